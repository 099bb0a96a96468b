"""What is promised of models in several files: each tensor once, nothing of another variant, and one clear error otherwise."""

import json
import operator
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import pytest
import tinywan
import torch
from counting import count_reads
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from vram_headroom.vram.estimate.checkpoint import (
    Checkpoint,
    CheckpointError,
    HeaderCache,
    TensorInfo,
    read_checkpoint,
    read_pipeline,
)

NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64"}

DIFFUSERS = "diffusion_pytorch_model"

MODELS: dict[str, tuple[Callable[[], Any], str]] = {
    "transformer": (tinywan.generator, DIFFUSERS),
    "vace": (tinywan.vace_generator, DIFFUSERS),
    "vae": (tinywan.vae, DIFFUSERS),
    "text_encoder": (tinywan.text_encoder, "model"),
    "image_encoder": (tinywan.image_encoder, "model"),
}


def infos(tensors: Mapping[str, torch.Tensor]) -> dict[str, TensorInfo]:
    return {
        name: TensorInfo(name, NAMES[tensor.dtype], tuple(tensor.shape), tensor.numel() * tensor.element_size())
        for name, tensor in tensors.items()
    }


def problem(path: Path, about: Path | None = None) -> str:
    """The message of the error that reading `path` must raise; it is one line and names `about`, or else `path`."""
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(path)
    message = str(caught.value)
    assert str(about or path) in message
    assert "\n" not in message
    return message


def weights_in(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def config(folder: Path, **content: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(content))
    return folder


def parts(folder: Path, stem: str = DIFFUSERS, count: int = 3) -> Path:
    """A sharded model, `count` parts of one 64-byte tensor each; returns its index."""
    folder.mkdir(exist_ok=True)
    weight_map = {}
    for i in range(count):
        name = f"{stem}-{i + 1:05}-of-{count:05}.safetensors"
        save_file({f"layer.{i}": torch.zeros(16)}, folder / name, metadata={"format": "pt"})
        weight_map[f"layer.{i}"] = name
    index = folder / f"{stem}.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 64 * count}, "weight_map": weight_map}))
    return index


def change(index: Path, **changes: Any) -> None:
    index.write_text(json.dumps({**json.loads(index.read_text()), **changes}))


# what the libraries write


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("sharded", [False, True], ids=["whole", "sharded"])
def test_a_saved_model_is_read_to_the_byte(tmp_path: Path, name: str, sharded: bool) -> None:
    build, stem = MODELS[name]
    build().save_pretrained(tmp_path, max_shard_size="20KB" if sharded else "1GB")
    files = weights_in(tmp_path)
    assert (len(files) > 2) == sharded
    saved = {key: tensor for file in files for key, tensor in load_file(file).items()}
    read = read_checkpoint(tmp_path)
    assert read.tensors == infos(saved)
    assert read.path == str(tmp_path)
    assert read.format == "diffusers"
    assert read.file_bytes == sum(file.stat().st_size for file in files)
    assert read.notes == ()
    assert read.metadata == {"format": "pt"}
    if sharded:
        by_index = read_checkpoint(tmp_path / f"{stem}.safetensors.index.json")
        assert (by_index.tensors, by_index.file_bytes, by_index.format) == (read.tensors, read.file_bytes, "sharded")


@pytest.mark.parametrize("name", ["transformer", "text_encoder"])
@pytest.mark.parametrize("sharded", [False, True], ids=["whole", "sharded"])
def test_a_variant_is_not_added_to_the_usual_weights(tmp_path: Path, name: str, sharded: bool) -> None:
    build, _ = MODELS[name]
    size = "20KB" if sharded else "1GB"
    build().save_pretrained(tmp_path, max_shard_size=size)
    alone = read_checkpoint(tmp_path)
    build().half().save_pretrained(tmp_path, max_shard_size=size, variant="fp16")
    both = read_checkpoint(tmp_path)
    assert len(weights_in(tmp_path)) >= 2
    assert (both.tensors, both.file_bytes) == (alone.tensors, alone.file_bytes)
    [note] = both.notes
    assert "fp16" in note
    assert "not counted" in note


@pytest.mark.parametrize("name", ["transformer", "text_encoder"])
@pytest.mark.parametrize("sharded", [False, True], ids=["whole", "sharded"])
def test_a_variant_on_its_own_is_read_and_named(tmp_path: Path, name: str, sharded: bool) -> None:
    build, _ = MODELS[name]
    build().half().save_pretrained(tmp_path, max_shard_size="20KB" if sharded else "1GB", variant="fp16")
    read = read_checkpoint(tmp_path)
    assert set(read.bytes_by_dtype) == {"F16"}
    assert read.tensors == infos({k: t for file in weights_in(tmp_path) for k, t in load_file(file).items()})
    [note] = read.notes
    assert "'fp16'" in note


def test_several_variants_without_the_usual_weights_are_not_guessed_between(tmp_path: Path) -> None:
    tinywan.generator().half().save_pretrained(tmp_path, variant="fp16")
    tinywan.generator().bfloat16().save_pretrained(tmp_path, variant="bf16")
    message = problem(tmp_path)
    assert "'bf16', 'fp16'" in message


@pytest.mark.parametrize("name", ["transformer", "text_encoder"])
def test_of_a_whole_file_and_parts_those_are_counted_that_the_library_loads(tmp_path: Path, name: str) -> None:
    build, stem = MODELS[name]
    model = build()
    zeros = build()
    with torch.no_grad():
        for parameter in zeros.parameters():
            parameter.zero_()
    zeros.save_pretrained(tmp_path / "parts", max_shard_size="20KB")
    model.save_pretrained(tmp_path / "whole")
    for file in (tmp_path / "parts").iterdir():
        file.rename(tmp_path / "whole" / file.name)
    read = read_checkpoint(tmp_path / "whole")
    loaded = type(model).from_pretrained(tmp_path / "whole")
    took_parts = not any(bool(parameter.any()) for parameter in loaded.parameters())
    files = {os.path.basename(source.path) for source in read.sources}
    assert (f"{stem}.safetensors" not in files) == took_parts == (name == "transformer")
    assert read.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert len(read.notes) == 1


@pytest.fixture(scope="module")
def pipeline_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline") / "Wan2.2-T2V-A14B-Diffusers"
    tinywan.pipeline(experts=2).save_pretrained(folder, max_shard_size="20KB")
    return folder


def test_a_pipeline_is_read_as_its_models_by_name(pipeline_folder: Path) -> None:
    models = read_pipeline(pipeline_folder)
    assert list(models) == ["text_encoder", "transformer", "transformer_2", "vae"]
    for name, model in models.items():
        assert model == read_checkpoint(pipeline_folder / name)
        saved = {k: t for file in weights_in(pipeline_folder / name) for k, t in load_file(file).items()}
        assert model.tensors == infos(saved)
    with pytest.raises(TypeError):
        operator.setitem(cast(Any, models), "x", models["vae"])


def test_an_image_pipeline_has_its_image_encoder_and_no_second_expert(tmp_path: Path) -> None:
    tinywan.image_pipeline().save_pretrained(tmp_path)
    assert list(read_pipeline(tmp_path)) == ["image_encoder", "text_encoder", "transformer", "vae"]


def test_the_folder_of_a_pipeline_names_its_models(pipeline_folder: Path) -> None:
    message = problem(pipeline_folder)
    assert "pipeline" in message
    assert "'text_encoder', 'transformer', 'transformer_2', 'vae'" in message
    assert "scheduler" not in message


# what is read


def test_of_a_28_gb_model_only_the_headers_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config(tmp_path, _class_name="WanTransformer3DModel")
    count, weights = 6, 28_000_000_000 // 6
    weight_map, headers = {}, 0
    for i in range(count):
        name = f"{DIFFUSERS}-{i + 1:05}-of-{count:05}.safetensors"
        head = json.dumps({f"w{i}": {"dtype": "U8", "shape": [weights], "data_offsets": [0, weights]}}).encode()
        with (tmp_path / name).open("wb") as file:
            file.write(len(head).to_bytes(8, "little") + head)
            file.truncate(8 + len(head) + weights)
        weight_map[f"w{i}"] = name
        headers += 8 + len(head)
    index = tmp_path / f"{DIFFUSERS}.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": count * weights}, "weight_map": weight_map}))
    counted = count_reads(monkeypatch)
    assert read_checkpoint(tmp_path).tensor_bytes == count * weights
    assert counted.taken == headers + index.stat().st_size + (tmp_path / "config.json").stat().st_size


def test_a_folder_is_read_again_when_any_of_its_files_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = config(tmp_path / "model", _class_name="X")
    index = parts(folder)
    cache = HeaderCache()
    counted = count_reads(monkeypatch)
    first = cache.get(folder)
    read = counted.taken
    assert cache.get(folder) is first
    assert counted.taken == read
    stamped = {os.path.basename(source.path) for source in first.sources}
    assert stamped == {"model", *os.listdir(folder)}
    for name in sorted(stamped - {"model"}):
        before = cache.get(folder)
        status = (folder / name).stat()
        os.utime(folder / name, ns=(status.st_atime_ns, status.st_mtime_ns + 1_000_000_000))
        assert cache.get(folder) is not before, name
    before = cache.get(folder)
    save_file({"a": torch.zeros(1)}, folder / f"{DIFFUSERS}.fp16.safetensors")
    assert len(cache.get(folder).notes) == 1
    assert before.notes == ()
    weights_in(folder)[1].unlink()
    with pytest.raises(CheckpointError, match="missing"):
        cache.get(folder)
    with pytest.raises(CheckpointError, match="missing"):
        cache.get(index)


def test_an_index_is_read_again_when_a_part_changed(tmp_path: Path) -> None:
    index = parts(tmp_path)
    cache = HeaderCache()
    first = cache.get(index)
    assert cache.get(index) is first
    part = weights_in(tmp_path)[2]
    save_file({"layer.2": torch.zeros(32)}, part)
    assert cache.get(index).tensor_bytes == first.tensor_bytes + 64


# parts


def test_parts_without_an_index_are_one_model(tmp_path: Path) -> None:
    parts(tmp_path).unlink()
    read = read_checkpoint(config(tmp_path))
    assert list(read.tensors) == ["layer.0", "layer.1", "layer.2"]
    assert read.tensor_bytes == 3 * 64


def test_a_part_that_is_missing_without_an_index_is_counted(tmp_path: Path) -> None:
    parts(tmp_path).unlink()
    weights_in(tmp_path)[1].unlink()
    assert "1 of the 3 parts" in problem(config(tmp_path))


def test_what_is_left_of_another_download_is_not_added(tmp_path: Path) -> None:
    parts(tmp_path, count=5)
    weights_in(tmp_path)[0].unlink()
    parts(tmp_path, count=2)
    read = read_checkpoint(config(tmp_path, _class_name="X"))
    assert read.tensor_bytes == 2 * 64


def test_parts_in_diffusers_legacy_form_are_a_variant(tmp_path: Path) -> None:
    parts(tmp_path)
    for i in (1, 2):
        save_file({f"layer.{i}": torch.zeros(16).half()}, tmp_path / f"{DIFFUSERS}-0000{i}-of-00002.fp16.safetensors")
    read = read_checkpoint(config(tmp_path, _class_name="X"))
    assert set(read.bytes_by_dtype) == {"F32"}
    assert "fp16" in read.notes[0]


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    index = parts(tmp_path)
    gone = weights_in(tmp_path)[1]
    gone.unlink()
    message = problem(index)
    assert "1 of the 3 files" in message
    assert gone.name in message
    assert gone.name in problem(config(tmp_path), index)


def test_a_broken_part_is_named_with_what_is_missing(tmp_path: Path) -> None:
    index = parts(tmp_path)
    broken = weights_in(tmp_path)[1]
    os.truncate(broken, broken.stat().st_size - 5)
    assert "5 are missing" in problem(index, broken)


def test_a_tensor_that_is_not_in_its_part_is_named(tmp_path: Path) -> None:
    index = parts(tmp_path)
    names = [file.name for file in weights_in(tmp_path)]
    change(index, weight_map={"layer.0": names[0], "layer.1": names[0], "layer.2": names[2]})
    message = problem(index)
    assert "'layer.1'" in message
    assert names[0] in message


def test_a_tensor_in_two_parts_is_not_counted_twice(tmp_path: Path) -> None:
    index = parts(tmp_path)
    second = weights_in(tmp_path)[1]
    save_file({"layer.0": torch.zeros(16), "layer.1": torch.zeros(16)}, second)
    assert "'layer.0'" in problem(index, second)


def test_tensors_that_the_index_lacks_are_counted_and_noted(tmp_path: Path) -> None:
    index = parts(tmp_path)
    save_file({"layer.2": torch.zeros(16), "more": torch.zeros(25)}, weights_in(tmp_path)[2])
    read = read_checkpoint(index)
    assert read.tensor_bytes == 3 * 64 + 100
    assert [("100 bytes" in note, "says 192 bytes" in note) for note in read.notes] == [(True, False), (False, True)]


@pytest.mark.parametrize(
    "name",
    [
        "../a.safetensors",
        "/a.safetensors",
        "sub/a.safetensors",
        r"sub\a.safetensors",
        "C:a.safetensors",
        "..",
        ".",
        "",
        "a\0b",
        None,
        5,
        ["a"],
        {},
    ],
)
def test_an_index_cannot_lead_out_of_its_folder(tmp_path: Path, name: Any) -> None:
    folder = tmp_path / "model"
    index = parts(folder)
    (folder / "sub").mkdir()
    for place in (tmp_path, folder / "sub"):
        save_file({"layer.0": torch.zeros(16)}, place / "a.safetensors")
    change(index, weight_map={"layer.0": name})
    message = problem(index)
    assert "'layer.0'" in message
    assert "not the name of something in its own folder" in message


def test_an_index_of_pickles_says_they_are_not_read(tmp_path: Path) -> None:
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "pytorch_model-00001-of-00001.bin"}}))
    message = problem(index)
    assert "pickle" in message
    assert "not read" in message


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "empty"),
        (b"[]", "not a JSON object"),
        (b"{", "not JSON"),
        (b"\xff{}", "UTF-8"),
        (b'{"a": 1, "a": 1}', "'a' twice"),
        (b"{}", "no weight_map"),
        (b'{"weight_map": []}', "no weight_map"),
        (b'{"weight_map": {}}', "names no tensors"),
        (b'{"weight_map": {"\\ud800": "a.safetensors"}}', "UTF-8"),
        (b'{"weight_map": {"a": "gone.safetensors"}}', "'gone.safetensors'"),
    ],
)
def test_a_malformed_index_says_what_is_wrong(tmp_path: Path, content: bytes, expected: str) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_bytes(content)
    assert expected in problem(index)


# folders


def test_a_folder_without_a_config_is_a_model_only_where_it_has_parts(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(4)}, tmp_path / "wan.safetensors")
    message = problem(tmp_path)
    assert "folder" in message
    assert "no config.json" in message
    (tmp_path / "wan.safetensors").unlink()
    index = parts(tmp_path)
    by_index = read_checkpoint(tmp_path)
    index.unlink()
    for read in (by_index, read_checkpoint(tmp_path)):
        assert (read.format, read.path, read.tensor_bytes) == ("sharded", str(tmp_path), 3 * 64)


def test_a_config_that_appears_makes_a_folder_of_parts_read_again(tmp_path: Path) -> None:
    parts(tmp_path)
    cache = HeaderCache()
    assert cache.get(tmp_path).format == "sharded"
    config(tmp_path, _class_name="X")
    assert cache.get(tmp_path).format == "diffusers"


def test_a_folder_with_nothing_but_a_config_says_so(tmp_path: Path) -> None:
    assert "no .safetensors file" in problem(config(tmp_path))


def test_a_folder_of_pickles_says_they_are_not_read(tmp_path: Path) -> None:
    torch.save({}, tmp_path / "pytorch_model.bin")
    message = problem(config(tmp_path))
    assert "'pytorch_model.bin'" in message
    assert "not read" in message


def test_a_pickle_beside_the_weights_changes_nothing(tmp_path: Path) -> None:
    tinywan.generator().save_pretrained(tmp_path)
    alone = read_checkpoint(tmp_path)
    torch.save({"a": torch.zeros(1000)}, tmp_path / f"{DIFFUSERS}.bin")
    assert read_checkpoint(tmp_path) == alone


def test_one_file_of_any_name_is_the_model_and_two_are_not(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(4)}, config(tmp_path) / "wan2.1_t2v.safetensors")
    read = read_checkpoint(tmp_path)
    assert (read.tensor_bytes, read.notes) == (16, ())
    save_file({"a": torch.zeros(4)}, tmp_path / "wan2.1_i2v.safetensors")
    assert "'wan2.1_i2v', 'wan2.1_t2v'" in problem(tmp_path)


def test_a_broken_config_is_named(tmp_path: Path) -> None:
    tinywan.generator().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    assert "not JSON" in problem(tmp_path, tmp_path / "config.json")


# pipelines


def broken_pipeline(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_pipeline(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


def pipeline(folder: Path, **components: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "WanPipeline", "boundary_ratio": 0.9, **components}))
    return folder


VAE = ["diffusers", "AutoencoderKLWan"]


def test_components_without_weights_are_left_out(tmp_path: Path) -> None:
    pipeline(
        tmp_path,
        vae=VAE,
        transformer_2=[None, None],
        scheduler=["diffusers", "UniPCMultistepScheduler"],
        tokenizer=["transformers", "T5TokenizerFast"],
        image_processor=["transformers", "CLIPImageProcessor"],
        something=["mine", "WithoutWeights"],
    )
    (tmp_path / "something").mkdir()
    tinywan.vae().save_pretrained(tmp_path / "vae")
    assert list(read_pipeline(tmp_path)) == ["vae"]


def test_a_missing_component_is_named(tmp_path: Path) -> None:
    message = broken_pipeline(pipeline(tmp_path, vae=VAE))
    assert "vae (AutoencoderKLWan) is missing" in message


def test_a_component_whose_weights_are_missing_is_named(tmp_path: Path) -> None:
    config(pipeline(tmp_path, vae=VAE) / "vae")
    assert f"{os.sep}vae)" in broken_pipeline(tmp_path)


@pytest.mark.parametrize("name", ["../vae", "a/b", "/vae", "..", "a\\b"])
def test_a_pipeline_cannot_lead_out_of_its_folder(tmp_path: Path, name: str) -> None:
    assert "not the name of something in its own folder" in broken_pipeline(pipeline(tmp_path / "pipe", **{name: VAE}))


def test_a_folder_that_is_no_pipeline_says_so(tmp_path: Path) -> None:
    assert "model_index.json" in broken_pipeline(tmp_path)
    assert "does not exist" in broken_pipeline(tmp_path / "gone")
    (tmp_path / "file").write_text("{}")
    broken_pipeline(tmp_path / "file")


# whatever the folder holds

FILE_NAMES = st.sampled_from(
    [
        *(f"{stem}{variant}.safetensors" for stem in (DIFFUSERS, "model", "other") for variant in ("", ".fp16", ".a.b")),
        *(f"{stem}-0000{i}-of-00002.safetensors" for stem in (DIFFUSERS, "model") for i in range(4)),
        f"{DIFFUSERS}.fp16-00001-of-00001.safetensors",
        f"{DIFFUSERS}.safetensors.index.json",
        f"{DIFFUSERS}.safetensors.index.fp16.json",
        "model.safetensors.index.json",
        "model_index.json",
        "config.json",
        "x.bin",
        "wan.gguf",
    ]
)
JSON_VALUES = st.recursive(
    st.none() | st.integers() | st.text(max_size=4) | FILE_NAMES,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4) | FILE_NAMES, inner, max_size=2),
    max_leaves=5,
)
JSON_FILES = st.dictionaries(st.sampled_from(["weight_map", "metadata", "_class_name", "vae", "a"]), JSON_VALUES, max_size=3)
SMALL = b"\x3b\0\0\0\0\0\0\0" + b'{"w":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'.ljust(0x3B) + b"\0"


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    files=st.dictionaries(
        FILE_NAMES,
        st.just(SMALL) | st.binary(max_size=12) | JSON_FILES.map(lambda value: json.dumps(value).encode()),
        max_size=6,
    )
)
def test_any_folder_gives_an_answer_or_a_checkpoint_error(tmp_path_factory: pytest.TempPathFactory, files: Any) -> None:
    folder = tmp_path_factory.mktemp("any")
    (folder / "config.json").write_text("{}")
    for name, content in files.items():
        (folder / name).write_bytes(content)
    for read in (read_checkpoint, read_pipeline):
        try:
            found = read(folder)
        except CheckpointError:
            continue
        if isinstance(found, Checkpoint):
            assert found.tensor_bytes < found.file_bytes <= len(SMALL) * len(files)
            assert set(found.tensors) <= {"w"}
    for name in files:
        if name.endswith(".json"):
            with pytest.raises(CheckpointError):
                read_checkpoint(folder / name / "x")
            try:
                read_checkpoint(folder / name)
            except CheckpointError:
                continue
