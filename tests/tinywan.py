"""The real WAN classes of diffusers and transformers, a few hundred KB each: same modules and names, tiny layers."""

import logging
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan_vace import WanVACETransformer3DModel
from diffusers.modular_pipelines.components_manager import ComponentsManager
from diffusers.pipelines.wan.pipeline_wan import WanPipeline
from diffusers.pipelines.wan.pipeline_wan_i2v import WanImageToVideoPipeline
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from transformers import CLIPVisionConfig, CLIPVisionModel, UMT5Config, UMT5EncoderModel

TEXT_WIDTH = 32
FRAMES, HEIGHT, WIDTH = 5, 16, 16
"""The smallest video that a WAN of stride 4×8×8 and patches of 2×2 can make in two latent frames."""

_LAYERS: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "text_dim": TEXT_WIDTH,
    "freq_dim": 32,
    "ffn_dim": 32,
    "num_layers": 2,
    "rope_max_seq_len": 32,
}

_NO_TOKENIZER: Any = None
"""`make_video` hands in encoded text."""

logging.getLogger("diffusers").setLevel(logging.ERROR)


def generator(seed: int = 0, in_channels: int = 16) -> WanTransformer3DModel:
    torch.manual_seed(seed)
    return WanTransformer3DModel(in_channels=in_channels, out_channels=16, **_LAYERS).eval()


def vace_generator() -> WanVACETransformer3DModel:
    return WanVACETransformer3DModel(vace_layers=[0], vace_in_channels=96, **_LAYERS).eval()


def vae() -> AutoencoderKLWan:
    torch.manual_seed(1)
    return AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    ).eval()


def text_encoder() -> UMT5EncoderModel:
    torch.manual_seed(2)
    config = UMT5Config(
        vocab_size=64, d_model=TEXT_WIDTH, d_kv=8, d_ff=37, num_layers=2, num_heads=4, relative_attention_num_buckets=8
    )
    return UMT5EncoderModel(config).eval()


def image_encoder() -> CLIPVisionModel:
    torch.manual_seed(3)
    config = CLIPVisionConfig(
        hidden_size=32,
        projection_dim=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=32,
        intermediate_size=37,
        patch_size=16,
    )
    return CLIPVisionModel(config).eval()


def pipeline(experts: int = 1) -> WanPipeline:
    """WAN 2.1 with one expert, WAN 2.2 with two."""
    return WanPipeline(
        tokenizer=_NO_TOKENIZER,
        text_encoder=text_encoder(),
        vae=vae(),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        transformer=generator(),
        transformer_2=generator(seed=4) if experts == 2 else None,
        boundary_ratio=0.5 if experts == 2 else None,
    )


def image_pipeline() -> WanImageToVideoPipeline:
    return WanImageToVideoPipeline(
        tokenizer=_NO_TOKENIZER,
        text_encoder=text_encoder(),
        vae=vae(),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        image_encoder=image_encoder(),
        transformer=generator(in_channels=36),
    )


def manager_of(components: dict[str, Any], collection: str | None = None, manager: Any = None) -> ComponentsManager:
    """A ComponentsManager that holds `components`, beside what `manager` held already."""
    manager = manager or ComponentsManager()
    for name, component in components.items():
        manager.add(name, component, collection=collection)
    return manager


def encoded_text(tokens: int = 8) -> torch.Tensor:
    return torch.linspace(-1, 1, tokens * TEXT_WIDTH).reshape(1, tokens, TEXT_WIDTH)


@torch.no_grad()
def make_video(pipe: WanPipeline, steps: int = 2) -> torch.Tensor:
    """A whole run, the same numbers every time."""
    pipe.set_progress_bar_config(disable=True)
    result: Any = pipe(
        prompt_embeds=encoded_text(),
        negative_prompt_embeds=-encoded_text(),
        height=HEIGHT,
        width=WIDTH,
        num_frames=FRAMES,
        num_inference_steps=steps,
        generator=torch.Generator().manual_seed(7),
        output_type="pt",
    )
    return result.frames
