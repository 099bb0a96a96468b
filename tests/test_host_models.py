"""Models of ComfyUI through nodes/host and the life cycle, on the stand-in's modules: placement, uses, handles, prompts."""

from pathlib import Path
from typing import Any

import pytest
from host.lab import write_tiny_models
from insidehost import ask_inside

COMMON = """
import gc, logging, threading, torch
import comfy.model_management as mm
import comfy.sd
from vram_headroom.nodes.controls import Control
from vram_headroom.nodes.host.handle import ComfyModelHandle
pack, lifecycle = Control.pack, Control.lifecycle
host, offloader, monitor = pack.host, pack.offloader, pack.monitor
nodes.NODE_CLASS_MAPPINGS.update(sys.modules["vram_headroom"].NODE_CLASS_MAPPINGS)
found = {}
M = str(base / "models") + "/"
DIT = M + "diffusion_models/tiny_wan21_t2v_fp16.safetensors"
OTHER = M + "diffusion_models/tiny_wan22_t2v_high_noise_fp16.safetensors"
VAE = M + "vae/tiny_wan_2.1_vae.safetensors"

def load(path): return comfy.sd.load_diffusion_model(path)
def names(): return [entry.model.model.file.name for entry in mm.current_loaded_models if entry.model is not None]
"""

PLACEMENT = """
pinned, other = load(DIT), load(OTHER)
host.placement.keep_loaded(lambda: {id(pinned.model)})
device = mm.get_torch_device()
def emptied(call):
    mm.load_models_gpu([pinned, other])
    call()
    return names()
found["positional"] = emptied(lambda: mm.free_memory(1e30, device, []))
found["keyword"] = emptied(lambda: mm.free_memory(memory_required=1e30, device=device, keep_loaded=[]))
found["bare"] = emptied(lambda: mm.free_memory(1e30, device))
found["all"] = emptied(mm.unload_all_models)
keep = []
mm.load_models_gpu([pinned, other])
keep.extend(entry for entry in mm.current_loaded_models if entry.model is other)
mm.free_memory(1e30, device, keep)
found["callers own"] = sorted(names())
found["callers list"] = len(keep)
host.placement.keep_loaded(lambda: (_ for _ in ()).throw(ValueError("broken")))
found["broken"] = emptied(mm.unload_all_models)
host.placement.keep_loaded(lambda: {id(pinned.model)})
mm.load_models_gpu([pinned])
pinned.is_dynamic = lambda: True
found["kept dynamic"] = len(host.placement._kept())
del pinned.is_dynamic
host.placement.keep_loaded(frozenset)
mm.unload_all_models()
found["unpinned"] = names()
answer(found)
"""

HANDLES = """
records = []
class Keep(logging.Handler):
    def emit(self, record): records.append(record.getMessage())
logging.getLogger().addHandler(Keep())
logging.getLogger().setLevel(logging.INFO)

patcher = load(DIT)
clone = patcher.clone()
handle = host.models.handle(patcher, DIT)
size = patcher.model_size()
found["size"] = [handle.total_bytes() == size, handle.bytes_on_card()]
found["load"] = [handle.load() == size, handle.bytes_on_card() == size, names()]
found["again"] = handle.load()
found["unload"] = [handle.unload() == size, handle.bytes_on_card(), names()]
found["nothing"] = handle.unload()
handle.load()
part = handle.unload(size // 4)
found["part"] = [size // 4 <= part < size, handle.bytes_on_card() == size - part, len(names())]
handle.unload()

# a clone is registered and dies; what it was cloned from goes on
of_clone = host.models.handle(clone, None)
found["same key"] = of_clone.key == handle.key
del clone
gc.collect()
found["through parent"] = [of_clone.alive, of_clone.load() == size, of_clone.unload() == size]

# the one it was registered with dies; the clone that ComfyUI loaded serves
source = load(OTHER)
first = host.models.handle(source, OTHER)
living = source.clone()
living.parent = None
mm.load_models_gpu([living])
del source
gc.collect()
found["through clone"] = [first.alive, first.bytes_on_card() == living.model_size(), first.unload() == living.model_size()]
found["listed after"] = names()

# registering keeps nothing alive
offloader.register("gone", "other", pack_role.GENERATOR, first)
mm.load_models_gpu([living])
used = mm.get_free_memory()
del living
gc.collect()
mm.cleanup_models()
found["dead"] = [first.alive, mm.get_free_memory() > used, [p.name for p in offloader.status()]]
try:
    first.load()
except RuntimeError as error:
    found["load of dead"] = str(error)
mm.cleanup_models_gc()
found["leaks"] = [line for line in records if "memory leak" in line]

# its key may be another model's by then
newcomer = host.models.handle(patcher, DIT)
first._key = newcomer.key
offloader.register("gone", "other", pack_role.GENERATOR, first)
offloader._books._pipelines["gone"].components[first.key] = offloader._books._pipelines["gone"].components[first.key]._replace(ruled_by="20")
found["stranger"] = [offloader.pipeline_of(newcomer.key), offloader.policy_of(newcomer.key)]
offloader.register("new", "dit", pack_role.GENERATOR, newcomer)
found["inherits"] = dict(offloader.components())["new"].ruled_by
answer(found)
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_tiny_models(folder / "models")
    return folder


@pytest.fixture(scope="module")
def placement(base: Path) -> dict[str, Any]:
    return ask_inside(COMMON + PLACEMENT, base, served=True)


@pytest.fixture(scope="module")
def handles(base: Path) -> dict[str, Any]:
    role = "from vram_headroom.vram.components import ComponentRole as pack_role\n"
    return ask_inside(COMMON + role + HANDLES, base, served=True)


DIT, HIGH = "tiny_wan21_t2v_fp16.safetensors", "tiny_wan22_t2v_high_noise_fp16.safetensors"


@pytest.mark.parametrize("way", ["positional", "keyword", "bare", "all"])
def test_a_pinned_model_stays_however_memory_is_asked_for(placement: dict[str, Any], way: str) -> None:
    assert placement[way] == [DIT]


def test_what_the_caller_keeps_is_kept_too_and_its_list_is_left_alone(placement: dict[str, Any]) -> None:
    assert placement["callers own"] == [DIT, HIGH]
    assert placement["callers list"] == 1


def test_pins_that_cannot_be_asked_for_cost_no_eviction(placement: dict[str, Any]) -> None:
    assert placement["broken"] == []


def test_a_dynamic_model_is_not_held_by_comfyuis_list(placement: dict[str, Any]) -> None:
    assert placement["kept dynamic"] == 0


def test_unpinned_again_it_goes(placement: dict[str, Any]) -> None:
    assert placement["unpinned"] == []


def test_sizes_and_comfyuis_list_are_true_through_load_and_unload(handles: dict[str, Any]) -> None:
    assert handles["size"] == [True, 0]
    assert handles["load"] == [True, True, [DIT]]
    assert handles["again"] == 0
    assert handles["unload"] == [True, 0, []]
    assert handles["nothing"] == 0


def test_a_part_that_leaves_is_counted_and_the_model_stays_in_the_list(handles: dict[str, Any]) -> None:
    assert handles["part"] == [True, True, 1]


def test_a_model_goes_on_through_what_its_dead_clone_was_cloned_from(handles: dict[str, Any]) -> None:
    assert handles["same key"] is True
    assert handles["through parent"] == [True, True, True]


def test_a_model_goes_on_through_the_clone_that_is_loaded(handles: dict[str, Any]) -> None:
    assert handles["through clone"] == [True, True, True]
    assert handles["listed after"] == []


def test_a_registered_model_dies_with_its_graph_and_is_no_leak(handles: dict[str, Any]) -> None:
    assert handles["dead"] == [False, True, []]
    assert "the node that loads it has to run again" in handles["load of dead"]
    assert handles["leaks"] == []


def test_a_model_with_the_key_of_one_that_is_gone_is_a_stranger(handles: dict[str, Any]) -> None:
    assert handles["stranger"] == [None, None]
    assert handles["inherits"] is None
