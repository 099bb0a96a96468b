"""Models of more than one file: sharded safetensors with their index, and folders that diffusers and transformers write.

Only file names, the small JSON files beside the weights and the headers of the weights are read.
"""

import ntpath
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any, Final, NamedTuple

from .header import (
    Checkpoint,
    Source,
    TensorInfo,
    UnusableError,
    check_text,
    is_pickle_name,
    json_file,
    look,
    naming,
    refuse_pickle,
    show,
    source,
    speaking_of_the_disk,
)
from .safetensors import read_safetensors

CONFIG: Final = "config.json"
"""What `save_pretrained` of a model writes beside its weights (`CONFIG_NAME` in diffusers and in transformers)."""

PIPELINE: Final = "model_index.json"
"""What `save_pretrained` of a pipeline writes: the library and class of each sub-folder (diffusers' DiffusionPipeline)."""

DIFFUSERS_STEM: Final = "diffusion_pytorch_model"
"""Start of diffusers' weight files (`SAFETENSORS_WEIGHTS_NAME` in its utils/constants.py)."""

TRANSFORMERS_STEM: Final = "model"
"""Start of transformers' weight files (`SAFE_WEIGHTS_NAME` in its utils)."""

WEIGHTLESS: Final = re.compile(r".*(?:Scheduler|Tokenizer(?:Fast)?|Processor(?:Fast)?|FeatureExtractor|Guidance|Guider)")
"""Classes of components without weights: the endings that diffusers' and transformers' classes of these kinds have."""

_STEM = rf"(?:(?P<stem>{DIFFUSERS_STEM}|{TRANSFORMERS_STEM})(?:\.(?P<variant>[^.]+?))?|(?P<other>.+?))"

_FILE = re.compile(_STEM + r"(?:-(?P<part>\d{5})-of-(?P<parts>\d{5})(?:\.(?P<late>[^.]+))?)?\.safetensors")
"""`stem[.variant][-00001-of-00002].safetensors`; the variant of a part came last in diffusers' legacy form."""

_INDEX = re.compile(_STEM + r"\.safetensors(?:\.(?P<legacy>[^.]+))?\.index(?:\.(?P<late>[^.]+))?\.json")
"""`stem.safetensors.index[.variant].json`, or diffusers' legacy `stem.safetensors[.variant].index.json`."""

_NAMED = 8
"""Most names that a message lists."""


class _Weights(NamedTuple):
    """One complete set of weights in a folder; a folder can hold the same model several times."""

    variant: str
    """Such as "fp16"; "" is the one that is loaded if none is asked for."""
    listing: str
    files: tuple[str, ...]
    """All files, if no index (`listing`) names them."""

    @property
    def name(self) -> str:
        return self.listing or self.files[0]


def read_index(path: str) -> Checkpoint:
    """The tensors of all files that the index at `path` (`*.safetensors.index.json`) names. Raises UnusableError or, about
    one of these files, CheckpointError."""
    index, stamp = json_file(path, "this file")
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict):
        raise UnusableError(
            "this is not the index of a sharded model: it has no weight_map", "Choose the model's own file, or its folder."
        )
    parts: dict[str, list[str]] = {}
    for tensor, part in weight_map.items():
        check_text(tensor, "its weight_map")
        parts.setdefault(_beside(part, f"its weight_map puts tensor {show(tensor)} in"), []).append(tensor)
    if not parts:
        raise UnusableError("its weight_map names no tensors")
    if any(map(is_pickle_name, parts)):
        refuse_pickle(f"its weight_map names {_names(parts)}, and such a file is a pickle (a file of torch.save)")
    folder = os.path.dirname(path)
    _all_there(folder, parts)
    checkpoint = _joined(path, folder, parts)
    return replace(checkpoint, sources=(stamp, *checkpoint.sources), notes=_disagreements(index, checkpoint))


def read_folder(path: str) -> Checkpoint:
    """The tensors of the one model in the folder at `path`: its config.json, and one file or several parts. Several parts, or
    the index of some, say without a config.json too that the folder is a model.

    Where the same model lies there in several variants, the one that is loaded if none is asked for is counted, and a note
    names the others. Raises UnusableError or, about one of its files, CheckpointError.
    """
    stamp, names = _listed(path)
    if PIPELINE in names:
        folders = [name for name, _ in _components(path) if name in names]
        raise UnusableError("this is the folder of a pipeline, which has several models", f"Choose one: {_names(folders)}.")
    config: Mapping[str, Any] = {}
    sources = [stamp]
    if CONFIG in names:
        config_path = os.path.join(path, CONFIG)
        with naming(config_path):
            config, config_stamp = json_file(config_path, "this file")
        sources.append(config_stamp)
    elif not any(map(_is_sharding, names)):
        raise UnusableError("this is a folder, not a model file, and it has no config.json", "Choose a file or folder in it.")
    chosen, others = _choice(names, diffusers="_class_name" in config or CONFIG not in names)
    if chosen.listing:
        with naming(os.path.join(path, chosen.listing)):
            checkpoint = read_index(os.path.join(path, chosen.listing))
    else:
        checkpoint = _joined(path, path, dict.fromkeys(chosen.files, ()))
    notes = checkpoint.notes
    if chosen.variant:
        notes += (f"It is there only as the variant {show(chosen.variant)}.",)
    if others:
        notes += (f"The same model is also there as {_names(other.name for other in others)}, which is not counted.",)
    kind = "diffusers" if CONFIG in names else "sharded"
    return replace(checkpoint, path=path, format=kind, notes=notes, sources=(*sources, *checkpoint.sources))


def read_pipeline(path: str | os.PathLike[str]) -> Mapping[str, Checkpoint]:
    """The models of the diffusers pipeline in the folder at `path`, by the names of their sub-folders.

    Its model_index.json says which there are; schedulers, tokenizers and the like have no weights and are left out. Raises
    CheckpointError.
    """
    path = os.fsdecode(path)
    with naming(path):
        _, names = _listed(path)
        if PIPELINE not in names:
            raise UnusableError(
                "this is not the folder of a pipeline: it has no model_index.json", "Choose the folder with it."
            )
        models: dict[str, Checkpoint] = {}
        for name, kind in _components(path):
            folder = os.path.join(path, name)
            if not os.path.isdir(folder):
                raise UnusableError(f"its {name} ({kind}) is missing", f"Download the folder {name}.")
            with naming(folder):
                models[name] = read_folder(folder)
    return MappingProxyType(models)


def _components(path: str) -> Iterator[tuple[str, str]]:
    """Sub-folder and class of each component that has weights."""
    index_path = os.path.join(path, PIPELINE)
    with naming(index_path):
        index, _ = json_file(index_path, "this file")
        listed = [
            (_beside(name, "it has a component"), entry[1])
            for name, entry in sorted(index.items())
            # Others are options, such as boundary_ratio; a component that was left out is [null, null].
            if not name.startswith("_") and isinstance(entry, list) and len(entry) == 2 and isinstance(entry[1], str)
        ]
    for name, kind in listed:
        if not WEIGHTLESS.fullmatch(kind) and not _is_weightless(os.path.join(path, name)):
            yield name, kind


def _is_weightless(folder: str) -> bool:
    """It is there, but holds no model."""
    try:
        names = os.listdir(folder)
    except OSError:
        return False
    return CONFIG not in names and not any(
        name.endswith((".safetensors", ".index.json")) or is_pickle_name(name) for name in names
    )


def _listed(path: str) -> tuple[Source, frozenset[str]]:
    """The stamp of the folder at `path` from before it was listed, and the names in it."""
    look(path)
    with speaking_of_the_disk():
        return source(path), frozenset(os.listdir(path))


def _beside(name: object, what: str) -> str:
    """`name`, which must be that of something in the same folder. `what` says whose it is."""
    # By the rules of every system: what is a plain name here may lead elsewhere there.
    if not isinstance(name, str) or name in ("", ".", "..") or ntpath.basename(name) != name or not name.isprintable():
        raise UnusableError(f"{what} {show(name)}, which is not the name of something in its own folder")
    return name


def _choice(names: Iterable[str], diffusers: bool) -> tuple[_Weights, list[_Weights]]:
    """The weights that are loaded from a folder if nothing else is asked for, and the others of the same model.

    diffusers takes an index before a single file, transformers a single file before an index (`from_pretrained` of both), and
    neither takes parts without an index: these come last, as the download that is not yet complete.
    """
    found = _sets(names)
    stems = (DIFFUSERS_STEM, TRANSFORMERS_STEM) if diffusers else (TRANSFORMERS_STEM, DIFFUSERS_STEM)
    stem = next((stem for stem in stems if stem in found), None)
    if stem is None and len(found) > 1:
        raise UnusableError(f"it holds several models: {_names(found)}", "Choose one of its files.")
    if stem is None and not found:
        if pickles := sorted(filter(is_pickle_name, names)):
            refuse_pickle(f"its only weights are {_names(pickles)}, and such a file is a pickle (a file of torch.save)")
        raise UnusableError("it has a config.json, but no .safetensors file", "Download the weights, or choose a file in it.")
    sets = found[stem] if stem is not None else next(iter(found.values()))

    def rank(weights: _Weights) -> tuple[bool, int, str]:
        kind = 2 if not weights.listing and len(weights.files) > 1 else int(bool(weights.listing) != diffusers)
        return weights.variant != "", kind, weights.name

    chosen, *others = sorted(sets, key=rank)
    if chosen.variant and any(other.variant != chosen.variant for other in others):
        variants = sorted({weights.variant for weights in sets})
        raise UnusableError(f"it holds this model only as the variants {_names(variants)}", "Choose one of its files.")
    return chosen, others


def _is_sharding(name: str) -> bool:
    """It is an index, or one of several parts: a folder that was downloaded for one model."""
    file = _FILE.fullmatch(name)
    return _INDEX.fullmatch(name) is not None or (file is not None and file["part"] is not None)


def _sets(names: Iterable[str]) -> dict[str, list[_Weights]]:
    """All sets of weights among the files `names`, by what their names start with.

    Raises UnusableError if parts are missing and nothing else of the same model is there.
    """
    found: dict[str, list[_Weights]] = {}
    loose: dict[tuple[str, str, int], dict[int, str]] = {}
    for name in sorted(names):
        if index := _INDEX.fullmatch(name):
            variant = index["variant"] or index["legacy"] or index["late"] or ""
            found.setdefault(index["stem"] or index["other"], []).append(_Weights(variant, name, ()))
        elif file := _FILE.fullmatch(name):
            stem, variant = file["stem"] or file["other"], file["variant"] or file["late"] or ""
            if file["part"]:
                loose.setdefault((stem, variant, int(file["parts"])), {})[int(file["part"])] = name
            else:
                found.setdefault(stem, []).append(_Weights(variant, "", (name,)))
    indexed = {(stem, weights.variant) for stem, sets in found.items() for weights in sets if weights.listing}
    whole = set(found)
    for (stem, variant, count), parts in loose.items():
        missing = count - sum(1 <= number <= count for number in parts)
        if (stem, variant) in indexed or (missing and stem in whole):
            continue  # the index says which are its parts; what is left of another download is not the model
        if missing or len(parts) > count:
            raise UnusableError(f"{missing:,} of the {count:,} parts of {show(stem)} are missing", "Download all of them.")
        found.setdefault(stem, []).append(_Weights(variant, "", tuple(parts[number] for number in sorted(parts))))
    return found


def _all_there(folder: str, parts: Iterable[str]) -> None:
    names = sorted(parts)
    if missing := [name for name in names if not os.path.exists(os.path.join(folder, name))]:
        raise UnusableError(
            f"{len(missing):,} of the {len(names):,} files it names are missing: {_names(missing)}",
            "Download them into its folder.",
        )


def _joined(path: str, folder: str, parts: Mapping[str, Sequence[str]]) -> Checkpoint:
    """The tensors of the files in `folder` that `parts` names, as one model. Each must have the tensors given with it."""
    tensors: dict[str, TensorInfo] = {}
    metadata: dict[str, str] = {}
    sources: list[Source] = []
    total = 0
    for name, expected in sorted(parts.items()):
        file = os.path.join(folder, name)
        with naming(file):
            part = read_safetensors(file)
            if twice := next((tensor for tensor in part.tensors if tensor in tensors), None):
                raise UnusableError(f"tensor {show(twice)} is in this file and in another part of the same model")
        if absent := [tensor for tensor in expected if tensor not in part.tensors]:
            raise UnusableError(f"its weight_map puts tensor {show(absent[0])} in {show(name)}, where it is not")
        tensors.update(part.tensors)
        metadata = {**part.metadata, **metadata}
        sources += part.sources
        total += part.file_bytes
    kept = MappingProxyType(tensors), MappingProxyType(metadata)
    return Checkpoint(path, total, *kept, format="sharded", sources=tuple(sources))


def _disagreements(index: Mapping[str, Any], checkpoint: Checkpoint) -> tuple[str, ...]:
    """What an index says otherwise than its files. Both libraries load what the files have and look at nothing else."""
    notes: list[str] = []
    if unlisted := [name for name in checkpoint.tensors if name not in index["weight_map"]]:
        size = sum(checkpoint.tensors[name].nbytes for name in unlisted)
        notes.append(f"{len(unlisted):,} tensors of {size:,} bytes are in its files, but not in its index; they are counted.")
    metadata = index.get("metadata")
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    if isinstance(total, int | float) and total != checkpoint.tensor_bytes:
        notes.append(f"Its index says {show(total)} bytes, and its files hold {checkpoint.tensor_bytes:,}.")
    return tuple(notes)


def _names(names: Iterable[str]) -> str:
    listed = list(names)
    shown = ", ".join(map(show, listed[:_NAMED]))
    return f"{shown} and {len(listed) - _NAMED} more" if len(listed) > _NAMED else shown
