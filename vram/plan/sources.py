"""Which model files reach a node: links followed by type through whatever patches, samplers or switches lie between."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Final, NamedTuple

from ..estimate.architecture import identify
from ..estimate.checkpoint import Checkpoint
from ..estimate.footprint import LoadRules
from .ours import NOTHING, PARTS, PASSES, Part
from .prompt import SWITCHES, Graph, Link, Unknown, is_wildcard
from .sizing import Load, Sizing, load_rules
from .types import Card, HostRules, Library, MissingFileError, ModelRef, ModelRole, UnreadableFileError

MODEL_TYPES: Final[Mapping[str, tuple[ModelRole, str]]] = {
    "MODEL": ("generator", "diffusion_models"),
    "CLIP": ("text_encoder", "text_encoders"),
    "VAE": ("vae", "vae"),
    "CLIP_VISION": ("clip_vision", "clip_vision"),
    "AUDIO_ENCODER": ("other", "audio_encoders"),
    "MODEL_PATCH": ("other", "model_patches"),
    "CONTROL_NET": ("other", "controlnet"),
    "UPSCALE_MODEL": ("other", "upscale_models"),
    "WANVIDEOMODEL": ("generator", "diffusion_models"),
    "WANTEXTENCODER": ("text_encoder", "text_encoders"),
    "WANVAE": ("vae", "vae"),
}
"""Link types that carry a model: its role, and the model folder a loader of it reads. The last three are WanVideoWrapper's
(github.com/kijai/ComfyUI-WanVideoWrapper, nodes.py and nodes_model_loading.py)."""

OWN_PLACEMENT: Final = frozenset({"WANVIDEOMODEL", "WANTEXTENCODER", "WANVAE"})
"""Models of packs that place them by themselves: ComfyUI neither evicts them nor streams their weights."""

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

NO_LORA_NAMES: Final = frozenset({"lora_count", "lora_stack", "lora_syntax"})
"""Widgets of such nodes that begin alike and name no file."""

TEXT_ENCODER_KEYS: Final = ("lora_te", "text_encoder", "te_", "clip_", "text_model", "transformer.text_model")
"""What a LoRA's keys for a text encoder begin with (ComfyUI comfy/lora.py, model_lora_keys_clip)."""

LOAD_OPTIONS: Final = ("weight_dtype", "device", "type", "quantization", "base_precision", "precision")
"""Inputs that make two loads of one file two models; the last three are WanVideoWrapper's."""

PATCHED: Final = ("MODEL", "CLIP", "WANVIDEOMODEL")
"""Link types that a LoRA may be patched onto."""

LORA_LINKS: Final = frozenset({"LORA_STACK", "WANVIDLORA"})
"""Link types that carry LoRAs to the node that patches them: of the Efficiency and Comfyroll packs, and WanVideoWrapper's."""

LORA_STRENGTHS: Final = ("strength_model", "strength", "lora_wt", "model_weight", "model_str")
"""What the strength of a LoRA is called: ComfyUI's own loader, and those packs', each followed by the LoRA's number."""

OWN_NAMES: Final[Mapping[str, str]] = {name: name for name in LOAD_OPTIONS}
"""Of nodes whose widgets are called what the options are."""


class Sources(NamedTuple):
    """The models behind one link, and the LoRAs patched onto them on the way."""

    models: tuple[ModelRef, ...]
    loras: tuple[ModelRef, ...]
    through: tuple[str, ...] = ()
    """Nodes the model passes on its way from the loader, nearest to the loader first."""


@dataclass(slots=True)
class SourceFinder:
    """Finds and sizes the models of one graph; `assumptions` and `unknown` collect what had to be said."""

    graph: Graph
    library: Library
    rules: HostRules
    card: Card
    sizing: Sizing
    assumptions: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    _found: dict[Link, Sources] = field(default_factory=dict)
    _refs: dict[tuple[object, ...], ModelRef] = field(default_factory=dict)

    _load_rules: LoadRules = field(init=False)
    _loads: dict[tuple[str, str, str], tuple[Checkpoint, Load]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._load_rules = load_rules(self.rules, self.card)

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

    def loaded_by(self, node_id: str) -> dict[str, Sources]:
        """Text encoders that a node loads from its own widgets to encode with (WanVideoWrapper's WanVideoTextEncodeCached)."""
        spec = self.graph.spec(node_id)
        if spec is None or "WANVIDEOTEXTEMBEDS" not in spec.outputs:
            return {}
        _, folder = MODEL_TYPES["WANTEXTENCODER"]
        values = (self.graph.value(node_id, name) for name in self.graph.inputs(node_id))
        files = (value for value in values if isinstance(value, str) and value and self._has(folder, value))
        models = tuple(self._ref(node_id, "text_encoder", folder, file) for file in files)
        return {"WANTEXTENCODER": Sources(models, ())} if models else {}

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
        result = Sources(
            (*found.models, *patches),
            tuple(dict.fromkeys((*found.loras, *reversed(loras)))),
            # of steps further on than any in `found`, so none of them is in it: a dict of all would be made anew at every node
            (*found.through, *(step.node_id for step in reversed(path))),
        )
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
        if declared == kind or not is_wildcard(declared):
            return declared == kind
        class_type = self.graph.class_of(node_id)
        return class_type in SWITCHES or PASSES.get(class_type) == name

    def _note_open_switch(self, node_id: str) -> None:
        taken = self.graph.taken_branch(node_id)
        if isinstance(taken, Unknown):
            self._say(
                self.assumptions,
                f"{self.graph.title(node_id)} may take either branch ({taken.reason}); both are counted",
            )

    def _lora(self, node_id: str, kind: str) -> list[ModelRef]:
        """The LoRAs that this node patches onto the model, the last first, if it is a node that does."""
        if kind not in PATCHED or not any(name[:4].lower() == "lora" for name in self.graph.inputs(node_id)):
            return []
        found = [
            self._ref(owner, "lora", "loras", file)
            for owner, file in self._lora_files(node_id, kind, frozenset())
            if kind != "CLIP" or self._patches_text_encoder(file)
        ]
        return found[::-1]

    def _lora_files(self, node_id: str, kind: str, seen: frozenset[str]) -> Iterator[tuple[str, str]]:
        """Node and file of every LoRA that is named here, or in the stacks that are linked to it."""
        for name, link in self.graph.links(node_id):
            stacked = self.graph.input_type(node_id, name) in LORA_LINKS
            if stacked and link.node_id in self.graph.nodes and link.node_id not in seen:
                yield from self._lora_files(link.node_id, kind, seen | {node_id})
        for name, raw in self.graph.inputs(node_id).items():
            if not name.lower().startswith("lora"):
                continue
            if isinstance(raw, dict) and "lora" in raw:  # Power Lora Loader of the rgthree pack
                two = raw.get("strengthTwo")
                strength = two if kind == "CLIP" and two is not None else raw.get("strength", 1)
                file, used = raw["lora"], raw.get("on") is not False and strength != 0
            else:
                file, used = self.graph.value(node_id, name), self._is_used(node_id, name, kind)
            if used and isinstance(file, str) and file.lower() not in ("", "none") and name not in NO_LORA_NAMES:
                yield node_id, file

    def _is_used(self, node_id: str, name: str, kind: str) -> bool:
        """Whether the LoRA that widget `name` names has a strength, is switched on and is among those that count."""
        number = name.removeprefix("lora_name").removeprefix("lora")
        names = ("strength_clip",) if kind == "CLIP" else LORA_STRENGTHS
        if any(self.graph.value(node_id, strength + number) == 0 for strength in names):
            return False
        if self.graph.value(node_id, "switch" + number) == "Off":
            return False
        most, index = self.graph.value(node_id, "lora_count"), number.lstrip("_")
        return not (isinstance(most, int) and index.isdecimal() and int(index) > most)

    def _patches_text_encoder(self, file: str) -> bool:
        """Most LoRAs of video models go through a text encoder without a key for it; one that can't be read may have some."""
        try:
            keys = self.library("loras", file).tensors
        except MissingFileError:
            return True
        return any(key.startswith(TEXT_ENCODER_KEYS) for key in keys)

    def _load(self, link: Link, kind: str) -> tuple[ModelRef, ...]:
        """The files that the loader at `link` reads: every text value that names a file of the folder its type needs."""
        node_id = link.node_id
        spec = self.graph.spec(node_id)
        if spec is None:
            self._say(self.unknown, f"{self.graph.title(node_id)} is of a class this ComfyUI does not have")
            return ()
        role, folder = MODEL_TYPES[kind]
        part = PARTS.get((self.graph.class_of(node_id), link.slot))
        if part is not None:
            return self._one_of_several(node_id, role, folder, part)
        named = [
            (name, value)
            for name in dict.fromkeys((*self.graph.inputs(node_id), *spec.inputs))
            if isinstance(value := self.graph.value(node_id, name), str) and value
        ]
        for where in (folder, WHOLE_CHECKPOINTS):
            refs = tuple(self._ref(node_id, role, where, value) for _, value in named if self._has(where, value))
            if refs:
                return refs
        for name, value in named:
            if name.endswith("_name"):
                try:
                    self.library(folder, value)
                except UnreadableFileError as error:
                    if role == "other":
                        # small models beside the video's, which often come as .pth: their weights are nearly all of the file
                        self._say(self.assumptions, f"{value} is counted by its size on disk, since its header can't be read")
                        ref = ModelRef(node_id, role, value, error.path, error.nbytes, error.nbytes, "unknown")
                        return (self._refs.setdefault((role, folder, value, ""), ref),)
                    self._say(self.unknown, f"{self.graph.title(node_id)}: {error}")
                except MissingFileError as error:
                    self._say(self.unknown, f"{self.graph.title(node_id)}: {error}")
                return (ModelRef(node_id, role, value, "", None, None, "unknown"),)
        self._say(self.unknown, f"{self.graph.title(node_id)} makes a {kind} that no file names, so it can't be sized")
        return ()

    def _one_of_several(self, node_id: str, role: ModelRole, folder: str, part: Part) -> tuple[ModelRef, ...]:
        """The file behind one output of a loader of several models; none where none is chosen."""
        file = self.graph.value(node_id, part.file)
        if file == NOTHING and part.otherwise is not None:
            file = self.graph.value(node_id, part.otherwise)
        if not isinstance(file, str):
            self._say(self.unknown, f"which file {self.graph.title(node_id)} loads is not known before it runs")
            return ()
        return () if file == NOTHING else (self._ref(node_id, role, folder, file, part.options),)

    def _has(self, folder: str, value: str) -> bool:
        try:
            self.library(folder, value)
        except MissingFileError:
            return False
        return True

    def _ref(self, node_id: str, role: ModelRole, folder: str, file: str, widgets: Mapping[str, str] | None = None) -> ModelRef:
        """`widgets` names the load options of a node that has other names for them; None: each is called what it is."""
        widgets = OWN_NAMES if widgets is None else widgets
        values = (self._option(node_id, widgets, name) for name in LOAD_OPTIONS)
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
            ref = self._sized(node_id, role, file, options, checkpoint, folder == WHOLE_CHECKPOINTS, widgets)
        self._refs[key] = ref
        return ref

    def _option(self, node_id: str, widgets: Mapping[str, str], name: str) -> object:
        return self.graph.value(node_id, widgets[name]) if name in widgets else Unknown(f"it has no {name}")

    def _sized(
        self,
        node_id: str,
        role: ModelRole,
        file: str,
        options: str,
        checkpoint: Checkpoint,
        whole: bool,
        widgets: Mapping[str, str],
    ) -> ModelRef:
        part = _part(checkpoint, role) if whole else checkpoint
        if role == "lora":
            # a LoRA is merged into the weights it patches and takes no room of its own on the card afterwards
            architecture = identify(part)
            return ModelRef(
                node_id, role, file, part.path, part.tensor_bytes, 0, architecture.name, on_card=False, options=options
            )
        load = Load(role, self._weight_dtype(node_id, widgets), False, self._load_rules)
        sized = self.sizing.of(part, load)
        self._loads[(checkpoint.path, role, options)] = (part, load)
        architecture = sized.architecture
        if architecture.kind == "unknown" or (role == "generator" and architecture.kind != "dit"):
            what = f"the {role.replace('_', ' ')} in {file}" if part is not checkpoint else file
            known = f"{architecture.name}, no WAN model" if architecture.name != "unknown" else "no WAN model we know"
            self._say(self.assumptions, f"{what} is {known}; its weights are counted by their dtypes alone")
        for note in (*part.notes, *sized.footprint.assumptions):
            self._say(self.assumptions, f"{file}: {note}")
        on_card = True
        if role == "text_encoder":
            on_card = self.rules.text_encoder_on_card and self._option(node_id, widgets, "device") != "cpu"
        return ModelRef(
            node_id=node_id,
            role=role,
            file=file,
            path=checkpoint.path,
            file_bytes=sized.file_bytes,
            resident_bytes=sized.footprint.booked,
            architecture=architecture.name,
            dim=architecture.dim,
            usage_factor=architecture.usage_factor,
            spatial_stride=architecture.spatial_stride,
            on_card=on_card,
            options=options,
            arch=architecture,
            footprint=sized.footprint,
            modules=sized.modules,
            detected=sized.detected,
        )

    def _weight_dtype(self, node_id: str, widgets: Mapping[str, str]) -> str:
        """As UNETLoader's widget has it. WanVideoWrapper says `fp8_..._scaled` of a file that has its scales already."""
        asked = self._option(node_id, widgets, "weight_dtype")
        if isinstance(asked, str):
            return asked
        asked = self._option(node_id, widgets, "quantization")
        casts = isinstance(asked, str) and asked.startswith("fp8_") and "_scaled" not in asked
        return str(asked) if casts else "default"

    def patched(self, model: ModelRef, loras: Iterable[ModelRef]) -> ModelRef:
        """`model` with LoRAs on it: what streams then carries them along."""
        names = " ".join(f"{lora.node_id}:{lora.file}" for lora in loras)
        known = self._loads.get(model.key)
        if not names or known is None or model.role != "generator":
            return model
        part, load = known
        sized = self.sizing.of(part, load._replace(patched=True))
        return replace(model, patches=names, footprint=sized.footprint, modules=sized.modules)

    @staticmethod
    def _say(where: list[str], sentence: str) -> None:
        if sentence not in where:
            where.append(sentence)


def _merge(first: Sources | None, second: Sources) -> Sources:
    if first is None:
        return second
    return Sources(
        tuple(dict.fromkeys((*first.models, *second.models))),
        tuple(dict.fromkeys((*first.loras, *second.loras))),
        tuple(dict.fromkeys((*first.through, *second.through))),
    )


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
    return replace(checkpoint, tensors=tensors)
