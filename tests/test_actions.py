"""Offload, pin, unpin and free as the panel asks for them, of the pack in the stand-in host."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from host.lab import Prompt, node, text_to_video, with_inputs, write_tiny_models
from host.process import HostProcess, start_host
from prompts import with_our_loaders
from watching import STATUS, Page, Reply, browse

GENERATOR, TEXT, VAE = "tiny_wan21_t2v_fp16.safetensors", "tiny_umt5.safetensors", "tiny_wan_2.1_vae.safetensors"
SAMPLER, DECODE = "8", "9"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def host(models: Path) -> Iterator[HostProcess]:
    with start_host(vram_gb=16, models=models) as running:
        yield running


@pytest.fixture(scope="module")
def dynamic(models: Path) -> Iterator[HostProcess]:
    with start_host(vram_gb=16, models=models, dynamic=True) as running:
        yield running


@pytest.fixture(autouse=True)
def emptied(request: pytest.FixtureRequest) -> None:
    for name in {"host", "dynamic"} & set(request.fixturenames):
        running: HostProcess = request.getfixturevalue(name)
        running.post("/free", {"unload_models": True, "free_memory": True})
        running.get("/_host/idle")


def components(status: Any) -> dict[str, Any]:
    return {c["name"]: c for pipeline in status["pipelines"] for c in pipeline["components"]}


def loaded(status: Any) -> dict[str, Any]:
    """By role: files of a stock loader's models are known where ComfyUI leaves a note of them."""
    return {model["role"]: model for model in status["loaded_models"]}


async def run(page: Page, host: HostProcess, prompt: Prompt) -> None:
    await page.ended(await page.queue(prompt))
    host.get("/_host/idle")


async def hold(page: Page, host: HostProcess, prompt: Prompt, node_id: str, step: int | None = None) -> str:
    """Queue it and stop it in this node; its id."""
    host.post("/_host/hold", {"node_id": node_id, "step": step})
    prompt_id = await page.queue(prompt)
    assert host.get("/_host/held?timeout=60").status == 200
    return prompt_id


async def release(page: Page, host: HostProcess, prompt_id: str) -> None:
    host.post("/_host/release")
    await page.ended(prompt_id)
    host.get("/_host/idle")


def ours() -> Prompt:
    return with_our_loaders(text_to_video())


def kind_of(answer: Reply) -> tuple[int, str]:
    return answer.status, answer.body["error"]["type"]


@pytest.mark.parametrize("stock", [False, True])
def test_what_is_idle_leaves_at_once_and_says_how_much_that_was(host: HostProcess, stock: bool) -> None:
    async def visit(page: Page) -> None:
        await run(page, host, text_to_video() if stock else ours())
        before = loaded(await page.status())
        generator = before["generator"]
        assert generator["registered"] is not stock
        answer = await page.act("offload", generator["key"])
        assert (answer.status, answer.body) == (200, {"done": True, "freed_bytes": generator["bytes_on_card"]})
        assert generator["bytes_on_card"] > 0
        after = loaded(await page.status())
        assert set(after) == set(before) - {"generator"}

    browse(host.url, visit)


@pytest.mark.parametrize("stock", [False, True])
def test_a_model_that_computes_is_refused_and_stays(host: HostProcess, stock: bool) -> None:
    async def visit(page: Page) -> None:
        prompt_id = await hold(page, host, text_to_video() if stock else ours(), SAMPLER, 0)
        generator = loaded(await page.status())["generator"]
        answer = await page.act("offload", generator["key"])
        after = loaded(await page.status())["generator"]
        await release(page, host, prompt_id)
        assert kind_of(answer) == (409, "in_use")
        assert "is computing; wait until its node has run" in answer.body["error"]["message"]
        assert after["bytes_on_card"] == generator["bytes_on_card"]

    browse(host.url, visit)


@pytest.mark.parametrize("stock", [False, True])
def test_while_a_node_runs_an_action_waits_for_its_end_and_everybody_can_see_that(host: HostProcess, stock: bool) -> None:
    async def visit(page: Page) -> None:
        await page.watch()
        prompt_id = await hold(page, host, text_to_video() if stock else ours(), SAMPLER, 0)
        encoder = loaded(await page.status())["text_encoder"]
        answer = await page.act("offload", encoder["key"])
        assert (answer.status, answer.body["waiting"]) == (202, "node")
        again = await page.act("offload", encoder["key"])
        assert (again.status, again.body["id"]) == (202, answer.body["id"]), "asked twice, it waits once"
        (waiting,) = (await page.status())["waiting"]
        assert (waiting["id"], waiting["action"], waiting["key"]) == (answer.body["id"], "offload", encoder["key"])
        assert TEXT in waiting["name"] or stock
        told = await page.until(lambda: [one for one in page.events("status") if one["waiting"]])
        assert told[0]["waiting"][0]["id"] == answer.body["id"]
        found = await page.get(f"{STATUS}/actions/{answer.body['id']}")
        assert found.body == {"id": answer.body["id"], "state": "waiting", "freed_bytes": 0, "message": None}
        # between the sampler and the decode, with the prompt still running
        host.post("/_host/hold", {"node_id": DECODE})
        assert host.get("/_host/held?timeout=60").body["node_id"] == DECODE
        found = await page.get(f"{STATUS}/actions/{answer.body['id']}")
        status = await page.status()
        await release(page, host, prompt_id)
        assert (found.body["state"], found.body["freed_bytes"]) == ("done", encoder["bytes_on_card"])
        assert (status["waiting"], status["running"]["prompt_id"]) == ([], prompt_id)
        assert "text_encoder" not in loaded(status)
        await page.until(lambda: page.events("status") and not page.events("status")[-1]["waiting"])

    browse(host.url, visit)


def test_a_pin_waits_for_no_node_and_holds_against_what_waits(host: HostProcess) -> None:
    async def visit(page: Page) -> None:
        await run(page, host, ours())
        generator = components(await page.status())[GENERATOR]
        prompt_id = await hold(page, host, with_inputs(ours(), "4", text="a dog"), "4")
        waits = await page.act("offload", generator["key"])
        pinned = await page.act("pin", generator["key"])
        assert (waits.status, pinned.status, pinned.body) == (202, 200, {"done": True, "freed_bytes": 0})
        await release(page, host, prompt_id)
        found = (await page.get(f"{STATUS}/actions/{waits.body['id']}")).body
        assert (found["state"], found["freed_bytes"]) == ("refused", 0)
        assert found["message"] == f"{GENERATOR} is pinned to the card; unpin it first"

    browse(host.url, visit)


def test_free_sends_off_what_is_idle_and_leaves_what_is_pinned(host: HostProcess) -> None:
    async def visit(page: Page) -> None:
        await run(page, host, ours())
        before = components(await page.status())
        assert (await page.act("pin", before[VAE]["key"])).body == {"done": True, "freed_bytes": 0}
        assert kind_of(await page.act("offload", before[VAE]["key"])) == (409, "pinned")
        answer = await page.act("free")
        after = components(await page.status())
        idle = before[GENERATOR]["bytes_on_card"] + before[TEXT]["bytes_on_card"]
        assert (answer.status, answer.body) == (200, {"done": True, "freed_bytes": idle})
        assert {name: c["placement"] for name, c in after.items()} == {GENERATOR: "cpu", TEXT: "cpu", VAE: "gpu"}
        assert {name: c["pinned"] for name, c in after.items()} == {GENERATOR: False, TEXT: False, VAE: True}
        assert {name: c["dtype"] for name, c in after.items()} == {name: c["dtype"] for name, c in before.items()}
        await page.act("unpin", before[VAE]["key"])
        assert (await page.act("free")).body["freed_bytes"] == before[VAE]["bytes_on_card"]
        assert (await page.act("free")).body == {"done": True, "freed_bytes": 0}

    browse(host.url, visit)


def test_free_while_a_node_runs_waits_and_leaves_what_the_next_nodes_do_with(host: HostProcess) -> None:
    async def visit(page: Page) -> None:
        prompt_id = await hold(page, host, ours(), SAMPLER, 0)
        answer = await page.act("free")
        assert (answer.status, answer.body["waiting"]) == (202, "node")
        (waiting,) = (await page.status())["waiting"]
        assert (waiting["action"], waiting["key"], waiting["name"]) == ("free", None, None)
        await release(page, host, prompt_id)
        found = (await page.get(f"{STATUS}/actions/{answer.body['id']}")).body
        assert (found["state"], found["freed_bytes"] > 0) == ("done", True)
        assert components(await page.status())[VAE]["placement"] == "gpu", "the decode came after it"

    browse(host.url, visit)


def test_a_pin_from_the_panel_holds_against_a_policy_node_run_after_run(host: HostProcess) -> None:
    prompt = ours()
    prompt["20"] = node("VRAMHeadroomComponentPolicy", policy="leaves between uses", priority=1, clip=["2", 0])
    prompt = with_inputs(with_inputs(prompt, "4", clip=["20", 1]), "5", clip=["20", 1])

    async def visit(page: Page) -> None:
        await run(page, host, prompt)
        encoder = components(await page.status())[TEXT]
        assert (encoder["policy"], encoder["placement"]) == ("leaves between uses", "cpu")
        await page.act("pin", encoder["key"])
        await run(page, host, with_inputs(prompt, "4", text="a dog"))
        pinned = components(await page.status())[TEXT]
        assert (pinned["policy"], pinned["placement"], pinned["pinned"]) == ("pinned", "gpu", True)
        await page.act("unpin", encoder["key"])
        await run(page, host, with_inputs(prompt, "4", text="a bird"))
        after = components(await page.status())[TEXT]
        assert (after["policy"], after["placement"], after["pinned"]) == ("leaves between uses", "cpu", False)

    browse(host.url, visit)


def test_a_model_of_a_stock_loader_is_pinned_against_comfyuis_own_unloading(host: HostProcess) -> None:
    async def visit(page: Page) -> None:
        await run(page, host, text_to_video())
        vae = loaded(await page.status())["vae"]
        assert (await page.act("unpin", vae["key"])).body == {"done": True, "freed_bytes": 0}
        assert (await page.act("pin", vae["key"])).body == {"done": True, "freed_bytes": 0}
        host.post("/free", {"unload_models": True})
        host.get("/_host/idle")
        assert set(loaded(await page.status())) == {"vae"}
        (component,) = components(await page.status()).values()
        assert (component["role"], component["pinned"], component["key"]) == ("vae", True, vae["key"])

    browse(host.url, visit)


def test_elastic_models_are_offloaded_between_nodes_and_refused_while_they_compute(dynamic: HostProcess) -> None:
    async def visit(page: Page) -> None:
        prompt_id = await hold(page, dynamic, ours(), SAMPLER, 1)
        models = components(await page.status())
        assert models[GENERATOR]["elastic"]
        assert kind_of(await page.act("offload", models[GENERATOR]["key"])) == (409, "in_use")
        waits = await page.act("offload", models[TEXT]["key"])
        assert (waits.status, waits.body["waiting"]) == (202, "node")
        assert models[TEXT]["bytes_on_card"] > 0
        dynamic.post("/_host/hold", {"node_id": DECODE})
        assert dynamic.get("/_host/held?timeout=60").body["node_id"] == DECODE
        after = components(await page.status())
        await release(page, dynamic, prompt_id)
        found = (await page.get(f"{STATUS}/actions/{waits.body['id']}")).body
        assert (found["state"], found["freed_bytes"]) == ("done", models[TEXT]["bytes_on_card"])
        assert after[TEXT]["bytes_on_card"] == 0
        assert after[GENERATOR]["bytes_on_card"] > 0
        # idle: at once
        left = components(await page.status())[GENERATOR]
        answer = await page.act("offload", left["key"])
        assert (answer.status, answer.body) == (200, {"done": True, "freed_bytes": left["bytes_on_card"]})

    browse(dynamic.url, visit)


def test_an_elastic_model_that_is_pinned_keeps_its_pages_in_the_next_run(dynamic: HostProcess) -> None:
    async def visit(page: Page) -> None:
        await run(page, dynamic, ours())
        vae = components(await page.status())[VAE]
        assert (vae["policy"], vae["pinned"]) == ("the host decides", False)
        await page.act("pin", vae["key"])
        prompt_id = await hold(page, dynamic, with_inputs(ours(), "4", text="a dog"), SAMPLER, 0)
        kept = {model["file"]: model["watermark_limit"] for model in dynamic.get("/_host/pages").body["models"]}
        await release(page, dynamic, prompt_id)
        assert components(await page.status())[VAE]["policy"] == "pinned"
        assert {file for file, limit in kept.items() if limit} == {VAE}
        await page.act("unpin", vae["key"])
        assert components(await page.status())[VAE]["policy"] == "the host decides"

    browse(dynamic.url, visit)


@pytest.mark.parametrize("action", ["offload", "pin", "unpin"])
@pytest.mark.parametrize("body", [{}, {"key": None}, {"key": "5"}, {"key": True}, {"key": 1.5}])
def test_a_body_without_a_key_gets_400_and_a_reason(host: HostProcess, action: str, body: Any) -> None:
    answer = host.post(f"{STATUS}/{action}", body)
    assert (answer.status, answer.body["error"]["type"]) == (400, "bad_key")
    assert "whole number" in answer.body["error"]["message"]


@pytest.mark.parametrize("action", ["offload", "pin", "unpin"])
def test_an_unknown_model_gets_404(host: HostProcess, action: str) -> None:
    answer = host.post(f"{STATUS}/{action}", {"key": 4711})
    assert (answer.status, answer.body["error"]["type"]) == (404, "unknown_model")
    assert host.get(f"{STATUS}/actions/4711").status == 404


@pytest.mark.parametrize("action", ["offload", "pin", "unpin", "free", "watch"])
@pytest.mark.parametrize(
    "headers", [{"Origin": "http://elsewhere.example"}, {"Sec-Fetch-Site": "cross-site"}, {"Sec-Fetch-Site": "same-site"}]
)
def test_a_page_of_another_site_is_refused(host: HostProcess, action: str, headers: dict[str, str]) -> None:
    answer = host.post(f"{STATUS}/{action}", {"key": 1, "client_id": "x"}, headers)
    assert (answer.status, answer.body["error"]["type"]) == (403, "other_site")


def test_comfyuis_own_page_is_not_refused(host: HostProcess) -> None:
    answer = host.post(f"{STATUS}/free", {}, {"Origin": host.url, "Sec-Fetch-Site": "same-origin"})
    assert (answer.status, answer.body["done"]) == (200, True)


@pytest.mark.parametrize("body", ["not an object", [], 5])
def test_a_body_that_is_no_object_gets_400(host: HostProcess, body: Any) -> None:
    assert host.post(f"{STATUS}/free", body).body["error"]["type"] == "not_an_object"
