"""The closed forms of a diffusion model's forward and of a sampling step, against traces of the real classes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from estimatelab import SHAPES, VERSIONS, Row, of
from vram_headroom.vram.estimate.backend import Backend, Correction
from vram_headroom.vram.estimate.caches import causal_caches, kv_cache
from vram_headroom.vram.estimate.dit import causal_block, dit_forward
from vram_headroom.vram.estimate.dit_shape import DitShape, host_memory_required, host_usage_factor
from vram_headroom.vram.estimate.estimate import Estimate
from vram_headroom.vram.estimate.overheads import dit_family, reserved
from vram_headroom.vram.estimate.sampling import batches_cond_and_uncond, host_step_required, sampling_step
from vram_headroom.vram.estimate.tokens import Video

MIB = 1 << 20
WITHIN = 0.005
EXCEPTIONS: dict[str, str] = {}
"""Rows that a form misses by more than WITHIN, by name, each with the reason. One that is not needed any more fails."""


def video(row: Row) -> Video:
    return Video(row.width, row.height, row.frames, row.batch)


def forward(row: Row) -> Estimate:
    return dit_forward(SHAPES[row.variant], video(row), row.backend, casts_weights=row.weights == "fp8")


def misses(rows: list[Row], expected: Callable[[Row], int]) -> dict[str, float]:
    """Rows and by how much, for those beyond WITHIN."""
    off = {row.name: expected(row) / row.peak_bytes - 1 for row in rows}
    return {name: error for name, error in off.items() if abs(error) > WITHIN}


def test_every_forward_is_told_within_half_a_percent_of_its_trace() -> None:
    rows = of("dit", "dit-full")
    assert len({row.variant for row in rows}) >= 8
    assert len(rows) > 5000
    assert set(misses(rows, lambda row: forward(row).expected)) == set(EXCEPTIONS)


def test_most_forwards_are_told_to_the_byte_or_nearly() -> None:
    errors = sorted(abs(forward(row).expected / row.peak_bytes - 1) for row in of("dit"))
    assert errors[-1] < 0.0002
    assert errors[len(errors) // 2] < 0.00001


def test_the_traced_peak_is_inside_the_band() -> None:
    for row in of("dit"):
        told = forward(row)
        assert told.lower <= row.peak_bytes <= told.upper, row.name


def test_blocks_see_the_tokens_that_are_counted() -> None:
    for row in of("dit"):
        shape = SHAPES[row.variant]
        assert shape.latent(video(row)) == row.latent, row.name
        assert shape.tokens(shape.latent(video(row))) == row.tokens, row.name


def test_a_causal_block_and_the_cache_its_first_one_makes() -> None:
    shape = SHAPES["causal-1.3b"]
    rows = of("causal")
    assert len(rows) == 160

    def expected(row: Row) -> int:
        frames, first = int(row.variant.split()[1]), "first" in row.variant
        made = causal_block(shape, video(row), row.backend, block_frames=frames, first=first)
        return made.expected + row.kept_bytes

    assert misses(rows, expected) == {}
    text = {row.kept_bytes for row in rows if "first" in row.variant}
    assert text == {2 * 30 * 512 * 1536 * 2}


def test_the_causal_caches_are_made_for_the_whole_clip() -> None:
    shape = SHAPES["causal-1.3b"]
    for row in of("causal-caches"):
        latent = shape.latent(video(row))
        assert kv_cache(latent, layers=30, dim=1536) == row.peak_bytes
        assert causal_caches(shape, video(row)).expected == row.peak_bytes + 90 * MIB


def test_a_whole_step_is_the_forward_and_the_latents_around_it() -> None:
    rows = of("step")

    def expected(row: Row) -> int:
        name, how = row.variant.split(", ")
        shape, conditions = SHAPES[name], int(how[0])
        told = sampling_step(
            shape,
            video(row),
            row.backend,
            conditions=conditions,
            batched="batched" in how,
            casts_weights=row.weights == "fp8",
        )
        # the trace is of calc_cond_batch alone: the sampler's three latents and the conditions are there before it
        cells = shape.latent(video(row)).cells
        concatenated = 4 * (shape.in_channels - shape.out_channels) * cells
        outside = 3 * 4 * shape.out_channels * cells + conditions * (concatenated + 4 * 512 * 4096)
        return told.expected - outside

    assert len(rows) == 768
    assert misses(rows, expected) == {}


@pytest.mark.parametrize(
    ("name", "frames", "height", "eight", "newest"),
    [
        ("t2v-1.3b", 81, 480, (1445, 1445), (1541, 1541)),
        ("t2v-1.3b", 81, 720, (3333, 3333), (3555, 3555)),
        ("t2v-14b", 81, 480, (2728, 3240), (3048, 3240)),
        ("t2v-14b", 121, 480, (4025, 4781), (4498, 4781)),
        ("t2v-14b", 81, 720, (6290, 7471), (7028, 7471)),
        ("t2v-14b", 121, 720, (9282, 11026), (10372, 11026)),
        ("vace-14b", 81, 480, (3688, 3880), (4008, 4008)),
        ("vace-1.3b", 81, 480, (1733, 1733), (1829, 1829)),
    ],
)
def test_known_peaks_in_mib_fused_and_with_eager_rope(
    name: str, frames: int, height: int, eight: tuple[int, int], newest: tuple[int, int]
) -> None:
    clip = Video(832 if height == 480 else 1280, height, frames)
    for version, figures in (((0, 8, 0), eight), ((0, 33, 0), newest)):
        for fused, figure in zip((True, False), figures, strict=True):
            told = dit_forward(SHAPES[name], clip, Backend(version, fused, True))
            assert told.expected / MIB == pytest.approx(figure, rel=0.001)


@pytest.mark.parametrize(
    ("version", "units"), [((0, 3, 59), 17), ((0, 3, 60), 12), ((0, 3, 64), 9), ((0, 3, 68), 10), ((0, 33, 0), 10)]
)
def test_eager_rope_of_older_versions_in_tensors_of_the_hidden_size(version: tuple[int, int, int], units: int) -> None:
    clip = Video(832, 480, 81)
    hidden = 32_760 * 5120 * 2
    told = dit_forward(SHAPES["t2v-14b"], clip, Backend(version, False, True))
    held = {term.name: term.bytes for term in told.terms}
    assert (held["self-attention"] + held["hidden states"]) / hidden == pytest.approx(units, abs=0.01)


def test_what_is_not_known_of_the_kernels_is_in_the_band_and_said() -> None:
    clip, shape = Video(1280, 720, 81), SHAPES["t2v-14b"]
    known = [dit_forward(shape, clip, Backend((0, 33, 0), one, two)) for one in (True, False) for two in (True, False)]
    told = dit_forward(shape, clip, Backend((0, 33, 0)))
    assert told.lower == min(one.lower for one in known)
    assert told.upper == max(one.upper for one in known)
    assert told.expected == known[0].expected
    assert len([said for said in told.assumptions if "one kernel" in said]) == 2
    older = dit_forward(shape, clip, Backend((0, 8, 0), None, True))
    assert older.expected == dit_forward(shape, clip, Backend((0, 8, 0), False, True)).expected


def test_a_version_nobody_traced_is_taken_for_the_newest_and_said() -> None:
    clip, shape = Video(832, 480, 33), SHAPES["t2v-14b"]
    newest = dit_forward(shape, clip, Backend((0, 33, 0), True, True))
    newer = dit_forward(shape, clip, Backend((0, 40, 0), True, True))
    assert newer.expected == newest.expected
    assert "0.40.0 is newer" in newer.assumptions[0]
    assert newest.assumptions == ()


@pytest.mark.parametrize("attention", ["sage", "split", "unknown"])
def test_attention_other_than_flash_widens_the_band_upwards(attention: str) -> None:
    clip, shape = Video(832, 480, 81), SHAPES["t2v-14b"]
    flash = dit_forward(shape, clip, Backend((0, 33, 0), True, True))
    other = dit_forward(shape, clip, replace(Backend((0, 33, 0), True, True), attention=attention))
    assert other.upper > flash.upper
    assert other.expected >= flash.expected
    assert "ttention" in other.assumptions[0]


def test_a_compiled_model_widens_the_band_both_ways() -> None:
    clip, shape = Video(832, 480, 81), SHAPES["t2v-14b"]
    plain = dit_forward(shape, clip, Backend((0, 33, 0), True, True))
    compiled = dit_forward(shape, clip, Backend((0, 33, 0), True, True, compiled=True))
    assert compiled.lower < plain.lower
    assert compiled.upper > 1.2 * plain.upper
    assert "compiled" in compiled.assumptions[0]


def test_a_variant_that_was_not_traced_is_said_and_wider() -> None:
    shape = replace(SHAPES["i2v-14b"], variant="wandancer")
    told = dit_forward(shape, Video(832, 480, 81), Backend((0, 33, 0), True, True))
    assert told.upper > 1.4 * told.expected
    assert "not traced" in told.assumptions[0]


def test_terms_are_named_for_people_and_the_cast_is_one_of_them() -> None:
    told = dit_forward(SHAPES["t2v-14b"], Video(832, 480, 81), Backend((0, 33, 0), True, True), casts_weights=True)
    held = {term.name: term.bytes for term in told.terms}
    assert set(held) == {
        "feed-forward",
        "hidden states",
        "weight cast buffer",
        "rotary table",
        "input latent",
        "text tokens",
        "time embedding",
    }
    assert held["rotary table"] == 1024 * 32_760
    assert held["weight cast buffer"] == 2 * 5120 * (13_824 + 1)
    assert held["text tokens"] == 2 * 512 * 5120


def test_what_the_self_check_found_rescales_the_estimate_and_its_band() -> None:
    clip, shape = Video(832, 480, 81), SHAPES["t2v-14b"]
    plain = dit_forward(shape, clip, Backend((0, 33, 0), True, True))
    found = Backend((0, 33, 0), True, True, corrections=(Correction("dit", 1.25, "ComfyUI 0.34.0"),))
    told = dit_forward(shape, clip, found)
    assert told.expected == pytest.approx(plain.expected * 1.25, rel=1e-6)
    assert told.upper == pytest.approx(plain.upper * 1.25, rel=1e-6)
    assert "Rescaled by 1.250 to what the installed ComfyUI 0.34.0 was traced to need." in told.assumptions
    other = Backend((0, 33, 0), True, True, corrections=(Correction("vae_decode", 1.25, "ComfyUI 0.34.0"),))
    assert dit_forward(shape, clip, other) == plain


@pytest.mark.parametrize(
    ("name", "size", "frames", "mib"),
    [("t2v-1.3b", (832, 480), 81, 1812), ("ti2v-5b", (1280, 704), 81, 2044), ("t2v-14b", (1280, 720), 121, 20572)],
)
def test_comfyui_s_own_figure(name: str, size: tuple[int, int], frames: int, mib: int) -> None:
    shape = SHAPES[name]
    latent = shape.latent(Video(*size, frames))
    host = host_memory_required(latent, usage_factor=host_usage_factor(shape), element_bytes=2)
    assert host / MIB == pytest.approx(mib, abs=1)


def test_s2v_counts_its_reference_and_one_and_a_half_frames_of_motion() -> None:
    clip = Video(832, 480, 81)
    plain = host_step_required(replace(SHAPES["s2v-14b"], reference_frames=0), clip)
    assert host_step_required(SHAPES["s2v-14b"], clip) / plain == pytest.approx(22 / 21)
    assert host_step_required(SHAPES["s2v-14b-motion"], clip) / plain == pytest.approx(23.5 / 21)
    assert host_step_required(SHAPES["s2v-14b"], clip, conditions=2) == 2 * host_step_required(SHAPES["s2v-14b"], clip)


def test_conditions_are_batched_above_three_times_comfyui_s_figure_for_one() -> None:
    both = host_step_required(SHAPES["t2v-14b"], Video(832, 480, 81), conditions=2)
    assert not batches_cond_and_uncond(both, int(17.6 * 1024 * MIB))
    assert batches_cond_and_uncond(both, int(17.8 * 1024 * MIB))


def test_the_step_says_how_the_conditions_run() -> None:
    shape, clip, backend = SHAPES["t2v-14b"], Video(832, 480, 81), Backend((0, 33, 0), True, True)
    apart = sampling_step(shape, clip, backend)
    both = sampling_step(shape, clip, backend, batched=True)
    one = sampling_step(shape, clip, backend, conditions=1)
    assert one.expected < apart.expected < both.expected
    assert [told.assumptions[-1].split(":")[0] for told in (one, apart, both)] == [
        "One condition",
        "Prompt and negative prompt run one after the other",
        "Prompt and negative prompt run as one batch",
    ]


def test_reserved_memory_of_the_native_allocator_is_inside_its_band() -> None:
    errors = []
    for row in of("dit"):
        told = reserved(forward(row), dit_family(SHAPES[row.variant]), row.backend)
        assert told is not None
        assert told.predicts == "peak_reserved"
        assert told.lower <= row.reserved_bytes <= told.upper, row.name
        errors.append(abs(told.expected / row.reserved_bytes - 1))
    assert sorted(errors)[len(errors) // 2] < 0.05


def test_reserved_memory_is_not_told_for_an_allocator_that_was_not_simulated() -> None:
    told = forward(of("dit")[0])
    for allocator in ("cudaMallocAsync", "unknown"):
        assert reserved(told, "dit_14b", Backend(VERSIONS["0.33"], True, True, allocator=allocator)) is None


def test_every_shape_has_a_family() -> None:
    assert {dit_family(shape) for shape in SHAPES.values()} == {
        "dit_1.3b",
        "dit_5b",
        "dit_14b",
        "dit_joined",
        "dit_motion",
        "dit_humo",
        "dit_animate",
        "dit_camera",
        "dit_vace_1.3b",
        "dit_vace_14b",
    }
    assert isinstance(SHAPES["t2v-14b"], DitShape)
