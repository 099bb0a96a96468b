"""What a page that watches is told, by the pack in the stand-in host, over a real websocket."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from host.lab import node, text_to_video, with_inputs, write_tiny_models
from host.process import HostProcess, start_host
from prompts import official, with_our_loaders
from watching import STATUS, Page, browse

TWO_EXPERTS = "video_wan2_2_14B_t2v"
HIGH_NOISE = "128:81"
GIB = 1 << 30


@pytest.fixture(scope="module")
def host() -> Iterator[HostProcess]:
    with start_host(vram_gb=16) as running:
        yield running


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HostProcess]:
    models: Path = write_tiny_models(tmp_path_factory.mktemp("models"))
    with start_host(vram_gb=16, models=models) as running:
        yield running


@pytest.fixture(autouse=True)
def emptied(request: pytest.FixtureRequest) -> None:
    """Nothing cached and nothing loaded."""
    for name in {"host", "tiny"} & set(request.fixturenames):
        running: HostProcess = request.getfixturevalue(name)
        running.post("/free", {"unload_models": True, "free_memory": True})
        running.get("/_host/idle")
        running.post("/_host/others", {"bytes": 0})


def our_threads(host: HostProcess) -> int:
    return host.get("/_host/threads").body.count("vram_headroom_events")


def nobody_is_followed(host: HostProcess) -> bool:
    """The thread ends by itself, a moment after the last page has gone."""
    return any(our_threads(host) == 0 for _ in range(200))


def used(page: Page) -> list[int]:
    """Of the first card, as the page was told."""
    return [status["devices"][0]["used_bytes"] for status in page.events("status")]


def test_a_page_that_does_not_watch_is_told_nothing(tiny: HostProcess) -> None:
    async def visit(page: Page) -> None:
        await page.ended(await page.queue(text_to_video()))
        assert page.ours() == []
        assert our_threads(tiny) == 0

    browse(tiny.url, visit)


def test_a_watcher_follows_a_run_phase_by_phase_and_sees_its_end(host: HostProcess) -> None:
    async def visit(page: Page) -> None:
        assert (await page.watch()).status == 200
        host.post("/_host/hold", {"node_id": HIGH_NOISE, "step": 1})
        prompt_id = await page.queue(with_our_loaders(official(TWO_EXPERTS)))
        plan = (await page.until(lambda: page.events("plan")))[-1]["plan"]
        kinds = [phase["kind"] for phase in plan["phases"]]
        first = kinds.index("sample")
        held = await page.until(lambda: [one for one in page.events("phase") if one["phase"] == first])
        assert held[0]["node_id"] == HIGH_NOISE
        host.post("/_host/release")
        await page.until(lambda: any(one["state"] == "done" for one in page.events("phase")))
        seen = [one["phase"] for one in page.events("phase") if (one["phase"] or 0) >= first]
        assert seen == sorted(seen)
        last = page.events("phase")[-1]
        assert (last["prompt_id"], last["phase"], last["node_id"]) == (prompt_id, None, None)
        measured = {one["phase"]: one for one in last["measured"] if one["phase"] is not None}
        assert sorted(measured) == list(range(len(kinds)))
        assert sorted(mark["phase"] for mark in last["marks"]) == list(range(len(kinds)))
        begun = [mark["at"] for mark in last["marks"]]
        assert begun == sorted(begun)
        assert [measured[index]["node_id"] for index in measured] == [
            plan["phases"][index]["node_ids"][0] for index in measured
        ]
        samples = [sample for one in page.events("phase") for sample in one["samples"]]
        assert samples == sorted(samples, key=lambda sample: sample[0])
        assert max(size for _, size in samples) >= plan["phases"][first]["resident_bytes"]
        run = (await page.watch()).body["run"]
        assert (run["state"], run["samples"], run["measured"]) == ("done", samples, last["measured"])
        assert run["plan"] == {**plan, "fixes": []}

    browse(host.url, visit)


def test_a_page_that_comes_late_catches_up(host: HostProcess) -> None:
    async def visit(page: Page) -> None:
        host.post("/_host/hold", {"node_id": HIGH_NOISE, "step": 1})
        prompt_id = await page.queue(with_our_loaders(official(TWO_EXPERTS)))
        host.get("/_host/held?timeout=60")
        answer = (await page.watch()).body
        run = answer["run"]
        phase = run["plan"]["phases"][run["phase"]]
        assert (run["prompt_id"], run["state"], run["node_id"]) == (prompt_id, "running", HIGH_NOISE)
        assert (phase["kind"], phase["node_ids"]) == ("sample", [HIGH_NOISE])
        ended = [one["phase"] for one in run["measured"] if one["phase"] is not None]
        assert [run["plan"]["phases"][index]["kind"] for index in ended] == ["text_encode"] * 2
        assert len(run["samples"]) >= 2
        assert answer["status"]["running"] == {"prompt_id": prompt_id, "node_id": HIGH_NOISE}
        host.post("/_host/release")
        await page.until(lambda: any(one["state"] == "done" for one in page.events("phase")))
        # what the answer said is not said again
        assert all(sample not in run["samples"] for one in page.events("phase") for sample in one["samples"])
        assert page.events("plan") == []

    browse(host.url, visit)


def test_a_change_of_the_card_is_told_as_the_status_route_tells_it(tiny: HostProcess) -> None:
    async def visit(page: Page) -> None:
        await page.watch()
        tiny.post("/_host/others", {"bytes": 3 * GIB})
        await page.until(lambda: 3 * GIB in used(page))
        assert (await page.watch()).body["status"]["devices"][0]["used_bytes"] == 3 * GIB
        tiny.post("/_host/others", {"bytes": 4 * GIB})
        await page.until(lambda: 4 * GIB in used(page))
        # system memory and the self-check may have changed meanwhile
        assert used(page) == [0] * used(page).count(0) + [3 * GIB] * used(page).count(3 * GIB) + [4 * GIB]
        assert set(page.events("status")[-1]) == set(await page.status())

    browse(tiny.url, visit)


def test_a_run_that_fails_says_where(tiny: HostProcess) -> None:
    prompt = text_to_video()
    prompt["20"] = node("VRAMHeadroomGate", value=["7", 0], if_it_does_not_fit="stop")
    prompt = with_inputs(prompt, "8", model=["20", 0])

    async def visit(page: Page) -> None:
        await page.watch()
        tiny.post("/_host/others", {"bytes": 16 * GIB})
        await page.queue(prompt)
        await page.until(lambda: any(one["state"] == "failed" for one in page.events("phase")))
        assert page.events("phase")[-1]["node_id"] == "20"
        assert (await page.watch()).body["run"]["state"] == "failed"

    browse(tiny.url, visit)


def test_a_run_that_is_stopped_was_interrupted_in_its_phase(tiny: HostProcess) -> None:
    async def visit(page: Page) -> None:
        await page.watch()
        tiny.post("/_host/hold", {"node_id": "8", "step": 1})
        await page.queue(text_to_video())
        running = await page.until(lambda: [one for one in page.events("phase") if one["node_id"] == "8"])
        tiny.post("/interrupt")
        await page.until(lambda: any(one["state"] == "interrupted" for one in page.events("phase")))
        last = page.events("phase")[-1]
        assert (last["node_id"], last["phase"]) == ("8", running[0]["phase"])
        assert isinstance(last["phase"], int)

    browse(tiny.url, visit)


def test_a_prompt_that_nobody_checked_is_planned_for_who_watches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VRAM_HEADROOM_MODE", "off")
    with start_host(vram_gb=16, models=write_tiny_models(tmp_path)) as unchecked:

        async def visit(page: Page) -> None:
            await page.watch()
            unchecked.post("/_host/hold", {"node_id": "8", "step": 1})
            prompt_id = await page.queue(text_to_video())
            (told,) = await page.until(lambda: page.events("plan"))
            assert told["prompt_id"] == prompt_id
            assert "sample" in [phase["kind"] for phase in told["plan"]["phases"]]
            unchecked.post("/_host/release")
            await page.until(lambda: any(one["state"] == "done" for one in page.events("phase")))

        browse(unchecked.url, visit)


def test_a_page_that_is_closed_leaves_neither_a_thread_nor_a_word_in_the_log(tiny: HostProcess) -> None:
    async def gone(page: Page) -> None:
        await page.watch()

    async def visit(page: Page) -> None:
        await page.watch()
        tiny.post("/_host/others", {"bytes": 5 * GIB})
        await page.until(lambda: page.events("status"))
        assert our_threads(tiny) == 1
        assert (await page.watch(False)).status == 204
        told = len(page.ours())
        assert (await page.post(f"{STATUS}/watch", {"client_id": "gone", "watching": False})).status == 204
        assert nobody_is_followed(tiny)
        tiny.post("/_host/others", {"bytes": 6 * GIB})
        await page.ended(await page.queue(text_to_video()))
        assert len(page.ours()) == told

    browse(tiny.url, gone, client_id="gone", says_goodbye=False)
    browse(tiny.url, visit)
    assert "send error" not in tiny.log_text()
    assert "can't be told" not in tiny.log_text()


@pytest.mark.parametrize(
    ("body", "status", "word"),
    [
        ({}, 400, "client_id is not a text"),
        ({"client_id": ""}, 400, "client_id is not a text"),
        ({"client_id": 5}, 400, "client_id is not a text"),
        ({"client_id": "x" * 129}, 400, "client_id is not a text"),
        ({"client_id": "x", "watching": "yes"}, 400, "watching is neither true nor false"),
        ([], 400, "not a JSON object"),
        ({"client_id": "x" * 20_000}, 413, "16 KiB"),
    ],
)
def test_a_bad_heartbeat_is_refused_with_a_reason(tiny: HostProcess, body: Any, status: int, word: str) -> None:
    answer = tiny.post(f"{STATUS}/watch", body)
    assert answer.status == status
    assert word in answer.body["error"]["message"]
    assert nobody_is_followed(tiny)


def test_a_page_of_another_site_cannot_watch(tiny: HostProcess) -> None:
    answer = tiny.post(f"{STATUS}/watch", {"client_id": "x"}, {"Origin": "http://elsewhere.example"})
    assert (answer.status, answer.body["error"]["type"]) == (403, "other_site")
