"""Runs ComfyUI's own WAN classes on the card of this machine and writes what they really use, beside what the tracer says.

    PYTHON_OF_COMFYUI tests/measure.py --comfyui CHECKOUT --out docs/measured.json [--only dit,vae,text] [--dry-run]

One command, no weights: models are built with random ones. Needs a GPU that torch can use; without one it says so and exits
with 2. A row that fails (out of memory, a missing class) keeps its reason in the column `failure` and the others go on; run it
again and only missing and failed rows are measured. `--dry-run` does everything but the card: the figures are the tracer's.
Columns: those of the recorded traces, and `traced_bytes`, the tracer's peak for the kernels this machine was found to use.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
sys.path += [str(HERE), str(HERE.parent), str(HERE / "host" / "record")]

from host.record.rows import COLUMNS, Row, Table  # noqa: E402

MEASURED = (*COLUMNS, "weight_bytes", "traced_bytes", "failure")
FEW_BLOCKS = 4
SIZES = {8: ((480, 832), (720, 1280)), 16: ((480, 832), (704, 1280))}

Forward = Callable[[], object]
Build = Callable[[str], tuple[Any, Forward]]
"""From a device to a model on it and one forward of it."""


class Case(NamedTuple):
    """One row to measure."""

    component: str
    variant: str
    weights: str
    size: tuple[int, int | None, int | None, int | None]
    """Batch, frames, height, width."""
    latent: Row | None
    tokens: int | None
    build: Build


class Reading(NamedTuple):
    """Bytes of one forward above what was there before it."""

    peak: int
    reserved: int
    output: int
    kept: int
    weights: int


class Machine(NamedTuple):
    """What the figures depend on beside ComfyUI's version."""

    card: str
    cuda: str | None
    allocator: str
    fused_rope: bool | None
    fused_rms_norm: bool | None


def dit_cases(full: bool) -> Iterator[Case]:
    """The models of the issue with a few blocks each, whose peak is that of all of them, and complete ones where asked."""
    wan = importlib.import_module("wan_forwards")

    for name in ("t2v-14b", "ti2v-5b", "t2v-1.3b", "i2v-14b", "vace-14b"):
        variant = wan.VARIANTS[name]
        for weights in ("fp16", "fp8"):
            for height, width in SIZES[variant.stride]:
                for frames in (33, 81, 121):
                    for batch in (1, 2):
                        shape = wan.latent_shape(variant, batch, frames, height, width)

                        def build(device: str, v: Any = variant, w: str = weights, s: Any = shape) -> tuple[Any, Forward]:
                            model = wan.build(v, w, None if full else FEW_BLOCKS, device)
                            return model, wan.forward(model, v, s, device)

                        tokens = shape[1] * (shape[2] // 2) * (shape[3] // 2)
                        size = (batch, frames, height, width)
                        yield Case("dit-full" if full else "dit", name, weights, size, shape, tokens, build)


def vae_cases() -> Iterator[Case]:
    parts = importlib.import_module("wan_parts")

    for kind, (_, _, stride) in parts.VAES.items():
        for dtype in ("fp16", "bf16"):
            for way in ("decode", "encode"):
                for frames, size in ((frames, size) for frames in (1, 33, 81, 121) for size in SIZES[stride]):
                    clip = (frames, *size)

                    def build(device: str, k: str = kind, w: str = way, d: str = dtype, c: Any = clip) -> tuple[Any, Forward]:
                        model = parts.vae(k, d, device)
                        return model, parts.vae_forward(model, k, w, d, *c, device)

                    yield Case(f"vae-{way}", kind, dtype, (1, *clip), None, None, build)


def text_cases() -> Iterator[Case]:
    parts = importlib.import_module("wan_parts")

    for weights in ("fp16", "fp8"):
        for tokens in (512, 1024):
            for batch in (1, 2):

                def build(device: str, w: str = weights, n: int = tokens, b: int = batch) -> tuple[Any, Forward]:
                    model = parts.text_encoder(w, device)
                    return model, parts.text_forward(model, b, n)

                yield Case("text", f"umt5-xxl {tokens} tokens", weights, (batch, None, None, None), None, tokens, build)


PARTS: dict[str, Callable[[], Iterator[Case]]] = {
    "dit": lambda: dit_cases(full=False),
    "vae": vae_cases,
    "text": text_cases,
    "full": lambda: dit_cases(full=True),
}


def trace_case(case: Case, machine: Machine) -> Reading:
    """What the tracer says, with the kernels of this machine; an unknown kernel counts as fused."""
    import torch

    from vram import allocator, trace

    chains: dict[str, Any] = {}
    if machine.fused_rope is False:
        rope = importlib.import_module("comfy_kitchen.backends.eager.rope")
        chains = {f"comfy_kitchen::{name}": getattr(rope, name) for name in ("apply_rope", "apply_rope1")}
    model, forward = case.build("meta")
    options = trace.TraceOptions(fused_rms_norm=machine.fused_rms_norm is not False, instead=chains)
    traced = trace.trace_forward(forward, options=options)
    weights = sum(p.numel() * p.element_size() for p in model.parameters()) if isinstance(model, torch.nn.Module) else 0
    reserved = allocator.replay(traced.requests()).reserved
    return Reading(traced.peak_bytes, reserved, traced.output_bytes, traced.kept_bytes, weights)


def read_card(case: Case) -> Reading:
    """What torch's own counters say. Weights and inputs are there before; workspaces that the first forward leaves behind are
    in the peak, as they are for whoever runs it."""
    import torch

    cuda = torch.cuda
    clear_card()
    empty = cuda.memory_allocated()
    with torch.inference_mode():
        model, forward = case.build("cuda")
        for parameter in model.parameters():
            if parameter.dtype.itemsize > 1:  # zeros and noise use the same memory, but not-a-numbers may be slow
                parameter.normal_(std=0.02)
        cuda.synchronize()
        cuda.empty_cache()
        weights, held = cuda.memory_allocated() - empty, cuda.memory_reserved()
        before = cuda.memory_allocated()
        cuda.reset_peak_memory_stats()
        output = forward()
        cuda.synchronize()
        peak, reserved = cuda.max_memory_allocated() - before, cuda.max_memory_reserved() - held
        after = cuda.memory_allocated()
        del output
        kept = cuda.memory_allocated() - before
    return Reading(peak, reserved, after - before - kept, kept, weights)


def clear_card() -> None:
    import torch

    gc.collect()
    torch.cuda.empty_cache()


def peak_over_output(call: Callable[[], Any]) -> float:
    """Peak of a call on the card in multiples of what it returns."""
    import torch

    clear_card()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with torch.inference_mode():
        made = call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / (made.numel() * made.element_size())


def look_at_card() -> Machine:
    """Whether RoPE and RMSNorm are one kernel here is measured: one that is makes its output and little else."""
    import torch

    x = torch.zeros((1, 4096, 40, 128), device="cuda", dtype=torch.float16)
    table = torch.zeros((1, 4096, 1, 64, 2, 2), device="cuda")
    weight = torch.ones(5120, device="cuda", dtype=torch.float16)
    flat = x.view(1, 4096, 5120)
    norm = peak_over_output(lambda: torch.nn.functional.rms_norm(flat, (5120,), weight, 1e-6)) < 1.5
    try:
        apply = importlib.import_module("comfy.ldm.flux.math").apply_rope1
        rope = peak_over_output(lambda: apply(x, table)) < 1.5
    except Exception as error:
        print(f"RoPE could not be looked at, it is taken for fused: {error}")
        rope = None
    return Machine(torch.cuda.get_device_name(), torch.version.cuda, torch.cuda.get_allocator_backend(), rope, norm)


def measure(case: Case, machine: Machine, dry: bool) -> Row:
    """The row of a case. Never raises but for an interrupt: what went wrong is in the row."""
    key = case_key(case, machine)
    traced: int | None = None
    try:
        said = trace_case(case, machine)
        traced = said.peak
        reading = said if dry else read_card(case)
    except Exception as error:
        what = (str(error).strip() or "no message").splitlines()[0]
        return (*key, case.latent, case.tokens, None, None, None, None, None, traced, f"{type(error).__name__}: {what}")
    figures = (reading.peak, reading.reserved, reading.output, reading.kept, reading.weights)
    return (*key, case.latent, case.tokens, *figures, traced, None)


def no_card() -> str | None:
    """Why nothing can be measured here, None if it can."""
    try:
        import torch
    except ImportError as error:
        return f"Nothing was measured: torch can't be imported ({error})."
    if not torch.cuda.is_available():
        return "Nothing was measured: torch finds no GPU on this machine (--dry-run shows what would be run)."
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfyui", type=Path, required=True, help="a ComfyUI checkout")
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write or to go on with")
    parser.add_argument("--only", default=",".join(PARTS), help=f"parts, of {','.join(PARTS)}")
    parser.add_argument("--limit", type=int, help="measure at most so many rows")
    parser.add_argument("--dry-run", action="store_true", help="everything but the card")
    options = parser.parse_args()
    why_not = None if options.dry_run else no_card()
    if why_not:
        print(why_not, file=sys.stderr)
        return 2
    sys.path.insert(0, str(options.comfyui.resolve()))
    # ComfyUI reads its arguments when it is imported.
    sys.argv = ["main.py", "--use-pytorch-cross-attention", *(["--cpu"] if options.dry_run else [])]
    importlib.import_module("comfy.options").enable_args_parsing()
    import torch

    machine = Machine("none (dry run)", None, "simulated", True, True) if options.dry_run else look_at_card()
    about = {
        "comfyui": importlib.import_module("comfyui_version").__version__,
        "torch": torch.__version__,
        **machine._asdict(),
    }
    table = Table(options.out, about, MEASURED)
    cases = [case for part in options.only.split(",") for case in PARTS[part]()]
    for number, case in enumerate(cases[: options.limit], 1):
        row = measure(case, machine, options.dry_run) if table.lacks(case_key(case, machine)) else None
        if row is not None:
            table.add(*row)
            table.write()
            print(f"{number}/{len(cases)} {case.component} {case.variant} {case.weights} {case.size}: {told(row)}", flush=True)
    table.write()
    return 0


def case_key(case: Case, machine: Machine) -> Row:
    return (case.component, case.variant, case.weights, machine.fused_rope, machine.fused_rms_norm, None, *case.size)


def told(row: Row) -> str:
    """A row for the person who watches."""
    named = dict(zip(MEASURED, row, strict=True))
    if named["failure"]:
        return f"failed: {named['failure']}"
    return f"{named['peak_bytes'] / 2**20:.0f} MiB, traced {named['traced_bytes'] / 2**20:.0f} MiB"


if __name__ == "__main__":
    sys.exit(main())
