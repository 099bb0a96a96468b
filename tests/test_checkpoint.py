"""What is promised of reading a checkpoint: exact bytes from the header alone, and one clear error for any bad file."""

import json
import operator
import os
import re
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import pytest
import safetensors
import torch
from counting import CountingFile, count_reads
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from vram_headroom.vram.estimate import header as module
from vram_headroom.vram.estimate.checkpoint import (
    DTYPE_BITS,
    MAX_HEADER_BYTES,
    CheckpointError,
    HeaderCache,
    TensorInfo,
    read_checkpoint,
)

Entry = dict[str, Any]
HALF: Entry = {"dtype": "F16", "shape": [2, 3], "data_offsets": [0, 12]}


def packed(header: object, data: int = 0) -> bytes:
    """A file's bytes: length, header (JSON, or bytes as they are), then `data` zero bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(data)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tmp_path / "wan.safetensors"


def problem(path: Path) -> str:
    """The message of the error that reading `path` must raise; it always names the file and is one line."""
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(path)
    message = str(caught.value)
    assert path.name in message
    assert str(path) in message
    assert "\n" not in message
    return message


# what a good file gives


def test_names_dtypes_shapes_and_bytes_are_those_of_the_header(model: Path) -> None:
    header = {
        "__metadata__": {"format": "pt"},
        "a": HALF,
        "b": {"dtype": "F8_E4M3", "shape": [5, 4], "data_offsets": [12, 32]},
        "c": {"dtype": "F32", "shape": [1], "data_offsets": [32, 36]},
    }
    model.write_bytes(packed(header, 36))
    read = read_checkpoint(model)
    assert read.path == str(model)
    assert read.file_bytes == model.stat().st_size
    assert read.metadata == {"format": "pt"}
    assert read.tensors == {
        "a": TensorInfo("a", "F16", (2, 3), 12),
        "b": TensorInfo("b", "F8_E4M3", (5, 4), 20),
        "c": TensorInfo("c", "F32", (1,), 4),
    }
    assert read.tensor_bytes == 36
    assert read.parameters == 6 + 20 + 1
    assert read.bytes_by_dtype == {"F16": 12, "F8_E4M3": 20, "F32": 4}


def test_tensors_come_in_the_order_of_the_file_not_of_the_header(model: Path) -> None:
    second = {"dtype": "U8", "shape": [4], "data_offsets": [12, 16]}
    model.write_bytes(packed({"second": second, "first": HALF}, 16))
    assert list(read_checkpoint(model).tensors) == ["first", "second"]


def test_what_was_read_cannot_be_changed(model: Path) -> None:
    model.write_bytes(packed({"__metadata__": {"a": "b"}, "a": HALF}, 12))
    read = read_checkpoint(model)
    for mapping in (read.tensors, read.metadata, DTYPE_BITS):
        with pytest.raises(TypeError):
            operator.setitem(cast(Any, mapping), "a", None)


def test_scalars_have_one_element_and_empty_tensors_none(model: Path) -> None:
    header = {
        "empty": {"dtype": "F8_E4M3", "shape": [0], "data_offsets": [0, 0]},
        "scalar": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]},
        "also_empty": {"dtype": "F32", "shape": [3, 0], "data_offsets": [4, 4]},
    }
    model.write_bytes(packed(header, 4))
    read = read_checkpoint(model)
    assert [(t.elements, t.nbytes) for t in read.tensors.values()] == [(0, 0), (1, 4), (0, 0)]


def test_a_file_without_tensors_is_legal(model: Path) -> None:
    model.write_bytes(packed({}))
    read = read_checkpoint(model)
    assert (read.tensor_bytes, read.parameters, dict(read.tensors), dict(read.metadata)) == (0, 0, {}, {})


def test_trailing_spaces_belong_to_the_header(model: Path) -> None:
    model.write_bytes(packed(json.dumps({"a": HALF}).encode() + b" " * 100, 12))
    assert read_checkpoint(model).tensor_bytes == 12


def test_types_below_a_byte_are_counted_in_bits(model: Path) -> None:
    header = {
        "four": {"dtype": "F4", "shape": [3, 2], "data_offsets": [0, 3]},
        "six": {"dtype": "F6_E2M3", "shape": [4], "data_offsets": [3, 6]},
    }
    model.write_bytes(packed(header, 6))
    assert [t.nbytes for t in read_checkpoint(model).tensors.values()] == [3, 3]


# against the reference library


def test_the_table_of_types_is_the_libraries_own() -> None:
    unknown = packed({"a": {"dtype": "?", "shape": [], "data_offsets": [0, 0]}})
    with pytest.raises(Exception, match="expected one of") as caught:
        safetensors.deserialize(unknown)
    known = set(re.findall(r"`(\w+)`", str(caught.value).partition("expected one of")[2]))
    assert "F16" in known
    assert known <= set(DTYPE_BITS)


@pytest.mark.parametrize("dtype", sorted(DTYPE_BITS))
def test_the_library_takes_the_same_bytes_for_eight_elements(model: Path, dtype: str) -> None:
    nbytes = DTYPE_BITS[dtype]  # eight elements: as many bytes as an element has bits
    content = packed({"a": {"dtype": dtype, "shape": [8], "data_offsets": [0, nbytes]}}, nbytes)
    model.write_bytes(content)
    assert read_checkpoint(model).tensors["a"].nbytes == nbytes
    [(name, entry)] = safetensors.deserialize(content)
    assert (name, entry["dtype"], entry["shape"], len(entry["data"])) == ("a", dtype, [8], nbytes)


TORCH_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
    "C64": torch.complex64,
}


def test_files_the_library_writes_are_read_as_torch_counts_them(model: Path) -> None:
    pytest.importorskip("numpy", reason="safetensors writes torch tensors through numpy")
    tensors = {f"{name}.weight": torch.zeros((3, 5), dtype=dtype) for name, dtype in TORCH_DTYPES.items()}
    tensors["scalar"] = torch.tensor(1.0)
    tensors["empty"] = torch.zeros((0, 7))
    save_file(tensors, model, metadata={"modelspec.title": "wän"})
    read = read_checkpoint(model)
    assert read.metadata == {"modelspec.title": "wän"}
    assert {n: (t.shape, t.nbytes, t.elements) for n, t in read.tensors.items()} == {
        n: (tuple(t.shape), t.numel() * t.element_size(), t.numel()) for n, t in tensors.items()
    }
    assert all(read.tensors[f"{name}.weight"].dtype == name for name in TORCH_DTYPES)
    with safetensors.safe_open(model, framework="pt") as opened:
        assert set(opened.keys()) == set(read.tensors)


# what is read


@pytest.fixture
def bytes_read(monkeypatch: pytest.MonkeyPatch) -> type[CountingFile]:
    return count_reads(monkeypatch)


def test_of_a_14_gb_file_only_the_header_is_read(model: Path, bytes_read: type[CountingFile]) -> None:
    weights = 14_000_000_000
    head = packed({"w": {"dtype": "F8_E4M3", "shape": [weights], "data_offsets": [0, weights]}})
    with model.open("wb") as file:
        file.write(head)
        file.truncate(len(head) + weights)
    assert read_checkpoint(model).tensor_bytes == weights
    assert bytes_read.taken == len(head)


def test_a_header_said_to_be_longer_than_the_file_is_not_read(model: Path, bytes_read: type[CountingFile]) -> None:
    model.write_bytes(struct.pack("<Q", 90_000_000) + b"{}" * 1000)
    problem(model)
    assert bytes_read.taken == 8


# bad files


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    message = problem(tmp_path / "gone.safetensors")
    assert "does not exist" in message


def test_a_folder_is_not_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "folder.safetensors").mkdir()
    assert "folder" in problem(tmp_path / "folder.safetensors").replace("folder.safetensors", "")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes on this system")
def test_a_pipe_is_refused_without_waiting_for_a_writer(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.safetensors")
    assert "not a regular file" in problem(tmp_path / "pipe.safetensors")


def test_a_file_that_may_not_be_opened_says_so(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    model.write_bytes(packed({}))
    monkeypatch.setattr(module, "open", refuse, raising=False)
    message = problem(model)
    assert "Permission denied" in message
    assert "permission" in message.lower().replace("permission denied", "")


def test_a_path_no_system_takes_is_an_error_like_any_other() -> None:
    with pytest.raises(CheckpointError, match="cannot be opened"):
        read_checkpoint("a\0b.safetensors")


@pytest.mark.parametrize("size", [0, 1, 7])
def test_a_file_too_short_for_a_header_length_is_named_with_its_size(model: Path, size: int) -> None:
    model.write_bytes(b"\x10" * size)
    message = problem(model)
    assert "empty" in message if size == 0 else f"{size} bytes" in message
    assert "ownload it again" in message


def test_a_header_longer_than_the_file_is_named_with_both_sizes(model: Path) -> None:
    model.write_bytes(struct.pack("<Q", 500) + b"{}")
    message = problem(model)
    assert "500" in message
    assert "10 bytes" in message
    assert "ownload it again" in message


def test_a_header_over_the_formats_limit_is_refused(model: Path) -> None:
    assert MAX_HEADER_BYTES == 100_000_000
    with model.open("wb") as file:
        file.write(struct.pack("<Q", MAX_HEADER_BYTES + 1))
        file.truncate(MAX_HEADER_BYTES + 100)
    assert "100,000,001" in problem(model)


@pytest.mark.parametrize(
    "start",
    [b"version https://git-lfs", b"<!DOCTYPE html>", b"7z\xbc\xaf\x27\x1c\x00\x04archive"],
    ids=["git-lfs", "web page", "archive"],
)
def test_a_file_that_is_something_else_shows_how_it_starts(model: Path, start: bytes) -> None:
    model.write_bytes(start + b" " * 100)
    message = problem(model)
    assert "not a safetensors file" in message
    assert repr(start[:8])[2:-1] in message


@pytest.mark.parametrize("name", ["wan.pth", "wan.pt", "wan.CKPT", "pytorch_model.bin", "wan.safetensors"])
@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_is_not_read_whatever_its_name(tmp_path: Path, name: str, legacy: bool) -> None:
    torch.save({"a": torch.zeros(100)}, tmp_path / name, _use_new_zipfile_serialization=not legacy)
    message = problem(tmp_path / name)
    assert "pickle" in message
    assert "not read" in message
    assert ".safetensors or .gguf" in message


def test_a_safetensors_file_is_read_under_any_name(tmp_path: Path) -> None:
    (tmp_path / "wan.ckpt").write_bytes(packed({"a": HALF}, 12))
    assert read_checkpoint(tmp_path / "wan.ckpt").tensor_bytes == 12


def test_a_truncated_file_is_named_with_what_is_missing(model: Path) -> None:
    whole = packed({"a": HALF}, 12)
    model.write_bytes(whole[:-5])
    message = problem(model)
    assert f"{len(whole) - 5:,} bytes" in message
    assert f"{len(whole):,}" in message
    assert "5 are missing" in message
    assert "ownload it again" in message


def test_bytes_after_the_last_tensor_are_refused(model: Path) -> None:
    model.write_bytes(packed({"a": HALF}, 15))
    assert "3 bytes" in problem(model)


def entry(**changes: Any) -> Entry:
    changed = {**HALF, **changes}
    return {"layer.weight": {k: v for k, v in changed.items() if v is not ...}}


MALFORMED: list[tuple[object, str]] = [
    (b"", "header is empty"),
    (b"[]", "JSON object"),
    (b'"text"', "JSON object"),
    (b"  {}", "JSON object"),
    (b"{", "JSON"),
    (b"{} {}", "JSON"),
    (b"\xff\xfe{}", "UTF-8"),
    (b'{"a": "\xe9"}', "UTF-8"),
    (b'{"a": NaN}', "JSON"),
    (b'{"a": ' + b"[" * 100_000, "JSON"),
    (b'{"a": ' + b"9" * 5000 + b"}", "JSON"),
    (b'{"\\ud800": {"dtype": "U8", "shape": [], "data_offsets": [0, 1]}}', "UTF-8"),
    (b'{"__metadata__": {"\\ud800": "a"}}', "UTF-8"),
    (b'{"a": {}, "a": {}}', "'a' twice"),
    (b'{"a": {"dtype": "U8", "dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}', "'dtype' twice"),
    ({"__metadata__": []}, "__metadata__"),
    ({"__metadata__": {"format": 1}}, "__metadata__"),
    ({"layer.weight": 5}, "layer.weight"),
    ({"layer.weight": None}, "layer.weight"),
    ({"layer.weight": []}, "layer.weight"),
    (entry(dtype=...), "dtype"),
    (entry(shape=...), "shape"),
    (entry(data_offsets=...), "data_offsets"),
    (entry(dtype=16), "dtype"),
    (entry(dtype="F17"), "F17"),
    (entry(dtype="F" * 5000), "FFF"),
    (entry(shape=6), "shape"),
    (entry(shape={"0": 6}), "shape"),
    (entry(shape=[2, -3]), "-3"),
    (entry(shape=[2, 3.0]), "3.0"),
    (entry(shape=[True, 6]), "True"),
    (entry(shape=[2, "3"]), "'3'"),
    (entry(shape=[2, None]), "None"),
    (entry(shape=[2**64]), str(2**64)),
    (entry(shape=[2**40, 2**40]), "too large"),
    (entry(shape=[2**40, 2**40, 0]), "too large"),
    (entry(shape=[2**63]), "too large"),
    (entry(shape=[[[[]]]]), "shape"),
    (entry(data_offsets=12), "data_offsets"),
    (entry(data_offsets=[12]), "data_offsets"),
    (entry(data_offsets=[0, 6, 12]), "data_offsets"),
    (entry(data_offsets=[0, "12"]), "data_offsets"),
    (entry(data_offsets=[False, 12]), "data_offsets"),
    (entry(data_offsets=[-12, 0]), "data_offsets"),
    (entry(data_offsets=[0, 2**64]), "data_offsets"),
    (entry(data_offsets=[12, 0]), "begins at byte 12 and ends at byte 0"),
    (entry(data_offsets=[0, 11]), "11 bytes, but F16 of shape [2, 3] takes 12"),
    (entry(data_offsets=[0, 13]), "13 bytes, but F16 of shape [2, 3] takes 12"),
    (entry(dtype="F4", shape=[3], data_offsets=[0, 1]), "12 bits"),
    (entry(dtype="F4", shape=[3], data_offsets=[0, 2]), "12 bits"),
]


@pytest.mark.parametrize(("header", "expected"), MALFORMED, ids=[f"{i:02}" for i in range(len(MALFORMED))])
def test_a_malformed_header_says_what_is_wrong_and_what_to_do(model: Path, header: object, expected: str) -> None:
    model.write_bytes(packed(header, 12))
    message = problem(model)
    assert expected in message
    assert "ownload it again" in message or "pdate VRAM Headroom" in message
    assert len(message) < 700 + 2 * len(str(model))


def test_tensors_that_share_bytes_are_both_named(model: Path) -> None:
    other = {"dtype": "U8", "shape": [12], "data_offsets": [6, 18]}
    model.write_bytes(packed({"first": HALF, "second": other}, 18))
    message = problem(model)
    assert "second" in message
    assert "first" in message
    assert "6 bytes" in message


@pytest.mark.parametrize("begin", [13, 20])
def test_bytes_that_belong_to_no_tensor_are_refused(model: Path, begin: int) -> None:
    other = {"dtype": "U8", "shape": [4], "data_offsets": [begin, begin + 4]}
    model.write_bytes(packed({"first": HALF, "second": other}, begin + 4))
    assert f"{begin - 12} bytes" in problem(model)


def test_a_first_tensor_that_does_not_start_the_data_is_refused(model: Path) -> None:
    model.write_bytes(packed({"a": {"dtype": "U8", "shape": [4], "data_offsets": [4, 8]}}, 8))
    assert "4 bytes" in problem(model)


# whatever the bytes are


def outcome(path: Path, content: bytes) -> None:
    """Reading `content` succeeds or raises CheckpointError; where the library reads it too, both say the same."""
    path.write_bytes(content)
    try:
        read = read_checkpoint(path)
    except CheckpointError:
        return
    assert read.tensor_bytes <= len(content)
    try:
        reference = safetensors.deserialize(content)
    except Exception:
        return
    assert {n: (e["dtype"], tuple(e["shape"]), len(e["data"])) for n, e in reference} == {
        n: (t.dtype, t.shape, t.nbytes) for n, t in read.tensors.items()
    }


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "any.safetensors"


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(sorted(DTYPE_BITS)),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets", "x"]) | st.text(max_size=4), inner, max_size=4)
    ),
    max_leaves=12,
)
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(sorted(DTYPE_BITS)) | JSON_VALUES,
        "shape": st.lists(st.integers(0, 4), max_size=3) | JSON_VALUES,
        "data_offsets": st.tuples(st.integers(0, 32), st.integers(0, 32)) | JSON_VALUES,
    }
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(content=st.binary(max_size=200))
def test_any_bytes_give_an_answer_or_a_checkpoint_error(scratch: Path, content: bytes) -> None:
    outcome(scratch, content)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(text=st.binary(max_size=200), data=st.integers(0, 40))
def test_any_header_bytes_give_an_answer_or_a_checkpoint_error(scratch: Path, text: bytes, data: int) -> None:
    outcome(scratch, packed(text, data))


@settings(max_examples=300, deadline=None, derandomize=True)
@given(header=st.dictionaries(st.text(max_size=6), ENTRIES | JSON_VALUES, max_size=4), data=st.integers(0, 40))
def test_any_json_header_gives_an_answer_or_a_checkpoint_error(scratch: Path, header: object, data: int) -> None:
    outcome(scratch, packed(header, data))


GOOD = packed({"__metadata__": {"format": "pt"}, "a": HALF, "b": {**HALF, "data_offsets": [12, 24]}}, 24)


@settings(max_examples=500, deadline=None, derandomize=True)
@given(
    at=st.integers(0, len(GOOD) - 1),
    drop=st.integers(0, 3),
    put=st.binary(max_size=3) | st.sampled_from([b"-", b"0", b"9", b'"', b"}", b"1e5", b"true"]),
    keep_length=st.booleans(),
)
def test_any_mutation_gives_an_answer_or_a_checkpoint_error(
    scratch: Path, at: int, drop: int, put: bytes, keep_length: bool
) -> None:
    content = GOOD[:at] + put + GOOD[at + drop :]
    if not keep_length and at >= 8:
        content = struct.pack("<Q", max(0, struct.unpack("<Q", GOOD[:8])[0] + len(put) - drop)) + content[8:]
    outcome(scratch, content)


# the cache


def test_a_file_that_did_not_change_is_read_once(model: Path, bytes_read: type[CountingFile]) -> None:
    model.write_bytes(packed({"a": HALF}, 12))
    cache = HeaderCache()
    first = cache.get(model)
    once = bytes_read.taken
    assert cache.get(model) is first
    assert cache.get(str(model)) is first
    assert bytes_read.taken == once


@pytest.mark.parametrize("what", ["size", "time"])
def test_a_file_that_changed_is_read_again(model: Path, what: str) -> None:
    model.write_bytes(packed({"a": HALF}, 12))
    cache = HeaderCache()
    before = model.stat()
    assert list(cache.get(model).tensors) == ["a"]
    model.write_bytes(packed({"b" * (1 if what == "time" else 9): HALF}, 12))
    shift = 1_000_000_000 if what == "time" else 0
    os.utime(model, ns=(before.st_atime_ns, before.st_mtime_ns + shift))
    assert set("".join(cache.get(model).tensors)) == {"b"}


def test_the_file_asked_for_longest_ago_leaves_first(tmp_path: Path, bytes_read: type[CountingFile]) -> None:
    paths = [tmp_path / f"{i}.safetensors" for i in range(3)]
    for path in paths:
        path.write_bytes(packed({"a": HALF}, 12))
    cache = HeaderCache(size=2)
    first = cache.get(paths[0])
    cache.get(paths[1])
    cache.get(paths[0])
    cache.get(paths[2])  # 1 leaves
    read = bytes_read.taken
    assert cache.get(paths[0]) is first
    assert bytes_read.taken == read
    cache.get(paths[1])
    assert bytes_read.taken > read


def test_errors_are_not_kept(model: Path) -> None:
    cache = HeaderCache()
    for _ in range(2):
        with pytest.raises(CheckpointError, match="does not exist"):
            cache.get(model)
    model.write_bytes(packed({"a": HALF}, 12))
    assert cache.get(model).tensor_bytes == 12
    model.unlink()
    with pytest.raises(CheckpointError, match="does not exist"):
        cache.get(model)


def test_many_threads_get_the_right_file(tmp_path: Path) -> None:
    paths = [tmp_path / f"{i}.safetensors" for i in range(8)]
    for i, path in enumerate(paths):
        path.write_bytes(packed({f"t{i}": HALF}, 12))
    cache = HeaderCache(size=4)
    with ThreadPoolExecutor(8) as pool:
        names = list(pool.map(lambda i: next(iter(cache.get(paths[i % 8]).tensors)), range(800)))
    assert names == [f"t{i % 8}" for i in range(800)]
