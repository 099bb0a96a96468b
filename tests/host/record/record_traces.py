"""Traces the forwards of a real ComfyUI's WAN classes on the `meta` device and writes what they allocate, one row each.

    PYTHON_OF_COMFYUI tests/host/record/record_traces.py --comfyui CHECKOUT --out tests/data/traces-0.33.json [--only dit,vae]

No card and no weights are needed. Rows that the file has already are kept: an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

from rows import Row, Table

BLOCKS = 4
HEADER = (
    "peak_bytes: tensors alive at once, without weights and inputs; reserved_bytes: peak of the simulated caching allocator; "
    f"models have {BLOCKS} blocks (10 for animate; the peak is that of all blocks: component dit-full is the check); "
    "compute in fp16; flash attention; fused_rms_norm false: the chain of torch 2.7 and newer"
)
SIZES = {8: ((480, 832), (720, 1280)), 16: ((480, 832), (704, 1280))}
FRAMES = (17, 33, 49, 81, 121)
KERNELS = ((True, True), (False, True), (True, False), (False, False))


class Recorder:
    """Traces forwards into a table."""

    def __init__(self, table: Table) -> None:
        from vram import allocator, trace

        rope = importlib.import_module("comfy_kitchen.backends.eager.rope")

        self.table = table
        self._trace = trace
        self._replay = allocator.replay
        # Without its CUDA or Triton kernels comfy-kitchen runs these operations as the chains they are.
        self._chains = {f"comfy_kitchen::{name}": getattr(rope, name) for name in ("apply_rope", "apply_rope1")}

    def row(
        self,
        key: Row,
        forward: Callable[[], Callable[[], object]],
        latent: Row | None = None,
        lengths: list[int] | None = None,
        fused: tuple[bool, bool] = (True, True),
        workspace: Literal["none", "copies"] = "none",
    ) -> None:
        """Traces what `forward` makes, unless the table has that row."""
        if not self.table.lacks(key):
            return
        options = self._trace.TraceOptions(
            fused_rms_norm=fused[1], convolution_workspace=workspace, instead={} if fused[0] else self._chains
        )
        traced = self._trace.trace_forward(forward(), options=options)
        reserved = self._replay(traced.requests()).reserved
        tokens = lengths[-1] if lengths else None
        self.table.add(*key, latent, tokens, traced.peak_bytes, reserved, traced.output_bytes, traced.kept_bytes)


def record_dit(record: Recorder) -> Iterator[str]:
    """Every variant x both sizes x frames x batch x weights x kernels."""
    import wan_forwards as wan

    for name, variant in wan.VARIANTS.items():
        if not wan.present(variant):
            continue
        for weights in ("fp16", "fp8"):
            model = wan.build(variant, weights, BLOCKS)
            lengths = wan.sequence_lengths(model)
            for height, width in SIZES[variant.stride]:
                for frames, batch in ((frames, batch) for frames in FRAMES for batch in (1, 2)):
                    shape = wan.latent_shape(variant, batch, frames, height, width)
                    for fused in KERNELS:
                        key = ("dit", name, weights, *fused, None, batch, frames, height, width)
                        record.row(key, lambda m=model, v=variant, s=shape: wan.forward(m, v, s), shape, lengths, fused)
            yield f"dit {name} {weights}"


def record_full(record: Recorder) -> Iterator[str]:
    """With all blocks: the same peaks."""
    import wan_forwards as wan

    for name, variant in wan.VARIANTS.items():
        if not wan.present(variant):
            continue
        for weights in ("fp16", "fp8"):
            height, width = SIZES[variant.stride][0]
            shape = wan.latent_shape(variant, 1, 81, height, width)
            key = ("dit-full", name, weights, True, True, None, 1, 81, height, width)
            model = wan.build(variant, weights, None)
            lengths = wan.sequence_lengths(model)
            record.row(key, lambda m=model, v=variant, s=shape: wan.forward(m, v, s), shape, lengths)
        yield f"dit-full {name}"


def record_causal(record: Recorder) -> Iterator[str]:
    """The causal model: a forward over one block of latent frames with all layers, and the caches it is given."""
    import torch
    import wan_forwards as wan

    variant = wan.VARIANTS["causal-1.3b"]
    if not wan.present(variant):
        return
    model = wan.build(variant, "fp16", None)
    lengths = wan.sequence_lengths(model)
    for height, width in SIZES[variant.stride]:
        for frames in FRAMES:
            shape = wan.latent_shape(variant, 1, frames, height, width)
            frame = (shape[2] // 2) * (shape[3] // 2)
            for block in (1, 3):
                for first in (True, False):
                    for fused in KERNELS:
                        place = f"causal-1.3b {block} latent frames, {'first' if first else 'last'} of the clip"
                        key = ("causal", place, "fp16", *fused, None, 1, frames, height, width)
                        record.row(
                            key,
                            lambda m=model, s=shape, b=block, f=first: wan.causal_forward(m, s, b, f),
                            shape,
                            lengths,
                            fused,
                        )
            key = ("causal-caches", "causal-1.3b", "fp16", None, None, None, 1, frames, height, width)
            record.row(key, lambda m=model, n=shape[1] * frame: lambda: m.init_kv_caches(1, n, "meta", torch.float16), shape)
    yield "causal"


def record_vae(record: Recorder) -> Iterator[str]:
    """Both VAEs, both ways; fp16 without and with a workspace of its convolutions, and fp32."""
    import wan_parts as parts

    for kind, (_, _, stride) in parts.VAES.items():
        cases: tuple[tuple[str, Literal["none", "copies"]], ...] = (("fp16", "none"), ("fp16", "copies"), ("fp32", "none"))
        for dtype, workspace in cases:
            model = parts.vae(kind, dtype)
            for way in ("decode", "encode"):
                full = [(frames, size) for size in SIZES[stride] for frames in (1, 5, 17, 33, 81, 121)]
                tiles = [(81, (side, side)) for side in (256, 512, 1024)]
                fp32 = [(frames, SIZES[stride][0]) for frames in (1, 5, 17, 33)]
                for frames, size in fp32 if dtype == "fp32" else full + tiles:
                    key = (f"vae-{way}", kind, dtype, None, None, workspace, 1, frames, *size)
                    record.row(
                        key,
                        lambda m=model, k=kind, w=way, d=dtype, f=frames, s=size: parts.vae_forward(m, k, w, d, f, *s),
                        workspace=workspace,
                    )
                yield f"vae-{way} {kind} {dtype} {workspace}"


def record_step(record: Recorder) -> Iterator[str]:
    """Whole sampling steps: one condition, two one after the other, two at once."""
    import wan_forwards as wan
    import wan_parts as parts

    for name in ("t2v-1.3b", "t2v-14b", "i2v-a14b", "ti2v-5b"):
        variant = wan.VARIANTS[name]
        for weights in ("fp16", "fp8"):
            model = parts.step_model(name, weights, BLOCKS)
            lengths = wan.sequence_lengths(model.diffusion_model)
            for height, width in SIZES[variant.stride]:
                for frames in (33, 81):
                    shape = wan.latent_shape(variant, 1, frames, height, width)
                    for ncond, batched in ((1, False), (2, False), (2, True)):
                        for fused in KERNELS:
                            how = "1 condition" if ncond == 1 else f"2 conditions {'batched' if batched else 'one by one'}"
                            key = ("step", f"{name}, {how}", weights, *fused, None, 1, frames, height, width)
                            record.row(
                                key,
                                lambda m=model, n=name, s=shape, c=ncond, b=batched: parts.step_forward(m, n, s, c, b),
                                shape,
                                lengths,
                                fused,
                            )
            yield f"step {name} {weights}"


def record_encoders(record: Recorder) -> Iterator[str]:
    """UMT5-XXL (column `tokens`: of the text), CLIP vision H, and a layer with a LoRA on the fly."""
    import wan_parts as parts

    for weights in ("fp16", "fp8", "fp8-all"):
        model = parts.text_encoder(weights)
        for tokens in (512, 1024):
            for batch in (1, 2):
                key = ("text", f"umt5-xxl {tokens} tokens", weights, None, None, None, batch, None, None, None)
                record.row(key, lambda m=model, b=batch, n=tokens: parts.text_forward(m, b, n), lengths=[tokens])
    for weights in ("fp16", "fp8"):
        key = ("lora", "linear 5120x13824, rank 64", weights, None, None, None, 1, None, None, None)
        record.row(key, lambda w=weights: parts.lora_layer(w))
    model = parts.image_encoder()
    for batch in (1, 2):
        key = ("image", "clip-vision-h", "fp16", None, None, None, batch, None, 224, 224)
        record.row(key, lambda m=model, b=batch: parts.image_forward(m, b), lengths=[257])
    yield "encoders"


PARTS: dict[str, Callable[[Recorder], Iterator[str]]] = {
    "dit": record_dit,
    "causal": record_causal,
    "full": record_full,
    "vae": record_vae,
    "step": record_step,
    "encoders": record_encoders,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfyui", type=Path, required=True, help="a ComfyUI checkout")
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write or to go on with")
    parser.add_argument("--only", default=",".join(PARTS), help=f"parts, of {','.join(PARTS)}")
    options = parser.parse_args()
    here = Path(__file__).resolve()
    sys.path[:0] = [str(options.comfyui.resolve())]
    sys.path += [str(here.parents[3]), str(here.parent)]
    # ComfyUI reads its arguments when it is imported. Attention as on a card: torch's, not the split one of the CPU.
    sys.argv = ["main.py", "--cpu", "--use-pytorch-cross-attention"]
    importlib.import_module("comfy.options").enable_args_parsing()
    import torch

    about = {
        "comfyui": importlib.import_module("comfyui_version").__version__,
        "torch": torch.__version__.split("+")[0],
        "about": HEADER,
    }
    table = Table(options.out, about)
    recorder = Recorder(table)
    started = time.monotonic()
    for part in options.only.split(","):
        for done in PARTS[part](recorder):
            gc.collect()
            table.write()
            print(f"{time.monotonic() - started:6.1f} s  {len(table):5d} rows  {done}", flush=True)


if __name__ == "__main__":
    main()
