"""Latents kept after an error: files of ComfyUI's Save Latent format in its input folder, where Load Latent lists them."""

from __future__ import annotations

import importlib
import json
import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import comfy.utils
import folder_paths
import torch

from ...vram.units import GIB

logger = logging.getLogger("vram_headroom")

PREFIX: Final = "vram_headroom_"
SUFFIX: Final = ".latent"
"""Load Latent lists files of the input folder itself with this ending (nodes.py, 0.8 and 0.33)."""

COUNT_VARIABLE: Final = "VRAM_HEADROOM_KEPT_LATENTS"
"""Environment variable: how many files to keep; 0 keeps none."""

MOST_FILES: Final = 8
MOST_BYTES: Final = 2 * GIB
"""Of a hundred latents of 720p and 81 frames: 16 channels, 21 frames, 90 x 160 cells of 4 bytes are 19 MB."""

VERSION_KEY: Final = "latent_format_version_0"
"""With this entry Load Latent takes the numbers as they are; without, it divides them by 0.18215."""


def keep(latent: torch.Tensor, prompt_id: str, node_id: str, facts: Mapping[str, object], prompt: object) -> str | None:
    """Write a latent; returns the name to choose in Load Latent, None where keeping is switched off.

    `facts` are for a person or a program to go on from, `prompt` the graph in API format. The oldest of our files go first when
    there are too many. Raises OSError where it can't be written; no file of that name is half written.
    """
    most = _most_files()
    if most <= 0:
        return None
    folder = Path(folder_paths.get_input_directory())
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{PREFIX}{_plain(prompt_id)}_{_plain(node_id)}{SUFFIX}"
    tensors = {"latent_tensor": latent.detach().to("cpu").contiguous(), VERSION_KEY: torch.tensor([])}
    metadata = {"vram_headroom": json.dumps(facts)}
    if not _without_metadata():
        metadata["prompt"] = _as_json(prompt)
    unfinished = folder / f"{name}.part"
    try:
        comfy.utils.save_torch_file(tensors, str(unfinished), metadata=metadata)
        os.replace(unfinished, folder / name)
    except BaseException as error:
        unfinished.unlink(missing_ok=True)
        if isinstance(error, (OSError, KeyboardInterrupt)):
            raise
        # safetensors has an error of its own for a full disk
        raise OSError(str(error)) from error
    _remove_oldest(folder, most, folder / name)
    return name


def _remove_oldest(folder: Path, most: int, newest: Path) -> None:
    """Of our files only, and never the newest."""
    found = [(path.stat().st_mtime_ns, path) for path in folder.glob(f"{PREFIX}*{SUFFIX}") if path != newest]
    total = newest.stat().st_size
    for count, (_, path) in enumerate(sorted(found, reverse=True), start=2):
        total += path.stat().st_size
        if count > most or total > MOST_BYTES:
            logger.info("%s was kept longest and makes room for newer latents", path.name)
            path.unlink(missing_ok=True)


def _most_files() -> int:
    chosen = os.environ.get(COUNT_VARIABLE, "").strip()
    if not chosen:
        return MOST_FILES
    try:
        return int(chosen)
    except ValueError:
        logger.warning("%s is %r, which is no number: %d latents are kept", COUNT_VARIABLE, chosen, MOST_FILES)
        return MOST_FILES


def _plain(text: str) -> str:
    """For a file name on every system; ids of nodes in subgraphs have colons or dots."""
    return re.sub(r"[^A-Za-z0-9-]+", "-", text)[:64] or "none"


def _without_metadata() -> bool:
    """Started with --disable-metadata: no graph goes into files."""
    try:
        args = importlib.import_module("comfy.cli_args").args
    except (ImportError, AttributeError):
        return False
    return bool(getattr(args, "disable_metadata", False))


def _as_json(prompt: object) -> str:
    try:
        return json.dumps(prompt)
    except (TypeError, ValueError):
        return ""
