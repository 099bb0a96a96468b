"""What a safetensors file holds (tensors, types, bytes), read from its header alone: a weight is never read.

The format: https://github.com/huggingface/safetensors, README "Format" and `safetensors/src/tensor.rs` at 24b0b285 (0.8).
"""

import json
import os
import stat
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from threading import Lock
from types import MappingProxyType
from typing import Any, BinaryIO, Final, NamedTuple, NoReturn

MAX_HEADER_BYTES: Final = 100_000_000
"""Longest header the format allows: `MAX_HEADER_SIZE` in tensor.rs."""

MAX_COUNT: Final = 2**64 - 1
"""Largest dimension, offset and number of bits: tensor.rs counts in `usize` and refuses what overflows it."""

DTYPE_BITS: Final[Mapping[str, int]] = MappingProxyType(
    {
        "BOOL": 8,
        "F4": 4,
        "F6_E2M3": 6,
        "F6_E3M2": 6,
        "U8": 8,
        "I8": 8,
        "F8_E5M2": 8,
        "F8_E4M3": 8,
        "F8_E8M0": 8,
        "F8_E4M3FNUZ": 8,
        "F8_E5M2FNUZ": 8,
        "I16": 16,
        "U16": 16,
        "F16": 16,
        "BF16": 16,
        "I32": 32,
        "U32": 32,
        "F32": 32,
        "C64": 64,
        "F64": 64,
        "I64": 64,
        "U64": 64,
    }
)
"""Bits of one element: `Dtype::bitsize` in tensor.rs. Below 8 a tensor must still fill whole bytes."""

_LENGTH_BYTES = 8
_DOWNLOAD = "Download it again."
_UPDATE = "Update VRAM Headroom, or use a file in another precision."


class TensorInfo(NamedTuple):
    """One tensor of a file, as its header describes it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int

    @property
    def elements(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A safetensors file: its tensors in the order their bytes lie in the file."""

    path: str
    file_bytes: int
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]

    @property
    def tensor_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def parameters(self) -> int:
        return sum(tensor.elements for tensor in self.tensors.values())

    @property
    def bytes_by_dtype(self) -> Mapping[str, int]:
        totals: dict[str, int] = {}
        for tensor in self.tensors.values():
            totals[tensor.dtype] = totals.get(tensor.dtype, 0) + tensor.nbytes
        return MappingProxyType(totals)


class CheckpointError(ValueError):
    """A file is no usable checkpoint. The message names it, says what is wrong with the numbers and what to do."""


def read_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """The tensors of the file at `path`. Reads its first 8 bytes and the header, and checks both as the format demands."""
    path = os.fspath(path)
    try:
        file_bytes, text = _read_header(path)
        header = _parse(text)
        metadata = _metadata(header.pop("__metadata__", None))
        tensors = _in_file_order(header, _LENGTH_BYTES + len(text), file_bytes)
    except _UnusableError as why:
        raise CheckpointError(f"{os.path.basename(path)}: {why.problem}. {why.remedy} ({path})") from None
    return Checkpoint(path, file_bytes, MappingProxyType(tensors), MappingProxyType(metadata))


class HeaderCache:
    """The headers of the files last asked for. A file whose size or time of change differs is read again."""

    def __init__(self, size: int = 256) -> None:
        self._size = size
        self._lock = Lock()
        self._kept: OrderedDict[str, tuple[tuple[int, int], Checkpoint]] = OrderedDict()

    def get(self, path: str | os.PathLike[str]) -> Checkpoint:
        """As `read_checkpoint`. The lock is never held while a file is read."""
        path = os.fspath(path)
        try:
            found = os.stat(path)
        except (OSError, ValueError):
            return read_checkpoint(path)  # which says what is wrong
        # Taken before the file is read: one replaced meanwhile no longer matches its stamp, and is read again.
        stamp = (found.st_size, found.st_mtime_ns)
        with self._lock:
            kept = self._kept.get(path)
            if kept is not None and kept[0] == stamp:
                self._kept.move_to_end(path)
                return kept[1]
        checkpoint = read_checkpoint(path)
        with self._lock:
            self._kept[path] = (stamp, checkpoint)
            self._kept.move_to_end(path)
            while len(self._kept) > self._size:
                self._kept.popitem(last=False)
        return checkpoint


class _UnusableError(Exception):
    """Why a file cannot be used; `read_checkpoint` adds its name."""

    def __init__(self, problem: str, remedy: str = _DOWNLOAD) -> None:
        super().__init__(problem)
        self.problem = problem
        self.remedy = remedy


def _read_header(path: str) -> tuple[int, bytes]:
    """Bytes of the whole file, and its header."""
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISDIR(mode):
            raise _UnusableError("this is a folder, not a model file", "Choose a file in it.")
        if not stat.S_ISREG(mode):  # opening a pipe would wait for a writer
            raise _UnusableError("this is not a regular file", "Choose a model file.")
        with open(path, "rb", buffering=0) as file:  # unbuffered: a buffer would read on into the weights
            file_bytes = os.fstat(file.fileno()).st_size
            return file_bytes, _header_bytes(file, file_bytes)
    except FileNotFoundError:
        raise _UnusableError("this file does not exist", "Check the name and the folder, or download it.") from None
    except PermissionError as error:
        raise _UnusableError(f"this file cannot be opened: {error.strerror}", "Check its permissions.") from None
    except OSError as error:
        raise _UnusableError(f"this file cannot be read: {error.strerror or error}", "Check the disk it is on.") from None
    except ValueError as error:  # a path with a NUL in it
        raise _UnusableError(f"this file cannot be opened: {error}", "Check its name.") from None


def _header_bytes(file: BinaryIO, file_bytes: int) -> bytes:
    if file_bytes == 0:
        raise _UnusableError("the file is empty")
    start = _exactly(file, min(_LENGTH_BYTES, file_bytes))
    if file_bytes < _LENGTH_BYTES:
        raise _UnusableError(f"the file has only {file_bytes} bytes, less than the 8 that say how long its header is")
    length = int.from_bytes(start, "little")
    if length > MAX_HEADER_BYTES:
        raise _UnusableError(
            f"this is not a safetensors file: it starts with {start!r}, which would mean a header of {length:,} bytes, "
            f"and {MAX_HEADER_BYTES:,} is the most there can be",
            "Check that it is the model itself, not a link or a web page, and download it again.",
        )
    if _LENGTH_BYTES + length > file_bytes:
        raise _UnusableError(f"its header alone should have {length:,} bytes, but the file ends after {file_bytes:,} bytes")
    return _exactly(file, length)


def _exactly(file: BinaryIO, count: int) -> bytes:
    """The next `count` bytes: an unbuffered read may give fewer than it was asked for."""
    parts: list[bytes] = []
    missing = count
    while missing:
        part = file.read(missing)
        if not part:
            raise _UnusableError(f"the file ended {missing:,} bytes early, while it was read", "Try again.")
        parts.append(part)
        missing -= len(part)
    return b"".join(parts)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. README, Notes: "Duplicate keys are disallowed"."""
    entries = dict(pairs)
    if len(entries) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise _UnusableError(f"its header says {_show(twice)} twice")
    return entries


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=_once, parse_constant=_no_constant)


def _parse(text: bytes) -> dict[str, Any]:
    """The header as JSON. README, Format: it is UTF-8, MUST begin with `{`, and MAY end with spaces."""
    if not text:
        raise _UnusableError("its header is empty")
    try:
        content = text.decode()
    except UnicodeDecodeError as error:
        raise _UnusableError(f"its header is not UTF-8 at byte {_LENGTH_BYTES + error.start:,}") from None
    if not content.startswith("{"):
        raise _UnusableError(f"its header is not a JSON object: it starts with {_show(content[:8])}")
    try:
        return _DECODER.decode(content)
    except json.JSONDecodeError as error:
        raise _UnusableError(f"its header is not JSON at byte {_LENGTH_BYTES + error.pos:,}: {error.msg}") from None
    except (ValueError, RecursionError) as error:
        # A constant such as NaN, a number of thousands of digits, or thousands of brackets.
        raise _UnusableError(f"its header is not JSON that describes tensors: {str(error)[:80]}") from None


def _metadata(found: object) -> dict[str, str]:
    """README, Format: a string-to-string map; arbitrary JSON is not allowed. The reference reads null as none at all."""
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise _UnusableError(f"its __metadata__ is {_show(found)}, not a table of texts")
    for key, value in found.items():
        _check_text(key)
        if not isinstance(value, str):
            raise _UnusableError(f"in its __metadata__, {_show(key)} is {_show(value)}, not a text")
        _check_text(value)
    return found


def _in_file_order(header: dict[str, Any], data_start: int, file_bytes: int) -> dict[str, TensorInfo]:
    """The tensors, sorted by offset.

    README, Notes: "The byte buffer needs to be entirely indexed, and cannot contain holes"; `Metadata::validate` in
    tensor.rs: each tensor begins where the one before it ends, the first at 0, and the last ends with the file.
    """
    placed = sorted(
        (_tensor(name, entry) for name, entry in header.items()),
        key=lambda item: (item[1], item[1] + item[0].nbytes),
    )
    end = 0
    last = "the header"
    for tensor, begin in placed:
        if begin < end:
            raise _UnusableError(f"its tensors {_show(tensor.name)} and {last} share {end - begin:,} bytes")
        if begin > end:
            raise _UnusableError(f"{begin - end:,} bytes between {last} and {_show(tensor.name)} belong to no tensor")
        end = begin + tensor.nbytes
        last = _show(tensor.name)
    needed = data_start + end
    if file_bytes < needed:
        raise _UnusableError(
            f"the file has {file_bytes:,} bytes, but its header describes {needed:,}: {needed - file_bytes:,} are missing"
        )
    if file_bytes > needed:
        raise _UnusableError(f"the file has {file_bytes - needed:,} bytes after {last} that belong to no tensor")
    return {tensor.name: tensor for tensor, _ in placed}


def _tensor(name: str, entry: object) -> tuple[TensorInfo, int]:
    """A tensor and where its bytes begin, counted from the end of the header."""
    _check_text(name)
    if not isinstance(entry, dict):
        raise _UnusableError(f"its header has {_show(entry)} where tensor {_show(name)} should be described")
    for key in ("dtype", "shape", "data_offsets"):
        if key not in entry:
            raise _UnusableError(f"its header does not give the {key} of tensor {_show(name)}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str):
        raise _UnusableError(f"the dtype of tensor {_show(name)} is {_show(dtype)}, not a text")
    if dtype not in DTYPE_BITS:
        raise _UnusableError(f"the dtype of tensor {_show(name)} is {_show(dtype)}, which is not known here", _UPDATE)
    if not isinstance(shape, list):
        raise _UnusableError(f"the shape of tensor {_show(name)} is {_show(shape)}, not a list")
    for dimension in shape:
        if not _is_count(dimension):
            raise _UnusableError(f"the shape of tensor {_show(name)} contains {_show(dimension)}, not a size")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_count(offset) for offset in offsets):
        raise _UnusableError(f"the data_offsets of tensor {_show(name)} are not two positions in the file")
    begin, end = offsets
    if begin > end:
        raise _UnusableError(f"tensor {_show(name)} begins at byte {begin} and ends at byte {end}")
    bits = _bits(name, dtype, shape)
    if bits != 8 * (end - begin):
        takes = f"{bits // 8} bytes" if bits % 8 == 0 else f"{bits} bits, which are not whole bytes"
        raise _UnusableError(
            f"tensor {_show(name)} has {end - begin} bytes, but {dtype} of shape {_show_shape(shape)} takes {takes}"
        )
    return TensorInfo(name, dtype, tuple(shape), end - begin), begin


def _bits(name: str, dtype: str, shape: list[int]) -> int:
    """Step by step, as tensor.rs: what overflows on the way is refused even if a later dimension is 0."""
    bits = 1
    for factor in (*shape, DTYPE_BITS[dtype]):
        bits *= factor
        if bits > MAX_COUNT:
            raise _UnusableError(f"tensor {_show(name)} is too large: {dtype} of shape {_show_shape(shape)}")
    return bits


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value <= MAX_COUNT  # not isinstance: a bool is an int


def _check_text(text: str) -> None:
    r"""JSON can escape half a character ("\ud800"), which no UTF-8 text contains and nothing could print."""
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise _UnusableError(f"its header holds a text that is not UTF-8: {_show(text)}") from None


def _show(value: object) -> str:
    """A value of the header, short enough for a message. What holds others is only named: it may be deep."""
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list):
        return "a list"
    if isinstance(value, str) and len(value) > 120:
        return repr(f"{value[:100]}...")
    return repr(value)[:120]


def _show_shape(shape: list[int]) -> str:
    return str(shape) if len(shape) <= 8 else f"[{', '.join(map(str, shape[:8]))}, ...]"
