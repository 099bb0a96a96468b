"""What a GGUF file holds (tensors, types, bytes), read from its header alone: a weight is never read.

The format: https://github.com/ggml-org/ggml, `docs/gguf.md` and `src/gguf.cpp` at d99724f2. Where ggml is stricter than the
reader that ComfyUI-GGUF uses (the gguf package, 0.19), what ComfyUI loads is read here.
"""

import struct
from collections.abc import Mapping
from math import prod
from types import MappingProxyType
from typing import BinaryIO, Final, NamedTuple, NoReturn

from .header import MAX_HEADER_BYTES, UPDATE, Checkpoint, Source, TensorInfo, UnusableError, exactly, show, show_shape

MAGIC: Final = b"GGUF"
"""First four bytes, in either byte order (gguf.md, `gguf_header_t`)."""

VERSIONS: Final = (2, 3)
"""What ggml reads. 1 had 32-bit lengths and was dropped (gguf.cpp)."""

BLOCK: Final = 64 * 1024
"""Bytes read at once, and so the most that is read beyond the header, as nothing in it says where it ends. Chosen: the header
of a WAN 14B (1,095 tensors, 68 KB) takes two reads, and a text encoder's vocabulary (4 MB) 64."""

MAX_TEXT: Final = 65_535
"""Longest key and tensor name, in bytes (gguf.md, `gguf_metadata_kv_t`, for keys). Longer values are passed over."""

MAX_ENTRIES: Final = 65_536
"""Most tensors, and most entries of metadata. Chosen: HuMo, which has the most of all WAN, has 1,583 tensors."""

MAX_ARRAY: Final = 64
"""Longest array of numbers kept in the metadata. Chosen: a shape has at most 5; vocabularies have a quarter of a million."""

MAX_DIMENSIONS: Final = 5
"""ggml has four (GGML_MAX_DIMS), but ComfyUI-GGUF's tools/fix_5d_tensors.py writes WAN's patch_embedding, a Conv3d, in five."""

MAX_ELEMENTS: Final = 2**63 - 1
"""ggml counts elements in int64 and refuses what overflows it (gguf.cpp, tensor shape)."""

DEFAULT_ALIGNMENT: Final = 32
"""Tensors begin at multiples of this unless general.alignment says otherwise (GGUF_DEFAULT_ALIGNMENT in gguf.h)."""

ORIGINAL_SHAPE: Final = "comfy.gguf.orig_shape."
"""Before a tensor's name: the shape (in torch's order) it had before ComfyUI-GGUF's converter folded it into rows that a
block divides. Its loader.py restores it."""


class GgmlType(NamedTuple):
    """A type of tensor data: `nbytes` bytes hold `elements` elements."""

    name: str
    elements: int
    nbytes: int


GGML_TYPES: Final[Mapping[int, GgmlType]] = MappingProxyType(
    {
        0: GgmlType("F32", 1, 4),
        1: GgmlType("F16", 1, 2),
        2: GgmlType("Q4_0", 32, 18),
        3: GgmlType("Q4_1", 32, 20),
        6: GgmlType("Q5_0", 32, 22),
        7: GgmlType("Q5_1", 32, 24),
        8: GgmlType("Q8_0", 32, 34),
        9: GgmlType("Q8_1", 32, 40),
        10: GgmlType("Q2_K", 256, 84),
        11: GgmlType("Q3_K", 256, 110),
        12: GgmlType("Q4_K", 256, 144),
        13: GgmlType("Q5_K", 256, 176),
        14: GgmlType("Q6_K", 256, 210),
        15: GgmlType("Q8_K", 256, 292),
        16: GgmlType("IQ2_XXS", 256, 66),
        17: GgmlType("IQ2_XS", 256, 74),
        18: GgmlType("IQ3_XXS", 256, 98),
        19: GgmlType("IQ1_S", 256, 50),
        20: GgmlType("IQ4_NL", 32, 18),
        21: GgmlType("IQ3_S", 256, 110),
        22: GgmlType("IQ2_S", 256, 82),
        23: GgmlType("IQ4_XS", 256, 136),
        24: GgmlType("I8", 1, 1),
        25: GgmlType("I16", 1, 2),
        26: GgmlType("I32", 1, 4),
        27: GgmlType("I64", 1, 8),
        28: GgmlType("F64", 1, 8),
        29: GgmlType("IQ1_M", 256, 56),
        30: GgmlType("BF16", 1, 2),
        34: GgmlType("TQ1_0", 256, 54),
        35: GgmlType("TQ2_0", 256, 66),
        39: GgmlType("MXFP4", 32, 17),
        40: GgmlType("NVFP4", 64, 36),
        41: GgmlType("Q1_0", 128, 18),
        42: GgmlType("Q2_0", 64, 18),
    }
)
"""Types by the number a file gives them: `GGMLQuantizationType` and `GGML_QUANT_SIZES` in the gguf package's constants.py, and
42 from `QK2_0` and `block_q2_0` in ggml-common.h. ggml stopped reading the numbers that are missing between them (ggml.h)."""

QUANTISED: Final = frozenset(kind.name for kind in GGML_TYPES.values() if kind.elements > 1)
"""Names of the types that are dequantised before use."""

_NUMBERS: Final[Mapping[int, struct.Struct]] = MappingProxyType(
    {number: struct.Struct(f"<{code}") for number, code in zip((*range(8), 10, 11, 12), "BbHhIif?Qqd", strict=True)}
)
"""Types of metadata values that are one number (gguf.md, `gguf_metadata_value_type`)."""

_UINT32, _STRING, _ARRAY = 4, 8, 9
_FLOATS = (6, 12)
_U32 = _NUMBERS[_UINT32]
_U64 = _NUMBERS[10]
_COUNTS = struct.Struct("<QQ")
_LEAST_ENTRY = 8 + 4 + 1
_LEAST_TENSOR = 8 + 4 + 4 + 8


class _Metadata(NamedTuple):
    texts: dict[str, str]
    shapes: dict[str, tuple[int, ...]]
    """Original shapes, by tensor."""
    alignment: int


def read_gguf(file: BinaryIO, stamp: Source) -> Checkpoint:
    """The tensors of `file`, wherever in it the last read ended. Raises UnusableError.

    Metadata holds texts and numbers as text, and arrays of up to MAX_ARRAY numbers as "[1, 2]"; longer ones, arrays of texts
    and texts of more than MAX_TEXT bytes are left out.
    """
    header = _Header(file, stamp.size)
    tensor_count, entry_count = _start(header)
    metadata = _metadata(header, entry_count)
    pieces = metadata.texts.get("split.count", "1")
    if pieces not in ("0", "1"):
        raise UnusableError(
            f"this is one of {pieces} pieces of a model", "Join them with llama.cpp's llama-gguf-split --merge."
        )
    tensors = _tensors(header, tensor_count, metadata, stamp.size)
    return Checkpoint(
        stamp.path, stamp.size, MappingProxyType(tensors), MappingProxyType(metadata.texts), format="gguf", sources=(stamp,)
    )


class _Header:
    """Reads a header of unknown length from its start, in blocks; what is passed over without a look is not read."""

    def __init__(self, file: BinaryIO, file_bytes: int) -> None:
        self._file = file
        self._file_bytes = file_bytes
        self._buffer = b""
        self._base = 0
        """Where in the file the buffer begins."""
        self._at = 0
        """Where in the buffer the next value begins; beyond its end, after something long was passed over."""

    @property
    def position(self) -> int:
        return self._base + self._at

    @property
    def left(self) -> int:
        """Bytes the file has after this position."""
        return self._file_bytes - self.position

    def unpack(self, what: struct.Struct) -> tuple[int, ...]:
        self._need(what.size)
        values = what.unpack_from(self._buffer, self._at)
        self._at += what.size
        return values

    def number(self, what: struct.Struct = _U64) -> int:
        return self.unpack(what)[0]

    def text(self, what: str) -> str:
        """A key or a name."""
        length = self.number()
        if length > MAX_TEXT:
            raise UnusableError(
                f"{what} at byte {self.position - 8:,} should have {length:,} bytes, and {MAX_TEXT:,} is the most there can be"
            )
        try:
            return self.raw(length).decode()
        except UnicodeDecodeError:
            raise UnusableError(f"{what} at byte {self.position - length:,} is not UTF-8") from None

    def raw(self, count: int) -> bytes:
        self._need(count)
        start = self._at
        self._at += count
        return self._buffer[start : self._at]

    def skip(self, count: int) -> None:
        if count > self.left:
            self._too_short(count)
        self._at += count

    def skip_texts(self, count: int) -> None:
        """Pass over `count` texts: a quarter of a million take some 40 ms, so this loop is bare."""
        unpack = _U64.unpack_from
        while count:
            self._need(_U64.size)
            buffer, at, last = self._buffer, self._at, len(self._buffer) - _U64.size
            while count and at <= last:
                at += _U64.size + unpack(buffer, at)[0]
                count -= 1
            self.skip(at - self._at)

    def _need(self, count: int) -> None:
        """Have the next `count` bytes in the buffer."""
        if self._at + count <= len(self._buffer):
            return
        if count > self.left:
            self._too_short(count)
        if self.position + count > MAX_HEADER_BYTES:
            raise UnusableError(f"its header goes on after {MAX_HEADER_BYTES:,} bytes, which is the most that is read")
        kept = self._buffer[self._at :]
        self._base, self._at = self.position, 0
        self._file.seek(self._base + len(kept))
        self._buffer = kept + exactly(self._file, min(max(count, BLOCK), self.left) - len(kept))

    def _too_short(self, count: int) -> NoReturn:
        raise UnusableError(
            f"its header goes on for {count:,} bytes after byte {self.position:,}, but the file ends after "
            f"{self._file_bytes:,} bytes"
        )


def _start(header: _Header) -> tuple[int, int]:
    """Counts of tensors and of metadata entries."""
    header.skip(len(MAGIC))
    version = header.number(_U32)
    if version and version & 0xFFFF == 0:  # as gguf.cpp tells it
        raise UnusableError(
            "this GGUF file is big-endian, for another kind of computer", "Use a file made for x86 or ARM: any usual download."
        )
    if version not in VERSIONS:
        what = f"this is a GGUF file of version {version}, and versions 2 and 3 are read"
        raise UnusableError(what, "Update VRAM Headroom." if version > max(VERSIONS) else "Use a newer file of this model.")
    tensors, entries = header.unpack(_COUNTS)
    for count, what, least in ((tensors, "tensors", _LEAST_TENSOR), (entries, "entries of metadata", _LEAST_ENTRY)):
        if count * least > header.left:
            raise UnusableError(
                f"its header should describe {count:,} {what}, which take {count * least:,} bytes at least, but the file "
                f"has {header.left:,} left"
            )
        if count > MAX_ENTRIES:
            raise UnusableError(f"its header should describe {count:,} {what}, and {MAX_ENTRIES:,} is the most that is read")
    return tensors, entries


def _metadata(header: _Header, count: int) -> _Metadata:
    found = _Metadata({}, {}, DEFAULT_ALIGNMENT)
    seen: set[str] = set()
    for _ in range(count):
        key = header.text("a key")
        if key in seen:
            raise UnusableError(f"its metadata says {show(key)} twice")
        seen.add(key)
        kind = header.number(_U32)
        if key == "general.alignment":
            found = found._replace(alignment=_alignment(header, kind))
        elif kind == _ARRAY:
            _array(header, key, found)
        elif key.startswith(ORIGINAL_SHAPE):
            raise UnusableError(f"its metadata {show(key)} is not a list of sizes")
        elif kind == _STRING:
            length = header.number()
            if length > MAX_TEXT:
                header.skip(length)
            else:
                found.texts[key] = header.raw(length).decode(errors="replace")
        elif kind in _NUMBERS:
            found.texts[key] = _number_text(header.number(_NUMBERS[kind]))
        else:
            raise UnusableError(f"its metadata {show(key)} is of type {kind}, which is not known here", UPDATE)
    return found


def _alignment(header: _Header, kind: int) -> int:
    if kind != _UINT32:
        raise UnusableError(f"its metadata 'general.alignment' is of type {kind}, and should be of type {_UINT32}")
    alignment = header.number(_U32)
    if alignment == 0 or alignment & (alignment - 1):
        raise UnusableError(f"its metadata 'general.alignment' is {alignment}, which is not a power of 2")
    return alignment


def _array(header: _Header, key: str, found: _Metadata) -> None:
    kind = header.number(_U32)
    count = header.number()
    if kind != _STRING and kind not in _NUMBERS:
        raise UnusableError(f"its metadata {show(key)} is an array of type {kind}, which is not known here", UPDATE)
    size = _NUMBERS[kind].size if kind in _NUMBERS else _U64.size
    if count * size > header.left:
        raise UnusableError(
            f"its metadata {show(key)} should have {count:,} values, which take {count * size:,} bytes at least, but the file "
            f"has {header.left:,} left"
        )
    numbers = [header.number(_NUMBERS[kind]) for _ in range(count)] if kind in _NUMBERS and count <= MAX_ARRAY else None
    if key.startswith(ORIGINAL_SHAPE):
        if numbers is None or kind in _FLOATS or count > MAX_DIMENSIONS or any(number < 0 for number in numbers):
            raise UnusableError(f"its metadata {show(key)} is not a list of sizes")
        found.shapes[key.removeprefix(ORIGINAL_SHAPE)] = tuple(int(number) for number in numbers)
    if numbers is not None:
        found.texts[key] = f"[{', '.join(map(_number_text, numbers))}]"
    elif kind == _STRING:
        header.skip_texts(count)
    else:
        header.skip(count * size)


def _number_text(number: float) -> str:
    return str(number).lower() if isinstance(number, bool) else str(number)


def _tensors(header: _Header, count: int, metadata: _Metadata, file_bytes: int) -> dict[str, TensorInfo]:
    """The tensors, sorted by offset: none may share bytes, and all end within the file."""
    placed: list[tuple[int, TensorInfo]] = []
    seen: set[str] = set()
    for _ in range(count):
        tensor, offset = _tensor(header, metadata)
        if tensor.name in seen:
            raise UnusableError(f"its header describes tensor {show(tensor.name)} twice")
        seen.add(tensor.name)
        placed.append((offset, tensor))
    placed.sort(key=lambda item: (item[0], item[0] + item[1].nbytes))
    end = 0
    last = "the header"
    for offset, tensor in placed:
        if offset < end:
            raise UnusableError(f"its tensors {show(tensor.name)} and {last} share {end - offset:,} bytes")
        end = offset + tensor.nbytes
        last = show(tensor.name)
    needed = -(-header.position // metadata.alignment) * metadata.alignment + end
    if placed and needed > file_bytes:
        raise UnusableError(
            f"the file has {file_bytes:,} bytes, but its header describes {needed:,}: {needed - file_bytes:,} are missing"
        )
    return {tensor.name: tensor for _, tensor in placed}


def _tensor(header: _Header, metadata: _Metadata) -> tuple[TensorInfo, int]:
    """A tensor and where its bytes begin, counted from the end of the padded header."""
    name = header.text("a tensor's name")
    dimensions = header.number(_U32)
    if dimensions > MAX_DIMENSIONS:
        raise UnusableError(f"tensor {show(name)} should have {dimensions:,} dimensions, and {MAX_DIMENSIONS} is the most")
    *stored, kind, offset = header.unpack(_TAILS[dimensions])
    if kind not in GGML_TYPES:
        raise UnusableError(f"tensor {show(name)} is of type {kind}, which is not known here", UPDATE)
    ggml = GGML_TYPES[kind]
    shape = stored[::-1]  # the file gives the dimension that varies fastest first
    elements = prod(shape)
    if max((elements, *shape)) > MAX_ELEMENTS:
        raise UnusableError(f"tensor {show(name)} is too large: {ggml.name} of shape {show_shape(shape)}")
    if (stored[0] if stored else 1) % ggml.elements:
        raise UnusableError(
            f"tensor {show(name)} is {ggml.name} of shape {show_shape(shape)}, but {ggml.name} has rows of whole blocks of "
            f"{ggml.elements} elements"
        )
    if offset % metadata.alignment:
        raise UnusableError(f"tensor {show(name)} begins at byte {offset:,}, which is not a multiple of {metadata.alignment}")
    original = metadata.shapes.get(name)
    if original is not None and prod(original) != elements:
        raise UnusableError(
            f"tensor {show(name)} has {elements:,} elements, but its original shape {show_shape(list(original))} has "
            f"{prod(original):,}"
        )
    final = tuple(shape) if original is None else original
    return TensorInfo(name, ggml.name, final, elements // ggml.elements * ggml.nbytes), offset


_TAILS: Final = tuple(struct.Struct(f"<{dimensions}QIQ") for dimensions in range(MAX_DIMENSIONS + 1))
"""What follows a tensor's name and number of dimensions: these, its type and its offset."""
