"""What is promised of the stand-ins for the official WAN files: the published counts and sizes, in almost no disk space."""

from collections.abc import Iterable
from pathlib import Path

import pytest
import safetensors
from host.checkpoints import CATALOGUE, header_of, write_official_models
from vram_headroom.vram.estimate.checkpoint import Checkpoint, HeaderCache, TensorInfo, read_checkpoint

T2V_14B = 14_288_491_584
I2V_14B = 14_288_901_184
I2V_14B_CLIP = 16_394_878_784
UMT5 = 5_680_910_336
LORA = 40 * 64 * (8 * (5120 + 5120) + 2 * (5120 + 13824))

# Parameters were counted on the modules of ComfyUI's and the authors' own code (meta device); LORA is counted above.
PARAMETERS = {
    "wan2.1_t2v_1.3B_fp16": 1_418_996_800,
    "wan2.1_t2v_14B_fp16": T2V_14B,
    "wan2.1_t2v_14B_fp8_scaled": T2V_14B,
    "wan2.1_i2v_480p_14B_fp16": I2V_14B_CLIP,
    "wan2.1_i2v_480p_14B_fp8_scaled": I2V_14B_CLIP,
    "wan2.2_t2v_high_noise_14B_fp16": T2V_14B,
    "wan2.2_t2v_low_noise_14B_fp16": T2V_14B,
    "wan2.2_t2v_high_noise_14B_fp8_scaled": T2V_14B,
    "wan2.2_t2v_low_noise_14B_fp8_scaled": T2V_14B,
    "wan2.2_i2v_high_noise_14B_fp16": I2V_14B,
    "wan2.2_i2v_low_noise_14B_fp16": I2V_14B,
    "wan2.2_i2v_high_noise_14B_fp8_scaled": I2V_14B,
    "wan2.2_i2v_low_noise_14B_fp8_scaled": I2V_14B,
    "wan2.2_ti2v_5B_fp16": 4_999_787_712,
    "umt5_xxl_fp16": UMT5,
    "umt5_xxl_fp8_e4m3fn_scaled": UMT5,
    "wan_2.1_vae": 126_892_531,
    "wan2.2_vae": 704_688_668,
    "clip_vision_h": 632_076_800,
    "wan2.2_t2v_lightx2v_4steps_lora_v1.1_high_noise": LORA,
    "wan2.2_t2v_lightx2v_4steps_lora_v1.1_low_noise": LORA,
    "wan2.2_i2v_lightx2v_4steps_lora_v1_high_noise": LORA,
    "wan2.2_i2v_lightx2v_4steps_lora_v1_low_noise": LORA,
}

# Bytes of the files as published by Comfy-Org on Hugging Face (Wan_2.1_ComfyUI_repackaged, Wan_2.2_ComfyUI_Repackaged).
PUBLISHED_BYTES = {
    "wan2.1_t2v_1.3B_fp16": 2_838_303_560,
    "wan2.1_i2v_480p_14B_fp16": 32_791_377_504,
    "wan2.2_t2v_high_noise_14B_fp8_scaled": 14_293_923_632,
    "wan2.2_t2v_low_noise_14B_fp8_scaled": 14_293_923_632,
    "wan2.2_i2v_high_noise_14B_fp8_scaled": 14_294_742_832,
    "wan2.2_i2v_low_noise_14B_fp8_scaled": 14_294_742_832,
    "wan2.2_ti2v_5B_fp16": 9_999_658_848,
    "umt5_xxl_fp16": 11_366_399_385,
    "umt5_xxl_fp8_e4m3fn_scaled": 6_735_906_897,
    "wan_2.1_vae": 253_815_318,
    "wan2.2_vae": 1_409_400_960,
    "clip_vision_h": 1_264_219_396,
    "wan2.2_t2v_lightx2v_4steps_lora_v1.1_high_noise": 1_226_977_424,
    "wan2.2_t2v_lightx2v_4steps_lora_v1.1_low_noise": 1_226_977_424,
    "wan2.2_i2v_lightx2v_4steps_lora_v1_high_noise": 1_226_977_424,
    "wan2.2_i2v_lightx2v_4steps_lora_v1_low_noise": 1_226_977_424,
}

# Published to three digits only.
ROUNDED_GB = {
    "wan2.1_t2v_14B_fp16": 28.6,
    "wan2.1_t2v_14B_fp8_scaled": 14.3,
    "wan2.1_i2v_480p_14B_fp8_scaled": 16.4,
    "wan2.2_t2v_high_noise_14B_fp16": 28.6,
    "wan2.2_t2v_low_noise_14B_fp16": 28.6,
    "wan2.2_i2v_high_noise_14B_fp16": 28.6,
    "wan2.2_i2v_low_noise_14B_fp16": 28.6,
}

NOT_PARAMETERS = ("scale_weight", "scale_input", "alpha", "position_ids", "spiece_model", "scaled_fp8")


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_official_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def headers() -> HeaderCache:
    return HeaderCache()


def parameters(tensors: Iterable[TensorInfo]) -> int:
    return sum(tensor.elements for tensor in tensors if not tensor.name.endswith(NOT_PARAMETERS))


def test_every_file_has_a_known_count_and_size() -> None:
    assert set(CATALOGUE) == set(PARAMETERS)
    assert set(CATALOGUE) == set(PUBLISHED_BYTES) | set(ROUNDED_GB)


def test_files_lie_in_the_folders_their_loaders_look_in(paths: dict[str, Path]) -> None:
    folders = {name: path.parent.name for name, path in paths.items()}
    assert {path.name for path in paths.values()} == {f"{name}.safetensors" for name in CATALOGUE}
    assert folders["wan2.2_t2v_high_noise_14B_fp8_scaled"] == "diffusion_models"
    assert folders["umt5_xxl_fp8_e4m3fn_scaled"] == "text_encoders"
    assert folders["wan_2.1_vae"] == "vae"
    assert folders["clip_vision_h"] == "clip_vision"
    assert folders["wan2.2_t2v_lightx2v_4steps_lora_v1.1_low_noise"] == "loras"


@pytest.mark.parametrize("name", sorted(PARAMETERS))
def test_parameters_are_counted_exactly(paths: dict[str, Path], headers: HeaderCache, name: str) -> None:
    read = headers.get(paths[name])
    assert parameters(read.tensors.values()) == PARAMETERS[name]
    assert read.parameters >= PARAMETERS[name]


@pytest.mark.parametrize("name", sorted(PUBLISHED_BYTES))
def test_files_have_the_published_size_to_the_byte(paths: dict[str, Path], headers: HeaderCache, name: str) -> None:
    assert headers.get(paths[name]).file_bytes == PUBLISHED_BYTES[name]
    assert paths[name].stat().st_size == PUBLISHED_BYTES[name]


@pytest.mark.parametrize("name", sorted(ROUNDED_GB))
def test_files_have_the_published_size_to_three_digits(paths: dict[str, Path], name: str) -> None:
    assert round(paths[name].stat().st_size / 1e9, 1) == ROUNDED_GB[name]


@pytest.mark.parametrize("name", sorted(PARAMETERS))
def test_files_take_almost_no_disk_space(paths: dict[str, Path], name: str) -> None:
    blocks = getattr(paths[name].stat(), "st_blocks", None)
    if blocks is None:
        pytest.skip("this system does not say how much disk a file takes")
    assert blocks * 512 < 4_000_000


@pytest.mark.parametrize("name", sorted(PARAMETERS))
def test_the_library_opens_them_and_finds_the_same_tensors(paths: dict[str, Path], headers: HeaderCache, name: str) -> None:
    pytest.importorskip("numpy", reason="safetensors opens files without mapping them privately for numpy only")
    read = headers.get(paths[name])
    with safetensors.safe_open(paths[name], framework="numpy") as opened:  # "pt" maps the file as private memory
        found = {key: opened.get_slice(key) for key in opened.keys()}  # noqa: SIM118 (not a dict)
        assert {key: (part.get_dtype(), tuple(part.get_shape())) for key, part in found.items()} == {
            key: (tensor.dtype, tensor.shape) for key, tensor in read.tensors.items()
        }


@pytest.mark.parametrize("name", sorted(PARAMETERS))
def test_the_header_given_is_the_header_written(paths: dict[str, Path], headers: HeaderCache, name: str) -> None:
    read = headers.get(paths[name])
    header = header_of(name)
    assert {n: (t.dtype, list(t.shape), t.nbytes) for n, t in read.tensors.items()} == {
        n: (e["dtype"], e["shape"], e["data_offsets"][1] - e["data_offsets"][0]) for n, e in header.items()
    }


def weights(read: Checkpoint, dtype: str) -> set[str]:
    return {tensor.name for tensor in read.tensors.values() if tensor.dtype == dtype and tensor.nbytes}


def test_a_scaled_fp8_transformer_holds_every_linear_in_fp8(paths: dict[str, Path], headers: HeaderCache) -> None:
    read = headers.get(paths["wan2.2_t2v_high_noise_14B_fp8_scaled"])
    linear = weights(read, "F8_E4M3")
    assert len(linear) == 40 * 10 + 6
    assert all(len(read.tensors[name].shape) == 2 for name in linear)
    stems = {name.removesuffix("weight") for name in linear}
    assert weights(read, "F32") == {f"{stem}{scale}" for stem in stems for scale in ("scale_weight", "scale_input")}
    in_blocks = 40 * (8 * 5120 * 5120 + 2 * 5120 * 13824)
    outside = 5120 * (4096 + 5120 + 256 + 5120 + 6 * 5120 + 64)
    assert read.bytes_by_dtype == {
        "F8_E4M3": in_blocks + outside,
        "F16": 2 * (T2V_14B - in_blocks - outside),
        "F32": 4 * 2 * 406,
    }


def test_the_experts_of_wan_2_2_have_identical_headers() -> None:
    for kind in ("t2v", "i2v"):
        for precision in ("fp8_scaled", "fp16"):
            high, low = (header_of(f"wan2.2_{kind}_{noise}_noise_14B_{precision}") for noise in ("high", "low"))
            assert high == low


def test_image_to_video_of_2_1_sees_the_image_and_that_of_2_2_does_not() -> None:
    assert "img_emb.proj.0.bias" in header_of("wan2.1_i2v_480p_14B_fp16")
    second = header_of("wan2.2_i2v_high_noise_14B_fp16")
    assert "img_emb.proj.0.bias" not in second
    assert second["patch_embedding.weight"]["shape"] == [5120, 36, 1, 2, 2]


def test_the_embedding_of_the_text_encoder_stays_fp16(paths: dict[str, Path], headers: HeaderCache) -> None:
    read = headers.get(paths["umt5_xxl_fp8_e4m3fn_scaled"])
    assert read.tensors["shared.weight"] == TensorInfo("shared.weight", "F16", (256384, 4096), 2 * 1_050_148_864)
    assert len(weights(read, "F8_E4M3")) == 24 * 7


def test_only_the_files_asked_for_are_written(tmp_path: Path) -> None:
    written = write_official_models(tmp_path, ["wan_2.1_vae"])
    assert written == {"wan_2.1_vae": tmp_path / "vae" / "wan_2.1_vae.safetensors"}
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [written["wan_2.1_vae"]]
    assert read_checkpoint(written["wan_2.1_vae"]).tensor_bytes == 2 * PARAMETERS["wan_2.1_vae"]


def test_a_name_that_is_no_official_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="sd15"):
        write_official_models(tmp_path, ["sd15"])
