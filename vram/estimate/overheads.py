"""What comes on top of tensors: the driver's context, library workspaces, the allocator's rounding and its reserve."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from types import MappingProxyType
from typing import Final, Literal, NamedTuple

from ..units import GIB, MIB
from .backend import Backend
from .corrections import checked
from .dit import CONTIGUOUS_INPUT, FOLDED_FFN, FUSED_BY_DEFAULT, KITCHEN
from .dit_shape import DitShape
from .estimate import Estimate, Term
from .tokens import flag, one_of, short, typed, whole

CONTEXT: Final = (300 * MIB, 512 * MIB, 723 * MIB)
"""CUDA context and modules, outside torch's figures: 300 to 600 MiB are usual, 723 MiB were reported on the PyTorch forum."""

CUBLAS: Final = 8_519_680
"""cuBLAS workspace before Hopper, in bytes, for every handle and stream (pytorch issue 120925)."""

CUBLAS_HOPPER: Final = 32 * MIB
"""The same from Hopper (compute capability 9.0) on."""

CUBLASLT: Final = MIB
"""cublasLt workspace (pytorch, CUDABlas.cpp)."""

CUBLASLT_AMPERE: Final = 4 * MIB
"""From compute capability 8.0 on with 24 GiB or more."""

CUBLASLT_HOPPER: Final = 32 * MIB
"""From compute capability 9.0 on."""

BLOCK: Final = 512
"""The native allocator rounds every request up to this (c10/cuda/CUDACachingAllocator.cpp, kMinBlockSize)."""

SMALL: Final = MIB
SMALL_SEGMENT: Final = 2 * MIB
LARGE: Final = 10 * MIB
LARGE_SEGMENT: Final = 20 * MIB
"""Requests up to 1 MiB come out of segments of 2 MiB, up to 10 MiB out of 20 MiB, larger ones are rounded to 2 MiB (kSmallSize,
kSmallBuffer, kMinLargeAlloc, kLargeBuffer, kRoundLarge of the same file)."""

HOST_MINIMUM: Final = GIB * 8 // 10
"""ComfyUI keeps this free for any inference, before its reserve (comfy/model_management.py, minimum_inference_memory)."""

RESERVE: Final = 400 * MIB
RESERVE_WINDOWS: Final = 600 * MIB
RESERVE_WINDOWS_LARGE: Final = 700 * MIB
"""ComfyUI's EXTRA_RESERVED_VRAM: Linux, Windows, Windows with more than 15 GiB (comfy/model_management.py, 0.8 and 0.33);
--reserve-vram replaces it."""

STREAMS: Final = 2
"""Offload streams ComfyUI uses on NVIDIA, each with a buffer as large as the largest layer that is not on the card."""

Family = Literal[
    "dit_1.3b",
    "dit_14b",
    "dit_5b",
    "dit_animate",
    "dit_camera",
    "dit_humo",
    "dit_joined",
    "dit_motion",
    "dit_vace_1.3b",
    "dit_vace_14b",
    "image",
    "text",
    "vae_decode_2.1",
    "vae_decode_2.2",
    "vae_encode_2.1",
    "vae_encode_2.2",
]
"""Forwards whose events leave an allocator equally fragmented. `dit_joined`: reference tokens are joined to those of the video;
`dit_motion`: S2V that goes on from a motion."""


class Ratio(NamedTuple):
    """Peak reserved over peak allocated, in thousandths: the least, the median and the most that was simulated."""

    least: int
    usual: int
    most: int


RATIOS: Final[Mapping[tuple[str, str, bool], Ratio]] = MappingProxyType(
    {
        ("dit_1.3b", "fused", True): Ratio(1160, 1241, 1320),
        ("dit_1.3b", "fused", False): Ratio(1280, 1319, 1410),
        ("dit_1.3b", "rope", True): Ratio(1380, 1467, 1510),
        ("dit_1.3b", "rope", False): Ratio(1550, 1574, 1610),
        ("dit_1.3b", "norm", True): Ratio(1440, 1529, 1580),
        ("dit_1.3b", "norm", False): Ratio(1610, 1639, 1680),
        ("dit_14b", "fused", True): Ratio(1120, 1341, 1550),
        ("dit_14b", "fused", False): Ratio(1270, 1501, 1730),
        ("dit_14b", "rope", True): Ratio(1230, 1649, 1750),
        ("dit_14b", "rope", False): Ratio(1380, 1649, 1750),
        ("dit_14b", "norm", True): Ratio(1390, 1599, 1720),
        ("dit_14b", "norm", False): Ratio(1410, 1599, 1720),
        ("dit_5b", "fused", True): Ratio(1040, 1245, 1310),
        ("dit_5b", "fused", False): Ratio(1300, 1369, 1650),
        ("dit_5b", "rope", True): Ratio(1210, 1506, 1600),
        ("dit_5b", "rope", False): Ratio(1370, 1660, 1730),
        ("dit_5b", "norm", True): Ratio(1230, 1582, 1680),
        ("dit_5b", "norm", False): Ratio(1340, 1750, 1890),
        ("dit_animate", "fused", True): Ratio(1310, 1411, 1810),
        ("dit_animate", "fused", False): Ratio(1490, 1601, 2090),
        ("dit_animate", "rope", True): Ratio(1550, 1737, 2080),
        ("dit_animate", "rope", False): Ratio(1550, 1737, 2080),
        ("dit_animate", "norm", True): Ratio(1590, 1671, 1990),
        ("dit_animate", "norm", False): Ratio(1590, 1671, 1990),
        ("dit_camera", "fused", True): Ratio(1080, 1358, 1520),
        ("dit_camera", "fused", False): Ratio(1080, 1518, 1730),
        ("dit_camera", "rope", True): Ratio(1080, 1672, 1830),
        ("dit_camera", "rope", False): Ratio(1080, 1672, 1830),
        ("dit_camera", "norm", True): Ratio(1250, 1701, 1850),
        ("dit_camera", "norm", False): Ratio(1250, 1701, 1850),
        ("dit_humo", "fused", True): Ratio(1250, 1357, 1390),
        ("dit_humo", "fused", False): Ratio(1470, 1516, 1660),
        ("dit_humo", "rope", True): Ratio(1220, 1638, 1670),
        ("dit_humo", "rope", False): Ratio(1530, 1828, 1920),
        ("dit_humo", "norm", True): Ratio(1380, 1666, 1850),
        ("dit_humo", "norm", False): Ratio(1490, 1666, 1850),
        ("dit_joined", "fused", True): Ratio(1220, 1415, 1510),
        ("dit_joined", "fused", False): Ratio(1510, 1584, 1760),
        ("dit_joined", "rope", True): Ratio(1330, 1767, 1860),
        ("dit_joined", "rope", False): Ratio(1600, 1846, 2010),
        ("dit_joined", "norm", True): Ratio(1510, 1814, 2030),
        ("dit_joined", "norm", False): Ratio(1640, 1828, 2030),
        ("dit_motion", "fused", True): Ratio(1380, 1474, 1600),
        ("dit_motion", "fused", False): Ratio(1560, 1675, 1800),
        ("dit_motion", "rope", True): Ratio(1670, 1783, 1920),
        ("dit_motion", "rope", False): Ratio(1790, 1892, 2010),
        ("dit_motion", "norm", True): Ratio(1810, 2088, 2200),
        ("dit_motion", "norm", False): Ratio(1810, 2088, 2200),
        ("dit_vace_1.3b", "fused", True): Ratio(1030, 1078, 1120),
        ("dit_vace_1.3b", "fused", False): Ratio(1120, 1157, 1180),
        ("dit_vace_1.3b", "rope", True): Ratio(1230, 1289, 1330),
        ("dit_vace_1.3b", "rope", False): Ratio(1350, 1372, 1400),
        ("dit_vace_1.3b", "norm", True): Ratio(1270, 1341, 1380),
        ("dit_vace_1.3b", "norm", False): Ratio(1400, 1426, 1460),
        ("dit_vace_14b", "fused", True): Ratio(1080, 1102, 1320),
        ("dit_vace_14b", "fused", False): Ratio(1180, 1199, 1440),
        ("dit_vace_14b", "rope", True): Ratio(1230, 1406, 1430),
        ("dit_vace_14b", "rope", False): Ratio(1370, 1458, 1550),
        ("dit_vace_14b", "norm", True): Ratio(1300, 1433, 1510),
        ("dit_vace_14b", "norm", False): Ratio(1410, 1433, 1530),
        ("image", "", True): Ratio(1360, 1439, 1510),
        ("image", "", False): Ratio(1360, 1439, 1510),
        ("text", "", True): Ratio(1000, 1135, 1480),
        ("text", "", False): Ratio(1000, 1135, 1480),
        ("vae_decode_2.1", "clip", True): Ratio(1220, 1350, 1550),
        ("vae_decode_2.1", "clip", False): Ratio(1350, 1482, 1590),
        ("vae_decode_2.1", "one", True): Ratio(1490, 1642, 1660),
        ("vae_decode_2.1", "one", False): Ratio(1190, 1216, 1290),
        ("vae_decode_2.2", "clip", True): Ratio(1180, 1305, 1430),
        ("vae_decode_2.2", "clip", False): Ratio(1370, 1516, 1690),
        ("vae_decode_2.2", "one", True): Ratio(1120, 1147, 1190),
        ("vae_decode_2.2", "one", False): Ratio(1150, 1169, 1310),
        ("vae_encode_2.1", "clip", True): Ratio(1280, 1488, 1580),
        ("vae_encode_2.1", "clip", False): Ratio(1240, 1309, 1520),
        ("vae_encode_2.1", "one", True): Ratio(1010, 1040, 1420),
        ("vae_encode_2.1", "one", False): Ratio(1020, 1037, 1110),
        ("vae_encode_2.2", "clip", True): Ratio(1110, 1244, 1330),
        ("vae_encode_2.2", "clip", False): Ratio(1160, 1327, 1440),
        ("vae_encode_2.2", "one", True): Ratio(1030, 1043, 1120),
        ("vae_encode_2.2", "one", False): Ratio(1050, 1053, 1090),
    }
)
"""By family, kernels (DiT: all fused, eager RoPE, eager RMSNorm; VAE: a clip or one frame) and whether ComfyUI is as new as
FOLDED_FFN. Simulated: the native allocator replayed over the traces of tests/data/traces-0.33.json and traces-0.8.json. On a
real RTX 4090 a VAE's simulated decodes were 1 % low to 1.7 % high (InvokeAI pull request 9305)."""


def cuda_context() -> Estimate:
    """Bytes the driver takes before the first tensor; torch does not count them."""
    lower, expected, upper = CONTEXT
    return Estimate(expected, lower, upper, (Term("CUDA context", expected),))


def library_workspaces(capability: tuple[int, int] = (8, 0), card_total: int = 0) -> Estimate:
    """Workspaces of cuBLAS and cublasLt, in bytes: torch allocates them on first use and keeps them.

    Raises ValueError that names an argument out of range.
    """
    if not isinstance(capability, tuple) or len(capability) != 2:
        raise ValueError(f"capability must be two numbers, not {short(capability)}")
    whole("capability", capability[0], 0, 1000)
    whole("capability", capability[1], 0, 1000)
    whole("card_total", card_total)
    hopper = capability >= (9, 0)
    larger = capability >= (8, 0) and card_total >= 24 * GIB
    blas = CUBLAS_HOPPER if hopper else CUBLAS
    light = CUBLASLT_HOPPER if hopper else CUBLASLT_AMPERE if larger else CUBLASLT
    made = Estimate.of((Term("cuBLAS workspace", blas), Term("cublasLt workspace", light)), below=light, above=blas)
    return made


def host_reserve(*, windows: bool, card_total: int, reserve_vram: int | None = None) -> int:
    """Bytes ComfyUI leaves alone on purpose (EXTRA_RESERVED_VRAM); `reserve_vram`: of --reserve-vram. Raises ValueError that
    names an argument out of range."""
    flag("windows", windows)
    whole("card_total", card_total)
    if reserve_vram is not None:
        return whole("reserve_vram", reserve_vram)
    if not windows:
        return RESERVE
    return RESERVE_WINDOWS_LARGE if card_total > 15 * GIB else RESERVE_WINDOWS


def stream_buffers(largest_layer: int, streams: int = STREAMS) -> int:
    """Bytes of the buffers that weights pass through on their way to the card, where not all of them are there.

    Raises ValueError that names an argument out of range.
    """
    return whole("largest_layer", largest_layer) * whole("streams", streams, 0, 64)


def rounded(nbytes: int) -> int:
    """Bytes the native allocator takes from the card for one tensor when nothing is cached. Raises ValueError that names
    `nbytes`."""
    whole("nbytes", nbytes)
    if nbytes == 0:
        return 0
    if nbytes <= SMALL:
        return SMALL_SEGMENT
    if nbytes < LARGE:
        return LARGE_SEGMENT
    return -(-nbytes // SMALL_SEGMENT) * SMALL_SEGMENT


def dit_family(shape: DitShape) -> Family:
    """The family of a diffusion model's forwards."""
    typed("shape", shape, DitShape)
    if shape.motion:
        return "dit_motion"
    if shape.variant == "humo":
        return "dit_humo"
    if shape.variant in ("animate", "animate2"):
        return "dit_animate"
    if shape.variant in ("camera", "camera_2.2"):
        return "dit_camera"
    small = shape.dim < 2304
    if shape.variant == "vace":
        return "dit_vace_1.3b" if small else "dit_vace_14b"
    if shape.variant in CONTIGUOUS_INPUT:
        return "dit_joined"
    if small:
        return "dit_1.3b"
    return "dit_5b" if shape.dim < 4096 else "dit_14b"


def reserved(estimate: Estimate, family: Family, backend: Backend, *, one_frame: bool = False) -> Estimate | None:
    """Peak reserved where peak allocated is `estimate`; None where the allocator is not known or was not simulated.

    ComfyUI's default on most NVIDIA cards is cudaMallocAsync, whose pool fragments less: it was not simulated. `one_frame`: of
    a VAE, a single picture. Raises ValueError that names an argument out of range.
    """
    typed("estimate", estimate, Estimate)
    backend = checked(backend)
    one_of("family", family, FAMILY_NAMES)
    flag("one_frame", one_frame)
    if estimate.predicts != "peak_allocated":
        raise ValueError(f"estimate must predict peak_allocated, not {estimate.predicts}")
    if backend.allocator != "native":
        return None
    newest = backend.comfyui is None or backend.comfyui >= FOLDED_FFN
    kernels = _kernels(backend) if family.startswith("dit") else ("one" if one_frame else "clip",)
    if family in ("text", "image"):
        kernels = ("",)
    found = [RATIOS[family, kernel, newest] for kernel in kernels]
    expected = _times(estimate.expected, found[0].usual)
    lower = min(expected, _times(estimate.lower, min(ratio.least for ratio in found)))
    upper = max(expected, _times(estimate.upper, max(ratio.most for ratio in found)))
    terms = (*estimate.terms, Term("cached and fragmented by the allocator", expected - estimate.expected))
    return Estimate(
        expected,
        lower,
        upper,
        tuple(term for term in terms if term.bytes),
        (*estimate.assumptions, "What torch's own allocator reserves was simulated, not measured."),
        "peak_reserved",
        estimate.purpose,
    )


FAMILY_NAMES: Final = tuple(sorted({family for family, _, _ in RATIOS}))


def _kernels(backend: Backend) -> tuple[str, ...]:
    """What the kernels may be, the likely one first."""
    version = backend.comfyui
    norm = backend.fused_rms_norm
    rope = backend.fused_rope
    likely_norm = (version is None or version >= KITCHEN) if norm is None else norm
    likely_rope = (version is None or version >= FUSED_BY_DEFAULT) if rope is None else rope
    likely = "norm" if not likely_norm else "fused" if likely_rope else "rope"
    possible = {likely}
    if norm is not True:
        possible.add("norm")
    if norm is not False:
        possible |= {"fused"} if rope is True else {"rope"} if rope is False else {"fused", "rope"}
    return (likely, *sorted(possible - {likely}))


def _times(nbytes: int, thousandths: int) -> int:
    return round(nbytes * Fraction(thousandths, 1000))
