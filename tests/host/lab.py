"""What the tests of the stand-in host share: tiny model files, a running host, prompts, and a websocket that is listened to."""

from __future__ import annotations

import asyncio
import copy
import json
import struct
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp

from .process import HostProcess

Prompt = dict[str, dict[str, Any]]

# The keys by which ComfyUI tells what a file is, and one tensor of weights. (name -> shape), all 16 bit.
DIFFUSION = {
    "head.modulation": (1, 2, 128),
    "head.head.weight": (64, 128),
    "patch_embedding.weight": (128, 16, 1, 2, 2),
    "blocks.0.ffn.0.weight": (256, 128),
    "blocks.1.ffn.0.weight": (256, 128),
}
IMAGE_DIFFUSION = DIFFUSION | {"patch_embedding.weight": (128, 36, 1, 2, 2), "img_emb.proj.0.weight": (1280,)}
TEXT_ENCODER = {"shared.weight": (256, 64), "encoder.block.23.layer.1.DenseReluDense.wi_1.weight": (10240, 64)}
VAE = {"decoder.middle.0.residual.0.gamma": (64, 1, 1, 1), "decoder.head.0.gamma": (16, 1, 1, 1)}

TINY_FILES: dict[str, Mapping[str, tuple[int, ...]]] = {
    "diffusion_models/tiny_wan21_t2v_fp16.safetensors": DIFFUSION,
    "diffusion_models/tiny_wan21_t2v_fp8_scaled.safetensors": DIFFUSION,
    "diffusion_models/tiny_wan21_i2v_fp16.safetensors": IMAGE_DIFFUSION,
    "diffusion_models/tiny_wan22_t2v_high_noise_fp16.safetensors": DIFFUSION,
    "diffusion_models/tiny_wan22_t2v_low_noise_fp16.safetensors": DIFFUSION,
    "text_encoders/tiny_umt5.safetensors": TEXT_ENCODER,
    "vae/tiny_wan_2.1_vae.safetensors": VAE,
}


def write_model(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """A safetensors file of zeros with these 16 bit tensors; returns their bytes."""
    header: dict[str, Any] = {}
    end = 0
    for name, shape in shapes.items():
        size = 2
        for side in shape:
            size *= side
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return end


def write_tiny_models(folder: Path) -> Path:
    for name, shapes in TINY_FILES.items():
        write_model(folder / name, shapes)
    return folder


# A WAN text-to-video graph as people queue it.

Link = list[Any]


def node(class_type: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs}


def text_to_video(
    unet: str = "tiny_wan21_t2v_fp16.safetensors",
    clip: str = "tiny_umt5.safetensors",
    vae: str = "tiny_wan_2.1_vae.safetensors",
    width: int = 64,
    height: int = 64,
    length: int = 5,
    steps: int = 2,
    cfg: float = 6.0,
) -> Prompt:
    """Loaders 1, 2, 3; texts 4, 5; latent 6; shift 7; sampler 8; decode 9; preview 10."""
    return {
        "1": node("UNETLoader", unet_name=unet, weight_dtype="default"),
        "2": node("CLIPLoader", clip_name=clip, type="wan", device="default"),
        "3": node("VAELoader", vae_name=vae),
        "4": node("CLIPTextEncode", text="a cat walks on the beach", clip=["2", 0]),
        "5": node("CLIPTextEncode", text="blur", clip=["2", 0]),
        "6": node("EmptyHunyuanLatentVideo", width=width, height=height, length=length, batch_size=1),
        "7": node("ModelSamplingSD3", model=["1", 0], shift=8.0),
        "8": node(
            "KSampler",
            seed=1,
            steps=steps,
            cfg=cfg,
            sampler_name="euler",
            scheduler="simple",
            positive=["4", 0],
            negative=["5", 0],
            model=["7", 0],
            latent_image=["6", 0],
            denoise=1.0,
        ),
        "9": node("VAEDecode", samples=["8", 0], vae=["3", 0]),
        "10": node("PreviewImage", images=["9", 0]),
    }


def with_inputs(prompt: Prompt, node_id: str, **inputs: Any) -> Prompt:
    """A copy with some inputs changed; None takes an input away."""
    changed = copy.deepcopy(prompt)
    for name, value in inputs.items():
        if value is None:
            del changed[node_id]["inputs"][name]
        else:
            changed[node_id]["inputs"][name] = value
    return changed


class Ran(NamedTuple):
    """One prompt from the post to the end."""

    prompt_id: str
    messages: list[tuple[str, dict[str, Any]]]
    history: dict[str, Any]

    @property
    def status(self) -> str:
        return self.history["status"]["status_str"]

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [data for name, data in self.messages if name == kind]

    @property
    def executed(self) -> list[str]:
        """The nodes that ran, in order."""
        return [data["node"] for data in self.of("executing") if data["node"] is not None]


def run_prompt(host: HostProcess, prompt: Prompt, **body: Any) -> Ran:
    """Queue it as a browser does and wait for its last message."""
    return asyncio.run(_run(host, {"prompt": prompt, **body}))


async def _run(host: HostProcess, body: dict[str, Any]) -> Ran:
    client_id = uuid.uuid4().hex
    timeout = aiohttp.ClientTimeout(total=90)
    async with (
        aiohttp.ClientSession(host.url, timeout=timeout) as http,
        http.ws_connect("/ws", params={"clientId": client_id}) as socket,
    ):
        async with http.post("/api/prompt", json={**body, "client_id": client_id}) as response:
            answer = await response.json()
            if response.status != 200:
                raise AssertionError(f"refused: {answer}")
        messages: list[tuple[str, dict[str, Any]]] = []
        async for message in socket:
            told = message.json()
            messages.append((told["type"], told["data"]))
            if told["type"] == "executing" and told["data"]["node"] is None:
                break
        async with http.get(f"/api/history/{answer['prompt_id']}") as response:
            history = (await response.json())[answer["prompt_id"]]
    return Ran(answer["prompt_id"], messages, history)
