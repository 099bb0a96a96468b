"""Graphs as people share them: numbers from other packs' nodes, videos that VideoHelperSuite loads, upscaling in between."""

from pathlib import Path
from typing import Any

import planlab
import pytest
from planlab import RULES, node
from vram_headroom.vram.estimate.checkpoint import Checkpoint
from vram_headroom.vram.estimate.media import MediaSize
from vram_headroom.vram.plan.cache import Reads
from vram_headroom.vram.plan.graph import build_chain
from vram_headroom.vram.plan.planner import make_plan
from vram_headroom.vram.plan.types import Chain, NodeSpec, Phase, UnreadableFileError, no_media

SIZES = {"custom_width": "INT", "custom_height": "INT"}
LOADING = {"force_rate": "FLOAT", "frame_load_cap": "INT", "skip_first_frames": "INT", "select_every_nth": "INT"}
VOCABULARY = {
    **planlab.VOCABULARY,
    "INTConstant": NodeSpec({"value": "INT"}, ("INT",)),
    "Int Literal": NodeSpec({"int": "INT"}, ("INT",)),
    "MathExpression|pysssss": NodeSpec({"expression": "STRING", "a": "*", "b": "*", "c": "*"}, ("INT", "FLOAT")),
    "SimpleMath+": NodeSpec({"value": "STRING", "a": "*", "b": "*"}, ("INT", "FLOAT")),
    "VHS_LoadVideo": NodeSpec({"video": "COMBO", **SIZES, **LOADING}, ("IMAGE", "INT", "AUDIO", "VHS_VIDEOINFO")),
    "VAEEncode": NodeSpec({"pixels": "IMAGE", "vae": "VAE"}, ("LATENT",)),
    "UpscaleModelLoader": NodeSpec({"model_name": "COMBO"}, ("UPSCALE_MODEL",)),
    "ImageUpscaleWithModel": NodeSpec({"upscale_model": "UPSCALE_MODEL", "image": "IMAGE"}, ("IMAGE",)),
    "ImageScaleBy": NodeSpec({"image": "IMAGE", "scale_by": "FLOAT"}, ("IMAGE",)),
}


def media(name: str) -> MediaSize | None:
    return {"clip.mp4": MediaSize(1280, 720, 300)}.get(name)


def library(folder: str, name: str) -> Checkpoint:
    if name.endswith(".pth"):
        raise UnreadableFileError(f"the size of {name} can't be read", f"/m/{name}", 64 << 20)
    return planlab.library(folder, name)


def chain_of(prompt: dict[str, Any]) -> Chain:
    return build_chain(prompt, VOCABULARY, library, RULES, planlab.card(100_000), media=media)


def samplers(prompt: dict[str, Any]) -> list[Phase]:
    return [phase for phase in chain_of(prompt).phases if phase.kind == "sample"]


@pytest.mark.parametrize(
    ("number", "slot"),
    [
        (node("INTConstant", value=49), 0),
        (node("Int Literal", int=49), 0),
        (node("MathExpression|pysssss", expression="a * 16 + b", a=3, b=("c", 0)), 0),
        (node("SimpleMath+", value="a*b", a=7, b=7), 0),
    ],
)
def test_a_length_comes_from_whatever_node_has_the_number(number: dict[str, Any], slot: int) -> None:
    prompt = planlab.two_experts(length=("n", slot))
    prompt |= {"n": number, "c": node("INTConstant", value=1)}
    assert [phase.frames for phase in samplers(prompt)] == [49, 49]


def from_video(**widgets: object) -> Phase:
    video = {"video": "clip.mp4", "custom_width": 0, "custom_height": 0, "force_rate": 0, "frame_load_cap": 0, **widgets}
    prompt = planlab.two_experts()
    prompt["v"] = node("VHS_LoadVideo", skip_first_frames=0, select_every_nth=1, **video)
    prompt["e"] = node("VAEEncode", pixels=("v", 0), vae=("73", 0))
    prompt["81"]["inputs"]["latent_image"] = ["e", 0]
    return samplers(prompt)[0]


def test_a_loaded_video_has_the_size_and_the_frames_its_loader_makes_of_the_file() -> None:
    assert (from_video().width, from_video().height, from_video().frames) == (1280, 720, 300)
    halved = from_video(custom_width=640)
    assert (halved.width, halved.height) == (640, 360)
    cut = from_video(custom_width=832, custom_height=480, frame_load_cap=81)
    assert (cut.width, cut.height, cut.frames) == (832, 480, 81)
    prompt = from_video(frame_load_cap=81)
    assert prompt.frames == 81


def test_a_loaded_video_of_an_unknown_file_is_bounded_by_its_cap() -> None:
    known = from_video(video="gone.mp4", custom_width=832, custom_height=480, frame_load_cap=81)
    assert (known.width, known.height, known.frames) == (832, 480, 81)
    assert from_video(video="gone.mp4").frames is None
    assert from_video(force_rate=16).frames is None, "the file's own rate decides"


def enlarged(model: str) -> dict[str, Any]:
    """Decoded, enlarged by a model, halved, sampled again."""
    prompt = planlab.two_experts()
    prompt |= {
        "u": node("UpscaleModelLoader", model_name=model),
        "i": node("ImageUpscaleWithModel", upscale_model=("u", 0), image=("87", 0)),
        "h": node("ImageScaleBy", image=("i", 0), scale_by=0.5),
        "e": node("VAEEncode", pixels=("h", 0), vae=("73", 0)),
        "k": node("KSampler", model=("82", 0), steps=4, cfg=1.0, latent_image=("e", 0)),
        "d": node("VAEDecode", samples=("k", 0), vae=("73", 0)),
    }
    prompt["80"]["inputs"]["images"] = ["d", 0]
    return prompt


@pytest.mark.parametrize("model", ["4x-UltraSharp.pth", "RealESRGAN_x4plus.pth", "up/4x_foolhardy_Remacri.pth"])
def test_an_upscale_model_enlarges_as_its_name_says(model: str) -> None:
    chain = chain_of(enlarged(model))
    last = chain.phases[-1]
    assert (last.width, last.height, last.frames) == (1280, 1280, 81)
    assert "ImageUpscaleWithModel i makes pictures 4 times as wide and high, as the name of its model says" in chain.assumptions


def test_an_upscale_model_of_another_name_leaves_the_size_unknown_and_never_as_it_was() -> None:
    chain = chain_of(enlarged("my_2024_model.pth"))
    assert (chain.phases[-1].width, chain.phases[-1].height) == (None, None)
    assert make_plan(chain, planlab.card(100_000), RULES).verdict == "unknown"


def test_a_small_model_without_a_header_counts_by_its_file_and_costs_no_verdict() -> None:
    chain = chain_of(enlarged("4x-UltraSharp.pth"))
    upscaler = next(model for model in chain.models if model.role == "other")
    assert (upscaler.file_bytes, upscaler.resident_bytes) == (64 << 20, 64 << 20)
    assert "4x-UltraSharp.pth is counted by its size on disk, since its header can't be read" in chain.assumptions
    assert make_plan(chain, planlab.card(100_000), RULES).verdict == "fits"


def test_a_diffusion_model_without_a_header_is_not_guessed_at() -> None:
    prompt = planlab.two_experts()
    prompt["75"]["inputs"]["unet_name"] = "wan.pth"
    assert make_plan(chain_of(prompt), planlab.card(100_000), RULES).verdict == "unknown"


def test_a_file_whose_header_can_not_be_read_is_watched_for_changes(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    path.write_bytes(b"x" * 100)

    def broken(folder: str, name: str) -> Checkpoint:
        raise UnreadableFileError("no header", str(path), 100)

    reads = Reads(broken, no_media, lambda name: None)
    with pytest.raises(UnreadableFileError):
        reads.header("upscale_models", "a.pth")
    assert (list(reads.stamps), reads.missing) == ([str(path)], set())
