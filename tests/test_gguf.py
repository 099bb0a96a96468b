"""What is promised of GGUF files: what the gguf package reads, from the header alone, and a clear error for a bad one."""

import os
import struct
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy
import pytest
from counting import count_reads
from gguf import GGMLQuantizationType, GGUFValueType
from hypothesis import given, settings
from hypothesis import strategies as st
from vram_headroom.vram.estimate.checkpoint import CheckpointError, HeaderCache, TensorInfo, read_checkpoint
from vram_headroom.vram.estimate.gguf import BLOCK, GGML_TYPES, MAX_DIMENSIONS, QUANTISED, VERSIONS
from vram_headroom.vram.estimate.header import MAX_HEADER_BYTES

F32, F16, Q8_0, Q4_K = 0, 1, 8, 12
U8, U32, STRING, ARRAY, U64 = 0, 4, 8, 9, 10


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tmp_path / "wan.gguf"


def problem(path: Path) -> str:
    """The message of the error that reading `path` must raise; it always names the file and is one line."""
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(path)
    message = str(caught.value)
    assert path.name in message
    assert str(path) in message
    assert "\n" not in message
    return message


# files as the gguf package writes them


def write(path: Path, tensors: dict[str, tuple[tuple[int, ...], GGMLQuantizationType]], title: str = "") -> None:
    """A file of zeros whose tensors have these shapes (torch's order) and types."""
    writer = gguf.GGUFWriter(path, "wan")
    writer.add_string("general.name", title)  # which leaves out an empty one
    for name, (shape, kind) in tensors.items():
        block, nbytes = gguf.GGML_QUANT_SIZES[kind]
        stored = (*shape[:-1], shape[-1] // block * nbytes)
        writer.add_tensor(name, numpy.zeros(stored, numpy.uint8), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def as_the_package_reads(path: Path) -> dict[str, TensorInfo]:
    return {
        t.name: TensorInfo(t.name, t.tensor_type.name, tuple(int(n) for n in reversed(t.shape)), int(t.n_bytes))
        for t in gguf.GGUFReader(path).tensors
    }


def test_every_type_of_the_package_is_known_with_its_block() -> None:
    theirs = {int(kind): (kind.name, *gguf.GGML_QUANT_SIZES[kind]) for kind in GGMLQuantizationType}
    assert len(theirs) >= 34
    assert {number: tuple(GGML_TYPES[number]) for number in theirs} == theirs


def test_the_types_the_package_lacks_are_these() -> None:
    assert {GGML_TYPES[number].name for number in set(GGML_TYPES) - set(map(int, GGMLQuantizationType))} <= {"Q2_0"}


@pytest.mark.parametrize("kind", GGMLQuantizationType, ids=lambda kind: kind.name)
def test_each_type_is_read_as_the_package_wrote_it(model: Path, kind: GGMLQuantizationType) -> None:
    write(model, {"blocks.0.q.weight": ((3, 5, 512), kind), "blocks.0.q.bias": ((512,), GGMLQuantizationType.F32)})
    read = read_checkpoint(model)
    assert read.tensors == as_the_package_reads(model)
    tensor = read.tensors["blocks.0.q.weight"]
    assert (tensor.dtype, tensor.shape, tensor.elements) == (kind.name, (3, 5, 512), 7680)
    assert (tensor.dtype in QUANTISED) == (gguf.GGML_QUANT_SIZES[kind][0] > 1)
    assert read.format == "gguf"
    assert read.path == str(model)
    assert read.file_bytes == model.stat().st_size
    assert read.parameters == 7680 + 512
    assert read.tensor_bytes == tensor.nbytes + 2048


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q5_1", "BF16"])
def test_weights_that_the_package_quantised_take_the_bytes_read(model: Path, kind: str) -> None:
    weights = gguf.quants.quantize(numpy.ones((6, 128), numpy.float32), GGMLQuantizationType[kind])
    writer = gguf.GGUFWriter(model, "wan")
    writer.add_tensor("w", weights, raw_dtype=GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert read_checkpoint(model).tensors["w"] == TensorInfo("w", kind, (6, 128), weights.nbytes)


def test_the_sizes_usually_quoted_come_out() -> None:
    bits = {kind.name: 8 * kind.nbytes / kind.elements for kind in GGML_TYPES.values()}
    quoted = {"Q8_0": 8.5, "Q6_K": 6.5625, "Q5_K": 5.5, "Q4_K": 4.5, "Q4_0": 4.5, "Q3_K": 3.4375, "Q2_K": 2.625, "BF16": 16}
    assert {name: bits[name] for name in quoted} == quoted


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    tensors=st.dictionaries(
        st.text(st.characters(codec="utf-8"), max_size=12),
        st.tuples(st.lists(st.integers(1, 3), max_size=3), st.integers(1, 2), st.sampled_from(list(GGMLQuantizationType))).map(
            lambda t: ((*t[0], t[1] * 256), t[2])
        ),
        min_size=1,
        max_size=5,
    ),
    title=st.text(st.characters(codec="utf-8"), min_size=1, max_size=20),
)
def test_whatever_the_package_writes_is_read_as_it_reads_it(scratch: Path, tensors: Any, title: str) -> None:
    write(scratch, tensors, title)
    read = read_checkpoint(scratch)
    assert read.tensors == as_the_package_reads(scratch)
    assert list(read.tensors) == list(tensors), "in the order of their bytes"
    assert read.metadata == {"general.architecture": "wan", "general.name": title}


def test_metadata_of_every_type_is_kept_as_text(model: Path) -> None:
    writer = gguf.GGUFWriter(model, "wan")
    for kind in GGUFValueType:
        if kind not in (GGUFValueType.ARRAY, GGUFValueType.STRING, GGUFValueType.BOOL):
            writer.add_key_value(kind.name, 7, kind)
    writer.add_bool("yes", True)
    writer.add_string("text", "wän")
    writer.add_array("sizes", [1, 2, 2])
    writer.add_array("flags", [True, False])
    writer.add_array("long", list(range(1000)))
    writer.add_array("words", ["a", "b"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    assert read_checkpoint(model).metadata == {
        "general.architecture": "wan",
        **dict.fromkeys(("UINT8", "INT8", "UINT16", "INT16", "UINT32", "INT32", "UINT64", "INT64"), "7"),
        **dict.fromkeys(("FLOAT32", "FLOAT64"), "7.0"),
        "yes": "true",
        "text": "wän",
        "sizes": "[1, 2, 2]",
        "flags": "[true, false]",
    }


def test_an_alignment_of_its_own_is_followed(model: Path) -> None:
    writer = gguf.GGUFWriter(model, "wan")
    writer.add_custom_alignment(4096)
    for name in "ab":
        writer.add_tensor(name, numpy.zeros(3, numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert read_checkpoint(model).tensors == as_the_package_reads(model)
    os.truncate(model, 4096 + 4096 + 11)
    assert "1 are missing" in problem(model)


def test_a_big_endian_file_says_so(model: Path) -> None:
    writer = gguf.GGUFWriter(model, "wan", endianess=gguf.GGUFEndian.BIG)
    writer.add_tensor("a", numpy.zeros(4, numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert "big-endian" in problem(model)


# files by hand


class Tensor(NamedTuple):
    name: str = "a"
    shape: tuple[int, ...] = (3, 64)
    kind: int = F16
    offset: int = 0


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def said(key: str | bytes, value: object, kind: int = U32) -> bytes:
    """An entry of metadata: a text, a number, or a list of either."""
    if isinstance(value, list):
        values = b"".join(text(v) if isinstance(v, str) else struct.pack(FORMATS[kind], v) for v in value)
        inner = STRING if value and isinstance(value[0], str) else kind
        return text(key) + struct.pack("<IIQ", ARRAY, inner, len(value)) + values
    if isinstance(value, str | bytes):
        return text(key) + struct.pack("<I", STRING) + text(value)
    return text(key) + struct.pack("<I", kind) + struct.pack(FORMATS[kind], value)


FORMATS = {0: "<B", 4: "<I", 5: "<i", 6: "<f", 7: "<B", 10: "<Q", 11: "<q"}


def packed(
    tensors: Sequence[Tensor | bytes] = (), entries: Sequence[bytes] = (), data: int = 0, version: int = 3, **counts: int
) -> bytes:
    """A file's bytes. `data` is the bytes after the padded header; counts may be said wrong."""
    head = b"GGUF" + struct.pack(
        "<IQQ", version, counts.get("tensor_count", len(tensors)), counts.get("entry_count", len(entries))
    )
    head += b"".join(entries)
    for tensor in tensors:
        if isinstance(tensor, bytes):
            head += tensor
        else:
            head += text(tensor.name) + struct.pack("<I", len(tensor.shape))
            head += struct.pack(f"<{len(tensor.shape)}QIQ", *reversed(tensor.shape), tensor.kind, tensor.offset)
    return head + bytes(-len(head) % 32 + data)


A = Tensor()
"""3 × 64 of F16: 384 bytes."""


@pytest.mark.parametrize("version", VERSIONS)
def test_both_versions_in_use_are_read_alike(model: Path, version: int) -> None:
    model.write_bytes(packed([A], [said("general.name", "x")], 384, version))
    read = read_checkpoint(model)
    assert read.tensors == {"a": TensorInfo("a", "F16", (3, 64), 384)} == as_the_package_reads(model)
    assert read.metadata == {"general.name": "x"}


def test_a_file_without_tensors_is_legal(model: Path) -> None:
    model.write_bytes(packed())
    read = read_checkpoint(model)
    assert (dict(read.tensors), dict(read.metadata), read.file_bytes) == ({}, {}, 32)


def test_tensors_come_in_the_order_of_their_bytes(model: Path) -> None:
    model.write_bytes(packed([A._replace(name="second", offset=384), A._replace(name="first")], data=768))
    assert list(read_checkpoint(model).tensors) == ["first", "second"]


def test_scalars_have_one_element_and_empty_tensors_none(model: Path) -> None:
    model.write_bytes(packed([Tensor("scalar", (), F32), Tensor("empty", (0, 4), F32, 32)], data=32))
    assert {t.name: (t.elements, t.nbytes) for t in read_checkpoint(model).tensors.values()} == {
        "scalar": (1, 4),
        "empty": (0, 0),
    }


def test_a_file_is_known_by_its_content_not_by_its_name(tmp_path: Path) -> None:
    for name in ("wan.safetensors", "wan.bin", "wan"):
        (tmp_path / name).write_bytes(packed([A], data=384))
        assert read_checkpoint(tmp_path / name).format == "gguf"


@pytest.mark.parametrize("kind", [4, 5, 10, 11])
def test_the_original_shape_replaces_the_folded_one(model: Path, kind: int) -> None:
    shape = (5120, 16, 1, 2, 2)
    folded = Tensor("patch_embedding.weight", (1280, 256), F16)
    model.write_bytes(packed([folded], [said("comfy.gguf.orig_shape.patch_embedding.weight", list(shape), kind)], 655360))
    assert read_checkpoint(model).tensors["patch_embedding.weight"].shape == shape
    assert prod(shape) == 1280 * 256


def test_an_original_shape_of_no_tensor_changes_nothing(model: Path) -> None:
    model.write_bytes(packed([A], [said("comfy.gguf.orig_shape.b", [1])], 384))
    assert read_checkpoint(model).tensors["a"].shape == (3, 64)


def test_wans_patch_embedding_may_have_its_five_dimensions(model: Path) -> None:
    assert MAX_DIMENSIONS == 5
    model.write_bytes(packed([Tensor("patch_embedding.weight", (8, 16, 1, 2, 2), F16)], data=1024))
    assert read_checkpoint(model).tensors["patch_embedding.weight"].shape == (8, 16, 1, 2, 2)


# what is read


def test_of_a_28_gb_file_the_header_and_at_most_64_kib_are_read(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert BLOCK == 64 * 1024
    rows = 28_000_000_000 // 34
    head = packed([Tensor("w", (rows, 32), Q8_0)])
    with model.open("wb") as file:
        file.write(head)
        file.truncate(len(head) + rows * 34)
    counted = count_reads(monkeypatch)
    assert read_checkpoint(model).tensor_bytes == rows * 34
    assert counted.taken <= len(head) + BLOCK


def test_a_header_as_long_as_wans_takes_what_it_has_and_at_most_64_kib(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = [Tensor(f"blocks.{i // 27}.cross_attn.norm_k.{i % 27}.weight", (64, 256), Q4_K, i * 9216) for i in range(1095)]
    head = packed(tensors)
    with model.open("wb") as file:
        file.write(head)
        file.truncate(len(head) + 1095 * 9216)
    counted = count_reads(monkeypatch)
    assert len(read_checkpoint(model).tensors) == 1095
    assert len(head) > BLOCK
    assert len(head) <= counted.taken <= len(head) + BLOCK


def test_a_vocabulary_is_passed_over(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [f"word{i}" * (1 + i % 5) for i in range(256_384)]
    scores = text("tokenizer.ggml.scores") + struct.pack("<IIQ", ARRAY, 6, 256_384) + bytes(4 * 256_384)
    head = packed([A], [said("tokenizer.ggml.tokens", words), scores, said("general.name", "umt5")])
    model.write_bytes(head + bytes(384 + 10 * BLOCK))
    counted = count_reads(monkeypatch)
    read = read_checkpoint(model)
    assert read.metadata == {"general.name": "umt5"}
    assert list(read.tensors) == ["a"]
    assert counted.taken <= len(head) - 4 * 256_384 + 2 * BLOCK + 8, "numbers are not even read"


def test_a_long_text_is_passed_over_without_being_read(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    head = packed([A], [said("workflow", "x" * 5_000_000), said("general.name", "wan")])
    model.write_bytes(head + bytes(384))
    counted = count_reads(monkeypatch)
    assert read_checkpoint(model).metadata == {"general.name": "wan"}
    assert counted.taken <= 2 * BLOCK + 8


def test_a_header_longer_than_any_is_not_read(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with model.open("wb") as file:
        file.write(packed([A], [text("long") + struct.pack("<IIQ", ARRAY, U8, MAX_HEADER_BYTES)])[:-32])
        file.truncate(2 * MAX_HEADER_BYTES)
    counted = count_reads(monkeypatch)
    assert "100,000,000" in problem(model)
    assert counted.taken <= 2 * BLOCK


def test_a_file_that_did_not_change_is_read_once(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model.write_bytes(packed([A], data=384))
    cache = HeaderCache()
    counted = count_reads(monkeypatch)
    first = cache.get(model)
    once = counted.taken
    assert cache.get(model) is first
    assert counted.taken == once
    model.write_bytes(packed([A._replace(name="longer")], data=384 + 32))
    assert list(cache.get(model).tensors) == ["longer"]


# bad files

MALFORMED: list[tuple[bytes, str]] = [
    (b"GGUF", "file ends after 4 bytes"),
    (b"GGUF\x03\x00", "file ends after 6 bytes"),
    (b"GGUF\x03\x00\x00\x00" + b" " * 100, "2,314,885,530,818,453,536 tensors"),
    (packed(version=0), "version 0"),
    (packed(version=1), "version 1"),
    (packed(version=4), "version 4"),
    (packed(version=3 << 24), "big-endian"),
    (packed([A], data=384, tensor_count=2**40), "1,099,511,627,776 tensors"),
    (packed([A], data=384, entry_count=2**40), "1,099,511,627,776 entries of metadata"),
    (packed(data=4_000_000, tensor_count=70_000), "65,536 is the most"),
    (packed(data=4_000_000, entry_count=70_000), "65,536 is the most"),
    (packed([A]), "384 are missing"),
    (packed([A], data=383), "1 are missing"),
    (packed([A, A], data=384), "'a' twice"),
    (packed([A, A._replace(name="b", offset=352)], data=768), "'b' and 'a' share 32 bytes"),
    (packed([A._replace(offset=16)], data=400), "byte 16, which is not a multiple of 32"),
    (packed([A._replace(offset=2**63)], data=384), "are missing"),
    (packed([A._replace(kind=99)], data=384), "type 99"),
    (packed([A._replace(kind=4)], data=384), "type 4"),
    (packed([A._replace(kind=Q4_K)], data=384), "blocks of 256"),
    (packed([Tensor("a", (), Q8_0)], data=384), "blocks of 32"),
    (packed([A._replace(shape=(1,) * 6)], data=384), "6 dimensions"),
    (packed([A._replace(shape=(2**62, 64))], data=384), "too large"),
    (packed([A._replace(shape=(2**63, 0))], data=384), "too large"),
    (packed([text("a") + struct.pack("<I", 2**32 - 1) + bytes(24)]), "4,294,967,295 dimensions"),
    (packed([text(b"\xff\xfe") + bytes(24)]), "not UTF-8"),
    (packed([struct.pack("<Q", 2**63) + bytes(24)]), "9,223,372,036,854,775,808 bytes"),
    (packed([A], [said("k", 1), said("k", 2)], 384), "'k' twice"),
    (packed([A], [said(b"\xff", 1)], 384), "not UTF-8"),
    (packed([A], [text("k") + struct.pack("<I", 13)], 384), "type 13"),
    (packed([A], [text("k") + struct.pack("<IIQ", ARRAY, ARRAY, 0)], 384), "array of type 9"),
    (packed([A], [text("k") + struct.pack("<IIQ", ARRAY, U64, 2**61)], 384), "2,305,843,009,213,693,952 values"),
    (packed([A], [text("k") + struct.pack("<IIQ", ARRAY, STRING, 1) + struct.pack("<Q", 2**62)], 384), "file ends after"),
    (packed([A], [text("k") + struct.pack("<IQ", STRING, 2**62)], 384), "file ends after"),
    (packed([A], [said("general.alignment", 0)], 384), "not a power of 2"),
    (packed([A], [said("general.alignment", 48)], 384), "not a power of 2"),
    (packed([A], [said("general.alignment", 32, U64)], 384), "general.alignment"),
    (packed([A], [said("split.count", 3)], 384), "one of 3 pieces"),
    (packed([A], [said("comfy.gguf.orig_shape.a", [3, 65])], 384), "192 elements, but its original shape [3, 65] has 195"),
    (packed([A], [said("comfy.gguf.orig_shape.a", [-3, -64], 5)], 384), "not a list of sizes"),
    (packed([A], [said("comfy.gguf.orig_shape.a", [3.0, 64.0], 6)], 384), "not a list of sizes"),
    (packed([A], [said("comfy.gguf.orig_shape.a", [2**64 - 1] * 6, U64)], 384), "not a list of sizes"),
    (packed([A], [said("comfy.gguf.orig_shape.a", [1] * 65)], 384), "not a list of sizes"),
    (packed([A], [said("comfy.gguf.orig_shape.a", "3, 64")], 384), "not a list of sizes"),
    (packed([A], [said("comfy.gguf.orig_shape.a", ["3", "64"])], 384), "not a list of sizes"),
]


@pytest.mark.parametrize(("content", "expected"), MALFORMED, ids=[f"{i:02}" for i in range(len(MALFORMED))])
def test_a_malformed_file_says_what_is_wrong_and_what_to_do(model: Path, content: bytes, expected: str) -> None:
    model.write_bytes(content)
    message = problem(model)
    assert expected in message
    assert any(remedy in message for remedy in ("ownload it again", "pdate VRAM Headroom", "Use a ", "Join them"))
    assert len(message) < 700 + 2 * len(str(model))


GOOD = packed(
    [A, Tensor("q", (2, 256), Q4_K, 384)],
    [said("general.name", "wan"), said("words", ["a", "bc"]), said("comfy.gguf.orig_shape.a", [3, 8, 8])],
    384 + 288,
)


@pytest.mark.parametrize("length", range(4, len(GOOD), 7))
def test_a_file_cut_anywhere_is_refused(model: Path, length: int) -> None:
    model.write_bytes(GOOD[:length])
    problem(model)


# whatever the bytes are


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "any.gguf"


def outcome(path: Path, content: bytes) -> None:
    """Reading `content` succeeds, with no more bytes than it has, or raises CheckpointError."""
    path.write_bytes(content)
    try:
        read = read_checkpoint(path)
    except CheckpointError:
        return
    assert read.tensor_bytes <= len(content)
    for tensor in read.tensors.values():
        kind = next(kind for kind in GGML_TYPES.values() if kind.name == tensor.dtype)
        assert tensor.nbytes * kind.elements == tensor.elements * kind.nbytes


@settings(max_examples=150, deadline=None, derandomize=True)
@given(content=st.binary(max_size=200))
def test_any_bytes_after_the_magic_give_an_answer_or_a_checkpoint_error(scratch: Path, content: bytes) -> None:
    outcome(scratch, b"GGUF" + content)


SIZES = st.sampled_from([0, 1, 2, 31, 32, 255, 256, 2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 1])
TENSORS = st.builds(
    Tensor,
    st.sampled_from(["a", "b", "ä"]),
    st.lists(st.integers(0, 4) | SIZES, max_size=6).map(tuple),
    st.integers(0, 45),
    st.sampled_from([0, 32, 64, 96, 7]) | SIZES,
)
ENTRIES = st.one_of(
    st.builds(said, st.sampled_from(["k", "general.alignment", "split.count", "comfy.gguf.orig_shape.a"]), st.integers(0, 200)),
    st.builds(
        said, st.sampled_from(["l", "comfy.gguf.orig_shape.a"]), st.lists(st.integers(0, 2**64 - 1), max_size=4), st.just(U64)
    ),
    st.builds(said, st.sampled_from(["t", "split.count"]), st.text(st.characters(codec="utf-8"), max_size=5)),
    st.builds(said, st.just("words"), st.lists(st.text("ab", max_size=3), min_size=1, max_size=4)),
    st.binary(max_size=40),
)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(
    tensors=st.lists(TENSORS | st.binary(max_size=40), max_size=3),
    entries=st.lists(ENTRIES, max_size=3),
    data=st.integers(0, 300),
)
def test_any_header_gives_an_answer_or_a_checkpoint_error(scratch: Path, tensors: Any, entries: Any, data: int) -> None:
    outcome(scratch, packed(tensors, entries, data))


@settings(max_examples=500, deadline=None, derandomize=True)
@given(
    at=st.integers(4, len(GOOD) - 1),
    drop=st.integers(0, 8),
    put=st.binary(max_size=8) | st.sampled_from([bytes(8), b"\xff" * 8, b"\xff" * 4, b"\x00\x00\x00\x80"]),
)
def test_any_mutation_gives_an_answer_or_a_checkpoint_error(scratch: Path, at: int, drop: int, put: bytes) -> None:
    outcome(scratch, GOOD[:at] + put + GOOD[at + drop :])
