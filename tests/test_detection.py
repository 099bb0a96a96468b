"""What is said of a model that is none of WAN's: its host's own figure, named as such, or that it is unknown."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from insidehost import ask_inside
from vram_headroom.vram.estimate.detection import OVERSTATED, UNDERSTATED, HostDetection, host_required

FLUX = HostDetection("Flux", 243793.92, 16, 8, None, 11_901_408_320)
LTXV = HostDetection("LTXV", 432537.6, 128, 32, 8, 1_923_385_472)


def test_an_image_needs_the_hosts_bytes_for_each_latent_cell() -> None:
    estimate = host_required(FLUX, width=1024, height=768)
    assert estimate.expected == round(128 * 96 * 243793.92)
    assert (estimate.lower, estimate.upper) == (int(estimate.expected / OVERSTATED), round(estimate.expected * UNDERSTATED))


def test_a_video_counts_its_latent_frames() -> None:
    one = host_required(LTXV, width=768, height=512).expected
    assert one == round(24 * 16 * 432537.6)
    assert host_required(LTXV, width=768, height=512, frames=97).expected == round(13 * 24 * 16 * 432537.6)


def test_frames_of_a_model_of_images_are_a_batch() -> None:
    batch = host_required(FLUX, width=512, height=512, batch=4)
    assert host_required(FLUX, width=512, height=512, frames=4) == batch


def test_the_figure_says_whose_it_is() -> None:
    estimate = host_required(FLUX, width=1024, height=1024)
    assert [term.name for term in estimate.terms] == ["ComfyUI's own figure for Flux"]
    assert estimate.assumptions == ("Flux is no WAN model: this is what ComfyUI makes room for, not checked by us",)


@given(st.integers(-2, 9000), st.integers(-2, 9000), st.integers(-2, 300), st.integers(-2, 9))
def test_any_size_has_a_band_or_an_error_that_names_it(width: int, height: int, frames: int, batch: int) -> None:
    sizes = {"width": width, "height": height, "frames": frames, "batch": batch}
    wrong = [name for name, value in sizes.items() if value < 1]
    if wrong:
        with pytest.raises(ValueError, match=wrong[0]):
            host_required(LTXV, **sizes)
    else:
        estimate = host_required(LTXV, **sizes)
        assert 0 < estimate.lower <= estimate.expected <= estimate.upper


# inside the stand-in, which has no detection, and beside one that is made up

SCRIPT = """
import logging, os, sys, types
import torch
from vram_headroom.nodes.host.backend import read_backend
from vram_headroom.nodes.host.detection import HostDetector
from vram_headroom.vram.estimate.checkpoint import Checkpoint, TensorInfo

lines = []
class Keep(logging.Handler):
    def emit(self, record):
        lines.append([record.levelname, record.getMessage()])
logger = logging.getLogger("vram_headroom")
logger.addHandler(Keep())
logger.setLevel(logging.INFO)

file = base / "flux.safetensors"
file.write_bytes(b"1")

def header(path, *tensors):
    return Checkpoint(str(path), 1, {t.name: t for t in tensors}, {})

SCALE = TensorInfo("model.diffusion_model.scale", "BF16", (24,), 48)
WEIGHT = TensorInfo("model.diffusion_model.weight", "F8_E4M3", (400_000, 300_000), 120_000_000_000)
OTHER = TensorInfo("vae.weight", "F16", (8, 8), 128)
said = {"backend": repr(read_backend())}
import comfy.model_management as management
def kept_and_cast(kept, cast):
    before = management.unet_dtype, management.unet_manual_cast
    management.unet_dtype = lambda *a, **k: kept
    management.unet_manual_cast = lambda *a, **k: cast
    try:
        backend = read_backend()
        return [backend.weight_bytes, backend.element_bytes]
    finally:
        management.unet_dtype, management.unet_manual_cast = before
said["kept and cast"] = [
    kept_and_cast(*types)
    for types in ((torch.float16, None), (torch.float16, torch.float32), (torch.float8_e4m3fn, torch.float16))
]
def slow(cudnn, torch_version, around):
    before = torch.backends.cudnn.version, torch.__version__, management.get_torch_device
    torch.backends.cudnn.version, torch.__version__ = lambda: cudnn, torch_version
    management.get_torch_device = lambda: torch.device("cuda", 0)
    sys.modules["comfy.ops"] = types.SimpleNamespace(NVIDIA_MEMORY_CONV_BUG_WORKAROUND=around)
    try:
        return read_backend().slow_conv3d
    finally:
        torch.backends.cudnn.version, torch.__version__, management.get_torch_device = before
        del sys.modules["comfy.ops"]
said["slow"] = [
    slow(91002, "2.9.1+cu130", False), slow(91002, "2.9.1+cu130", True), slow(91002, "2.8.0", False), slow(91500, "2.9.1", 0)
]
detector = HostDetector()
said["without"] = [detector.detect(header(file, WEIGHT)), detector.detect(header(file, WEIGHT))]
said["lines without"] = list(lines)

class Latent:
    latent_channels, latent_dimensions, spacial_downscale_ratio = 16, 2, 16
asked = []
class Model:
    def __init__(self, formula):
        self.latent_format, self.formula = Latent(), formula
    def memory_required(self, shape):
        return self.formula(shape[0] * shape[2] * shape[3], self.diffusion_model.dtype.itemsize)
class MadeUp:
    supported_inference_dtypes = [torch.float16]
    formula = staticmethod(lambda cells, size: cells * size * 1000.0)
    unet_config = {}
    def set_inference_dtype(self, dtype, cast):
        pass
    def get_model(self, state, prefix, device=None):
        asked.append([sorted(state), str(device), self.unet_config["disable_unet_model_creation"]])
        assert float(state["scale"].sum()) == 0.0 and state["weight"].is_meta
        return Model(self.formula)
made_up = types.ModuleType("comfy.model_detection")
made_up.unet_prefix_from_state_dict = lambda state: "model.diffusion_model."
made_up.model_config_from_unet = lambda state, prefix, metadata=None: MadeUp()
sys.modules["comfy.model_detection"] = made_up
import comfy.utils
comfy.utils.weight_dtype = lambda state: torch.float16

whole = header(file, SCALE, WEIGHT, OTHER)
said["still"] = detector.detect(whole)
detector = HostDetector()
found = [detector.detect(whole) for _ in range(2)][1]
said["made up"] = [found.name, found.bytes_per_cell, found.latent_channels, found.spatial_stride, found.temporal_stride]
said["parameters"] = found.parameters
said["asked once"] = list(asked)
os.utime(file, ns=(1, 1))
detector.detect(whole)
said["asked again"] = len(asked)
MadeUp.formula = staticmethod(lambda cells, size: cells * size * 1000.0 + 5_000_000)
lines.clear()
said["with a constant"] = HostDetector().detect(whole)
Latent.latent_dimensions = 1
said["sound"] = HostDetector().detect(whole)
said["lines"] = list(lines)
answer(said)
"""


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What the detector of the pack said."""
    return ask_inside(SCRIPT, tmp_path_factory.mktemp("detection"))


def test_a_torch_with_the_conv3d_regression_is_told_of_unless_comfyui_works_around_it(said: dict[str, Any]) -> None:
    assert said["slow"] == [True, False, False, False]


def test_a_host_without_detection_gives_no_answer_and_one_line_in_the_log(said: dict[str, Any]) -> None:
    assert said["without"] == [None, None]
    ((level, line),) = said["lines without"]
    assert level == "INFO"
    assert line.startswith("ComfyUI can't say what flux.safetensors needs (ModuleNotFoundError")


def test_the_diffusion_model_of_a_checkpoint_is_asked_about_by_shapes_alone(said: dict[str, Any]) -> None:
    # 120 billion weights of one byte lie in no memory; one-dimensional tensors have values to read
    assert said["made up"] == ["MadeUp", 2000.0, 16, 16, None]
    assert said["parameters"] == 24 + 120_000_000_000
    assert said["asked once"] == [[["scale", "weight"], "meta", True]]


def test_a_file_is_asked_about_once_until_it_changes(said: dict[str, Any]) -> None:
    assert said["still"] is None
    assert said["asked again"] == 2


def test_a_formula_that_is_not_proportional_to_the_cells_is_no_answer(said: dict[str, Any]) -> None:
    assert said["with a constant"] is None
    assert "not proportional to the size of the latent" in said["lines"][0][1]


def test_a_model_of_sound_is_no_answer(said: dict[str, Any]) -> None:
    assert said["sound"] is None
    assert "1 dimension" in said["lines"][1][1]


def test_the_stand_ins_backend_is_read_with_what_it_does_not_know(said: dict[str, Any]) -> None:
    assert "comfyui=(0, 33, 0)" in said["backend"]
    assert "attention='flash'" in said["backend"]


def test_a_card_that_keeps_one_type_and_computes_in_another_is_read_with_both(said: dict[str, Any]) -> None:
    """GeForce 10 on Linux: fp16 weights, fp32 forwards. --fp8_e4m3fn-unet: fp8 weights, fp16 forwards."""
    assert said["kept and cast"] == [[2, 2], [2, 4], [1, 2]]
