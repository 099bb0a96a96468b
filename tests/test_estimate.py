"""What every estimate is made of, and the files of every WAN by the reference's table."""

from __future__ import annotations

import json
import struct
from dataclasses import FrozenInstanceError
from math import prod
from pathlib import Path

import headers
import pytest
from host.record.folding import unfolded
from vram_headroom.vram.estimate.checkpoint import read_checkpoint
from vram_headroom.vram.estimate.estimate import Estimate, Term
from vram_headroom.vram.estimate.footprint import LoadRules, diffusion_model
from vram_headroom.vram.estimate.gguf import GGML_TYPES
from vram_headroom.vram.estimate.safetensors import DTYPE_BITS
from vram_headroom.vram.estimate.tiling import Tile, fallback_tile
from vram_headroom.vram.estimate.tokens import Latent

GIB = 1 << 30
RECORDED = headers.recorded("variants")


def test_an_estimate_can_not_be_changed() -> None:
    told = Estimate.of((Term("a", 3),))
    with pytest.raises(FrozenInstanceError):
        told.expected = 4  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("bounds", "terms", "named"),
    [
        ((5, 5, 5), (Term("a", 4),), "terms"),
        ((5, 6, 7), (), "expected"),
        ((5, 3, 4), (), "expected"),
        ((0, -1, 1), (), "lower"),
    ],
)
def test_terms_sum_to_what_is_expected_and_bounds_hold_it(
    bounds: tuple[int, int, int], terms: tuple[Term, ...], named: str
) -> None:
    with pytest.raises(ValueError, match=named):
        Estimate(*bounds, terms)


def test_what_is_required_and_what_is_observed_are_never_added() -> None:
    required, observed = Estimate.of((Term("a", 3),)), Estimate.of((Term("a", 3),), purpose="observed")
    reserved = Estimate.of((Term("a", 3),), predicts="peak_reserved")
    for other in (observed, reserved):
        with pytest.raises(ValueError, match="other"):
            required.and_also(other)


# GiB in fp16, with matrices in fp8, and with matrices in Q8_0: the reference's table of variants.
FILES = {
    "2.1 T2V 1.3B": (2.64, 1.32, 1.41),
    "2.1 T2V 14B": (26.61, 13.31, 14.14),
    "2.1 I2V 14B": (30.54, 15.27, 16.23),
    "2.1 FLF2V 14B": (30.54, 15.28, 16.23),
    "2.2 I2V A14B": (26.62, 13.31, 14.14),
    "2.2 TI2V 5B": (9.31, 4.66, 4.95),
    "VACE 1.3B": (4.01, 2.01, 2.13),
    "VACE 14B": (32.29, 16.15, 17.16),
    "Fun-Control 14B": (30.54, 15.28, 16.23),
    "Fun-Control 1.3B": (2.91, 1.46, 1.55),
    "Fun-InP 1.3B": (2.91, 1.46, 1.55),
    "2.2 Fun-Control A14B": (26.62, 13.31, 14.15),
    "Fun-Camera 14B": (31.48, 16.21, 17.17),
    "Fun-Camera 1.3B": (3.01, 1.56, 1.65),
    "2.2 Fun-Camera A14B": (27.55, 14.25, 15.08),
    "2.2 S2V 14B": (30.35, 15.27, 16.21),
    "2.2 Animate 14B": (32.18, 16.13, 17.13),
    "HuMo 17B": (31.77, 15.89, 16.88),
    "UMT5-XXL": (10.58, 6.27, None),
    "CLIP vision H": (1.18, None, None),
    "VAE 2.1": (0.24, None, None),
    "VAE 2.2": (1.31, None, None),
}
"""UMT5's table of words stays in fp16."""


def write(path: Path, tensors: dict[str, tuple[str, tuple[int, ...]]]) -> None:
    """A sparse safetensors file of these types and shapes."""
    entries, end = {}, 0
    for name, (dtype, shape) in tensors.items():
        begin, end = end, end + prod(shape) * DTYPE_BITS[dtype] // 8
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    head = json.dumps(entries).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(head)) + head)
        file.truncate(8 + len(head) + end)


@pytest.mark.parametrize("name", FILES)
def test_files_of_every_variant_have_the_bytes_of_the_table(name: str, tmp_path: Path) -> None:
    shapes = {key: shape for key, (_, shape) in unfolded(RECORDED[name]).items()}
    half, narrow, packed = FILES[name]
    path = tmp_path / "model.safetensors"
    matrices = {key for key, shape in shapes.items() if len(shape) == 2 and key != "shared.weight"}
    for matrix, expected in (("F16", half), ("F8_E4M3", narrow)):
        if expected is None:
            continue
        write(path, {key: (matrix if key in matrices else "F16", shape) for key, shape in shapes.items()})
        read = read_checkpoint(path)
        assert read.tensor_bytes / GIB == pytest.approx(expected, abs=0.006)
        assert 0 < read.file_bytes - read.tensor_bytes < 1_000_000
    if packed is not None:
        block = next(kind for kind in GGML_TYPES.values() if kind.name == "Q8_0")
        bytes_of = {key: prod(shape) // block.elements * block.nbytes for key, shape in shapes.items() if key in matrices}
        total = sum(bytes_of.get(key, 2 * prod(shape)) for key, shape in shapes.items())
        assert total / GIB == pytest.approx(packed, abs=0.006)


@pytest.mark.parametrize(
    ("scales", "weight", "bits", "native"),
    [
        ({"weight_scale": ("F8_E8M0", 32)}, "F8_E4M3", 8, (10, 0)),
        ({"weight_scale": ("F8_E4M3", 16), "weight_scale_2": ("F32", 0)}, "U8", 4, (10, 0)),
        ({"weight_scale": ("F32", 0)}, "F8_E4M3", 8, (8, 9)),
        ({"weight_scale": ("F32", 0)}, "I8", 8, (7, 5)),
    ],
    ids=["mxfp8", "nvfp4", "fp8", "int8"],
)
def test_a_format_is_multiplied_as_it_is_from_its_generation_of_cards_on(
    scales: dict[str, tuple[str, int]], weight: str, bits: int, native: tuple[int, int]
) -> None:
    tensors = unfolded(RECORDED["2.2 I2V A14B"])
    layer, rows, columns = "blocks.0.ffn.0", 13824, 5120
    tensors[f"{layer}.weight"] = (weight, (rows, columns * bits // 8))
    for name, (dtype, group) in scales.items():
        tensors[f"{layer}.{name}"] = (dtype, (rows, columns // group) if group else ())
    tensors[f"{layer}.comfy_quant"] = ("U8", (27,))
    read = headers.checkpoint(tensors)
    older = {(10, 0): (8, 9), (8, 9): (8, 6)}.get(native)
    assert diffusion_model(read, rules=LoadRules.of_card(native, 24 * GIB, GIB)).cast == "native"
    if older is not None:
        assert diffusion_model(read, rules=LoadRules.of_card(older, 24 * GIB, GIB)).cast == "dequantise"


def test_a_fallback_never_cuts_a_clip_below_two_latent_frames() -> None:
    assert fallback_tile("2.1", Latent(1, 21, 90, 160), card_total=1, comfyui=(0, 33, 0)) == Tile(2, 32, 32)
