"""What decides how weights are kept, and what the answer holds: rules of a card and its host, layers, the footprint."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from .estimate import Term

Cast = Literal["none", "cast", "native", "dequantise"]
"""What happens to a weight when its layer runs. `none`: it is used as it lies. `cast`: a copy in the compute type. `native`:
the card multiplies the stored type. `dequantise`: a copy is unpacked."""


@dataclass(frozen=True, slots=True)
class LoadRules:
    """What of a card and its host decides how weights are kept. Raises ValueError that names the number that cannot be."""

    weight_bytes: int = 2
    """One element of the type that ComfyUI picks for a WAN's weights: fp16 on every card but the oldest, fp32 on the CPU."""
    compute_bytes: int = 2
    """One element of the type it computes in: fp32 on Pascal and the CPU."""
    fp8_compute: bool = False
    """The card multiplies fp8 itself (compute capability 8.9 and newer)."""
    block_compute: bool = False
    """The card multiplies nvfp4 and mxfp8 itself (compute capability 10.0 and newer)."""
    card_total: int = 0
    """Bytes of the card, for the choice that depends on them."""
    minimum_inference: int = 0
    """What the host keeps free of weights (minimum_inference_memory), in bytes."""
    streams: int = 2
    """Weights streamed ahead of use: 2 on NVIDIA and AMD, else 0 (model_management.NUM_STREAMS)."""
    vae_bytes: int = 2
    comfyui: tuple[int, int, int] | None = None
    """Version; None: the newest."""

    def __post_init__(self) -> None:
        for name in ("weight_bytes", "compute_bytes", "vae_bytes"):
            if getattr(self, name) not in (1, 2, 4, 8):
                raise ValueError(f"{name} must be 1, 2, 4 or 8, not {getattr(self, name)}")
        for name in ("card_total", "minimum_inference", "streams"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, not {getattr(self, name)}")

    @classmethod
    def of_card(
        cls,
        capability: tuple[int, int],
        card_total: int,
        minimum_inference: int,
        *,
        streams: int = 2,
        comfyui: tuple[int, int, int] | None = None,
    ) -> LoadRules:
        """For an NVIDIA card of this compute capability (comfy/model_management.py should_use_fp16, supports_fp8_compute, ...).

        Pascal is taken to keep fp16 and compute in fp32, as ComfyUI does on the GeForce 10 series; older cards keep fp32.
        """
        return cls(
            weight_bytes=2 if capability >= (6, 0) else 4,
            compute_bytes=2 if capability >= (7, 0) else 4,
            fp8_compute=capability >= (8, 9),
            block_compute=capability >= (10, 0),
            card_total=card_total,
            minimum_inference=minimum_inference,
            streams=streams,
            vae_bytes=2 if capability >= (7, 0) else 4,
            comfyui=comfyui,
        )


class Module(NamedTuple):
    """A layer as ComfyUI places it: wholly on the card or wholly off it."""

    name: str
    bytes: int
    offload_bytes: int
    """What running it from off the card takes there by ComfyUI's own count: itself, its cast copy, its patches."""


@dataclass(frozen=True, slots=True)
class Footprint:
    """What a model takes. All numbers are bytes."""

    resident: int
    """On the card once wholly loaded."""
    booked: int
    """What ComfyUI says it weighs (`model_size()` of a patcher that is not dynamic). Equal to `resident` but for GGUF, where
    room to unpack the largest layer is booked with it."""
    staged_bytes: int
    """What `model_size()` says under DynamicVRAM: the tensors as the file has them. On the card they take `resident`."""
    largest_layer: int
    """The largest layer as it is kept: what one stream copies at once."""
    cast: Cast
    kept_fp8: bool | None = None
    """Plain fp8 stays fp8 (True) or becomes 16 bit, twice the bytes (False). None: the file is none, or the option decided."""
    transients: tuple[Term, ...] = ()
    """More, while a block of the model runs."""
    streaming: tuple[Term, ...] = ()
    """More, where part of the model is off the card: the copies that streams make ahead."""
    patching: tuple[Term, ...] = ()
    """More, for a moment when the model is loaded with LoRAs: the largest weight they change. No activation is held then."""
    modules: tuple[Module, ...] = ()
    """In the order ComfyUI places them."""
    integer_bits: int | None = None
    """Layers are multiplied as integers; the fewest bits that inputs of such a product have."""
    step: str | None = None
    """The choice that made it so, where the same file would take another size elsewhere."""
    assumptions: tuple[str, ...] = ()

    @property
    def packed(self) -> bool:
        """It is GGUF: a layer is unpacked by the loader's own code, which takes more than the copy that comes of it."""
        return self.booked > self.resident

    def placed(self, budget: int, streams: int) -> tuple[int, int]:
        """Bytes on the card when weights may take `budget`, and bytes that ComfyUI keeps free for streaming the rest.

        A replay of ModelPatcher.load (comfy/model_patcher.py, 0.8 and 0.33). Raises ValueError that names what is negative.
        """
        for name, value in (("budget", budget), ("streams", streams)):
            if value < 0:
                raise ValueError(f"{name} must not be negative, not {value}")
        on_card = buffer = 0
        for index, module in enumerate(self.modules):
            ahead = self.modules[index + 1 : index + 1 + streams]
            wanted = max(buffer, module.offload_bytes + sum(other.bytes for other in ahead))
            if on_card + module.bytes + wanted < budget:
                on_card += module.bytes
            else:
                buffer = wanted
        return on_card, buffer
