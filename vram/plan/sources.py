"""Which model files reach a node: links followed by type through whatever patches, samplers or switches lie between."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from ..estimate import footprint
from ..estimate.checkpoint import Checkpoint
from ..estimate.wan import UNKNOWN, Architecture, identify
from .prompt import SWITCHES, Graph, Link, Unknown, is_wildcard
from .types import Card, HostRules, Library, MissingFileError, ModelRef, ModelRole

MODEL_TYPES: Final[Mapping[str, tuple[ModelRole, str]]] = {
    "MODEL": ("generator", "diffusion_models"),
    "CLIP": ("text_encoder", "text_encoders"),
    "VAE": ("vae", "vae"),
    "CLIP_VISION": ("clip_vision", "clip_vision"),
    "AUDIO_ENCODER": ("other", "audio_encoders"),
    "MODEL_PATCH": ("other", "model_patches"),
    "CONTROL_NET": ("other", "controlnet"),
    "UPSCALE_MODEL": ("other", "upscale_models"),
}
"""Link types that carry a model: its role, and the model folder a loader of it reads."""

CARRIERS: Final = {"GUIDER": "MODEL"}
"""Link types that carry a model inside something else."""

WHOLE_CHECKPOINTS: Final = "checkpoints"
"""The folder of files that hold diffusion model, text encoder and VAE together."""

PART_PREFIXES: Final[Mapping[ModelRole, tuple[str, ...]]] = {
    "generator": ("model.diffusion_model.",),
    "text_encoder": ("text_encoders.", "cond_stage_model.", "conditioner."),
    "vae": ("first_stage_model.", "vae."),
}
"""What a whole checkpoint's keys begin with, by part (ComfyUI comfy/supported_models_base.py and supported_models.py)."""

LOAD_OPTIONS: Final = ("weight_dtype", "device", "type")
"""Inputs that make two loads of one file two models."""


class Sources(NamedTuple):
    """The models behind one link, and the LoRAs patched onto them on the way."""

    models: tuple[ModelRef, ...]
    loras: tuple[ModelRef, ...]


@dataclass(slots=True)
class SourceFinder:
    """Finds and sizes the models of one graph; `assumptions` and `unknown` collect what had to be said."""

    graph: Graph
    library: Library
    rules: HostRules
    card: Card
    assumptions: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    _found: dict[Link, Sources] = field(default_factory=dict)
    _refs: dict[tuple[object, ...], ModelRef] = field(default_factory=dict)

    @property
    def models(self) -> tuple[ModelRef, ...]:
        """Every model found so far, each once, in the order found."""
        return tuple(self._refs.values())

    def of_node(self, node_id: str) -> dict[str, Sources]:
        """Models that reach `node_id`, by the type of link they come through."""
        found: dict[str, Sources] = {}
        for name, link in self.graph.links(node_id):
            kind = self.graph.input_type(node_id, name)
            if kind in MODEL_TYPES:
                found[kind] = _merge(found.get(kind), self.behind(link, kind))
            elif kind in CARRIERS and link.node_id in self.graph.nodes:
                carried = CARRIERS[kind]
                inner = self.of_node(link.node_id).get(carried)
                if inner is not None:
                    found[carried] = _merge(found.get(carried), inner)
        return found

    def behind(self, link: Link, kind: str) -> Sources:
        """The models that the output `link` of type `kind` carries."""
        path: list[Link] = []
        loras: list[ModelRef] = []
        patches: list[ModelRef] = []
        here = link
        while True:
            if here in self._found:
                found = self._found[here]
                break
            if here in path or here.node_id not in self.graph.nodes:
                self._say(self.unknown, f"the {kind} of link {here.node_id}:{here.slot} has no source in this prompt")
                found = Sources((), ())
                break
            path.append(here)
            onward = [source for name, source in self.graph.links(here.node_id) if self._carries(here.node_id, name, kind)]
            if self.graph.class_of(here.node_id) in SWITCHES:
                self._note_open_switch(here.node_id)
            loras.extend(self._lora(here.node_id, kind))
            patches.extend(self._patches(here.node_id, kind))
            if len(onward) == 1:
                here = onward[0]
                continue
            if onward:
                parts = [self.behind(source, kind) for source in onward]
                self._say(self.assumptions, f"{self.graph.title(here.node_id)} merges {len(parts)} models; each counts")
                found = parts[0]
                for part in parts[1:]:
                    found = _merge(found, part)
            else:
                found = Sources(self._load(here, kind), ())
            break
        result = Sources((*found.models, *patches), tuple(dict.fromkeys((*found.loras, *reversed(loras)))))
        self._found[link] = result
        return result

    def _patches(self, node_id: str, kind: str) -> tuple[ModelRef, ...]:
        """Models that this node adds to the one that passes through it: ComfyUI loads them with it."""
        if kind != "MODEL":
            return ()
        added = (link for name, link in self.graph.links(node_id) if self.graph.input_type(node_id, name) == "MODEL_PATCH")
        return tuple(model for link in added for model in self.behind(link, "MODEL_PATCH").models)

    def _carries(self, node_id: str, name: str, kind: str) -> bool:
        declared = self.graph.input_type(node_id, name)
        return declared == kind or (is_wildcard(declared) and self.graph.class_of(node_id) in SWITCHES)

    def _note_open_switch(self, node_id: str) -> None:
        taken = self.graph.taken_branch(node_id)
        if isinstance(taken, Unknown):
            self._say(
                self.assumptions,
                f"{self.graph.title(node_id)} may take either branch ({taken.reason}); both are counted",
            )

    def _lora(self, node_id: str, kind: str) -> list[ModelRef]:
        """The LoRA that this node patches onto the model, if it is a node that does."""
        found: list[ModelRef] = []
        if kind not in ("MODEL", "CLIP"):
            return found
        for name in self.graph.inputs(node_id):
            if not name.startswith("lora_name") and name != "lora":
                continue
            file = self.graph.value(node_id, name)
            strength = self.graph.value(node_id, "strength_model")
            if not isinstance(file, str) or file == "None" or strength == 0:
                continue
            found.append(self._ref(node_id, "lora", "loras", file, self._size_lora))
        return found

    def _load(self, link: Link, kind: str) -> tuple[ModelRef, ...]:
        """The files that the loader at `link` reads: every text value that names a file of the folder its type needs."""
        node_id = link.node_id
        spec = self.graph.spec(node_id)
        if spec is None:
            self._say(self.unknown, f"{self.graph.title(node_id)} is of a class this ComfyUI does not have")
            return ()
        role, folder = MODEL_TYPES[kind]
        named = [
            (name, value)
            for name in dict.fromkeys((*self.graph.inputs(node_id), *spec.inputs))
            if isinstance(value := self.graph.value(node_id, name), str) and value
        ]
        for where in (folder, WHOLE_CHECKPOINTS):
            refs = tuple(
                self._ref(node_id, role, where, value, self._sizer(role, node_id))
                for _, value in named
                if self._has(where, value)
            )
            if refs:
                return refs
        for name, value in named:
            if name.endswith("_name"):
                try:
                    self.library(folder, value)
                except MissingFileError as error:
                    self._say(self.unknown, f"{self.graph.title(node_id)}: {error}")
                return (ModelRef(node_id, role, value, "", None, None, "unknown"),)
        self._say(self.unknown, f"{self.graph.title(node_id)} makes a {kind} that no file names, so it can't be sized")
        return ()

    def _has(self, folder: str, value: str) -> bool:
        try:
            self.library(folder, value)
        except MissingFileError:
            return False
        return True

    def _ref(
        self,
        node_id: str,
        role: ModelRole,
        folder: str,
        file: str,
        size: Callable[[Checkpoint, Architecture], tuple[int, bool]],
    ) -> ModelRef:
        values = (self.graph.value(node_id, name) for name in LOAD_OPTIONS)
        options = " ".join("" if isinstance(value, Unknown) else repr(value) for value in values).strip()
        key = (role, folder, file, options)
        if key in self._refs:
            return self._refs[key]
        try:
            checkpoint = self.library(folder, file)
        except MissingFileError as error:
            self._say(self.assumptions, f"{self.graph.title(node_id)}: {error}; it is not counted")
            ref = ModelRef(node_id, role, file, "", None, None, "unknown")
        else:
            part = _part(checkpoint, role) if folder == WHOLE_CHECKPOINTS else checkpoint
            architecture = identify(part)
            if architecture is UNKNOWN or (role == "generator" and architecture.kind != "dit"):
                what = f"the {role.replace('_', ' ')} in {file}" if part is not checkpoint else file
                self._say(self.assumptions, f"{what} is no WAN model we know; its weights are counted by their dtypes alone")
            resident, on_card = size(part, architecture)
            ref = ModelRef(
                node_id=node_id,
                role=role,
                file=file,
                path=checkpoint.path,
                file_bytes=part.tensor_bytes,
                resident_bytes=resident,
                architecture=architecture.name,
                dim=architecture.dim,
                usage_factor=architecture.usage_factor,
                spatial_stride=architecture.spatial_stride,
                on_card=on_card,
                options=options,
            )
        self._refs[key] = ref
        return ref

    def _sizer(self, role: ModelRole, node_id: str) -> Callable[[Checkpoint, Architecture], tuple[int, bool]]:
        def size(checkpoint: Checkpoint, architecture: Architecture) -> tuple[int, bool]:
            if role == "generator":
                weight_dtype = self.graph.value(node_id, "weight_dtype")
                return footprint.diffusion_model_bytes(
                    checkpoint,
                    weight_dtype=weight_dtype if isinstance(weight_dtype, str) else "default",
                    compute_bytes=self.rules.compute_bytes,
                    fp8_compute=self.rules.fp8_compute,
                    card_total=self.card.total,
                    minimum_inference=self.rules.minimum_inference_bytes,
                ), True
            if role == "text_encoder":
                on_card = self.rules.text_encoder_on_card and self.graph.value(node_id, "device") != "cpu"
                return footprint.text_encoder_bytes(checkpoint), on_card
            return footprint.cast_bytes(checkpoint, compute_bytes=self.rules.vae_compute_bytes), True

        return size

    @staticmethod
    def _size_lora(checkpoint: Checkpoint, architecture: Architecture) -> tuple[int, bool]:
        """A LoRA is merged into the weights it patches and takes no room of its own on the card afterwards."""
        return 0, False

    @staticmethod
    def _say(where: list[str], sentence: str) -> None:
        if sentence not in where:
            where.append(sentence)


def _merge(first: Sources | None, second: Sources) -> Sources:
    if first is None:
        return second
    return Sources(tuple(dict.fromkeys((*first.models, *second.models))), tuple(dict.fromkeys((*first.loras, *second.loras))))


def _part(checkpoint: Checkpoint, role: ModelRole) -> Checkpoint:
    """One part of a whole checkpoint, as if it were a file of its own."""
    prefixes = PART_PREFIXES.get(role, ())
    tensors = {}
    for name, tensor in checkpoint.tensors.items():
        prefix = next((prefix for prefix in prefixes if name.startswith(prefix)), None)
        if prefix is not None:
            bare = name.removeprefix(prefix)
            if role == "text_encoder":
                # text_encoders.umt5xxl.transformer.encoder...: the encoder's own name and wrapper come first
                bare = re.sub(r"^[^.]+\.(?:transformer\.)?(?=encoder\.|shared\.|spiece_model)", "", bare)
            tensors[bare] = tensor._replace(name=bare)
    return Checkpoint(checkpoint.path, checkpoint.file_bytes, tensors, checkpoint.metadata)
