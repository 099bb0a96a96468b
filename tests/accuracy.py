"""Writes docs/accuracy.md: how far the estimates are from traces of ComfyUI's own classes and from what was measured.

usage, in the repository's root: .venv/bin/python tests/accuracy.py [--check]

`--check` writes nothing and fails where the page is not what the code says today.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from loadpack import load_pack

load_pack()

import estimatelab  # noqa: E402 - the pack has to be loaded first
from estimatelab import SHAPES, Row, of  # noqa: E402
from vram_headroom.vram.estimate.dit import dit_forward  # noqa: E402
from vram_headroom.vram.estimate.dit_shape import host_memory_required, host_usage_factor  # noqa: E402
from vram_headroom.vram.estimate.estimate import Estimate  # noqa: E402
from vram_headroom.vram.estimate.overheads import Family, dit_family, reserved  # noqa: E402
from vram_headroom.vram.estimate.tokens import Latent, Video  # noqa: E402
from vram_headroom.vram.estimate.vae import (  # noqa: E402
    STRIDES,
    VaeKind,
    host_decode_required,
    host_encode_required,
    vae_decode,
    vae_encode,
)

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "accuracy.md"
MEASURED = ROOT / "docs" / "measured.json"
MIB = 1 << 20
COMMAND = "python tests/measure.py --comfyui PATH --out docs/measured.json"

HEAD = """# How accurate the estimates are

What a phase needs beside weights is a sum of named terms: closed forms of ComfyUI's own code, chosen by its version and by what
runs as one kernel. They are held against **traces**: the real classes of ComfyUI 0.33.0 and 0.8.0 run on torch's `meta` device,
where every tensor is counted and none exists. Each table below is made by

    python tests/accuracy.py

from `tests/data/traces-0.33.json` and `traces-0.8.json` (made by `tests/host/record/record_traces.py --comfyui PATH`).
`tests/test_dit.py` and `tests/test_vae_formulas.py` fail where a row is off by more than 0.5 %.
"""

MISSING = f"""## Measured on a card

**These rows are still missing.** No machine with a GPU has run the grid yet: peak allocated and reserved of real forwards with
random weights (14B fp16 and fp8, 5B, 1.3B; 480p and 720p; 33, 81 and 121 frames; both VAEs; UMT5). The script is ready:

    {COMMAND}
    python tests/accuracy.py

What traces cannot see and a card will show: memory inside kernels, cuDNN's workspace (its band is in every VAE estimate), and
what cudaMallocAsync, ComfyUI's usual allocator, keeps. For that allocator the reserved memory is `unknown` rather than guessed.
"""


def video(row: Row) -> Video:
    return Video(row.width, row.height, row.frames, row.batch)


def of_dit(row: Row) -> Estimate:
    return dit_forward(SHAPES[row.variant], video(row), row.backend, casts_weights=row.weights == "fp8")


def of_vae(row: Row) -> Estimate:
    """Without what is given to it, which a trace does not count: it was there before."""
    kind: VaeKind = "2.2" if row.variant == "2.2" else "2.1"
    form = vae_decode if row.component == "vae-decode" else vae_encode
    told = form(kind, video(row), row.backend)
    terms = tuple(term for term in told.terms if "as given" not in term.name)
    given = told.expected - sum(term.bytes for term in terms)
    return Estimate(
        told.expected - given, told.lower - round(0.99 * given), told.upper - round(1.01 * given), terms, told.assumptions
    )


def inside(row: Row, told: Estimate) -> bool:
    return told.lower <= row.peak_bytes <= told.upper


def error(row: Row, told: Estimate) -> float:
    return told.expected / row.peak_bytes - 1


def summary() -> Iterator[str]:
    yield "| forward | ComfyUI | rows | median error | largest | inside the band |"
    yield "|---|---|---:|---:|---:|---:|"
    for version in estimatelab.VERSIONS:
        for component, what in (("dit", "diffusion model"), ("vae-decode", "VAE decode"), ("vae-encode", "VAE encode")):
            form = of_dit if component == "dit" else of_vae
            rows = [row for row in of(component) if row.version == version and row.weights != "fp32"]
            told = [(row, form(row)) for row in rows]
            share = sum(inside(row, found) for row, found in told) / len(rows)
            if component == "dit":
                errors = sorted(abs(error(row, found)) for row, found in told)
            else:
                # the expected value lies between none and all of cuDNN's workspace: a bound is held against its own trace
                errors = sorted(abs(bound(row, found) / row.peak_bytes - 1) for row, found in told)
            middle, largest = statistics.median(errors), errors[-1]
            yield f"| {what} | {version} | {len(rows)} | {middle:.3%} | {largest:.3%} | {share:.1%} |"


def bound(row: Row, told: Estimate) -> float:
    """The end of a VAE's band that a row is about, without the band's own 1 %."""
    return told.lower / 0.99 if row.workspace == "none" else told.upper / 1.01


def forwards() -> Iterator[str]:
    yield "| model, 81 frames | ComfyUI | traced | expected | band | ComfyUI makes room for |"
    yield "|---|---|---:|---:|---:|---:|"
    for row in of("dit"):
        plain = row.fused_rope and row.fused_rms_norm and row.batch == 1 and row.frames == 81 and row.weights == "fp16"
        if not plain or row.variant not in ("t2v-1.3b", "ti2v-5b", "t2v-14b", "i2v-14b", "vace-14b", "animate-14b"):
            continue
        told, shape = of_dit(row), SHAPES[row.variant]
        host = host_memory_required(shape.latent(video(row)), usage_factor=host_usage_factor(shape), element_bytes=2)
        yield (
            f"| {row.variant} {row.width}×{row.height} | {row.version} | {mib(row.peak_bytes)} | {mib(told.expected)} | "
            f"{mib(told.lower)} to {mib(told.upper)} | {mib(host)} ({host / row.peak_bytes:.2f}×) |"
        )


def decodes() -> Iterator[str]:
    yield "| VAE, 81 frames | ComfyUI | traced without and with a workspace | expected | band | ComfyUI makes room for |"
    yield "|---|---|---:|---:|---:|---:|"
    for component, what in (("vae-decode", "decode"), ("vae-encode", "encode")):
        for row in of(component):
            if row.workspace != "none" or row.frames != 81 or row.weights == "fp32" or row.height not in (704, 720):
                continue
            kind: VaeKind = "2.2" if row.variant == "2.2" else "2.1"
            full = next(other for other in of(component) if is_twin(row, other))
            told = of_vae(row)
            stride = STRIDES[kind]
            latent = Latent(1, (row.frames - 1) // 4 + 1, row.height // stride, row.width // stride)
            host = host_decode_required(kind, latent) if what == "decode" else host_encode_required(kind, video(row))
            yield (
                f"| {row.variant} {what} {row.width}×{row.height} | {row.version} | {mib(row.peak_bytes)} / "
                f"{mib(full.peak_bytes)} | {mib(told.expected)} | {mib(told.lower)} to {mib(told.upper)} | {mib(host)} |"
            )


def is_twin(row: Row, other: Row) -> bool:
    """The same forward with a workspace."""
    same = (row.version, row.variant, row.weights, row.batch, row.frames, row.height, row.width)
    theirs = (other.version, other.variant, other.weights, other.batch, other.frames, other.height, other.width)
    return other.workspace == "copies" and same == theirs


def reserves() -> Iterator[str]:
    yield "| forward | ComfyUI | rows | median error of peak reserved | inside the band |"
    yield "|---|---|---:|---:|---:|"
    for version in estimatelab.VERSIONS:
        for component, what in (("dit", "diffusion model"), ("vae-decode", "VAE decode"), ("vae-encode", "VAE encode")):
            found = [(row, told) for row in of(component) if row.version == version and (told := taken(row)) is not None]
            errors = [abs(told.expected / row.reserved_bytes - 1) for row, told in found]
            share = sum(told.lower <= row.reserved_bytes <= told.upper for row, told in found) / len(found)
            yield f"| {what} | {version} | {len(found)} | {statistics.median(errors):.1%} | {share:.1%} |"


def taken(row: Row) -> Estimate | None:
    if row.component == "dit":
        return reserved(of_dit(row), dit_family(SHAPES[row.variant]), row.backend)
    if row.weights == "fp32":
        return None
    names: dict[tuple[str, bool], Family] = {
        ("vae-decode", False): "vae_decode_2.1",
        ("vae-decode", True): "vae_decode_2.2",
        ("vae-encode", False): "vae_encode_2.1",
        ("vae-encode", True): "vae_encode_2.2",
    }
    return reserved(of_vae(row), names[row.component, row.variant == "2.2"], row.backend, one_frame=row.frames == 1)


def mib(nbytes: int) -> str:
    return f"{round(nbytes / MIB):,} MiB"


def measured() -> Iterator[str]:
    """What a card showed, where somebody has measured."""
    if not MEASURED.exists():
        yield MISSING.rstrip()
        return
    found: dict[str, Any] = json.loads(MEASURED.read_text(encoding="utf-8"))
    rows = [dict(zip(found["columns"], row, strict=True)) for row in found["rows"]]
    yield "## Measured on a card"
    yield ""
    yield f"{found.get('card', 'a card')}, torch {found.get('torch')}, ComfyUI {found.get('comfyui')}: {len(rows)} rows."
    yield ""
    yield "| forward | size | measured | reserved |"
    yield "|---|---|---:|---:|"
    for row in rows:
        if row.get("peak_bytes"):
            size = f"{row['width']}×{row['height']}, {row['frames']} frames, batch {row['batch']}"
            yield (
                f"| {row['component']} {row['variant']} {row['weights']} | {size} | {mib(row['peak_bytes'])} | "
                f"{mib(row['reserved_bytes'] or 0)} |"
            )


def page() -> str:
    sections: Iterable[tuple[str, Callable[[], Iterator[str]], str]] = (
        (
            "## Against every trace",
            summary,
            "Median and largest error of the expected value; of a VAE, of the end of its band that a trace without or with "
            "cuDNN's workspace is about.",
        ),
        ("## Diffusion models", forwards, "One forward, 16 bit, RoPE and RMSNorm as one kernel each, weights excluded."),
        ("## VAEs", decodes, "16 bit. The band reaches from no workspace to the input and output of the largest convolution."),
        (
            "## Reserved memory, native allocator",
            reserves,
            "What torch's caching allocator takes from the card for the traced allocations, simulated (`vram/allocator.py`).",
        ),
    )
    parts = [HEAD]
    for title, rows, about in sections:
        parts.append("\n".join((title, "", about, "", *rows(), "")))
    parts.append("\n".join(measured()) + "\n")
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    made = page()
    if not parser.parse_args().check:
        PAGE.write_text(made, encoding="utf-8")
    elif PAGE.read_text(encoding="utf-8") != made:
        sys.exit("docs/accuracy.md is not what the code says: run python tests/accuracy.py")


if __name__ == "__main__":
    main()
