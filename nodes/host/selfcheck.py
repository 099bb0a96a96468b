"""What the self-check traces in this ComfyUI: its own WAN classes, on the `meta` device, which neither reads nor holds numbers.

Nothing of ComfyUI is replaced: modes are this thread's own, and a class that would choose an attention for the card is told
another by the means it has for that: `optimized_attention_override`, and an attribute of the blocks of the VAE made here.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Final, NamedTuple

import comfy.model_management as model_management
import comfyui_version
import folder_paths
import torch
import torch.nn.functional as functional
from server import PromptServer

from ...vram.estimate.backend import Backend
from ...vram.estimate.dit import DitShape, dit_forward
from ...vram.estimate.tokens import Video
from ...vram.estimate.vae import CHANNELS, STRIDES, VaeKind, Way, peak_parts
from ...vram.selfcheck import AbsentError, Checker, Plan, Postponed, Store, Subject, host_key
from ...vram.trace import TraceOptions
from .backend import kitchen_version, read_backend

FILE: Final = ("vram_headroom", "selfcheck.json")
"""In ComfyUI's user folder, which outlives updates of ComfyUI and of this pack."""

BLOCKS: Final = 4
"""Blocks of a diffusion model that is traced: with 2 or more its peak is that of all 30 or 40 (traced, 0.8 and 0.33)."""

TEXT_TOKENS: Final = 512
TEXT_CHANNELS: Final = 4096
"""What UMT5-XXL gives for any prompt of that length (comfy/text_encoders/wan.py)."""

PLAIN_14B: Final = DitShape(dim=5120, ffn_dim=13824, heads=40, layers=40, in_channels=16, out_channels=16)
PLAIN_5B: Final = DitShape(dim=3072, ffn_dim=14336, heads=24, layers=30, in_channels=48, out_channels=48, variant="ti2v")
PLAIN_1_3B: Final = DitShape(dim=1536, ffn_dim=8960, heads=12, layers=30, in_channels=16, out_channels=16)

DITS: Final = (
    ("14B", PLAIN_14B, Video(832, 480, 33)),
    ("14B", PLAIN_14B, Video(832, 480, 81)),
    ("14B", PLAIN_14B, Video(1280, 720, 81)),
    ("5B", PLAIN_5B, Video(1280, 704, 81)),
    ("1.3B", PLAIN_1_3B, Video(832, 480, 81)),
)
"""A wide model, whose feed-forward makes its peak, and narrow ones, at sizes of a prompt: a handful takes half a second."""


def host_selfcheck(running: Callable[[], bool]) -> Checker:
    """The self-check of the running ComfyUI. `running` says whether a prompt is executed right now."""
    return Checker(describe, lambda: running() or queued(), Store(Path(folder_paths.get_user_directory(), *FILE)))


def queued() -> bool:
    """Whether ComfyUI has a prompt to run, or runs one."""
    count = getattr(getattr(getattr(PromptServer, "instance", None), "prompt_queue", None), "get_tasks_remaining", None)
    return bool(count()) if callable(count) else False


def describe() -> Plan:
    """What to check of this ComfyUI, under a key that holds all that its memory may depend on."""
    return plan_for(read_backend())


@functools.lru_cache(maxsize=4)
def plan_for(backend: Backend) -> Plan:
    """As `describe`. The forms are those of 16 bit, flash attention and no corrections: what else there is only scales them."""
    version = str(getattr(comfyui_version, "__version__", "unknown"))
    compared = replace(
        backend,
        fused_rope=bool(backend.fused_rope),
        fused_rms_norm=bool(backend.fused_rms_norm),
        attention="flash",
        element_bytes=2,
        vae_element_bytes=2,
        corrections=(),
    )
    subjects = (*dit_subjects(compared), *vae_subjects(compared))
    parts = (
        f"comfyui={version}",
        f"torch={torch.__version__}",
        f"kitchen={kitchen_version() or 'none'}",
        f"attention={backend.attention}",
        f"rope={backend.fused_rope}",
        f"norm={backend.fused_rms_norm}",
    )
    return Plan(host_key(parts, subjects), f"ComfyUI {version}", subjects)


# diffusion models


def dit_subjects(backend: Backend) -> tuple[Subject, ...]:
    """One forward each of DITS, as this backend runs it."""
    return tuple(
        Subject(
            kind="dit",
            name=f"{name} {video.width}×{video.height}, {video.frames} frames",
            expected=dit_forward(shape, video, backend).expected,
            prepare=functools.partial(prepare_dit, shape, video),
            options=lambda: trace_options(backend),
        )
        for name, shape, video in DITS
    )


def trace_options(backend: Backend) -> TraceOptions:
    """The kernels of this backend. Where rotary embedding has no kernel, it is the chain that runs in its place."""
    if backend.fused_rope:
        return TraceOptions(fused_rms_norm=bool(backend.fused_rms_norm))
    try:
        chain = importlib.import_module("comfy.quant_ops").ck.registry.get_implementation("apply_rope1", backend="eager")
    except (ImportError, AttributeError):
        # no comfy-kitchen: ComfyUI's own chain runs as it is
        return TraceOptions(fused_rms_norm=bool(backend.fused_rms_norm))
    return TraceOptions(fused_rms_norm=bool(backend.fused_rms_norm), instead={"comfy_kitchen::apply_rope1": chain})


def prepare_dit(shape: DitShape, video: Video) -> Callable[[], object]:
    """A forward of WanModel with random shapes of weights that do not exist. Raises AbsentError without WAN classes."""
    operations = importlib.import_module("comfy.ops").disable_weight_init if has_wan() else None
    model = importlib.import_module("comfy.ldm.wan.model").WanModel(
        model_type="t2v",
        in_dim=shape.in_channels,
        dim=shape.dim,
        ffn_dim=shape.ffn_dim,
        text_dim=TEXT_CHANNELS,
        out_dim=shape.out_channels,
        num_heads=shape.heads,
        num_layers=BLOCKS,
        device=torch.device("meta"),
        dtype=torch.float16,
        operations=operations,
    )
    with_weights(model)
    latent = shape.latent(video)
    given = on_meta(latent.batch, shape.in_channels, latent.frames, latent.rows, latent.columns)
    step, text = on_meta(latent.batch), on_meta(latent.batch, TEXT_TOKENS, TEXT_CHANNELS)
    options = {"optimized_attention_override": attend}
    return uninterrupted(lambda: model(given, step, text, transformer_options=options))


def has_wan() -> bool:
    """True. Raises AbsentError where ComfyUI has no models at all, as the stand-in in tests."""
    try:
        importlib.import_module("comfy.ldm")
    except ModuleNotFoundError as error:
        if error.name == "comfy.ldm":
            raise AbsentError from None
        raise
    return True


def on_meta(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.float16, device="meta")


def with_weights(model: torch.nn.Module) -> None:
    """Give weights to layers that wait for them: under DynamicVRAM ComfyUI makes linear layers without (comfy/ops.py)."""
    for layer in model.modules():
        if isinstance(layer, torch.nn.Linear) and getattr(layer, "weight", None) is None:
            layer.weight = torch.nn.Parameter(on_meta(layer.out_features, layer.in_features), requires_grad=False)
            if getattr(layer, "comfy_need_lazy_init_bias", False):
                layer.bias = torch.nn.Parameter(on_meta(layer.out_features), requires_grad=False)


def attend(
    instead_of: object,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    heads: int,
    *_: object,
    skip_reshape: bool = False,
    skip_output_reshape: bool = False,
    **others: object,
) -> torch.Tensor:
    """Attention by torch's own function, which the tracer counts as flash: called as ComfyUI calls an attention override.

    ComfyUI's function of the same kind is not used: it sets kernels for the whole process while it runs.
    """
    if not skip_reshape:
        q, k, v = (part.reshape(part.shape[0], -1, heads, part.shape[-1] // heads).transpose(1, 2) for part in (q, k, v))
    out = functional.scaled_dot_product_attention(q, k, v)
    return out if skip_output_reshape else out.transpose(1, 2).reshape(out.shape[0], -1, heads * out.shape[-1])


def uninterrupted(forward: Callable[[], object]) -> Callable[[], object]:
    """`forward`, in which an interrupt that a person meant for a prompt is given back to it."""

    def call() -> object:
        try:
            return forward()
        except model_management.InterruptProcessingException:
            # whichever operation sees the flag first takes it away (comfy/ops.py run_every_op): here it was one of ours
            model_management.interrupt_current_processing(True)
            raise Postponed from None

    return call


# VAEs


class VaeClass(NamedTuple):
    """A VAE of ComfyUI, as comfy/sd.py VAE.__init__ builds it."""

    module: str
    settings: Mapping[str, object]


COMMON_SETTINGS: Final = {
    "dim_mult": [1, 2, 4, 4],
    "num_res_blocks": 2,
    "attn_scales": [],
    "temperal_downsample": [False, True, True],
    "dropout": 0.0,
}

WAYS: Final[tuple[Way, ...]] = ("decode", "encode")

VAES: Final[Mapping[VaeKind, VaeClass]] = MappingProxyType(
    {
        "2.1": VaeClass("comfy.ldm.wan.vae", {"dim": 96, "z_dim": 16}),
        "2.2": VaeClass("comfy.ldm.wan.vae2_2", {"dim": 160, "z_dim": 48}),
    }
)

VAE_VIDEO: Final = Video(832, 480, 17)
"""The shortest clip whose peak is that of any longer one (vram/estimate/vae.py LONG): the time grows with the frames."""


def vae_subjects(backend: Backend) -> tuple[Subject, ...]:
    """A decode and an encode of either VAE, without what cuDNN may copy: that no trace can tell."""
    return tuple(
        Subject(
            kind="vae_decode" if way == "decode" else "vae_encode",
            name=f"VAE {name} {way} {VAE_VIDEO.width}×{VAE_VIDEO.height}, {VAE_VIDEO.frames} frames",
            expected=peak_parts(name, way, VAE_VIDEO.latent(STRIDES[name]), backend.comfyui, 2).plain,
            prepare=functools.partial(prepare_vae, name, way, VAE_VIDEO),
            options=vae_options,
        )
        for name in VAES
        for way in WAYS
    )


def prepare_vae(name: VaeKind, way: Way, video: Video) -> Callable[[], object]:
    """`decode` of a latent video or `encode` of a video by one of VAES, in 16 bit. Raises AbsentError without WAN classes."""
    has_wan()
    known = VAES[name]
    with torch.device("meta"):
        vae = importlib.import_module(known.module).WanVAE(**COMMON_SETTINGS, **known.settings).to(torch.float16)
    with_weights(vae)
    for block in vae.modules():
        if hasattr(block, "optimized_attention"):
            # chosen for the card when it is made, and no argument of a forward
            block.optimized_attention = attend_pixels
    latent = video.latent(STRIDES[name])
    if way == "decode":
        given = on_meta(latent.batch, CHANNELS[name], latent.frames, latent.rows, latent.columns)
    else:
        given = on_meta(video.batch, 3, video.frames, video.height, video.width)
    forward = getattr(vae, way)
    return uninterrupted(lambda: forward(given))


def attend_pixels(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Attention of one head over the pixels of [batch, channels, rows, columns]."""
    q_row, k_row, v_row = (part.flatten(2).transpose(1, 2)[:, None] for part in (q, k, v))
    return functional.scaled_dot_product_attention(q_row, k_row, v_row)[:, 0].transpose(1, 2).reshape(q.shape)


def vae_options() -> TraceOptions:
    """Convolutions as torch's own: around a cuDNN bug ComfyUI calls cuDNN's, which only a card has (comfy/ops.py Conv3d)."""
    return TraceOptions(instead={"aten::cudnn_convolution": convolution})


def convolution(
    given: torch.Tensor,
    weight: torch.Tensor,
    padding: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    *_: object,
    **others: object,
) -> torch.Tensor:
    """What `cudnn_convolution` makes, in the order of its arguments."""
    return torch.ops.aten.convolution(given, weight, None, stride, padding, dilation, False, [0] * len(padding), groups)
