"""What a page that watches is told, by the pack in the stand-in host, over a real websocket."""

from collections.abc import Iterator
from typing import Any

import pytest
from host.process import HostProcess, start_host
from prompts import official, with_our_loaders
from watching import Page, browse

SAMPLERS = ("128:81", "128:78")
TWO_EXPERTS = "video_wan2_2_14B_t2v"


@pytest.fixture(scope="module")
def host() -> Iterator[HostProcess]:
    with start_host(vram_gb=16) as running:
        yield running


@pytest.fixture(autouse=True)
def emptied(host: HostProcess) -> None:
    """Nothing cached and nothing loaded."""
    host.post("/free", {"unload_models": True, "free_memory": True})
    host.get("/_host/idle")
    host.post("/_host/others", {"bytes": 0})


def test_a_page_that_does_not_watch_is_told_nothing(host: HostProcess) -> None:
    async def visit(page: Page) -> None:
        await page.ended(await page.queue(with_our_loaders(official(TWO_EXPERTS))))
        assert page.ours() == []

    browse(host.url, visit)


def test_a_watcher_follows_a_run_phase_by_phase_and_sees_its_end(host: HostProcess) -> None:
    async def visit(page: Page) -> None:
        assert (await page.watch()).status == 200
        host.post("/_host/hold", {"node_id": SAMPLERS[0], "step": 1})
        prompt_id = await page.queue(with_our_loaders(official(TWO_EXPERTS)))
        plan = (await page.until(lambda: page.events("plan")))[-1]["plan"]
        kinds = [phase["kind"] for phase in plan["phases"]]
        first = kinds.index("sample")
        held = await page.until(lambda: [one for one in page.events("phase") if one["phase"] == first])
        assert held[0]["node_id"] == plan["phases"][first]["node_ids"][0]
        host.post("/_host/release")
        await page.until(lambda: any(one["state"] == "done" for one in page.events("phase")))
        seen = [one["phase"] for one in page.events("phase") if (one["phase"] or 0) >= first]
        assert seen == sorted(seen)
        last = page.events("phase")[-1]
        assert (last["prompt_id"], last["phase"], last["node_id"]) == (prompt_id, None, None)
        measured = [one["phase"] for one in last["measured"] if one["phase"] is not None]
        # which of two texts comes first is ComfyUI's affair
        assert sorted(measured) == list(range(len(kinds)))
        assert sorted(mark["phase"] for mark in last["marks"]) == list(range(len(kinds)))
        begun = [mark["at"] for mark in last["marks"]]
        assert begun == sorted(begun)
        samples = [sample for one in page.events("phase") for sample in one["samples"]]
        assert samples == sorted(samples, key=lambda sample: sample[0])
        run = (await page.watch()).body["run"]
        assert (run["state"], run["samples"], run["measured"]) == ("done", samples, last["measured"])

    browse(host.url, visit)


def component(status: Any, role: str) -> Any:
    return next(c for pipeline in status["pipelines"] for c in pipeline["components"] if c["role"] == role)


def test_smoke_of_actions(host: HostProcess) -> None:
    async def visit(page: Page) -> None:
        await page.watch()
        await page.ended(await page.queue(with_our_loaders(official("text_to_video_wan"))))
        host.get("/_host/idle")
        before = component(await page.status(), "generator")
        done = await page.act("offload", before["key"])
        assert (done.status, done.body) == (200, {"done": True, "freed_bytes": before["bytes_on_card"]})
        assert component(await page.status(), "generator")["placement"] == "cpu"
        assert (await page.act("offload", 5)).status == 404
        vae = component(await page.status(), "vae")
        assert (await page.act("pin", vae["key"])).body["done"]
        assert component(await page.status(), "vae")["pinned"]
        assert (await page.act("offload", vae["key"])).status == 409
        await page.act("free")
        assert component(await page.status(), "vae")["placement"] == "gpu"
        assert component(await page.status(), "text_encoder")["placement"] == "cpu"

    browse(host.url, visit)
