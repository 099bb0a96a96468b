"""What a model on disk holds (tensors, types, bytes), whatever its format, read from headers alone: a weight is never read."""

import os
import stat
from collections import OrderedDict
from threading import Lock

from .folder import read_folder, read_index, read_pipeline
from .gguf import MAGIC, read_gguf
from .header import (
    MAX_COUNT,
    MAX_HEADER_BYTES,
    PICKLE_STARTS,
    Checkpoint,
    CheckpointError,
    CheckpointFormat,
    Source,
    TensorInfo,
    exactly,
    is_pickle_name,
    look,
    naming,
    opened,
    refuse_pickle,
    source,
)
from .safetensors import DTYPE_BITS, LENGTH_BYTES, has_header, read_opened

__all__ = [
    "DTYPE_BITS",
    "MAX_COUNT",
    "MAX_HEADER_BYTES",
    "Checkpoint",
    "CheckpointError",
    "CheckpointFormat",
    "HeaderCache",
    "TensorInfo",
    "read_checkpoint",
    "read_pipeline",
]


def read_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """The tensors of what is at `path`: a safetensors or GGUF file, the index of a sharded one, or a folder with one model.

    A file's content says what it is, not its name. Of a safetensors file, 8 bytes and the header are read; of a GGUF file,
    the header and at most 64 KiB more. Raises CheckpointError.
    """
    path = os.fsdecode(path)
    with naming(path):
        if stat.S_ISDIR(look(path).st_mode):
            return read_folder(path)
        if path.lower().endswith(".json"):
            return read_index(path)
        with opened(path) as (file, stamp):
            start = exactly(file, min(LENGTH_BYTES, stamp.size))
            if start.startswith(MAGIC):
                return read_gguf(file, stamp)
            if start and not has_header(start, stamp.size) and (is_pickle_name(path) or start.startswith(PICKLE_STARTS)):
                refuse_pickle()
            return read_opened(file, stamp, start)


class HeaderCache:
    """The headers of the models last asked for. One of which any file changed its size or time of change is read again."""

    def __init__(self, size: int = 256) -> None:
        self._size = size
        self._lock = Lock()
        self._kept: OrderedDict[str, Checkpoint] = OrderedDict()

    def get(self, path: str | os.PathLike[str]) -> Checkpoint:
        """As `read_checkpoint`. The lock is never held while a file is read or looked at."""
        path = os.fsdecode(path)
        with self._lock:
            kept = self._kept.get(path)
        # The stamps are from before the files were read: one replaced meanwhile no longer matches, and is read again.
        checkpoint = kept if kept is not None and all(map(_is_current, kept.sources)) else read_checkpoint(path)
        with self._lock:
            self._kept[path] = checkpoint
            self._kept.move_to_end(path)
            while len(self._kept) > self._size:
                self._kept.popitem(last=False)
        return checkpoint


def _is_current(stamp: Source) -> bool:
    try:
        return source(stamp.path) == stamp
    except (OSError, ValueError):
        return False
