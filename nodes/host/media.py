"""The sizes of the files in ComfyUI's input folder."""

from __future__ import annotations

import os
from collections import OrderedDict
from threading import Lock
from typing import Final

import folder_paths

from ...vram.estimate.media import MediaSize, read_picture, read_video

PICTURE_ENDINGS: Final = frozenset({".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".apng"})

KEPT: Final = 64
"""Files whose sizes are remembered."""


class HostMedia:
    """Reads each file once. None where one is absent or cannot be read: its size then counts as unknown."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._known: OrderedDict[tuple[str, int, int], MediaSize | None] = OrderedDict()

    def path(self, name: str) -> str | None:
        """Where the file would be; None for a name that can be no file's."""
        try:
            return folder_paths.get_annotated_filepath(name)
        except (ValueError, TypeError):
            return None

    def size(self, name: str) -> MediaSize | None:
        """Size of the file that a loader's widget names (`clip.mp4`, `sub/a.png [input]`)."""
        path = self.path(name)
        try:
            stat = os.stat(path) if path is not None else None
        except (OSError, ValueError):
            stat = None
        if path is None or stat is None:
            return None
        key = (path, stat.st_size, stat.st_mtime_ns)
        with self._lock:
            if key in self._known:
                self._known.move_to_end(key)
                return self._known[key]
        picture = os.path.splitext(path)[1].lower() in PICTURE_ENDINGS
        found = read_picture(path) if picture else read_video(path)
        with self._lock:
            self._known[key] = found
            while len(self._known) > KEPT:
                self._known.popitem(last=False)
        return found
