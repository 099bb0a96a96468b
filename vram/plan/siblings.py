"""The same model in a smaller file: by its name and by what its header holds, never by a guess."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Final

from ..estimate.architecture import Architecture, identify
from ..estimate.checkpoint import CheckpointError
from .types import Library, MissingFileError, ModelRef, ModelRole

FileLister = Callable[[str], Sequence[str]]
"""Model folder -> the names of its files, as loader widgets have them."""

FOLDERS: Final[Mapping[ModelRole, str]] = {"generator": "diffusion_models", "text_encoder": "text_encoders"}
"""Where the files of a role lie; a whole checkpoint has no siblings, it is three models in one."""

PRECISIONS: Final = frozenset(
    {"fp32", "fp16", "bf16", "fp8", "fp4", "nvfp4", "mxfp8", "mxfp4", "int8", "int4", "f32", "f16", "scaled", "mixed"}
    | {"e4m3fn", "e4m3", "e5m2"}
)
"""Words of a file name that say its precision alone, as Comfy-Org's and the usual GGUF repositories write them."""

GGUF_TYPE: Final = re.compile(r"(?<![a-z0-9])i?q[2-8](?:_k)?(?:_(?:0|1|s|m|l|xs|xxs|xl|nl))?(?![a-z0-9])")
"""`q4_k_m`, `q8_0`, `iq3_xxs` (llama.cpp's names of file types)."""

MOST_SIBLINGS: Final = 6
"""Headers are read of no more files than this for one model; a folder seldom has as many of one."""


def smaller_siblings(model: ModelRef, library: Library, files: FileLister) -> tuple[str, ...]:
    """Files of the same model with fewer bytes, the largest first."""
    folder = FOLDERS.get(model.role)
    if folder is None or model.file_bytes is None:
        return ()
    words = name_words(model.file)
    own = _header(library, folder, model.file)
    if own is None:
        return ()
    found: list[tuple[int, str]] = []
    alike = [file for file in files(folder) if file != model.file and name_words(file) == words]
    for file in sorted(alike)[:MOST_SIBLINGS]:
        other = _header(library, folder, file)
        if other is not None and other[0] == own[0] and other[1] < own[1]:
            found.append((-other[1], file))
    return tuple(file for _, file in sorted(found))


def name_words(file: str) -> tuple[str, ...]:
    """The words of a file name but those of its precision, in alphabetical order: equal for files of one model."""
    base = file.replace("\\", "/").rsplit("/", 1)[-1].lower()
    stem = re.sub(r"\.(?:safetensors|sft|gguf)$", "", base)
    stem = GGUF_TYPE.sub(" ", stem)
    # HighNoise and high_noise, A14B and 14B are the same words in different repositories
    stem = re.sub(r"(high|low)[_\- ]?noise", r" \1 noise ", stem)
    stem = re.sub(r"(?<![a-z0-9])a14b(?![a-z0-9])", "14b", stem)
    return tuple(sorted(word for word in re.split(r"[_\-\s]+|\.(?!\d)", stem) if word and word not in PRECISIONS))


def _header(library: Library, folder: str, file: str) -> tuple[Architecture, int] | None:
    """What a file holds, but for how its tensors are called, and their bytes; None if that is not known."""
    try:
        checkpoint = library(folder, file)
    except (MissingFileError, CheckpointError):
        return None
    found = identify(checkpoint)
    if found.kind not in ("dit", "text_encoder") or not found.parameters:
        return None
    return replace(found, layout="comfyui", prefix=""), checkpoint.tensor_bytes
