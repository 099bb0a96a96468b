"""What a safetensors file holds (tensors, types, bytes), read from its header alone: a weight is never read.

The format: https://github.com/huggingface/safetensors, README "Format" and `safetensors/src/tensor.rs` at 24b0b285 (0.8).
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, BinaryIO, Final

from .header import (
    MAX_COUNT,
    MAX_HEADER_BYTES,
    UPDATE,
    Checkpoint,
    Source,
    TensorInfo,
    UnusableError,
    check_text,
    exactly,
    json_object,
    opened,
    show,
    show_shape,
)

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

LENGTH_BYTES: Final = 8
"""A file starts with the length of its header, a little-endian integer of this many bytes (README, Format)."""


def read_safetensors(path: str) -> Checkpoint:
    """The tensors of the file at `path`. Raises UnusableError."""
    with opened(path) as (file, stamp):
        return read_opened(file, stamp, exactly(file, min(LENGTH_BYTES, stamp.size)))


def read_opened(file: BinaryIO, stamp: Source, start: bytes) -> Checkpoint:
    """The tensors of `file`, whose first 8 bytes (or all it has) were read as `start`. Reads the header and no more."""
    text = _header_bytes(file, stamp.size, start)
    header = json_object(text, at=LENGTH_BYTES)
    metadata = _metadata(header.pop("__metadata__", None))
    tensors = _in_file_order(header, LENGTH_BYTES + len(text), stamp.size)
    return Checkpoint(stamp.path, stamp.size, MappingProxyType(tensors), MappingProxyType(metadata), sources=(stamp,))


def has_header(start: bytes, file_bytes: int) -> bool:
    """`start`, the first 8 bytes of a file of `file_bytes`, can be the length of a safetensors header."""
    length = int.from_bytes(start, "little")
    return length <= MAX_HEADER_BYTES and LENGTH_BYTES + length <= file_bytes


def _header_bytes(file: BinaryIO, file_bytes: int, start: bytes) -> bytes:
    if file_bytes == 0:
        raise UnusableError("the file is empty")
    if file_bytes < LENGTH_BYTES:
        raise UnusableError(f"the file has only {file_bytes} bytes, less than the 8 that say how long its header is")
    length = int.from_bytes(start, "little")
    if length > MAX_HEADER_BYTES:
        raise UnusableError(
            f"this is not a safetensors file: it starts with {start!r}, which would mean a header of {length:,} bytes, "
            f"and {MAX_HEADER_BYTES:,} is the most there can be",
            "Check that it is the model itself, not a link or a web page, and download it again.",
        )
    if LENGTH_BYTES + length > file_bytes:
        raise UnusableError(f"its header alone should have {length:,} bytes, but the file ends after {file_bytes:,} bytes")
    return exactly(file, length)


def _metadata(found: object) -> dict[str, str]:
    """README, Format: a string-to-string map; arbitrary JSON is not allowed. The reference reads null as none at all."""
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise UnusableError(f"its __metadata__ is {show(found)}, not a table of texts")
    for key, value in found.items():
        check_text(key)
        if not isinstance(value, str):
            raise UnusableError(f"in its __metadata__, {show(key)} is {show(value)}, not a text")
        check_text(value)
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
            raise UnusableError(f"its tensors {show(tensor.name)} and {last} share {end - begin:,} bytes")
        if begin > end:
            raise UnusableError(f"{begin - end:,} bytes between {last} and {show(tensor.name)} belong to no tensor")
        end = begin + tensor.nbytes
        last = show(tensor.name)
    needed = data_start + end
    if file_bytes < needed:
        raise UnusableError(
            f"the file has {file_bytes:,} bytes, but its header describes {needed:,}: {needed - file_bytes:,} are missing"
        )
    if file_bytes > needed:
        raise UnusableError(f"the file has {file_bytes - needed:,} bytes after {last} that belong to no tensor")
    return {tensor.name: tensor for tensor, _ in placed}


def _tensor(name: str, entry: object) -> tuple[TensorInfo, int]:
    """A tensor and where its bytes begin, counted from the end of the header."""
    check_text(name)
    if not isinstance(entry, dict):
        raise UnusableError(f"its header has {show(entry)} where tensor {show(name)} should be described")
    for key in ("dtype", "shape", "data_offsets"):
        if key not in entry:
            raise UnusableError(f"its header does not give the {key} of tensor {show(name)}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str):
        raise UnusableError(f"the dtype of tensor {show(name)} is {show(dtype)}, not a text")
    if dtype not in DTYPE_BITS:
        raise UnusableError(f"the dtype of tensor {show(name)} is {show(dtype)}, which is not known here", UPDATE)
    if not isinstance(shape, list):
        raise UnusableError(f"the shape of tensor {show(name)} is {show(shape)}, not a list")
    for dimension in shape:
        if not _is_count(dimension):
            raise UnusableError(f"the shape of tensor {show(name)} contains {show(dimension)}, not a size")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_count(offset) for offset in offsets):
        raise UnusableError(f"the data_offsets of tensor {show(name)} are not two positions in the file")
    begin, end = offsets
    if begin > end:
        raise UnusableError(f"tensor {show(name)} begins at byte {begin} and ends at byte {end}")
    bits = _bits(name, dtype, shape)
    if bits != 8 * (end - begin):
        takes = f"{bits // 8} bytes" if bits % 8 == 0 else f"{bits} bits, which are not whole bytes"
        raise UnusableError(
            f"tensor {show(name)} has {end - begin} bytes, but {dtype} of shape {show_shape(shape)} takes {takes}"
        )
    return TensorInfo(name, dtype, tuple(shape), end - begin), begin


def _bits(name: str, dtype: str, shape: list[int]) -> int:
    """Step by step, as tensor.rs: what overflows on the way is refused even if a later dimension is 0."""
    bits = 1
    for factor in (*shape, DTYPE_BITS[dtype]):
        bits *= factor
        if bits > MAX_COUNT:
            raise UnusableError(f"tensor {show(name)} is too large: {dtype} of shape {show_shape(shape)}")
    return bits


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value <= MAX_COUNT  # not isinstance: a bool is an int
