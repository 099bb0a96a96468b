"""A model's weights as ComfyUI places them: module by module, those that cost most to stream first."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable
from typing import Final, NamedTuple

PATCH_MATH_FACTOR: Final = 2
"""A LoRA-patched weight that streams takes twice its elements in the compute dtype (LOWVRAM_PATCH_ESTIMATE_MATH_FACTOR)."""


class Parameter(NamedTuple):
    """One tensor of a model, in bytes as it lies on the card."""

    name: str
    bytes: int
    elements: int
    compute_bytes: int | None = None
    """Bytes of one element in the dtype it is computed in where that is another one than it is stored in."""
    castable: bool = True
    """Its module is one of ComfyUI's own layers, which can compute with weights that are elsewhere. WAN's VAE norms
    (`.gamma`) and T5's layer norms are not."""


class Module(NamedTuple):
    """The smallest thing ComfyUI loads or unloads."""

    bytes: int
    streaming: int
    """Bytes with what casting or patching takes while it streams: what ComfyUI sorts by."""
    castable: bool = True


def load_order(parameters: Iterable[Parameter], patched: Collection[str] = (), empty: int = 0) -> tuple[Module, ...]:
    """Modules in the order ComfyUI fills a card with them (ModelPatcher._load_list and load, 0.8 and 0.33 alike).

    `patched` names the parameters that a LoRA changes. A module whose descendants have parameters too is not listed: ComfyUI
    leaves what it holds itself (`blocks.0.modulation`) to the moment everything is loaded. `empty` is the number of layers
    without weights (empty_layers): no file tells of them, but they are listed and make a partial unload's first buffer smaller.
    """
    held: defaultdict[str, list[Parameter]] = defaultdict(list)
    for parameter in parameters:
        held[parameter.name.rpartition(".")[0]].append(parameter)
    parents: set[str] = set()
    for name in held:
        while name:
            name = name.rpartition(".")[0]
            parents.add(name)
    entries: list[tuple[int, int, str, bool]] = []
    for name, own in held.items():
        if name in parents:
            continue
        size = sum(parameter.bytes for parameter in own)
        casts = all(parameter.castable for parameter in own)
        extra = 0
        for parameter in own:
            if casts and parameter.name.rpartition(".")[2] in ("weight", "bias"):
                extra += _while_streaming(parameter, parameter.name in patched)
        entries.append((size + extra, size, name, casts))
    entries.sort(reverse=True)
    modules = tuple(Module(size, streaming, casts) for streaming, size, _, casts in entries)
    return modules + (Module(0, 0),) * empty


def empty_layers(names: Iterable[str]) -> int:
    """Layers without weights in a WAN diffusion model, by its parameters' names: two norms a block, one in the head."""
    blocks = sum(name.endswith(".modulation") and ".blocks." in f".{name}" for name in names)
    return 2 * blocks + 1 if blocks else 0


def castable(name: str) -> bool:
    """Whether ComfyUI can stream this parameter's layer: all but the norms of WAN's VAE and of T5, by their names."""
    if name.endswith((".gamma", "logit_scale")):
        return False
    return not (name.endswith("layer_norm.weight") and ("encoder.block." in name or "encoder.final_layer_norm" in name))


def _while_streaming(parameter: Parameter, patched: bool) -> int:
    if patched:
        stored = parameter.bytes // parameter.elements if parameter.elements else 0
        return parameter.elements * (parameter.compute_bytes or stored) * PATCH_MATH_FACTOR
    return parameter.elements * parameter.compute_bytes if parameter.compute_bytes else 0
