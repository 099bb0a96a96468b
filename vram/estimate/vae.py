"""What the WAN VAEs allocate to decode and encode, weights excluded: whole clips, closed forms by ComfyUI version.

A decode works through one or two latent frames at a time and keeps features between them, so its peak hardly grows with the
clip. Everything is counted per pixel of the video: features of the convolutions, the frames made so far, the latent. Read off
traces of the real classes on the `meta` device (ComfyUI 0.8.0 and 0.33.0, torch 2.13, 1 to 1601 frames, 64 to 1280 pixels):
the forms give those bytes exactly. Tiles are in tiling.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final, Literal, NamedTuple

from .backend import NEWEST_TRACED, OLDEST_TRACED, Backend
from .corrections import checked, corrected, version_of
from .estimate import Estimate, Term
from .tokens import Latent, Video, flag, one_of, typed, video_frames, whole

VaeKind = Literal["2.1", "2.2"]
Way = Literal["decode", "encode"]

KINDS: Final = ("2.1", "2.2")
STRIDES: Final[Mapping[str, int]] = MappingProxyType({"2.1": 8, "2.2": 16})
"""Pixels of one latent cell (comfy/sd.py, VAE.__init__)."""

CHANNELS: Final[Mapping[str, int]] = MappingProxyType({"2.1": 16, "2.2": 48})
"""Of the latent."""

BORDERS: Final[Mapping[str, int]] = MappingProxyType({"2.1": 2, "2.2": 4})
"""Pixels that a padded copy is wider and higher than the video: one cell of the layer on each side (the 2.2 VAE's layers have
half its resolution)."""

LONG: Final = 5
"""Latent frames from which on the features at the peak do not change any more."""

RESIDUAL: Final = 0.01
"""Band around the bracket: traces fit 18 readings of an RTX 4090 to 0.41 % and two of WanVideoWrapper to 0.2 % (InvokeAI pull
request 9305, WanVideoWrapper pull request 2042)."""

REGRESSED: Final = 3
"""torch 2.9 without its fix: a 16 bit VAE takes two to three times as much (pytorch issues 166643 and 177406, ComfyUI issue
10373)."""


class Peak(NamedTuple):
    """Bytes per pixel in 16 bit at the peak, without the frames and the latent, and per pixel of the padded border; both
    without and with cuDNN copying the input and output of a convolution to change their layout."""

    plain: float
    copied: float
    border: int = 0
    copied_border: int = 0


class _Table(NamedTuple):
    """Peaks of 1, 2, 3, 4 and more latent frames; of a decode also what is kept while its frames are joined."""

    peaks: tuple[Peak, Peak, Peak, Peak, Peak]
    joined: float = 0.0
    in_pairs: bool = False
    """Frames are worked on two latent ones at a time: one left over at the end is not at the peak."""


def _table(
    one: Peak, two: Peak, more: Peak, *, three: Peak | None = None, four: Peak | None = None, **rest: float | bool
) -> _Table:
    peaks = (one, two, three or more, four or more, more)
    return _Table(peaks, float(rest.get("joined", 0.0)), bool(rest.get("in_pairs", False)))


NEWEST: Final[Mapping[tuple[str, str], _Table]] = MappingProxyType(
    {
        ("2.1", "decode"): _table(
            Peak(774, 1254),
            Peak(6516, 7668),
            Peak(6756, 7908),
            four=Peak(6732, 7884),
            joined=4728,
            in_pairs=True,
        ),
        ("2.1", "encode"): _table(
            Peak(767, 959), Peak(4103, 5255), Peak(4402, 5554), three=Peak(4294, 5446), four=Peak(4391, 5543), in_pairs=True
        ),
        ("2.2", "decode"): _table(Peak(2250.375, 2506.375), Peak(7128.75, 9176.75), Peak(7664.75, 9712.75), joined=3592.75),
        ("2.2", "encode"): _table(Peak(645.25, 805.25), Peak(2761.25, 3561.25), Peak(2937, 3737)),
    }
)
"""0.18 and newer (commits 035414ed and 25b6d1d6 of comfy/ldm/wan/vae.py); traced on 0.33.0."""

MIDDLE: Final[Mapping[tuple[str, str], _Table]] = MappingProxyType(
    {
        ("2.1", "decode"): _table(Peak(3258.5, 4026.5), Peak(8161, 9889), Peak(8185, 10105), joined=4729),
        ("2.1", "encode"): _table(Peak(1925, 2693), Peak(5843, 7571), Peak(6264, 8184)),
        ("2.2", "decode"): NEWEST["2.2", "decode"],
        ("2.2", "encode"): NEWEST["2.2", "encode"],
    }
)
"""0.11 to 0.17 (commit 4e6a1b66): convolutions pad for themselves. Cited from traces of 0.17; one and two latent frames of the
2.1 VAE were not traced and are those of 0.8."""

OLDEST: Final[Mapping[tuple[str, str], _Table]] = MappingProxyType(
    {
        ("2.1", "decode"): _table(
            Peak(3258.5, 4026.5, 576, 1152), Peak(8161, 9889, 1152, 2304), Peak(8569, 10105, 1152, 2304), joined=4729
        ),
        ("2.1", "encode"): _table(Peak(1925, 2693, 576, 1152), Peak(5843, 7571, 1152, 2304), Peak(6648, 8184, 1152, 2304)),
        ("2.2", "decode"): _table(
            Peak(2634.375, 3274.375, 384, 1536),
            Peak(7640.75, 8920.75, 1536, 3072),
            Peak(8688.75, 9712.75, 1536, 3072),
            joined=3592.75,
        ),
        ("2.2", "encode"): _table(
            Peak(885.25, 1205.25, 240, 480), Peak(2761.25, 3481.25, 480, 960), Peak(3097, 3737, 480, 960)
        ),
    }
)
"""Before 0.11; traced on 0.8.0."""

SINCE: Final = ((0, 18, 0), NEWEST), ((0, 11, 0), MIDDLE), ((0, 0, 0), OLDEST)


class _Parts(NamedTuple):
    """A peak in bytes, its workspace apart."""

    features: int
    workspace: int
    frames: int
    latent: int

    @property
    def plain(self) -> int:
        return self.features + self.frames + self.latent


def vae_decode(
    kind: VaeKind,
    video: Video,
    backend: Backend | None = None,
    *,
    at_once: int = 1,
    output_on_card: bool = False,
    slow_conv3d: bool = False,
) -> Estimate:
    """Peak allocated of a decode to `video`, in bytes, the latent included.

    `at_once`: clips of the batch that ComfyUI decodes together, see `clips_at_once`. `output_on_card`: ComfyUI keeps its
    results on the card (--gpu-only). `slow_conv3d`: a torch with the conv3d regression of 2.9. Raises ValueError that names an
    argument out of range.
    """
    return _estimate(kind, "decode", video, checked(backend), at_once, output_on_card, slow_conv3d)


def vae_encode(
    kind: VaeKind,
    video: Video,
    backend: Backend | None = None,
    *,
    at_once: int = 1,
    output_on_card: bool = False,
    slow_conv3d: bool = False,
) -> Estimate:
    """Peak allocated of an encode of `video`, in bytes, its frames included. Image-to-video nodes encode a clip of the full
    length, padded with grey, so their video is the whole one.

    Arguments as for `vae_decode`. Raises ValueError that names an argument out of range.
    """
    return _estimate(kind, "encode", video, checked(backend), at_once, output_on_card, slow_conv3d)


def clips_at_once(free: int, host_required: int, batch: int) -> int:
    """Clips of a batch that ComfyUI decodes or encodes together: as many as its own figure for one fits into what is free.

    From comfy/sd.py, VAE.decode and encode, 0.8 and 0.33. Raises ValueError that names an argument out of range.
    """
    whole("free", free)
    whole("host_required", host_required)
    whole("batch", batch, 1)
    return max(1, min(batch, free // max(1, host_required)))


def host_decode_required(kind: VaeKind, latent: Latent, element_bytes: int = 2) -> int:
    """Bytes that ComfyUI itself makes room for before a decode; the batch is not counted (comfy/sd.py, VAE.__init__, 0.8 and
    0.33). 1.4 to 2.1 times what the decode allocates. Raises ValueError that names an argument out of range."""
    one_of("kind", kind, KINDS)
    typed("latent", latent, Latent)
    whole("element_bytes", element_bytes, 1, 8)
    if kind == "2.2":
        return 8000 * latent.rows * latent.columns * 256 * element_bytes
    return (2200 if latent.frames <= 4 else 7000) * latent.rows * latent.columns * 64 * element_bytes


def host_encode_required(kind: VaeKind, video: Video, element_bytes: int = 2) -> int:
    """The same before an encode, by the pixels that are left when its sides are cropped to whole cells."""
    one_of("kind", kind, KINDS)
    typed("video", video, Video)
    whole("element_bytes", element_bytes, 1, 8)
    stride = STRIDES[kind]
    pixels = (video.width // stride * stride) * (video.height // stride * stride)
    if kind == "2.2":
        return 3300 * pixels * element_bytes
    return (1500 if video.frames <= 4 else 6000) * pixels * element_bytes


def _estimate(
    kind: VaeKind, way: Way, video: Video, backend: Backend, at_once: int, output_on_card: bool, slow_conv3d: bool
) -> Estimate:
    one_of("kind", kind, KINDS)
    typed("video", video, Video)
    whole("at_once", at_once, 1, video.batch)
    flag("output_on_card", output_on_card)
    flag("slow_conv3d", slow_conv3d)
    size = backend.vae_element_bytes
    latent = video.latent(STRIDES[kind])
    parts = peak_parts(kind, way, latent, backend.comfyui, size)
    pixels = latent.rows * latent.columns * STRIDES[kind] ** 2
    if way == "decode":
        given = CHANNELS[kind] * latent.frames * latent.rows * latent.columns * size
    else:
        given = 3 * video.frames * pixels * size
    once = Estimate.of(_terms(parts, way, given, at_once))
    below = once.expected - (parts.plain + given) * at_once
    above = (parts.plain + parts.workspace + given) * at_once - once.expected
    lower, upper = once.expected - below, once.expected + above
    said = list(_said(kind, way, latent, backend, parts))
    if slow_conv3d or backend.slow_conv3d:
        upper *= REGRESSED
        said.append("This torch has a conv3d that may take two to three times the memory.")
    lower, upper = round(lower * (1 - RESIDUAL)), round(upper * (1 + RESIDUAL))
    made = Estimate(once.expected, lower, upper, once.terms, tuple(said))
    made = corrected(made, f"vae_{way}", backend)
    if output_on_card:
        name, kept = _output(kind, way, video.batch, latent)
        made = made.plus(kept, name)
    return made


def _output(kind: VaeKind, way: Way, batch: int, latent: Latent) -> tuple[str, int]:
    """The whole result in fp32 (0.33 may keep it in 16 bit: --fp16-intermediates)."""
    if way == "decode":
        pixels = latent.rows * latent.columns * STRIDES[kind] ** 2
        return "decoded video", 4 * 3 * batch * video_frames(latent.frames) * pixels
    return "encoded latent", 4 * CHANNELS[kind] * batch * latent.frames * latent.rows * latent.columns


def _terms(parts: _Parts, way: Way, given: int, at_once: int) -> tuple[Term, ...]:
    frames = "frames made so far" if way == "decode" else "frames in patches"
    return (
        Term("features of the convolutions", parts.features * at_once),
        Term("convolution workspace", parts.workspace // 2 * at_once),
        Term(frames, parts.frames * at_once),
        Term("latent", parts.latent * at_once),
        Term("latent as given" if way == "decode" else "video as given", given * at_once),
    )


def peak_parts(kind: VaeKind, way: Way, latent: Latent, comfyui: tuple[int, int, int] | None, element_bytes: int) -> _Parts:
    """The peak over one clip of `latent`, in bytes: its own parts and the most that a workspace adds. What is given to it (the
    latent, the video) is not in it."""
    version = version_of(comfyui)
    table = next(tables for since, tables in SINCE if version >= since)[kind, way]
    if not latent.frames or not latent.rows or not latent.columns:
        return _Parts(0, 0, 0, 0)
    peak = table.peaks[min(latent.frames, LONG) - 1]
    rows, columns = latent.rows * STRIDES[kind], latent.columns * STRIDES[kind]
    pixels = rows * columns
    edge = (rows + BORDERS[kind]) * (columns + BORDERS[kind]) - pixels

    def sized(halves: float) -> int:
        # every figure is in eighths of a byte at most, and for elements of two bytes
        return round(halves * 8) * pixels * element_bytes // 16

    frames = video_frames(latent.frames)
    counted = latent.frames
    if table.in_pairs and latent.frames >= LONG and latent.frames % 2 == 0:
        frames, counted = frames - 4, latent.frames - 1
    if way == "decode":
        made, coded = 3 * 2.0 * frames, CHANNELS[kind] * 2 / STRIDES[kind] ** 2 * latent.frames
    else:
        # the 2.2 VAE folds all frames into patches first; the 2.1 one takes them as they are given
        made = 3 * 2.0 * frames if kind == "2.2" else 0.0
        coded = 2 * CHANNELS[kind] * 2 / STRIDES[kind] ** 2 * counted
    features = sized(peak.plain) + peak.border * edge * element_bytes // 2
    with_copies = sized(peak.copied) + peak.copied_border * edge * element_bytes // 2
    found = _Parts(features, with_copies - features, sized(made), sized(coded))
    if way == "encode" or latent.frames == 1:
        return found
    # while all frames are joined they are there twice, and so are the features that were kept for the next one
    joined = _Parts(sized(table.joined), 0, sized(2 * 3 * 2.0 * video_frames(latent.frames)), found.latent)
    most = max(found.plain + found.workspace, joined.plain)
    base = found if found.plain >= joined.plain else joined
    return base._replace(workspace=most - base.plain)


def _said(kind: VaeKind, way: Way, latent: Latent, backend: Backend, parts: _Parts) -> tuple[str, ...]:
    said: list[str] = []
    version = backend.comfyui
    if version is None:
        said.append("The version of ComfyUI is not known: taken for the newest that was traced.")
    elif version[:2] > NEWEST_TRACED[:2]:
        said.append("This ComfyUI is newer than what was traced: taken for that.")
    elif version < OLDEST_TRACED:
        said.append("This ComfyUI is older than what was traced: taken for the oldest that was.")
    if parts.workspace:
        said.append("cuDNN may copy what its convolutions read and write: half of that is expected, none to all is the band.")
    if latent.frames == 1:
        said.append(f"A single frame: the {way} keeps no features for a next one.")
    elif kind == "2.1" and latent.frames <= 4:
        said.append(f"Up to 4 latent frames (13 frames): ComfyUI makes less room for the {way}.")
    return tuple(said)
