"""What the readers of model files share: the types they fill, the error they raise, and opening a file without reading on."""

import json
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from types import MappingProxyType
from typing import Any, BinaryIO, Final, Literal, NamedTuple, NoReturn

CheckpointFormat = Literal["safetensors", "gguf", "sharded", "diffusers"]
"""One safetensors file, one GGUF file, several safetensors files with or without an index, a folder with a config.json."""

MAX_HEADER_BYTES: Final = 100_000_000
"""Longest header that is read: `MAX_HEADER_SIZE` in safetensors' tensor.rs. GGUF sets none and is held to the same one here;
the longest in use, text encoders with their whole vocabulary, have some 20 MB."""

MAX_COUNT: Final = 2**64 - 1
"""Largest dimension, offset and number of bits: tensor.rs counts in `usize` and refuses what overflows it."""

DOWNLOAD: Final = "Download it again."
UPDATE: Final = "Update VRAM Headroom, or use a file in another precision."

PICKLES: Final = (".pth", ".pt", ".ckpt", ".bin")
"""Endings that ComfyUI and the libraries of Hugging Face give to what torch.save writes."""

PICKLE_STARTS: Final = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
"""A zip, which torch.save writes since 1.6, or a bare pickle, which it wrote before."""


class TensorInfo(NamedTuple):
    """One tensor of a file, as its header describes it: the shape in torch's order, the bytes it takes in the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int

    @property
    def elements(self) -> int:
        return prod(self.shape)


class Source(NamedTuple):
    """A file or folder as it was just before it was read. `size` is in bytes; for a folder, the number of its entries."""

    path: str
    size: int
    mtime_ns: int


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model on disk: its tensors in the order their bytes lie in the file, one file after the other.

    `path` is what was asked for, `file_bytes` the size of all files with weights. A tensor's dtype is safetensors' name of it
    (`DTYPE_BITS`) or, in GGUF, ggml's (`GGML_TYPES`); what both have, both call the same. `notes` are sentences about what
    was not counted or does not agree; `sources` is everything whose change makes this out of date.
    """

    path: str
    file_bytes: int
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    format: CheckpointFormat = "safetensors"
    notes: tuple[str, ...] = ()
    sources: tuple[Source, ...] = field(default=(), repr=False, compare=False)

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


class UnusableError(Exception):
    """Why a file cannot be used; `naming` adds its name."""

    def __init__(self, problem: str, remedy: str = DOWNLOAD) -> None:
        super().__init__(problem)
        self.problem = problem
        self.remedy = remedy


@contextmanager
def naming(path: str) -> Iterator[None]:
    """Turn UnusableError into a CheckpointError that names `path`."""
    try:
        yield
    except UnusableError as why:
        name = os.path.basename(os.path.normpath(path)) or path
        raise CheckpointError(f"{name}: {why.problem}. {why.remedy} ({path})") from None


@contextmanager
def speaking_of_the_disk() -> Iterator[None]:
    """Turn what the operating system refuses into UnusableError."""
    try:
        yield
    except FileNotFoundError:
        raise UnusableError("this file does not exist", "Check the name and the folder, or download it.") from None
    except PermissionError as error:
        raise UnusableError(f"this file cannot be opened: {error.strerror}", "Check its permissions.") from None
    except OSError as error:
        raise UnusableError(f"this file cannot be read: {error.strerror or error}", "Check the disk it is on.") from None


def look(path: str) -> os.stat_result:
    """What is at `path`."""
    with speaking_of_the_disk():
        try:
            return os.stat(path)
        except ValueError as error:  # a path with a NUL in it
            raise UnusableError(f"this file cannot be opened: {error}", "Check its name.") from None


def source(path: str) -> Source:
    """The stamp of `path` as it is now. Raises OSError or ValueError if nothing is there."""
    found = os.stat(path)
    size = len(os.listdir(path)) if stat.S_ISDIR(found.st_mode) else found.st_size
    return Source(path, size, found.st_mtime_ns)


@contextmanager
def opened(path: str) -> Iterator[tuple[BinaryIO, Source]]:
    """A regular file, unbuffered (a buffer would read on into the weights), and its stamp from before the first read."""
    mode = look(path).st_mode
    if stat.S_ISDIR(mode):
        raise UnusableError("this is a folder, not a model file", "Choose a file in it.")
    if not stat.S_ISREG(mode):  # opening a pipe would wait for a writer
        raise UnusableError("this is not a regular file", "Choose a model file.")
    with speaking_of_the_disk(), open(path, "rb", buffering=0) as file:
        found = os.fstat(file.fileno())
        yield file, Source(path, found.st_size, found.st_mtime_ns)


def exactly(file: BinaryIO, count: int) -> bytes:
    """The next `count` bytes: an unbuffered read may give fewer than it was asked for."""
    parts: list[bytes] = []
    missing = count
    while missing:
        part = file.read(missing)
        if not part:
            raise UnusableError(f"the file ended {missing:,} bytes early, while it was read", "Try again.")
        parts.append(part)
        missing -= len(part)
    return b"".join(parts)


def json_object(text: bytes, what: str = "its header", at: int = 0) -> dict[str, Any]:
    """`text` as a JSON object without a key said twice. `what` names it in errors, `at` is where in the file it starts."""
    if not text:
        raise UnusableError(f"{what} is empty")
    try:
        content = text.decode()
    except UnicodeDecodeError as error:
        raise UnusableError(f"{what} is not UTF-8 at byte {at + error.start:,}") from None
    if not content.startswith("{"):
        raise UnusableError(f"{what} is not a JSON object: it starts with {show(content[:8])}")
    try:
        return _DECODER.decode(content)
    except _TwiceError as error:
        raise UnusableError(f"{what} says {show(error.args[0])} twice") from None
    except json.JSONDecodeError as error:
        raise UnusableError(f"{what} is not JSON at byte {at + error.pos:,}: {error.msg}") from None
    except (ValueError, RecursionError) as error:
        # A constant such as NaN, a number of thousands of digits, or thousands of brackets.
        raise UnusableError(f"{what} is not JSON that describes tensors: {str(error)[:80]}") from None


def json_file(path: str, what: str) -> tuple[dict[str, Any], Source]:
    """The JSON object in the file at `path`, and the file's stamp."""
    with opened(path) as (file, stamp):
        if stamp.size > MAX_HEADER_BYTES:
            raise UnusableError(f"{what} has {stamp.size:,} bytes, and {MAX_HEADER_BYTES:,} is the most that is read")
        return json_object(exactly(file, stamp.size).strip(), what), stamp


class _TwiceError(Exception):
    pass


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. safetensors' README, Notes: "Duplicate keys are disallowed"."""
    entries = dict(pairs)
    if len(entries) < len(pairs):
        seen: set[str] = set()
        raise _TwiceError(next(key for key, _ in pairs if key in seen or seen.add(key)))
    return entries


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=_once, parse_constant=_no_constant)


def is_pickle_name(name: str) -> bool:
    return name.lower().endswith(PICKLES)


def refuse_pickle(problem: str = "this is a pickle (a file of torch.save)") -> NoReturn:
    raise UnusableError(
        f"{problem}, which is not read: reading even its table of tensors can run code that it carries",
        "Use the same model as .safetensors or .gguf.",
    )


def check_text(text: str, what: str = "its header") -> None:
    r"""JSON can escape half a character ("\ud800"), which no UTF-8 text contains and nothing could print."""
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise UnusableError(f"{what} holds a text that is not UTF-8: {show(text)}") from None


def show(value: object) -> str:
    """A value of the header, short enough for a message. What holds others is only named: it may be deep."""
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list):
        return "a list"
    if isinstance(value, str) and len(value) > 120:
        return repr(f"{value[:100]}...")
    return repr(value)[:120]


def show_shape(shape: list[int]) -> str:
    return str(shape) if len(shape) <= 8 else f"[{', '.join(map(str, shape[:8]))}, ...]"
