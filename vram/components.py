"""What part a model plays in making a video, and which models a pipeline, a manager of components or a plain object holds.

Nothing here knows diffusers or ComfyUI: things are told by the names of their classes, by the layers they have, and last
by the name they were found under. Looking moves nothing; what cannot be read is left out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from enum import Enum
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any, Final, NamedTuple

import torch


class ComponentRole(str, Enum):
    """The roles that memory policies tell apart; `clip_vision` is an OTHER with a name of its own in reports."""

    GENERATOR = "generator"
    TEXT_ENCODER = "text_encoder"
    VAE = "vae"
    CLIP_VISION = "clip_vision"
    OTHER = "other"


class FoundComponent(NamedTuple):
    """A model, the name it was found under and the part it plays."""

    name: str
    role: ComponentRole
    model: Any
    """A torch module, or an object shaped like ComfyUI's patchers: it has a `model` and says where that one is loaded."""


class _Rule(NamedTuple):
    role: ComponentRole
    pattern: re.Pattern[str]


_CLASS_RULES: Final = (
    # Adapters beside a generator carry its name (WanUni3CControlnet) and its layers, but leave and come by themselves.
    _Rule(ComponentRole.OTHER, re.compile(r"Control[Nn]et")),
    # AutoencoderKLWan, WanVAE, Wan2_1_VAE, AutoencodingEngine; the small ones: TAESD, TAEHV. Not WanVACE...
    _Rule(ComponentRole.VAE, re.compile(r"VAE|Vae|[Aa]uto[Ee]ncod|TAE[A-Z]")),
    # CLIPVisionModel, CLIPVisionModelProjection, SiglipVisionModel, WanImageEncoder. Before text: "CLIP" is in both.
    _Rule(ComponentRole.CLIP_VISION, re.compile(r"(CLIP|Clip|[Ss]ig[Ll]ip)\w*Vision|ImageEncoder")),
    # UMT5EncoderModel, T5EncoderModel, T5, UMT5XXlModel, WanT5Model; WanTEModel (ComfyUI's `te`); CLIPTextModel,
    # SDXLClipModel, WanTextEncoder. Before the generator: several of them begin with "Wan" and end with "Model".
    _Rule(ComponentRole.TEXT_ENCODER, re.compile(r"(^|[a-z_]|M)T5|TE\w*Model|Text(Encoder|Model|Transformer)|ClipModel")),
    # WanTransformer3DModel, WanVACETransformer3DModel, WanModel, WanModel_S2V, CausalWanModel, WanDiffusionWrapper.
    _Rule(ComponentRole.GENERATOR, re.compile(r"Wan\w*(Model|Transformer|Diffusion|Di[Tt])")),
    # ComfyUI's model_base writes the family in capitals: WAN21, WAN22_Animate, WAN_Animate2.
    _Rule(ComponentRole.GENERATOR, re.compile(r"^WAN")),
    # Generators of other families, so that a mixed graph is booked right: FluxTransformer2DModel, UNet2DConditionModel.
    _Rule(ComponentRole.GENERATOR, re.compile(r"Transformer[23]DModel|U[Nn]et\w*Model|DiT$")),
)

_NAME_RULES: Final = (
    _Rule(ComponentRole.OTHER, re.compile(r"control_?net")),
    _Rule(ComponentRole.VAE, re.compile(r"vae|first_stage|autoencoder")),
    _Rule(ComponentRole.CLIP_VISION, re.compile(r"image_enc|clip_vision|vision")),
    _Rule(ComponentRole.TEXT_ENCODER, re.compile(r"text_?enc|text_model|cond_stage|^clip(_[lgh])?$|t5|^te\d?$")),
    _Rule(ComponentRole.GENERATOR, re.compile(r"transformer|generator|unet|^dit\d?$|diffusion_model|denois|noise_model")),
)
"""The attribute's name comes last: it says what somebody calls a thing, its class and layers say what it is."""

_USUAL_NAMES: Final = (
    *("vae", "generator", "transformer", "transformer_2", "unet", "dit", "dit2", "high_noise_model", "low_noise_model"),
    *("text_encoder", "text_encoder_2", "clip", "image_encoder", "clip_vision", "model", "pipe", "pipeline"),
)
"""Read with getattr even where they are properties or slots; anything else is found in an object's own attributes."""

_WRAPPERS: Final = ("_orig_mod", "module", "patcher", "diffusion_model", "first_stage_model", "model", "base_model")
"""Where wrappers keep the model: torch.compile, DataParallel and FSDP, ComfyUI's CLIP and VAE, its patchers, PEFT."""

_PLAIN: Final = (
    *(str, bytes, int, float, complex, type, Enum, ModuleType, FunctionType, MethodType, BuiltinFunctionType),
    *(torch.Tensor, torch.device, torch.dtype),
)
"""What holds no model, whatever its attributes."""

_DEPTH: Final = 3
"""Levels below the source that are searched: an object that holds a pipeline whose parts are wrapped models needs 3."""

_MANY: Final = 64
"""A collection longer than this inside a source is data (a vocabulary, a cache), not a set of models."""


def role_of(name: str, model: object) -> ComponentRole:
    """The part that `model`, found under `name`, plays: by its class, else its layers, else its name."""
    return _own_role(model) or _first_match(_NAME_RULES, _last_word(name)) or ComponentRole.OTHER


def find_components(source: object) -> tuple[FoundComponent, ...]:
    """The models in a manager of components, a pipeline, a mapping, a plain object, a patcher or a thing that has one.

    Each model once, in the order found, under a name of its own. What is no model or cannot be read is left out.
    """
    found: list[FoundComponent] = []
    search = _Search()
    for name, model in search.models("", source, _DEPTH):
        name = _apart(name or _class_name(_core(model)), {other.name for other in found})
        found.append(FoundComponent(name, role_of(name, model), model))
    return tuple(found)


class _Search:
    """One walk through a source. Remembers what it saw, so that cycles end and a shared model is listed once."""

    def __init__(self) -> None:
        self._seen: dict[int, object] = {}
        """By id, with the object itself: one that a property made for us must not hand its id on to the next."""

    def models(self, name: str, thing: object, depth: int) -> Iterator[tuple[str, object]]:
        patcher = _read(thing, "patcher")
        if _is_patcher(patcher):
            thing = patcher
        model = _is_module(thing) or _is_patcher(thing)
        if not model and not _may_hold_models(thing):
            return
        core = _core(thing) if model else thing
        if id(core) in self._seen:
            return
        self._seen[id(core)] = core
        if model and not _is_bundle(thing):
            if not _is_module(thing) or _has_weights(thing):
                yield name, thing
        elif depth:
            for part_name, part in _parts(thing, outermost=depth == _DEPTH):
                yield from self.models(_join(name, part_name), part, depth - 1)


def _own_role(model: object) -> ComponentRole | None:
    """The role by class and layers, of the model or of what it wraps; None if neither tells."""
    layer, seen = model, set[int]()
    while layer is not None and id(layer) not in seen:
        seen.add(id(layer))
        role = _role_by_class(layer) or _role_by_layers(layer)
        if role is not None:
            return role
        layer = _wrapped(layer)
    return None


def _role_by_class(model: object) -> ComponentRole | None:
    """By the names along the MRO, the most derived first: a subclass of somebody else's keeps its parent's role."""
    for cls in type(model).__mro__:
        if (role := _first_match(_CLASS_RULES, cls.__name__)) is not None:
            return role
    return None


def _role_by_layers(model: object) -> ComponentRole | None:
    # ComfyUI marks the patcher of every text encoder, whatever its class.
    if _is_patcher(model) and _read(model, "is_clip") is True:
        return ComponentRole.TEXT_ENCODER
    if not _is_module(model):
        return None
    has = {name for name, layer in _children(model) if layer is not None}
    # ComfyUI's BaseModel, of every family, keeps the network in `diffusion_model`.
    if "diffusion_model" in has:
        return ComponentRole.GENERATOR
    # A diffusion transformer: latents cut into patches, blocks, and a projection back to latents.
    if {"patch_embedding", "blocks"} <= has and has & {"head", "proj_out"}:
        return ComponentRole.GENERATOR
    # Tokens looked up in a table, then encoded. Before the VAE: a whole T5 has a decoder too, a VAE has no such table.
    if has & {"shared", "embed_tokens", "token_embedding"} and has & {"encoder", "layers", "blocks"}:
        return ComponentRole.TEXT_ENCODER
    # Pixels to latents and back, with a 1x1x1 convolution at the latents: diffusers' two names, WAN's own conv1 and conv2.
    if {"encoder", "decoder"} <= has and has & {"quant_conv", "post_quant_conv", "conv1", "conv2"}:
        return ComponentRole.VAE
    # An image tower: `visual` in open_clip and WAN's own CLIP, `vision_model` in others; in transformers 5 the layers lie bare.
    if has & {"visual", "vision_model"} or {"embeddings", "encoder", "post_layernorm"} <= has:
        return ComponentRole.CLIP_VISION
    return None


def _wrapped(model: object) -> object | None:
    """What a wrapper wraps: under a usual name, else its only child (`WanTEModel.umt5xxl` has a name of its own)."""
    for name in _WRAPPERS:
        inner = _read(model, name)
        if inner is not model and (_is_module(inner) or _is_patcher(inner)):
            return inner
    children = _children(model)
    return children[0][1] if len(children) == 1 else None


def _core(model: object) -> object:
    """The module that two clones of a patcher, or a module and its compiled form, share."""
    if not _is_module(model):
        inner = _read(model, "model")
        return model if inner is None else _core(inner) if _is_module(inner) else inner
    compiled = _read(model, "_orig_mod")
    return compiled if _is_module(compiled) else model


def _is_bundle(thing: object) -> bool:
    """A module that is itself the pipeline: no one part, but with parts of its own, a generator or a VAE among them.

    Two towers alone make no pipeline: a text encoder that also sees is one model.
    """
    if not _is_module(thing) or _role_by_class(thing) or _role_by_layers(thing):
        return False
    roles = [role for _, child in _children(thing) if (role := _own_role(child))]
    return len(roles) > 1 and (ComponentRole.GENERATOR in roles or ComponentRole.VAE in roles)


def _is_module(thing: object) -> bool:
    return issubclass(type(thing), torch.nn.Module)


def _is_patcher(thing: object) -> bool:
    """Shaped like ComfyUI's patchers. Its `model` is mostly a torch module, but no law says so."""
    if _is_module(thing) or not _may_hold_models(thing) or _read(thing, "model") is None:
        return False
    return _read(thing, "load_device") is not None or callable(_read(thing, "model_size"))


def _may_hold_models(thing: object) -> bool:
    """Not by being callable: pipelines are."""
    return thing is not None and not issubclass(type(thing), _PLAIN)


def _has_weights(module: Any) -> bool:
    """A module without a parameter or buffer (a loss, an identity) takes no memory: there is nothing to place."""
    return bool(_guarded(lambda: next(module.parameters(), None) is not None or next(module.buffers(), None) is not None))


def _parts(thing: object, *, outermost: bool) -> list[tuple[str, object]]:
    """What a thing holds, by name: its items, its `components`, or its attributes."""
    if issubclass(type(thing), Mapping):
        return _items(thing, outermost=outermost)
    if issubclass(type(thing), (list, tuple)):
        return _elements(thing)
    components = _read(thing, "components")
    if issubclass(type(components), Mapping):
        named = _items(components, outermost=True)
        if any(_is_module(part) or _is_patcher(part) for _, part in named):
            return named
    return _attributes(thing)


def _items(mapping: Any, *, outermost: bool) -> list[tuple[str, object]]:
    keys = _guarded(lambda: list(mapping) if outermost or len(mapping) <= _MANY else []) or []
    items = [(key, _guarded(lambda key=key: mapping[key])) for key in keys if type(key) is str]
    # diffusers' ComponentsManager files a component under `name_id(component)`.
    return [(key.removesuffix(f"_{id(value)}"), value) for key, value in items]


def _elements(sequence: Any) -> list[tuple[str, object]]:
    elements = _guarded(lambda: list(sequence) if len(sequence) <= _MANY else []) or []
    return [(str(index), element) for index, element in enumerate(elements)]


def _attributes(thing: object) -> list[tuple[str, object]]:
    """Children of a module, then an object's own public attributes, then usual names that are properties or slots."""
    own = _guarded(lambda: dict(vars(thing))) or {}
    attributes = dict(_children(thing)) | {name: value for name, value in own.items() if not str(name).startswith("_")}
    attributes |= {name: _read(thing, name) for name in _USUAL_NAMES if name not in attributes}
    return list(attributes.items())


def _children(model: Any) -> list[tuple[str, object]]:
    return (_guarded(lambda: list(model.named_children())) or []) if _is_module(model) else []


def _read(thing: object, name: str) -> Any:
    return _guarded(lambda: getattr(thing, name, None))


def _guarded(read: Callable[[], Any]) -> Any:
    """None for what cannot be read: a search through other people's objects must survive a property that raises."""
    try:
        return read()
    except Exception:
        return None


def _first_match(rules: tuple[_Rule, ...], text: str) -> ComponentRole | None:
    return next((rule.role for rule in rules if rule.pattern.search(text)), None)


def _last_word(name: str) -> str:
    """`pipe.text_encoders.0` was found under `text_encoders`."""
    words = [word for word in name.lower().split(".") if not word.isdigit()]
    return words[-1] if words else ""


def _join(holder: str, name: str) -> str:
    """A wrapper's `model` goes by the name of the wrapper: `vae`, not `vae.model`."""
    if not holder:
        return name
    return holder if name == "model" else f"{holder}.{name}"


def _apart(name: str, taken: set[str]) -> str:
    """Two collections of one manager may both hold a `transformer`; books need two names."""
    return next(free for free in (name, *(f"{name} ({n})" for n in range(2, len(taken) + 3))) if free not in taken)


def _class_name(thing: object) -> str:
    return type(thing).__name__
