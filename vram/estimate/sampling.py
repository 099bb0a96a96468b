"""A whole sampling step: the forward, the latents a sampler holds around it, and how ComfyUI batches the two conditions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Final

from .backend import Backend
from .corrections import checked
from .dit import dit_forward
from .dit_shape import TEXT_DIM, TEXT_TOKENS, DitShape, host_memory_required, host_usage_factor
from .estimate import Estimate, Term
from .tokens import Latent, Video, flag, typed, whole

BATCHING: Final = (3, 2)
"""Conditions run together if 3/2 of ComfyUI's own figure for them is less than what is free (comfy/samplers.py,
calc_cond_batch, 0.8 and 0.33)."""

SAMPLER_LATENTS: Final = 3
"""fp32 latents alive outside a step: the one being sampled, the noise and the input (cited: 6 + 3 for each condition in all
through ComfyUI 0.8's sampler, of which calc_cond_batch makes 3 + 3)."""

COND_LATENTS: Final = 3
"""fp32 latents of each condition in a step: its result, its weights, the weights of its area (comfy/samplers.py; traced exactly
on 0.8.0 and 0.33.0)."""

MOST_HISTORY: Final = 3
"""Latents that a multi-step solver keeps: none (euler) to three (uni_pc); derived from comfy/k_diffusion/sampling.py."""

FP32: Final = 4
"""Conditions and latents are fp32 outside the model."""

CLIP_DIM: Final = 1280
"""Width of a CLIP ViT-H embedding."""

CONDITION_CHANNELS: Final[Mapping[str, int]] = MappingProxyType(
    {"vace": 96, "camera": 24 * 64, "camera_2.2": 24 * 64, "s2v": 16, "animate": 16, "scail": 5}
)
"""Numbers of a variant's own conditions for one latent cell: VACE's frames and masks, a camera path, a control video, a pose
(comfy/model_base.py, extra_conds). Derived: the sampling steps that were traced have none of them."""

FACE_PIXELS: Final = 3 * 512 * 512
"""Of one of Animate's faces."""


def batches_cond_and_uncond(host_required_both: int, free: int) -> bool:
    """Whether ComfyUI runs prompt and negative prompt as one batch, with `free` bytes free as the step starts.

    `host_required_both` is its own figure for both, see `host_step_required`. Raises ValueError that names an argument out of
    range.
    """
    whole("host_required_both", host_required_both)
    whole("free", free)
    times, of = BATCHING
    return host_required_both * times < free * of


def host_step_required(
    shape: DitShape, video: Video, *, conditions: int = 1, element_bytes: int = 2, flash: bool = True
) -> int:
    """Bytes that ComfyUI itself reserves for a forward over `conditions` conditions at once, by which it places weights (2 as
    wanted, 1 as least) and batches. Raises ValueError that names an argument out of range."""
    typed("shape", shape, DitShape)
    typed("video", video, Video)
    whole("conditions", conditions, 1, 1 << 10)
    latent = shape.latent(video)
    batched = latent._replace(batch=latent.batch * conditions)
    return host_memory_required(
        batched,
        usage_factor=host_usage_factor(shape),
        element_bytes=element_bytes,
        flash=flash,
        more_cells=conditions * _counted_cells(shape, latent),
    )


def _counted_cells(shape: DitShape, latent: Latent) -> int:
    """Cells of conditions that ComfyUI adds to the latent's: a reference, and of a motion or pose 1.5 frames at any length.

    From comfy/model_base.py, memory_usage_factor_conds: S2V in 0.8 and 0.33, SCAIL in 0.33.
    """
    frame = latent.rows * latent.columns
    if shape.variant == "s2v":
        return frame * shape.reference_frames + (-(-3 * frame // 2) if shape.motion else 0)
    if shape.variant in ("scail", "scail2"):
        pose = (latent.rows // 2) * (latent.columns // 2)
        return frame * shape.reference_frames + -(-3 * latent.batch * pose // 2)
    return 0


def sampling_step(
    shape: DitShape,
    video: Video,
    backend: Backend | None = None,
    *,
    conditions: int = 2,
    batched: bool = False,
    history: int | None = None,
    casts_weights: bool = False,
    scaled_matmul: bool = False,
    timesteps: int = 1,
) -> Estimate:
    """Peak allocated of one sampling step, in bytes, weights excluded.

    `conditions`: 2 with a negative prompt, 1 without (cfg 1). `batched`: they run as one batch, see `batches_cond_and_uncond`.
    `history`: latents the solver keeps from earlier steps; None: not known, none expected and three as the upper bound. The
    rest as for `dit_forward`. Raises ValueError that names an argument out of range.
    """
    typed("shape", shape, DitShape)
    typed("video", video, Video)
    backend = checked(backend)
    whole("conditions", conditions, 1, 1 << 10)
    flag("batched", batched)
    if history is not None:
        whole("history", history, 0, 1 << 10)
    together = conditions if batched else 1
    forward = dit_forward(
        shape,
        replace(video, batch=video.batch * together) if together > 1 else video,
        backend,
        casts_weights=casts_weights,
        scaled_matmul=scaled_matmul,
        timesteps=timesteps,
    )
    latent = shape.latent(video)
    one = FP32 * shape.out_channels * latent.cells
    concatenated = FP32 * max(0, shape.in_channels - shape.out_channels) * latent.cells
    given = _condition(shape, latent, video.batch)
    size = backend.element_bytes
    held = (
        Term("sampler's latents", (SAMPLER_LATENTS + (history or 0)) * one),
        Term("results of the conditions", COND_LATENTS * conditions * one),
        Term("model input", together * (one + concatenated + (one + concatenated) * size // FP32)),
        Term("conditions", conditions * (given + concatenated) + together * (given + given * size // FP32)),
    )
    more = MOST_HISTORY * one if history is None else 0
    said = _how(conditions, batched)
    around = Estimate.of(held, above=more, assumptions=(said,))
    return forward.and_also(around)


def _how(conditions: int, batched: bool) -> str:
    if conditions == 1:
        return "One condition: no negative prompt runs (cfg 1)."
    if batched:
        return "Prompt and negative prompt run as one batch: enough is free for both."
    return "Prompt and negative prompt run one after the other: too little is free for both at once."


def _condition(shape: DitShape, latent: Latent, batch: int) -> int:
    """fp32 bytes of what one condition brings beside the concatenated latent: its text, and what the variant takes."""
    numbers = batch * (TEXT_TOKENS * TEXT_DIM + shape.image_tokens * CLIP_DIM)
    numbers += CONDITION_CHANNELS.get(shape.variant, 0) * latent.cells
    if shape.variant == "animate" and latent.frames > 1:
        numbers += FACE_PIXELS * batch * (4 * (latent.frames - 2) + 1)
    return FP32 * numbers
