"""What one forward of a WAN diffusion model allocates, weights excluded: closed forms of ComfyUI's own classes.

The peak is the largest of a few moments in a block, and each moment is a sum of tensors that are alive then. Every count below
was read off the allocations of the real classes on the `meta` device (ComfyUI 0.8.0 and 0.33.0 on torch 2.13: the rows of
tests/data/traces-0.8.json and traces-0.33.json, held to 0.5 % by tests/test_dit.py); what older versions add is cited from
traces of ComfyUI 0.3.59 to 0.3.68.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Final, Literal, NamedTuple

from .backend import NEWEST_TRACED, Backend
from .corrections import checked, corrected, version_of
from .dit_shape import HEAD_DIM, TEXT_TOKENS, DitShape, host_memory_required, host_usage_factor
from .estimate import Estimate, Term
from .tokens import Video, flag, latent_frames, one_of, typed, video_frames, whole

ROTARY_BYTES: Final = HEAD_DIM // 2 * 2 * 2 * 4
"""Of one token's rotations: a 2 x 2 matrix in fp32 for every pair of channels (comfy/ldm/flux/math.py, rope). One table for the
whole batch."""

Version = tuple[int, int, int]

FOLDED_FFN: Final[Version] = (0, 30, 0)
"""First ComfyUI whose feed-forward keeps the input of its GELU until the second layer is done (commit 15989f87)."""

CONTIGUOUS: Final[Version] = (0, 3, 68)
"""First ComfyUI whose block copies a transposed input before the attention (commit 4cd88186)."""

SEPARATE_QK: Final[Version] = (0, 3, 61)
"""First ComfyUI that is done with q before it makes k, and drops the attention's result before the feed-forward."""

KITCHEN: Final[Version] = (0, 8, 0)
"""First ComfyUI traced that can run RoPE as one kernel (comfy-kitchen, comfy/quant_ops.py)."""

FUSED_BY_DEFAULT: Final[Version] = (0, 30, 0)
"""From here on RoPE is taken for fused where nobody knows: the kernel needs torch for CUDA 13 (comfy/quant_ops.py), which the
releases of the time ship. A judgement, not a measurement: the band spans both."""

OLD_CHAIN: Final = ((0, 3, 61), 9), ((0, 3, 60), 12), ((0, 0, 0), 17)
"""Attention with eager RoPE or RMSNorm before CONTIGUOUS, in tensors of the hidden size; a few traces of 0.3.59 to 0.3.67."""

RESIDUAL: Final = 0.01
"""Band of a form whose every choice is known: it fits its traces to 0.5 %, and traces fit six published peaks to 0.5 %."""

COMPILED_ABOVE: Final = 0.25
"""torch.compile, upper bound: a judgement; private pools and padded buffers were not measured."""

NOT_TRACED: Final = ("animate2", "scail2", "wandancer", "flow_rvs")
"""Variants whose classes were not traced: they are taken for the plain model, with the band of NOT_TRACED_ABOVE."""

NOT_TRACED_ABOVE: Final = 0.5
"""A judgement: the variants that were traced need up to 1.4 times the plain one (VACE)."""

CONTIGUOUS_INPUT: Final = ("fun_control_2.2", "s2v", "humo", "scail", "scail2")
"""Variants that join reference tokens to those of the video: the result is contiguous already, and no block copies it."""

SECOND_TABLE: Final = ("s2v", "humo")
"""Variants that make the rotations of the video and then those of the video with its references: both stay."""

AUDIO_TOKENS: Final = 5
"""S2V and Animate keep 4 audio (face) tokens and one of padding for every latent frame, each of the hidden size."""

HUMO_AUDIO: Final = 16 * 1536 + 8 * 5 * 1280
"""HuMo keeps for every latent frame 16 audio tokens of 1536 channels and the padded input of 8 x 5 x 1280 they were made of."""

CAMERA_CHANNELS: Final = 24 * 8 * 8
"""Numbers of a camera path for one latent cell: 24 for every pixel (comfy/ldm/wan/model.py, WanCamAdapter)."""

FACES_AT_ONCE: Final = 8
"""Faces that Animate encodes at once (comfy/ldm/wan/model_animate.py, after_patch_embedding)."""

FACE_CELLS: Final = 32 * (2 * 512 * 512 + 516 * 516 + 513 * 513)
"""Numbers of one face of 512 x 512 at the peak of its encoder: two activations, one padded and one blurred (Blur)."""

MOTION_FRAMES: Final = 3
"""Entries that S2V's motion adds to the timesteps, which it doubles (comfy/ldm/wan/model.py, WanModel_S2V.forward_orig)."""

_Block = Literal["first", "later"]
"""Of a causal model: the first block of a clip fills the cache of the text."""


class _Choice(NamedTuple):
    """One possibility of what a backend leaves open."""

    fused_rope: bool
    fused_rms_norm: bool
    narrow_chain: bool = False
    """Eager RMSNorm as torch 2.4 to 2.6 chain it: cast before the weight is multiplied, one hidden-size tensor less."""


class _Moment(NamedTuple):
    """What is alive at one moment beside what stays through a forward, in bytes."""

    feed_forward: int = 0
    attention: int = 0
    hidden: int = 0
    cast: int = 0
    conditions: int = 0
    """What camera paths or faces are made into."""
    early: bool = False
    """Before the text, the timesteps and the audio are embedded."""

    @property
    def bytes(self) -> int:
        return self.feed_forward + self.attention + self.hidden + self.cast + self.conditions


def dit_forward(
    shape: DitShape,
    video: Video,
    backend: Backend | None = None,
    *,
    casts_weights: bool = False,
    scaled_matmul: bool = False,
    timesteps: int = 1,
) -> Estimate:
    """Peak allocated of one forward of `video.batch` clips, in bytes: no weights, no conditions, the latent's copy included.

    `casts_weights`: a layer's weight is cast to the compute dtype each time it runs (fp8 weights, any dtype but the compute's).
    `scaled_matmul`: products of fp8 weights on a card that has them, which take their input as fp8 as well (traced on 0.8.0 and
    0.33.0; mxfp8, traced on 0.33.0, takes 0.4 % more). Not traced with their kernels: nvfp4, whose smaller input should take
    some 6 % less, and integers, for which `integer_products` widens the band. `timesteps`: 1, or the latent frames where
    every frame has its own (2.2 5B from an image). Raises ValueError that names an argument out of range.
    """
    backend = _given(shape, video, backend)
    flag("casts_weights", casts_weights)
    flag("scaled_matmul", scaled_matmul)
    whole("timesteps", timesteps, 1, 1 << 20)
    return _dit_forward(shape, video, backend, casts_weights, scaled_matmul, timesteps, None)


INTEGER_ABOVE: Final[Mapping[int, float]] = MappingProxyType({8: 1.32, 4: 2.47})
"""Peak of a forward whose products are of integers, over that with fp8 products, by the bits of their inputs: traced on the
chain that runs without a kernel (0.33.0, 14B, 480p, 81 frames: 4,568 and 8,559 MiB to 3,480), which a kernel would not make."""


def integer_products(estimate: Estimate, bits: int) -> Estimate:
    """A forward with products of fp8, as wide as one with products of integers may be: their kernels were not traced.

    Raises ValueError that names `bits` unless it is 8 or 4.
    """
    typed("estimate", estimate, Estimate)
    one_of("bits", bits, tuple(INTEGER_ABOVE))
    said = f"Products of {bits}-bit integers were traced without their kernel: the upper bound is that of the chain."
    upper = max(estimate.upper, round(estimate.expected * INTEGER_ABOVE[bits]))
    return replace(estimate, upper=upper, assumptions=(*estimate.assumptions, said))


def causal_block(
    shape: DitShape,
    video: Video,
    backend: Backend | None = None,
    *,
    block_frames: int = 1,
    first: bool = False,
    casts_weights: bool = False,
    scaled_matmul: bool = False,
) -> Estimate:
    """Peak allocated of one forward of a causal model over `block_frames` latent frames of `video`, in bytes.

    The caches that it reads and writes are not in it (see caches.py), nor is that of the text, which the `first` block makes.
    `scaled_matmul` as for `dit_forward`; its layers are those of the plain model, and a causal one was not traced with it.

    Raises ValueError that names an argument out of range.
    """
    backend = _given(shape, video, backend)
    whole("block_frames", block_frames, 1, 1 << 16)
    flag("first", first)
    flag("casts_weights", casts_weights)
    flag("scaled_matmul", scaled_matmul)
    frames = min(block_frames, latent_frames(video.frames))
    block = Video(video.width, video.height, video_frames(frames), video.batch)
    return _dit_forward(shape, block, backend, casts_weights, scaled_matmul, max(1, frames), "first" if first else "later")


def _given(shape: object, video: object, backend: object) -> Backend:
    typed("shape", shape, DitShape)
    typed("video", video, Video)
    return checked(backend)


@functools.lru_cache(maxsize=256)
def _dit_forward(
    shape: DitShape, video: Video, backend: Backend, casts: bool, scaled: bool, timesteps: int, block: _Block | None
) -> Estimate:
    form = _Form(shape, video, backend, casts, scaled, timesteps, block)
    expected = form.terms(form.likely)
    total = sum(term.bytes for term in expected)
    others = [form.peak(choice) for choice in form.choices]
    lower, upper = min(total, *others), max(total, *others)
    said: list[str] = list(form.said)
    lower, upper = round(lower * (1 - RESIDUAL)), round(upper * (1 + RESIDUAL))
    if backend.attention != "flash":
        upper = max(upper, form.upper_without_flash())
    if backend.compiled:
        lower, upper = min(lower, form.least()), round(upper * (1 + COMPILED_ABOVE))
    if shape.variant in NOT_TRACED:
        upper = round(upper * (1 + NOT_TRACED_ABOVE))
    made = Estimate.of(expected, below=total - lower, above=upper - total, assumptions=tuple(said))
    return corrected(made, "dit", backend)


def _likely_fused(known: bool | None, likely: bool) -> bool:
    return likely if known is None else known


class _Form:
    """The sums of one forward."""

    def __init__(
        self, shape: DitShape, video: Video, backend: Backend, casts: bool, scaled: bool, timesteps: int, block: _Block | None
    ) -> None:
        self.shape = shape
        self.backend = backend
        self.casts = casts
        self.scaled = scaled
        self.block: _Block | None = block
        self.version = version_of(backend.comfyui)
        self.latent = shape.latent(video)
        self.tokens = shape.tokens(self.latent)
        self.size = backend.element_bytes
        self.hidden = self.latent.batch * self.tokens * shape.dim * self.size
        """One tensor of the hidden size: the unit of everything below."""
        self.wide = self.latent.batch * self.tokens * shape.ffn_dim * self.size
        self.timesteps = self._timesteps(timesteps)
        self.fixed = self._fixed()
        likely = _Choice(
            _likely_fused(backend.fused_rope, self.version >= FUSED_BY_DEFAULT),
            _likely_fused(backend.fused_rms_norm, self.version >= KITCHEN),
        )
        self.likely = likely
        self.choices = self._choices()
        self.said = self._said()

    def _timesteps(self, timesteps: int) -> int:
        """Entries of the time embedding: S2V has one for every latent frame and reference, doubled by a motion."""
        if self.shape.variant != "s2v":
            return timesteps
        frames = self.latent.frames + self.shape.reference_frames
        return 2 * frames + MOTION_FRAMES if self.shape.motion else frames

    def _choices(self) -> tuple[_Choice, ...]:
        rope = (True, False) if self.backend.fused_rope is None else (self.backend.fused_rope,)
        norm = (True, False) if self.backend.fused_rms_norm is None else (self.backend.fused_rms_norm,)
        plain = [_Choice(one, two) for one in rope for two in norm]
        return (*plain, *(choice._replace(narrow_chain=True) for choice in plain if not choice.fused_rms_norm))

    def _said(self) -> tuple[str, ...]:
        backend, said = self.backend, []
        if backend.comfyui is None:
            said.append(f"The version of ComfyUI is not known: taken for {_dotted(NEWEST_TRACED)}.")
        elif backend.comfyui[:2] > NEWEST_TRACED[:2]:
            said.append(
                f"ComfyUI {_dotted(backend.comfyui)} is newer than what was traced: taken for {_dotted(NEWEST_TRACED)}."
            )
        for known, likely, what in (
            (backend.fused_rope, self.likely.fused_rope, "rotary embedding"),
            (backend.fused_rms_norm, self.likely.fused_rms_norm, "RMSNorm"),
        ):
            if known is None:
                said.append(f"Whether {what} runs as one kernel is not known: taken for {'one' if likely else 'a chain'}.")
        if backend.attention == "sage":
            said.append("SageAttention also keeps 8 bit copies of its inputs: counted, not measured.")
        elif backend.attention == "split":
            said.append("Attention without flash sizes its pieces by what is free: the upper bound is ComfyUI's own figure.")
        elif backend.attention == "unknown":
            said.append("The attention is not known: taken for flash, up to ComfyUI's own figure without it.")
        if backend.compiled:
            said.append("The memory of a compiled model is not predicted: the band is wider.")
        if self.shape.variant in NOT_TRACED:
            said.append(f"The variant {self.shape.variant} was not traced: taken for the plain model, the band is wider.")
        return tuple(said)

    def _fixed(self) -> tuple[Term, ...]:
        """What is alive in every block; the first two from the start."""
        shape, latent, size = self.shape, self.latent, self.size
        batch = latent.batch
        rotary = ROTARY_BYTES * self.tokens
        if shape.variant in SECOND_TABLE and (shape.reference_frames or shape.motion):
            rotary += ROTARY_BYTES * latent.tokens
        # an embedded image stays beside the sequence that it was joined to
        text = batch * (TEXT_TOKENS + 2 * shape.image_tokens) * shape.dim * size
        time = batch * self.timesteps * 13 * shape.dim * size
        # the copy of the latent that is padded to whole patches; a causal block drops it
        given = 0 if self.block else latent.padded_cells * shape.in_channels * size
        if shape.variant == "scail":
            given += self._scail_inputs()
        reference = 0
        if shape.variant == "fun_control_2.2":
            reference = batch * shape.reference_frames * latent.tokens_per_frame * shape.dim * size
        audio = 0
        if shape.variant in ("s2v", "animate"):
            audio = batch * latent.frames * AUDIO_TOKENS * shape.dim * size
            if shape.variant == "s2v":
                audio += batch * latent.frames * shape.dim * size
        elif shape.variant == "humo":
            audio = batch * (latent.frames + shape.reference_frames) * HUMO_AUDIO * size
        return (
            Term("rotary table", rotary),
            Term("input latent", given),
            Term("text tokens", text),
            Term("time embedding", time),
            Term("reference tokens", reference),
            Term("face tokens" if shape.variant == "animate" else "audio tokens", audio),
        )

    def _scail_inputs(self) -> int:
        """SCAIL pads its pose and its reference as well."""
        latent, shape = self.latent, self.shape
        pose = latent._replace(rows=latent.rows // 2, columns=latent.columns // 2)
        reference = latent._replace(frames=shape.reference_frames)
        return (pose.padded_cells + reference.padded_cells) * shape.in_channels * self.size

    @property
    def vace(self) -> bool:
        return self.shape.variant == "vace"

    @property
    def keeps_result(self) -> bool:
        """The attention's result stays alive through the rest of the block: HuMo's block, and every one before SEPARATE_QK."""
        return self.shape.variant == "humo" or self.version < SEPARATE_QK

    def moments(self, choice: _Choice) -> tuple[_Moment, ...]:
        """What may be the peak."""
        return (*self._feed_forward(), *self._attention(choice), *self._cross_attention(choice), *self._embedding())

    def _feed_forward(self) -> tuple[_Moment, ...]:
        # the block's input, what came of its attentions, the modulated input of the first layer; VACE holds two of the main
        # path and the one before its projection beside, a causal block q and the result of its attention to the text
        hidden = 3 + 3 * self.vace + self.keeps_result + 2 * (self.block == "later")
        # the second layer's weight and its bias
        cast = self.shape.dim * (self.shape.ffn_dim + 1) * self.size if self.casts else 0
        narrow = self.wide // self.size if self.scaled else 0
        kept = self.wide if self.version >= FOLDED_FFN else 0
        return (
            _Moment(feed_forward=2 * self.wide, hidden=hidden * self.hidden),
            _Moment(feed_forward=self.wide + kept + narrow + self.hidden, hidden=hidden * self.hidden, cast=cast),
            _Moment(feed_forward=self.wide, hidden=hidden * self.hidden, cast=cast),
        )

    def _attention(self, choice: _Choice) -> tuple[_Moment, ...]:
        unit, shape, version = self.hidden, self.shape, self.version
        copies = shape.variant not in CONTIGUOUS_INPUT and version >= CONTIGUOUS
        base = 4 if self.vace else 1 + copies
        narrow = 2 * (unit // self.size) if self.backend.attention == "sage" else 0
        log_sum_exp = 4 * self.latent.batch * shape.heads * self.tokens
        cast = shape.dim * shape.dim * self.size if self.casts else 0
        # the modulated input, q, k, v and what comes out
        moments = [
            _Moment(attention=5 * unit + log_sum_exp + narrow, hidden=base * unit),
            _Moment(attention=4 * unit, hidden=base * unit, cast=cast),
        ]
        if choice.fused_rope and choice.fused_rms_norm:
            return tuple(moments)
        if version < CONTIGUOUS:
            chain = next(units for since, units in OLD_CHAIN if version >= since) + 2 * self.vace
            moments.append(_Moment(attention=(chain - base) * unit, hidden=base * unit))
            return tuple(moments)
        wider = 0 if self.size == 4 else 4 * unit // self.size
        one = 4 * unit // self.size
        if not choice.fused_rope:
            # of k: its norm, that in fp32, the rotated in fp32, the result; beside the modulated input and q
            last = unit if self.size != 4 else 0
            moments.append(_Moment(attention=3 * unit + wider + one + last, hidden=base * unit))
        if not choice.fused_rms_norm:
            chain = self._norm_chain(choice, unit, self.tokens)
            moments.append(_Moment(attention=3 * unit + chain, hidden=base * unit))
        return tuple(moments)

    def _norm_chain(self, choice: _Choice, tensor: int, tokens: int) -> int:
        """RMSNorm of a tensor step by step: it in fp32, that normalised, that weighted, and the reciprocal root of every token.

        As torch 2.7 and newer chain it; 2.4 to 2.6 cast before they weight.
        """
        wide = 4 * tensor // self.size
        first = 0 if self.size == 4 else wide
        last = tensor if choice.narrow_chain and self.size != 4 else wide
        return first + wide + last + 4 * self.latent.batch * tokens

    def _cross_attention(self, choice: _Choice) -> tuple[_Moment, ...]:
        """Larger than self-attention only for videos of fewer tokens than the text, or where the result of that is kept."""
        held = (2 + 3 * self.vace + self.keeps_result) * self.hidden
        text = self.latent.batch * TEXT_TOKENS * self.shape.dim * self.size
        both = text + self.latent.batch * self.shape.image_tokens * self.shape.dim * self.size
        # the normed input, q, what comes out and what is made of it; of an image as well
        pictures = 1 if self.shape.image_tokens else 0
        plain = _Moment(attention=(4 + pictures) * self.hidden + 2 * both, hidden=held)
        if choice.fused_rms_norm or self.version < CONTIGUOUS:
            return (plain,)
        # the norm of q beside the normed input, then that of the text's k
        of_query = 2 * self.hidden + self._norm_chain(choice, self.hidden, self.tokens)
        of_text = 2 * self.hidden + text + self._norm_chain(choice, text, TEXT_TOKENS)
        return (plain, _Moment(attention=of_query, hidden=held), _Moment(attention=of_text, hidden=held))

    def _embedding(self) -> tuple[_Moment, ...]:
        """Before the blocks: the peak of small videos whose weights are cast or whose conditions are large."""
        shape, latent = self.shape, self.latent
        square = shape.dim * shape.dim * self.size if self.casts else 0
        found = [_Moment(hidden=self.hidden, cast=6 * square, early=True)]
        if shape.variant in ("camera", "camera_2.2"):
            # the path at video resolution, made contiguous and folded to cells; three results of the adapter's convolutions
            path = 2 * latent.cells * CAMERA_CHANNELS * self.size
            found.append(_Moment(hidden=4 * self.hidden, conditions=path, cast=9 * square, early=True))
        elif shape.variant == "animate" and latent.frames > 1:
            faces = min(FACES_AT_ONCE, latent.batch * video_frames(latent.frames - 1))
            found.append(_Moment(hidden=2 * self.hidden, conditions=faces * FACE_CELLS * self.size, early=True))
        return tuple(found)

    def peak(self, choice: _Choice) -> int:
        """Bytes of the largest moment."""
        always, blocks = self._stays()
        return max(moment.bytes + always + (0 if moment.early else blocks) for moment in self.moments(choice))

    def _stays(self) -> tuple[int, int]:
        """What is alive from the start, and what only from the blocks on."""
        always = sum(term.bytes for term in self.fixed[:2])
        return always, sum(term.bytes for term in self.fixed[2:])

    def terms(self, choice: _Choice) -> tuple[Term, ...]:
        """The terms of the largest moment."""
        _, blocks = self._stays()
        peak = max(self.moments(choice), key=lambda moment: moment.bytes + (0 if moment.early else blocks))
        return (
            Term("feed-forward", peak.feed_forward),
            Term("self-attention", peak.attention),
            Term("hidden states", peak.hidden),
            Term("weight cast buffer", peak.cast),
            Term("camera path" if self.shape.variant.startswith("camera") else "faces", peak.conditions),
            *(self.fixed[:2] if peak.early else self.fixed),
        )

    def least(self) -> int:
        """What no compiler can do without: the block's input, one wide tensor and what it is made of."""
        return sum(term.bytes for term in self.fixed) + 2 * self.hidden + max(self.wide, 3 * self.hidden)

    def upper_without_flash(self) -> int:
        """SageAttention: v may be copied as well (SageAttention 2). Otherwise ComfyUI's own figure without flash."""
        sage = max(self.peak(choice) for choice in self.choices) + 3 * (self.hidden // self.size)
        if self.backend.attention == "sage":
            return round(sage * (1 + RESIDUAL))
        return max(
            sage,
            host_memory_required(self.latent, usage_factor=host_usage_factor(self.shape), element_bytes=self.size, flash=False),
        )


def _dotted(version: tuple[int, int, int]) -> str:
    return ".".join(str(part) for part in version)
