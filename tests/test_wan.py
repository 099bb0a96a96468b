"""Which WAN a file is, by its keys, and the bytes it takes on a card, on the official files' own keys and sizes."""

from pathlib import Path

import planlab
import pytest
from host.checkpoints import write_official_models
from planlab import UNIT, checkpoint
from vram_headroom.vram.estimate import footprint
from vram_headroom.vram.estimate.architecture import UNKNOWN, identify
from vram_headroom.vram.estimate.checkpoint import Checkpoint, read_checkpoint
from vram_headroom.vram.estimate.tokens import latent_frames

GIB = 1 << 30


@pytest.fixture(scope="module")
def official(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_official_models(tmp_path_factory.mktemp("models"))


def read(official: dict[str, Path], name: str) -> Checkpoint:
    return read_checkpoint(official[name])


@pytest.mark.parametrize(
    ("name", "kind", "called"),
    [
        ("wan2.2_t2v_high_noise_14B_fp8_scaled", "dit", "WAN T2V 14B"),
        ("wan2.2_i2v_low_noise_14B_fp16", "dit", "WAN 2.2 I2V 14B"),
        ("wan2.1_i2v_480p_14B_fp16", "dit", "WAN 2.1 I2V 14B"),
        ("wan2.1_t2v_1.3B_fp16", "dit", "WAN T2V 1.3B"),
        ("wan2.2_ti2v_5B_fp16", "dit", "WAN 2.2 TI2V 5B"),
        ("umt5_xxl_fp8_e4m3fn_scaled", "text_encoder", "UMT5-XXL"),
        ("wan_2.1_vae", "vae", "WAN 2.1 VAE"),
        ("wan2.2_vae", "vae", "WAN 2.2 VAE"),
        ("clip_vision_h", "clip_vision", "CLIP vision H"),
        ("wan2.2_t2v_lightx2v_4steps_lora_v1.1_high_noise", "lora", "LoRA"),
    ],
)
def test_official_files_are_named_by_their_keys(official: dict[str, Path], name: str, kind: str, called: str) -> None:
    found = identify(read(official, name))
    assert (found.kind, found.name) == (kind, called)


def test_a_diffusion_model_tells_its_size_and_its_vae(official: dict[str, Path]) -> None:
    big, five = identify(read(official, "wan2.1_t2v_14B_fp16")), identify(read(official, "wan2.2_ti2v_5B_fp16"))
    assert (big.dim, big.layers, big.in_channels, big.out_channels, big.spatial_stride) == (5120, 40, 16, 16, 8)
    assert (five.dim, five.layers, five.in_channels, five.out_channels, five.spatial_stride) == (3072, 30, 48, 48, 16)
    assert big.usage_factor == pytest.approx(2.304, abs=0.001)


def test_what_is_not_wan_is_called_unknown() -> None:
    assert identify(checkpoint("/m/x", ("model.layers.0.weight", "F16", (4, 4)))) is UNKNOWN
    assert identify(checkpoint("/m/empty")) is UNKNOWN


def test_sixteen_bit_weights_stay_and_fp8_scaled_stays_as_stored(official: dict[str, Path]) -> None:
    fp16 = footprint.diffusion_model_bytes(read(official, "wan2.2_i2v_low_noise_14B_fp16"))
    assert fp16 / GIB == pytest.approx(26.62, abs=0.01)
    scaled = footprint.diffusion_model_bytes(read(official, "wan2.2_t2v_high_noise_14B_fp8_scaled"))
    assert scaled / GIB == pytest.approx(13.31, abs=0.02)


def test_a_vae_is_cast_whatever_the_file_says() -> None:
    fp32 = checkpoint("/m/vae", ("decoder.conv.weight", "F32", (UNIT,)))
    assert footprint.cast_bytes(fp32) == 2 * UNIT
    assert footprint.cast_bytes(fp32, compute_bytes=4) == 4 * UNIT


def test_weight_dtype_fp8_halves_a_16_bit_file() -> None:
    header = planlab.wan_dit("/m/x", 100)
    halved = footprint.diffusion_model_bytes(header, weight_dtype="fp8_e4m3fn")
    assert 50 * UNIT < halved < 51 * UNIT
    assert footprint.diffusion_model_bytes(header) > 100 * UNIT


@pytest.mark.parametrize(
    ("fp8_compute", "total", "kept"),
    [(True, 80 * GIB, True), (False, 16 * UNIT, True), (False, 80 * GIB, False)],
)
def test_plain_fp8_is_kept_where_the_card_computes_it_or_16_bit_would_not_fit(
    fp8_compute: bool, total: int, kept: bool
) -> None:
    header = planlab.wan_dit("/m/x", 100, dtype="F8_E4M3")
    found = footprint.diffusion_model_bytes(header, fp8_compute=fp8_compute, card_total=total)
    assert (found < 51 * UNIT) is kept
    assert (found > 100 * UNIT) is not kept


def test_four_frames_share_a_latent_frame_after_the_first() -> None:
    assert [latent_frames(frames) for frames in (0, 1, 4, 5, 33, 81, 121)] == [0, 1, 1, 2, 9, 21, 31]
