"""The values that cross the planner: host rules, vocabulary, chain, card and plan. All frozen, all bytes ints."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final, Literal, NamedTuple

from ..estimate.architecture import UNKNOWN, Architecture
from ..estimate.backend import Backend
from ..estimate.checkpoint import Checkpoint
from ..estimate.detection import HostDetection
from ..estimate.estimate import Estimate
from ..estimate.loading import Footprint
from ..estimate.media import MediaSize
from .modules import Module
from .ram import RamPlan

PhaseKind = Literal["text_encode", "clip_vision", "vae_encode", "audio_encode", "sample", "vae_decode", "other"]
ModelRole = Literal["generator", "text_encoder", "vae", "clip_vision", "lora", "other"]
Verdict = Literal["fits", "fits_with_offload", "does_not_fit", "unknown"]


class NodeSpec(NamedTuple):
    """The types of one node class, as its host declares them."""

    inputs: Mapping[str, str]
    """Input name to type: `MODEL`, `INT`, ...; `COMBO` for a list of choices."""
    outputs: tuple[str, ...]
    is_output: bool = False
    defaults: Mapping[str, object] = {}
    """Widget defaults, where declared."""
    output_names: tuple[str, ...] = ()


NodeVocabulary = Mapping[str, NodeSpec]
"""Node classes by name. A class that is not in it is unknown to the host."""


UNKNOWN_BACKEND: Final = Backend()


@dataclass(frozen=True, slots=True)
class HostRules:
    """How the host loads and evicts, as values: the planner replays them and asks the host nothing."""

    version: str = "unknown"
    patchers: Literal["legacy", "dynamic"] = "legacy"
    vram_state: str = "NORMAL_VRAM"
    reserve_bytes: int = 400 << 20
    """What the host keeps free beside inference: 400 MiB on Linux (ComfyUI model_management.EXTRA_RESERVED_VRAM)."""
    minimum_inference_bytes: int = round(0.8 * (1 << 30)) + (400 << 20)
    """Least memory the host keeps for a forward: 0.8 GiB + reserve (ComfyUI minimum_inference_memory)."""
    headroom_bytes: int = 256 << 20
    """Dynamic patchers drop pages below this much free memory (comfy-aimdo's default headroom)."""
    minimum_weight_ratio: float = 0.0
    """Share of the free memory that weights get at least: 0.0 on NVIDIA, 0.4 elsewhere (MIN_WEIGHT_MEMORY_RATIO)."""
    flash_attention: bool = True
    """Attention whose memory grows with the tokens only (PyTorch SDPA flash, xformers)."""
    fp8_compute: bool = False
    """The card multiplies fp8 itself (compute capability 8.9 and newer)."""
    text_encoder_on_card: bool = True
    compute_bytes: int = 2
    """Bytes of one element in the diffusion model's compute dtype: 2 on a GPU (fp16), 4 on the CPU."""
    vae_compute_bytes: int = 2
    card_total: int = 0
    """Bytes of the card, which sizes the tiles a VAE falls back to; 0: as small as they get."""
    block_compute: bool = False
    """The card multiplies nvfp4 and mxfp8 itself (compute capability 10.0 and newer)."""
    backend: Backend = UNKNOWN_BACKEND
    """The code that will run a forward, as far as its memory depends on it."""
    offload_streams: int = 2
    """Weights streamed ahead of use: 2 on NVIDIA and AMD, else 0 (ComfyUI model_management.NUM_STREAMS)."""
    smart_memory: bool = True
    """Leave other models on the card as far as there is room; False with --disable-smart-memory: they all leave wholly."""
    keeps_load_order: bool = True
    """Models loaded in one call come in the order they were asked for; ComfyUI 0.8 loads them in the order of a Python set."""
    gpu_only: bool = False
    """--gpu-only: no model has anywhere to go."""
    free_from_list: bool = False
    """Free memory is the total less what the list of loaded models says, as simulated cards count; real ones ask the driver."""


@dataclass(frozen=True, slots=True)
class Card:
    """One card at the moment of planning, in bytes."""

    name: str
    total: int
    free: int
    """Free for anybody, as the driver says."""
    safety_margin: int = 0
    """Never planned with."""


class HeldModel(NamedTuple):
    """A model the host has on the card already."""

    file: str | None
    """Absolute path it was loaded from, where the host knows."""
    name: str
    bytes: int
    bytes_on_card: int
    elastic: bool = False
    """Its pages lie outside torch's allocator (DynamicVRAM)."""
    pinned: bool = False
    """The user's policy keeps it on the card: nothing the host loads makes it leave."""


@dataclass(frozen=True, slots=True)
class ModelRef:
    """A model that the graph loads: one per file and load options, however many nodes share it."""

    node_id: str
    role: ModelRole
    file: str
    """As the widget names it."""
    path: str
    """Absolute, empty when the file is not there."""
    file_bytes: int | None
    """Sum of the file's tensors; None when the header could not be read."""
    resident_bytes: int | None
    """What it takes on the card, fully loaded, with this graph's load options."""
    architecture: str
    """`WAN 2.2 14B`, `UMT5-XXL`, ...; `unknown` if the keys are of no known architecture."""
    dim: int | None = None
    """Hidden size of a diffusion model: what ComfyUI's activation formula grows with."""
    usage_factor: float | None = None
    spatial_stride: int | None = None
    """Pixels of one latent cell, where the model fixes it."""
    on_card: bool = True
    """False when the graph puts it on the CPU."""
    options: str = ""
    """Load options that make two loads of one file two models."""
    patches: str = ""
    """Names the LoRAs on it, if any: ComfyUI exchanges what they patch by taking all weights off the card."""
    arch: Architecture = field(default=UNKNOWN, repr=False, compare=False)
    footprint: Footprint | None = field(default=None, repr=False, compare=False)
    modules: tuple[Module, ...] = field(default=(), repr=False, compare=False)
    """In the order the host places them."""
    detected: HostDetection | None = field(default=None, compare=False)
    """What the host says of a diffusion model that is no WAN."""

    @property
    def key(self) -> tuple[str, str, str]:
        """Equal for what the host keeps as one model."""
        return (self.path or self.file, self.role, self.options)


class Tile(NamedTuple):
    """The tiles of a tiled VAE, as its node asks for them: pixels, and frames of the video."""

    size: int
    overlap: int
    frames: int | None = None
    """None: tiles are not cut along time."""
    frames_overlap: int = 0


class PoseCache(NamedTuple):
    """What a WanAnimate2Cache on the model's way keeps while the sampler runs."""

    on_card: bool
    """False: in system memory."""
    bits: int
    """Of one value; 0: as wide as the model computes."""


@dataclass(frozen=True, slots=True)
class Phase:
    """One node's compute, with the models it needs at once."""

    kind: PhaseKind
    node_id: str
    class_type: str
    models: tuple[ModelRef, ...]
    loras: tuple[ModelRef, ...] = ()
    width: int | None = None
    height: int | None = None
    frames: int | None = None
    batch: int | None = None
    steps: int | None = None
    cfg: float | None = None
    title: str = ""
    tile: Tile | None = None
    """Of a tiled encode or decode."""
    window: int | None = None
    """Latent frames that context windows let a forward see at once."""
    patches: tuple[str, ...] = ()
    """Classes of the nodes that the model passes through on its way to the sampler."""
    reference_frames: int = 0
    """Reference pictures whose latents the conditioning carries: a frame of tokens each where the model joins them."""
    goes_on: bool = False
    """It goes on from an earlier clip, whose end it is given (S2V)."""
    own_placement: bool = False
    """Its models are placed by the pack they come from (WanVideoWrapper), not by ComfyUI."""
    blocks_to_swap: int | None = None
    """Of such a model, blocks that stay off the card and come one by one."""
    pose_cache: PoseCache | None = None
    """Of Animate 2: what no loader shows."""


@dataclass(frozen=True, slots=True)
class Chain:
    """The phases of a graph in the order they run, with what had to be assumed to say so."""

    phases: tuple[Phase, ...]
    models: tuple[ModelRef, ...]
    assumptions: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()
    """Why no verdict can be given, if so."""
    missing: tuple[str, ...] = ()
    """Node classes that the host does not have: what they do to sizes and models nobody knows."""
    nothing_to_do: bool = False
    """The host has the results of every output node."""
    ruled: tuple[tuple[tuple[str, str, str], str], ...] = ()
    """Models (by ModelRef.key) that pass through a policy node, with its id; a later node overrules an earlier one."""
    whole: bool = True
    """No node was left out because the host has its result."""


class MissingFileError(LookupError):
    """A model file that the graph names cannot be read; the message says which and why."""


class UnreadableFileError(MissingFileError):
    """The file is there, and its header is none that is known: `.pth` and the like."""

    def __init__(self, message: str, path: str, nbytes: int) -> None:
        super().__init__(message)
        self.path = path
        self.nbytes = nbytes
        """Of the whole file."""


Library = Callable[[str, str], Checkpoint]
"""(model folder, file name) -> header. Raises MissingFileError."""


Media = Callable[[str], MediaSize | None]
"""Name of an input file, as a loader's widget has it -> its size; None: no such file, or it does not say."""


def no_media(name: str) -> MediaSize | None:
    """No input file can be read."""
    return None


@dataclass(frozen=True, slots=True)
class Earlier:
    """A prompt that runs before the one that is planned: what is left of it to do, and what then leaves the card."""

    chain: Chain
    leaves: frozenset[tuple[str, str, str]] = frozenset()
    """Models (by ModelRef.key) that a policy sends off the card when the prompt is done."""
    pinned: frozenset[tuple[str, str, str]] = frozenset()
    """Models that a policy keeps there."""


@dataclass(frozen=True, slots=True)
class PhasePlan:
    """What one phase will do to the card."""

    phase: Phase
    resident: int
    """Bytes of this phase's weights on the card."""
    streamed: int
    """Bytes of weights that cross the bus in each step."""
    leaving: tuple[str, ...]
    """Files that leave the card, wholly or partly, to make room."""
    activation: Estimate | None
    """What it needs beside weights, in tensors; None where that is not known."""
    available: int
    """Bytes it can have for that, once the host has placed its weights."""
    peak: Estimate | None
    """Peak allocated on the card by everything the host holds: what must fit."""
    peak_reserved: Estimate | None = None
    """What a monitor will show of the host; None where the allocator's behaviour was not simulated."""
    others: int = 0
    """Bytes of other models that stay on the card."""
    batched: bool = False
    """cond and uncond run as one forward."""
    tiled: Tile | None = None
    """It does not fit whole, and the host does it in these tiles."""
    at_once: int = 1
    """Clips of the batch that a VAE decodes or encodes together."""

    @property
    def short(self) -> int:
        """Bytes missing by the expected value; 0 when it runs."""
        return max(0, self.activation.expected - self.available) if self.activation else 0


@dataclass(frozen=True, slots=True)
class Plan:
    """The answer for a whole graph; every face shows this one object."""

    plan_id: str
    verdict: Verdict
    message: str
    card: Card
    phases: tuple[PhasePlan, ...]
    models: tuple[ModelRef, ...]
    peak_phase: int | None
    assumptions: tuple[str, ...] = ()
    new_bytes: int = 0
    """What its largest phase needs beyond what is loaded already: what to make room for."""
    ram: RamPlan | None = None
    """System memory; None where it was not asked for."""
    reserve: int = 0
    """Bytes that the host leaves free beside what a forward needs, for others and its own surprises."""
    other_programs: int = 0
    """Bytes of the card that neither the host's models nor anybody has: the desktop, a browser, the driver's own."""
    settled: bool = False
    """Nothing of the graph computes with a model, whatever the card and the host's results are: there can be no other plan."""

    @property
    def bus_bytes(self) -> int:
        """Weights over the bus in the whole run; a sampler of unknown steps counts as one step."""
        return sum(planned.streamed * (planned.phase.steps or 1) for planned in self.phases)

    @property
    def runs(self) -> bool:
        return self.verdict != "does_not_fit"
