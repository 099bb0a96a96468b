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
class Stopped(Exception): "ComfyUI 0.8 stops a prompt with an Exception."
mm.InterruptProcessingException = Stopped
def stop(keys): raise Stopped()
host.placement.before_load(stop)
try:
    mm.load_models_gpu([pinned])
    found["stopped"] = False
except Stopped:
    found["stopped"] = True
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
components = offloader._books._pipelines["gone"].components
components[first.key] = components[first.key]._replace(ruled_by="20")
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


def test_an_interrupt_before_a_load_is_not_swallowed(placement: dict[str, Any]) -> None:
    assert placement["stopped"] is True


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


PROMPTS = """
import execution, threading
from host.lab import node, text_to_video, with_inputs
executor = execution.PromptExecutor(server)
seen = []

class Look:
    CATEGORY, FUNCTION, RETURN_TYPES = "tests", "run", ("*",)
    @classmethod
    def INPUT_TYPES(cls): return {"required": {"value": ("*", {}), "then": ("STRING", {})}}
    def run(self, value, then):
        seen.append(look())
        if then == "fail": raise LookupError("asked to")
        if then == "stop": raise mm.InterruptProcessingException
        return (value,)
nodes.NODE_CLASS_MAPPINGS["Look"] = Look

def files(keys):
    entries = [e.model.model for e in mm.current_loaded_models if e.model is not None]
    return sorted(model.file.name for model in entries if id(model) in keys)

def look():
    return {"uses": files(host.uses.now()), "state": {p.name: p.state for p in offloader.status()},
            "placed": {c.role.value: c.placement for p in offloader.status() for c in p.components}}

forwards = []
plain_apply = sys.modules["standin.models"].WAN21.apply_model
def apply_model(self, *args, **kwargs):
    if not forwards:
        held = monitor.video_memory("wan")
        forwards.append({**look(), "video": held.current})
    return plain_apply(self, *args, **kwargs)
sys.modules["standin.models"].WAN21.apply_model = apply_model

def ours(prompt):
    names = {"UNETLoader": "LoadDiffusionModel", "CLIPLoader": "LoadTextEncoder", "VAELoader": "LoadVAE"}
    return {k: {**v, "class_type": "VRAMHeadroom" + names[v["class_type"]] if v["class_type"] in names else v["class_type"]}
            for k, v in prompt.items()}

def run(prompt, prompt_id, checked=True):
    seen.clear(), forwards.clear()
    targets = [k for k, v in prompt.items() if v["class_type"] == "PreviewImage"]
    if checked:
        pack.plans.put(prompt_id, pack.plan(prompt))
    executor.execute(prompt, prompt_id, {}, targets)
    return {"ok": executor.success, "seen": list(seen), "forward": list(forwards), "after": look(),
            "video": monitor.video_memory("wan").current}

def idle():
    server.prompt_queue.get_flags()
    for thread in threading.enumerate():
        if thread.name.startswith("vram_headroom"):
            thread.join(10)
    return {**look(), "threads": [t.name for t in threading.enumerate() if t.name.startswith("vram_headroom")]}

def looking(prompt, then="go on", after="8"):
    prompt = {**prompt, "30": node("Look", value=[after, 0], then=then)}
    return with_inputs(prompt, "9", samples=["30", 0])

graph = ours(text_to_video())
for then in ("go on", "fail", "stop"):
    prompt = with_inputs(looking(graph, then), "8", seed=len(found))
    found[then] = run(prompt, then)
    found[then]["idle"] = idle()
found["peaks"] = [[p.node_id, p.sampled, p.failed] for p in lifecycle.peaks.of("go on")]
found["failed"] = [p.node_id for p in lifecycle.peaks.of("fail") if p.failed]
record = monitor.pipeline_record("wan")
found["sizes"] = dict(record.components) if record else {}

# between two queued prompts the pipeline stays in use
server.prompt_queue.put((1, "waits", {}, {}, [], {}))
found["queued"] = run(with_inputs(graph, "8", seed=50), "queued")
server.prompt_queue.get_flags()
found["queued"]["between"] = look()
server.prompt_queue.wipe_queue()
found["queued"]["idle"] = idle()

# a text encoder that leaves before sampling, and a generator that no loader of ours knows
mm.unload_all_models()
executor.reset()
stock = text_to_video()
stock["20"] = node("VRAMHeadroomComponentPolicy", policy="leaves between uses", priority=1, clip=["2", 0])
stock = with_inputs(with_inputs(stock, "4", clip=["20", 1]), "5", clip=["20", 1])
found["stock"] = run(stock, "stock")
found["stock"]["loaded"] = sorted(names())
answer(found)
"""


@pytest.fixture(scope="module")
def prompts(base: Path) -> dict[str, Any]:
    return ask_inside(COMMON + PROMPTS, base, served=True)


CLIP, VAE = "tiny_umt5.safetensors", "tiny_wan_2.1_vae.safetensors"


def test_a_model_is_in_use_to_the_end_of_the_node_that_loaded_it(prompts: dict[str, Any]) -> None:
    run = prompts["go on"]
    assert run["ok"] is True
    assert run["forward"][0]["uses"] == [DIT]
    assert run["seen"][0]["uses"] == [], "the sampler has ended"
    assert run["after"]["uses"] == []


@pytest.mark.parametrize("how", ["go on", "fail", "stop"])
def test_a_pipeline_is_active_from_its_first_load_to_the_end_of_the_queue(prompts: dict[str, Any], how: str) -> None:
    run = prompts[how]
    assert run["ok"] is (how == "go on")
    assert run["seen"][0]["state"] == {"wan": "active"}
    assert run["idle"]["state"] == {"wan": "idle"}


def test_a_pipeline_stays_active_while_another_prompt_waits(prompts: dict[str, Any]) -> None:
    assert prompts["queued"]["between"]["state"] == {"wan": "active"}
    assert prompts["queued"]["idle"]["state"] == {"wan": "idle"}


def test_a_video_counts_for_its_pipeline_while_it_is_sampled_and_no_longer(prompts: dict[str, Any]) -> None:
    run = prompts["go on"]
    assert run["forward"][0]["video"] > 0
    assert run["video"] == 0


def test_every_node_that_models_came_for_has_its_peak(prompts: dict[str, Any]) -> None:
    peaks = {node_id: sampled for node_id, sampled, _ in prompts["peaks"]}
    assert list(peaks) == [peak[0] for peak in prompts["peaks"]]
    assert {"4", "5", "8", "9"} <= set(peaks) <= {"1", "2", "3", "4", "5", "6", "7", "8", "9", "10", "30"}
    assert peaks["4"] >= prompts["sizes"][CLIP]
    assert peaks["8"] >= prompts["sizes"][DIT]
    assert prompts["failed"] == ["30"]


def test_the_sizes_of_a_pipelines_parts_are_noted(prompts: dict[str, Any]) -> None:
    assert set(prompts["sizes"]) == {DIT, CLIP, VAE}
    assert all(size > 0 for size in prompts["sizes"].values())


@pytest.mark.parametrize("how", ["go on", "fail", "stop", "queued"])
def test_no_thread_of_ours_is_left_when_nothing_runs(prompts: dict[str, Any], how: str) -> None:
    assert prompts[how]["idle"]["threads"] == []


def test_a_text_encoder_leaves_before_a_generator_that_nobody_registered(prompts: dict[str, Any]) -> None:
    assert prompts["stock"]["ok"] is True
    assert prompts["stock"]["forward"][0]["placed"] == {"text_encoder": "cpu"}
    assert DIT in prompts["stock"]["loaded"]
    assert CLIP not in prompts["stock"]["loaded"]


MANY = """
import comfy.model_management as model_management
from comfy.model_patcher import ModelPatcher
from host.lab import text_to_video
from vram_headroom.nodes.controls import Control
from vram_headroom.vram.components import ComponentRole
pack, kept, found = Control.pack, [], {}
loader = nodes.NODE_CLASS_MAPPINGS["VAELoader"]
size, calls = ModelPatcher.model_size, [0]

def counted(patcher):
    calls[0] += 1
    return size(patcher)

for count in (10, 40):
    while len(kept) < count:
        kept.append(getattr(loader(), loader.FUNCTION)(vae_name=text_to_video()["3"]["inputs"]["vae_name"])[0].patcher)
        pack.offloader.register("wan", f"vae {len(kept)}", ComponentRole.VAE, pack.host.models.handle(kept[-1], None))
        model_management.load_models_gpu([kept[-1]])
    ModelPatcher.model_size, calls[0] = counted, 0
    status = pack.status()
    ModelPatcher.model_size = size
    found[count] = [len(status.loaded_models), len(status.pipelines[0].components), calls[0]]
answer(found)
"""


def test_a_status_reads_each_model_a_few_times_however_many_there_are(tmp_path: Path) -> None:
    write_tiny_models(tmp_path / "models")
    found = ask_inside(MANY, tmp_path, served=True)
    assert [counts[:2] for counts in found.values()] == [[10, 10], [40, 40]]
    few, many = found["10"][2], found["40"][2]
    assert many == 4 * few <= 40 * 10
