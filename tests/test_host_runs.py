"""The stand-in runs, caches, refuses and stops prompts as ComfyUI does."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from host.lab import Prompt, node, run_prompt, text_to_video, with_inputs, write_tiny_models
from host.process import PACK_ROOT, HostProcess, start_host


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def host(models: Path) -> Iterator[HostProcess]:
    with start_host(models=models, pack=False) as running:
        yield running


def refusal(host: HostProcess, prompt: Prompt) -> tuple[str, dict[str, list[str]]]:
    """The prompt-level type, and the types of what is wrong per node."""
    status, body = host.post("/prompt", {"prompt": prompt})
    assert status == 400
    per_node = {node_id: [error["type"] for error in told["errors"]] for node_id, told in body["node_errors"].items()}
    return body["error"]["type"], per_node


def test_the_repository_is_not_on_the_path_and_nodes_is_comfyuis(host: HostProcess) -> None:
    body = host.get("/_host/python").body
    assert str(PACK_ROOT) not in body["path"]
    assert str(PACK_ROOT / "tests") not in body["path"]
    assert Path(body["nodes"]) == PACK_ROOT / "tests" / "host" / "comfyui" / "nodes.py"


def test_a_text_to_video_graph_runs_to_success_and_again_runs_nothing(host: HostProcess) -> None:
    first = run_prompt(host, text_to_video())
    assert first.status == "success"
    assert set(first.executed) == set(text_to_video())
    assert len(first.history["outputs"]["10"]["images"]) == 5
    again = run_prompt(host, text_to_video())
    assert again.status == "success"
    assert again.executed == []
    assert set(again.of("execution_cached")[0]["nodes"]) == set(text_to_video())
    assert again.history["outputs"] == first.history["outputs"]


def test_the_same_prompt_gives_the_same_picture_in_another_process(host: HostProcess, models: Path) -> None:
    def pictures(of: HostProcess) -> list[str]:
        saved = run_prompt(of, text_to_video()).history["outputs"]["10"]["images"]
        return [str(of.get(f"/view?type=temp&filename={image['filename']}").body) for image in saved]

    with start_host(models=models, pack=False) as other:
        assert pictures(other) == pictures(host)


def test_a_lazy_branch_that_is_not_chosen_is_not_loaded(host: HostProcess) -> None:
    prompt = text_to_video(unet="tiny_wan22_t2v_high_noise_fp16.safetensors")
    prompt["11"] = node("UNETLoader", unet_name="tiny_wan22_t2v_low_noise_fp16.safetensors", weight_dtype="default")
    prompt["12"] = node("ComfySwitchNode", switch=False, on_false=["7", 0], on_true=["11", 0])
    prompt = with_inputs(prompt, "8", model=["12", 0])
    ran = run_prompt(host, prompt)
    assert ran.status == "success"
    assert "11" not in ran.executed
    assert "1" in ran.executed


def test_values_that_come_through_nodes_reach_the_sampler(host: HostProcess) -> None:
    prompt = with_inputs(text_to_video(), "6", length=["13", 1])
    prompt["11"] = node("PrimitiveFloat", value=0.5)
    prompt["12"] = node("PrimitiveInt", value=16)
    prompt["13"] = node("ComfyMathExpression", expression="floor(a * b) + 1", **{"values.a": ["11", 0], "values.b": ["12", 0]})
    ran = run_prompt(host, prompt)
    assert len(ran.history["outputs"]["10"]["images"]) == 9


def test_a_missing_input_a_bad_file_and_a_number_out_of_range_are_refused_per_node(host: HostProcess) -> None:
    good = text_to_video()
    failed = "prompt_outputs_failed_validation"
    assert refusal(host, with_inputs(good, "9", vae=None)) == (failed, {"9": ["required_input_missing"]})
    assert refusal(host, with_inputs(good, "1", unet_name="no.safetensors")) == (failed, {"1": ["value_not_in_list"]})
    assert refusal(host, with_inputs(good, "8", steps=0)) == (failed, {"8": ["value_smaller_than_min"]})
    assert refusal(host, with_inputs(good, "8", cfg=1000.0)) == (failed, {"8": ["value_bigger_than_max"]})
    assert refusal(host, with_inputs(good, "9", samples=["1", 0])) == (failed, {"9": ["return_type_mismatch"]})
    assert refusal(host, with_inputs(good, "9", samples=["8"])) == (failed, {"9": ["bad_linked_input"]})
    nowhere = with_inputs(good, "9", samples=["99", 0])
    assert refusal(host, nowhere) == (failed, {"9": ["exception_during_inner_validation"]})


def test_a_prompt_without_outputs_or_with_an_unknown_node_is_refused_as_a_whole(host: HostProcess) -> None:
    without = {node_id: entry for node_id, entry in text_to_video().items() if node_id != "10"}
    assert refusal(host, without) == ("prompt_no_outputs", {})
    unknown = text_to_video() | {"7": node("NoSuchNode", model=["1", 0])}
    assert refusal(host, unknown) == ("missing_node_type", {})
    status, body = host.post("/prompt", {"client_id": "x"})
    assert (status, body["error"]["type"], body["node_errors"]) == (400, "no_prompt", {})


def test_only_the_asked_for_output_is_executed(host: HostProcess) -> None:
    prompt = text_to_video(steps=3)
    prompt["20"] = node("EmptyImage", width=32, height=32, batch_size=1, color=255)
    prompt["21"] = node("PreviewImage", images=["20", 0])
    ran = run_prompt(host, prompt, partial_execution_targets=["21"])
    assert ran.executed == ["20", "21"]


def test_a_node_that_is_only_described_says_so_when_it_runs(host: HostProcess) -> None:
    prompt = {
        "1": node("EmptyImage", width=32, height=32, batch_size=1, color=0),
        "2": node("Canny", image=["1", 0], low_threshold=0.4, high_threshold=0.8),
        "3": node("PreviewImage", images=["2", 0]),
    }
    ran = run_prompt(host, prompt)
    (error,) = ran.of("execution_error")
    assert ran.status == "error"
    assert (error["node_id"], error["exception_type"]) == ("2", "NotImplementedError")
    assert "Canny" in error["exception_message"]


def test_an_interrupt_ends_the_run_in_the_middle_of_sampling(host: HostProcess) -> None:
    host.post("/_host/hold", {"node_id": "8", "step": 1})
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(run_prompt, host, text_to_video(steps=5))
        assert host.get("/_host/held").body == {"node_id": "8", "step": 1}
        host.post("/interrupt")
        ran = running.result(timeout=60)
    (told,) = ran.of("execution_interrupted")
    assert told["node_id"] == "8"
    assert ran.status == "error"
    assert "9" not in ran.executed
    (job,) = [job for job in host.get("/api/jobs").body["jobs"] if job["id"] == ran.prompt_id]
    assert job["status"] == "cancelled"


def test_a_held_run_goes_on_when_released(host: HostProcess) -> None:
    host.post("/_host/hold", {"node_id": "9"})
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(run_prompt, host, text_to_video(steps=6))
        assert host.get("/_host/held").body == {"node_id": "9", "step": None}
        running_now = host.get("/queue").body["queue_running"]
        host.post("/_host/release")
        ran = running.result(timeout=60)
    assert [item[1] for item in running_now] == [ran.prompt_id]
    assert ran.status == "success"


PACK = """
from aiohttp import web
from server import PromptServer
import execution, nodes

server = PromptServer.instance


@server.routes.get("/pack/hello")
async def hello(request):
    return web.json_response({"open": not server.app.frozen})


@web.middleware
async def refuse(request, handler):
    if request.path in ("/prompt", "/api/prompt") and request.headers.get("X-Refuse"):
        return web.json_response({"error": {"type": "by_pack"}, "node_errors": {}}, status=400)
    return await handler(request)


server.app.middlewares.append(refuse)


def bad_hook(body):
    raise ValueError("a hook that fails")


def marking_hook(body):
    body.setdefault("extra_data", {})["marked"] = True
    return body


server.add_on_prompt_handler(bad_hook)
server.add_on_prompt_handler(marking_hook)


class Delegating:
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "load"
    CATEGORY = "test"

    @classmethod
    def INPUT_TYPES(cls):
        names = nodes.NODE_CLASS_MAPPINGS["UNETLoader"].INPUT_TYPES()["required"]["unet_name"]
        return {"required": {"unet_name": names}, "hidden": {"unique_id": "UNIQUE_ID"}}

    def load(self, unet_name, unique_id):
        from comfy_execution.utils import get_executing_context
        assert get_executing_context().node_id == unique_id
        server.send_sync("pack.loaded", {"node": unique_id})
        return nodes.NODE_CLASS_MAPPINGS["UNETLoader"]().load_unet(unet_name, "default")


class Failing:
    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "run"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"number": ("INT", {"default": 1})}}

    def run(self, number):
        raise RuntimeError(f"number {number} is wrong")


NODE_CLASS_MAPPINGS = {"Delegating": Delegating, "Failing": Failing, "UNETLoader": Failing}
NODE_DISPLAY_NAME_MAPPINGS = {"Delegating": "A delegating loader"}
"""


@pytest.fixture(scope="module")
def packed(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[HostProcess]:
    """A host with a pack that has a hyphen and a dot in its name, and with one that cannot be imported."""
    folder = tmp_path_factory.mktemp("packs")
    for name, text in {"a-pack.v1": PACK, "broken": "raise ImportError('on purpose')"}.items():
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text(text, "utf-8")
    with start_host(models=models, pack=False, custom_nodes=[folder / "a-pack.v1", folder / "broken"]) as running:
        yield running


def test_a_packs_nodes_are_offered_and_core_nodes_cannot_be_replaced(packed: HostProcess) -> None:
    info = packed.get("/api/object_info").body
    assert info["Delegating"]["display_name"] == "A delegating loader"
    assert info["Delegating"]["python_module"] == "custom_nodes.a-pack.v1"
    assert "tiny_wan21_t2v_fp16.safetensors" in info["Delegating"]["input"]["required"]["unet_name"][0]
    assert info["UNETLoader"]["output"] == ["MODEL"]
    assert "on purpose" in packed.log_text()


def test_a_packs_routes_answer_with_and_without_api(packed: HostProcess) -> None:
    assert packed.get("/pack/hello") == packed.get("/api/pack/hello") == (200, {"open": False})


def test_a_packs_loader_delegates_to_the_core_loader(packed: HostProcess) -> None:
    prompt = text_to_video()
    prompt["1"] = node("Delegating", unet_name="tiny_wan21_t2v_fp16.safetensors")
    ran = run_prompt(packed, prompt)
    assert ran.status == "success"
    assert ran.of("pack.loaded") == [{"node": "1"}]


def test_a_failing_hook_is_logged_and_the_next_one_still_runs(packed: HostProcess) -> None:
    ran = run_prompt(packed, text_to_video())
    assert ran.history["prompt"][3]["marked"] is True
    assert "a hook that fails" in packed.log_text()


def test_a_failing_node_is_reported_with_its_inputs(packed: HostProcess) -> None:
    ran = run_prompt(packed, {"1": node("Failing", number=3)})
    (error,) = ran.of("execution_error")
    assert error["node_id"] == "1"
    assert error["node_type"] == "Failing"
    assert error["exception_type"] == "RuntimeError"
    assert error["exception_message"] == "number 3 is wrong\n"
    assert error["current_inputs"] == {"number": [3]}
    assert any("is wrong" in line for line in error["traceback"])
    assert ran.status == "error"
