"""What goes wrong in the pack must not cost a prompt, a worker thread or the server."""

import shutil
from pathlib import Path

from client import history_of
from host.process import start_host
from loadpack import ROOT
from prompts import official, with_our_loaders

STATUS, CHECK = "/api/v1/hardware/vram", "/api/v1/hardware/vram/check"

FAULTY = """
import sys
import comfy.model_patcher

def is_dynamic(self):
    # ComfyUI asks it too, at every load, and must get its answer
    if ".nodes.host." in sys._getframe(1).f_globals["__name__"]:
        raise RuntimeError("a patcher of tomorrow")
    return False

comfy.model_patcher.ModelPatcher.is_dynamic = is_dynamic
NODE_CLASS_MAPPINGS = {}
"""

SLOW = """
import threading

class Slow:
    @classmethod
    def INPUT_TYPES(cls):
        # only the planner's thread waits: ComfyUI itself must not be what is slow here
        if threading.current_thread().name.startswith("vram_headroom_plan"):
            threading.Event().wait(6)
        return {"required": {"value": ("INT", {"default": 1})}}

    RETURN_TYPES = ("INT",)
    FUNCTION = "run"
    OUTPUT_NODE = True

    def run(self, value):
        return {"ui": {}, "result": (value,)}

NODE_CLASS_MAPPINGS = {"SlowToDescribe": Slow}
"""


def custom_node(folder: Path, name: str, code: str) -> Path:
    node = folder / name
    node.mkdir()
    (node / "__init__.py").write_text(code, encoding="utf-8")
    return node


def test_a_patcher_we_can_not_read_costs_neither_the_prompt_nor_the_next_one(tmp_path: Path) -> None:
    with start_host(vram_gb=16, custom_nodes=[custom_node(tmp_path, "zz_faulty", FAULTY)]) as host:
        for prompt in (with_our_loaders(official("text_to_video_wan")), official("text_to_video_wan")):
            queued = host.post("/prompt", {"prompt": prompt, "client_id": "test"})
            assert history_of(host.url, queued.body["prompt_id"])["status"]["status_str"] == "success"
        assert "a patcher of tomorrow" in host.log_text()


def test_a_plan_that_hangs_holds_a_prompt_up_for_two_seconds_and_no_longer(tmp_path: Path) -> None:
    with start_host(vram_gb=16, custom_nodes=[custom_node(tmp_path, "zz_slow", SLOW)]) as host:
        prompt = {"1": {"class_type": "SlowToDescribe", "inputs": {"value": 1}}}
        queued = host.post("/prompt", {"prompt": prompt, "client_id": "test"})
        assert history_of(host.url, queued.body["prompt_id"])["status"]["status_str"] == "success"
        assert "took longer than 2 s" in host.log_text()
        answer = host.post(CHECK, {"prompt": prompt})
        assert (answer.status, answer.body["error"]["type"]) == (503, "too_slow")


def test_a_second_copy_of_the_pack_says_so_and_stays_out_of_the_way(tmp_path: Path) -> None:
    copy = tmp_path / "vram-headroom-again"
    for room in ("vram", "nodes", "web"):
        shutil.copytree(ROOT / room, copy / room, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "__init__.py", copy)
    with start_host(vram_gb=16, custom_nodes=[copy]) as host:
        assert "VRAM Headroom is installed twice" in host.log_text()
        scripts = [path for path in host.get("/extensions").body if path.endswith("/vram_headroom.js")]
        assert len(scripts) == 1
        prompt = with_our_loaders(official("text_to_video_wan"))
        queued = host.post("/prompt", {"prompt": prompt, "client_id": "test"})
        assert history_of(host.url, queued.body["prompt_id"])["status"]["status_str"] == "success"
        status = host.get(STATUS).body
        assert [pipeline["name"] for pipeline in status["pipelines"]] == ["wan"]
        assert all(model["registered"] for model in status["loaded_models"])
