"""What one phase needs of the card: what the host makes room for, and what the tensors will really take."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Final, NamedTuple

from ..decoding import tilings
from ..estimate import dit, encoders, tiling, vae
from ..estimate.architecture import Architecture
from ..estimate.backend import Backend
from ..estimate.caches import causal_caches, pose_cache
from ..estimate.detection import host_required
from ..estimate.estimate import NOTHING, Estimate, Term
from ..estimate.overheads import Family, dit_family
from ..estimate.pictures import picture_bytes
from ..estimate.sampling import host_step_required, sampling_step
from ..estimate.tokens import Latent, Video, video_frames
from ..units import GIB, MIB
from .types import HostRules, ModelRef, Phase, Tile

AUDIO_ENCODER: Final = Estimate(
    expected=256 * MIB,
    lower=16 * MIB,
    upper=2 * GIB,
    assumptions=("what an audio encoder needs depends on the length of the sound; 0.3 GB is taken, up to 2 GB",),
)
"""wav2vec2-large over a minute: 3,000 steps of 1,024 channels through 24 layers whose attention is flash, and the first layer's
convolutions at 512 channels and a fifth of the sampling rate: 16,000 / 5 * 60 * 512 * 4 B = 0.4 GB at most. Derived from the
layers of ComfyUI comfy/audio_encoders/wav2vec2.py (0.33), not traced."""

COMPILES: Final = "TorchCompile"
"""Begins the class of every node that compiles a model (ComfyUI's TorchCompileModel, KJNodes' TorchCompileModelWanVideo...)."""

SAGE: Final = "Sage"
"""In the class of every node that puts SageAttention into a model (KJNodes' PathchSageAttentionKJ)."""


VOCABULARIES: Final = ("shared", "token_embd", "token_embedding")
"""What UMT5's table of words is called, by the layouts of architecture.py."""


class PhaseNeed(NamedTuple):
    """Bytes beside weights, of one forward at a time and, for a sampler, of cond and uncond together."""

    host: int
    """What the host makes room for before one forward."""
    host_batched: int
    required: Estimate | None
    """None where it is not known."""
    batched: Estimate | None
    fallback: Estimate | None = None
    """Of a VAE: what the tiles take that the host tries when the whole has run out of memory."""
    fallback_tile: Tile | None = None


UNKNOWN_NEED: Final = PhaseNeed(0, 0, None, None)


def need_of(phase: Phase, rules: HostRules, at_once: int = 1) -> PhaseNeed:
    """What `phase` needs under these rules, with `at_once` clips of its batch decoded or encoded together. Raises nothing: what
    has no known size has no known need."""
    if phase.kind != "other" and phase.models and not any(model.on_card for model in phase.models):
        return PhaseNeed(0, 0, NOTHING, NOTHING)
    match phase.kind:
        case "text_encode":
            return _text(phase, rules)
        case "clip_vision":
            return _same(encoders.clip_vision(batch=phase.frames or 1)) if _is(phase, "clip_vision") else UNKNOWN_NEED
        case "audio_encode":
            return _same(AUDIO_ENCODER)
        case "other":
            return _pictures(phase)
    if phase.width is None or phase.height is None or phase.frames is None or not phase.models:
        return UNKNOWN_NEED
    video = Video(phase.width, phase.height, phase.frames, phase.batch or 1)
    return _sampling(phase, video, rules) if phase.kind == "sample" else _vae(phase, video, rules, at_once)


def runs_uncond(phase: Phase) -> bool:
    """A sampler with a cfg of 1 runs the positive prompt only (ComfyUI comfy/samplers.py, cfg1 optimisation)."""
    return phase.kind == "sample" and (phase.cfg is None or not math.isclose(phase.cfg, 1.0))


def _same(estimate: Estimate, host: int = 0) -> PhaseNeed:
    return PhaseNeed(host, host, estimate, estimate)


def _is(phase: Phase, kind: str) -> bool:
    return any(model.arch.kind == kind for model in phase.models)


def _text(phase: Phase, rules: HostRules) -> PhaseNeed:
    """UMT5-XXL only: another encoder needs what nobody told us."""
    found = next((model for model in phase.models if _is_umt5(model)), None)
    if found is None:
        return UNKNOWN_NEED
    kept = found.footprint
    if kept is None or not found.arch.parameters:
        return _same(encoders.umt5(backend=rules.backend))
    vocabulary = next((module.bytes for module in kept.modules if module.name in VOCABULARIES), 0)
    return _same(
        encoders.umt5(
            backend=rules.backend,
            fp8_weights=kept.resident < 1.5 * found.arch.parameters,
            fp8_embedding=vocabulary == encoders.UMT5_VOCABULARY * encoders.UMT5_DIM,
            fp32_weights=kept.resident > 3 * found.arch.parameters,
        )
    )


def _is_umt5(model: ModelRef) -> bool:
    return model.arch.kind == "text_encoder" and model.arch.name.startswith("UMT5")


def _pictures(phase: Phase) -> PhaseNeed:
    """A node that computes on pictures; one that also has a model needs what nobody told us."""
    if phase.models or phase.width is None or phase.height is None or phase.frames is None:
        return UNKNOWN_NEED
    nbytes = picture_bytes(phase.class_type, phase.width, phase.height, phase.frames)
    return UNKNOWN_NEED if nbytes is None else _same(Estimate(nbytes, nbytes, nbytes, (Term("pictures", nbytes),)))


def backend_of(phase: Phase, rules: HostRules) -> Backend:
    """The host's backend, with what nodes on the model's way change about it."""
    backend = rules.backend
    attention = backend.attention if rules.flash_attention or backend.attention != "flash" else "split"
    if any(SAGE in patch for patch in phase.patches):
        attention = "sage"
    compiled = backend.compiled or any(patch.startswith(COMPILES) for patch in phase.patches)
    if (attention, compiled, rules.compute_bytes, rules.vae_compute_bytes) == (
        backend.attention,
        backend.compiled,
        backend.element_bytes,
        backend.vae_element_bytes,
    ):
        return backend
    return replace(
        backend,
        attention=attention,
        compiled=compiled,
        element_bytes=rules.compute_bytes,
        vae_element_bytes=rules.vae_compute_bytes,
    )


def _sampling(phase: Phase, video: Video, rules: HostRules) -> PhaseNeed:
    """Of several diffusion models at one sampler (an adapter beside the model) the one that needs most decides."""
    needs = [found for model in phase.models if (found := _forward(phase, model, video, rules)) is not None]
    if not needs:
        return UNKNOWN_NEED
    return max(needs, key=lambda need: need.required.expected if need.required else 0)


def _forward(phase: Phase, model: ModelRef, video: Video, rules: HostRules) -> PhaseNeed | None:
    if model.arch.kind != "dit":
        return _detected(model, video)
    shape = dit_shape(model.arch, phase)
    seen = _window(video, phase)
    if not shape.latent(seen).cells:
        return None
    # a version that knows no factor for a variant takes that of its base; the file's own answer is that of the newest
    scale = (model.arch.usage_factor or 0) / dit.host_usage_factor(shape) or 1.0
    host = [
        round(
            scale
            * host_step_required(
                shape, seen, conditions=conditions, element_bytes=rules.compute_bytes, flash=rules.flash_attention
            )
        )
        for conditions in (1, 2)
    ]
    backend = backend_of(phase, rules)
    kept = model.footprint
    # GGUF has its own way to unpack a layer, which is counted with its file (Footprint.transients)
    casts = kept is not None and not kept.packed and kept.cast in ("cast", "dequantise")
    scaled = kept is not None and kept.cast == "native"
    conditions = 2 if runs_uncond(phase) else 1
    if shape.variant == "causal":
        return _causal(shape, seen, backend, casts, scaled, host)
    one, both = (
        sampling_step(shape, seen, backend, conditions=conditions, batched=batched, casts_weights=casts, scaled_matmul=scaled)
        for batched in (False, conditions == 2)
    )
    if kept is not None and kept.integer_bits is not None:
        one, both = (dit.integer_products(estimate, kept.integer_bits) for estimate in (one, both))
    if phase.pose_cache is not None and phase.pose_cache.on_card:
        kept = pose_cache_bytes(phase, rules)
        one, both = (estimate.plus(kept, "cached pose activations") for estimate in (one, both))
    return PhaseNeed(host[0], host[1], one, both)


def pose_cache_bytes(phase: Phase, rules: HostRules) -> int:
    """What Animate 2's cache node keeps in this phase, on the card or off it; 0 without one, or where sizes are not known.

    With context windows each has a slot of its own, as long as there is room: those of the whole clip, side by side.
    """
    found = next((model.arch for model in phase.models if model.arch.variant == "animate2"), None)
    if phase.pose_cache is None or found is None or phase.width is None or phase.height is None or phase.frames is None:
        return 0
    clip = Video(phase.width, phase.height, max(1, phase.frames - 4)).latent()  # the reference frame has no pose
    bits = phase.pose_cache.bits or 8 * rules.compute_bytes
    return pose_cache(clip, layers=max(1, found.layers or 1), dim=found.dim or 1, bits=bits)


def _causal(shape: dit.DitShape, video: Video, backend: Backend, casts: bool, scaled: bool, host: list[int]) -> PhaseNeed:
    """A model that makes the video block by block: the caches of the whole clip are there from the start."""
    block = dit.causal_block(shape, video, backend, first=True, casts_weights=casts, scaled_matmul=scaled)
    needed = block.and_also(causal_caches(shape, video, backend.element_bytes))
    return PhaseNeed(host[0], host[1], needed, needed)


def _window(video: Video, phase: Phase) -> Video:
    """What a forward sees of the video: context windows show it a part."""
    if phase.window is None:
        return video
    return Video(video.width, video.height, min(video.frames, 4 * (phase.window - 1) + 1), video.batch)


def _detected(model: ModelRef, video: Video) -> PhaseNeed | None:
    """A model that only the host knows: its own figure, for both what it makes room for and what we expect."""
    if model.detected is None:
        return None
    one, two = (
        host_required(model.detected, width=video.width, height=video.height, frames=video.frames, batch=forwards * video.batch)
        for forwards in (1, 2)
    )
    return PhaseNeed(one.expected, two.expected, one, two)


def dit_shape(arch: Architecture, phase: Phase) -> dit.DitShape:
    """What the forward's memory depends on, of a model's architecture and of what its graph gives it."""
    variant = arch.variant or "t2v"
    leading = 0  # the node's own first frames are in the phase's frames already
    return dit.DitShape(
        dim=arch.dim or 1,
        ffn_dim=arch.ffn_dim or 1,
        heads=arch.heads or 1,
        layers=max(1, arch.layers or 1),
        in_channels=arch.in_channels or 1,
        out_channels=arch.out_channels or 1,
        variant=variant,
        vace_layers=arch.vace_layers,
        image_tokens=arch.image_tokens,
        reference_frames=phase.reference_frames if variant in REFERENCES else 0,
        leading_frames=leading,
        motion=variant == "s2v" and phase.goes_on,
    )


REFERENCES: Final = ("fun_control_2.2", "s2v", "humo", "scail", "scail2")
"""Variants that join the tokens of reference latents to those of the video (see dit.DitShape.reference_frames)."""


def _vae(phase: Phase, video: Video, rules: HostRules, at_once: int) -> PhaseNeed:
    kind = _wan_vae(phase)
    if kind is None:
        return UNKNOWN_NEED
    backend = backend_of(phase, rules)
    latent = video.latent(vae.STRIDES[kind])
    if not latent.cells:
        return UNKNOWN_NEED
    decodes = phase.kind == "vae_decode"
    if phase.tile is not None:
        return _tiled_vae(phase.tile, kind, video, rules, backend, decodes)
    if decodes:
        host = vae.host_decode_required(kind, latent, rules.vae_compute_bytes)
        whole_clip = vae.vae_decode(kind, video, backend, at_once=at_once)
        tile = tiling.fallback_tile(
            kind, latent, card_total=rules.card_total, comfyui=backend.comfyui, element_bytes=rules.vae_compute_bytes
        )
        fallback = tiling.tiled_decode(kind, video, tile, backend)
    else:
        host = vae.host_encode_required(kind, video, rules.vae_compute_bytes)
        whole_clip = vae.vae_encode(kind, video, backend, at_once=at_once)
        tile = tiling.encode_fallback_tile(kind, latent)
        fallback = tiling.tiled_encode(kind, video, tile, backend)
    side = max(tile.rows, tile.columns) * vae.STRIDES[kind]
    pixels = Tile(size=side, overlap=side // 4, frames=video_frames(tile.frames) if tile.frames < latent.frames else None)
    smaller = fallback if fallback.expected < whole_clip.expected else None
    return PhaseNeed(host, host, whole_clip, whole_clip, smaller, pixels if smaller else None)


def largest_tiles(phase: Phase, rules: HostRules, room: int) -> tuple[Tile, Estimate] | None:
    """What our own decode turns to where the whole can't be had in `room` bytes (nodes/decoding.py); None for another VAE."""
    found = _wan_vae(phase)
    if found is None or not phase.width or not phase.height:
        return None
    backend, stride = backend_of(phase, rules), vae.STRIDES[found]
    video = Video(phase.width, phase.height, phase.frames or 1, phase.batch or 1)

    def taken(side: int, frames: int) -> Estimate:
        cells = max(1, side // stride)
        return tiling.tiled_decode(found, video, tiling.Tile(max(1, -(-frames // 4)), cells, cells), backend)

    first = next(tilings(video.width, video.height, video.frames, room, lambda side, frames: taken(side, frames).upper))
    return Tile(first.size, first.overlap), taken(first.size, first.frames)


def _wan_vae(phase: Phase) -> vae.VaeKind | None:
    found = next((model for model in phase.models if model.arch.kind == "vae" and model.arch.spatial_stride), None)
    return None if found is None else "2.2" if found.arch.spatial_stride == 16 else "2.1"


def _tiled_vae(asked: Tile, kind: vae.VaeKind, video: Video, rules: HostRules, backend: Backend, decodes: bool) -> PhaseNeed:
    """A node that asks for tiles: the largest of them decides."""
    stride = vae.STRIDES[kind]
    if decodes:
        tile = tiling.decode_tile(kind, tile_size=asked.size, overlap=asked.overlap, temporal_size=asked.frames or 1 << 19)
        estimate = tiling.tiled_decode(kind, video, tile, backend)
    else:
        tile = tiling.encode_tile(kind, tile_size=asked.size, temporal_size=asked.frames)
        estimate = tiling.tiled_encode(kind, video, tile, backend)
    latent = video.latent(stride)
    one = Latent(1, min(tile.frames, latent.frames), min(tile.rows, latent.rows), min(tile.columns, latent.columns))
    if decodes:
        host = vae.host_decode_required(kind, one, rules.vae_compute_bytes)
    else:
        part = Video(one.columns * stride, one.rows * stride, video_frames(one.frames))
        host = vae.host_encode_required(kind, part, rules.vae_compute_bytes)
    return _same(estimate, host)


def family_of(phase: Phase) -> Family | None:
    """Which forwards' traces say how an allocator looks after this phase; None for those nobody simulated."""
    match phase.kind:
        case "text_encode":
            return "text"
        case "clip_vision":
            return "image"
        case "sample":
            found = next((model for model in phase.models if model.arch.kind == "dit"), None)
            return dit_family(dit_shape(found.arch, phase)) if found is not None else None
        case "vae_decode" | "vae_encode":
            newer = any(model.arch.kind == "vae" and model.arch.spatial_stride == 16 for model in phase.models)
            if phase.kind == "vae_decode":
                return "vae_decode_2.2" if newer else "vae_decode_2.1"
            return "vae_encode_2.2" if newer else "vae_encode_2.1"
    return None
