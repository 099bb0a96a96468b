"""What the panel is told and asks for in a real ComfyUI: two experts watched from start to end, and an action between nodes."""

from __future__ import annotations

from typing import Any

from prompts import with_our_loaders
from real_comfyui import CHECK, RealComfyUI
from watching import STATUS, Page, browse

EMPTY = {"unload_models": True, "free_memory": True}
PICTURE = {
    "1": {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 64, "batch_size": 1, "color": 0}},
    "2": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}},
}
STEPS = 15
"""Of each expert: long enough that the panel's heartbeat meets both."""


def slow(prompt: dict[str, Any]) -> dict[str, Any]:
    """The two-expert graph with many steps, so that there is something to watch."""
    ours = with_our_loaders(prompt)
    samplers = [node for node in ours.values() if node["class_type"] == "KSamplerAdvanced"]
    for sampler in samplers:
        first = sampler["inputs"]["start_at_step"] == 0
        sampler["inputs"] = {
            **sampler["inputs"],
            "noise_seed": 77,
            "steps": 2 * STEPS,
            "start_at_step": 0 if first else STEPS,
            "end_at_step": STEPS if first else 10_000,
        }
    return ours


async def emptied(page: Page) -> None:
    """Nothing cached and nothing loaded: ComfyUI does as the flags say before its next prompt."""
    await page.post("/free", EMPTY)
    await page.ended(await page.queue(PICTURE))


async def started(page: Page, node_id: str) -> None:
    await page.until(lambda: any(kind == "executing" and data["node"] == node_id for kind, data in page.told))


async def stepping(page: Page, node_id: str) -> None:
    """Until this sampler has made a step."""
    await page.until(lambda: any(kind == "progress" and data.get("node") == node_id for kind, data in page.told))


def test_a_run_of_two_experts_is_followed_and_an_offload_waits_for_the_end_of_a_node(
    comfyui: RealComfyUI, two_stage: dict[str, Any]
) -> None:
    prompt = slow(two_stage)
    phases = comfyui.ask(CHECK, {"prompt": prompt})[1]["phases"]
    high, low = [phase["node_ids"][0] for phase in phases if phase["kind"] == "sample"]

    async def visit(page: Page) -> None:
        await emptied(page)
        assert page.ours() == [], "it does not watch yet"
        await page.watch()
        prompt_id = await page.queue(prompt)
        await stepping(page, high)
        status = await page.status()
        models = {c["role"]: c for pipeline in status["pipelines"] for c in pipeline["components"] if c["bytes_on_card"]}
        busy = await page.act("offload", models["generator"]["key"])
        waits = await page.act("offload", models["text_encoder"]["key"])
        listed = (await page.status())["waiting"]
        await stepping(page, low)
        action = (await page.get(f"{STATUS}/actions/{waits.body['id']}")).body
        between = await page.status()
        await page.ended(prompt_id)
        await page.until(lambda: any(one["state"] == "done" for one in page.events("phase")))

        assert (busy.status, busy.body["error"]["type"]) == (409, "in_use")
        assert (waits.status, waits.body["waiting"]) == (202, "node")
        assert [(one["action"], one["key"]) for one in listed] == [("offload", models["text_encoder"]["key"])]
        assert (action["state"], action["freed_bytes"]) == ("done", models["text_encoder"]["bytes_on_card"])
        assert action["freed_bytes"] > 0
        assert (between["waiting"], between["running"]["prompt_id"]) == ([], prompt_id)
        told = page.events("phase")
        assert {one["prompt_id"] for one in told} == {prompt_id}
        order = [phases[one["phase"]]["node_ids"][0] for one in told if one["phase"] is not None]
        sampled = [node_id for node_id in order if node_id in (high, low)]
        assert sampled == sorted(sampled, key=(high, low).index)
        begun = [phases[mark["phase"]]["node_ids"][0] for mark in told[-1]["marks"]]
        assert [node_id for node_id in begun if node_id in (high, low)] == [high, low], "however short the second was"
        measured = [one["phase"] for one in told[-1]["measured"] if one["phase"] is not None]
        assert sorted(measured) == list(range(len(phases)))
        assert measured[-3:] == [index for index, phase in enumerate(phases) if phase["kind"] in ("sample", "vae_decode")]
        assert {one["exact"] for one in told[-1]["measured"]} == {False}, "the simulated card has no counter of peaks"
        samples = [sample for one in told for sample in one["samples"]]
        assert samples == sorted(samples, key=lambda sample: sample[0])
        assert max(size for _, size in samples) >= models["generator"]["bytes_on_card"]
        (plan,) = page.events("plan")
        assert [phase["node_ids"] for phase in plan["plan"]["phases"]] == [phase["node_ids"] for phase in phases]
        run = (await page.watch()).body["run"]
        assert (run["prompt_id"], run["state"], run["samples"]) == (prompt_id, "done", samples)

    browse(comfyui.url, visit)


def test_what_is_idle_leaves_at_once_and_a_pin_holds_against_comfyuis_unload_button(
    comfyui: RealComfyUI, two_stage: dict[str, Any]
) -> None:
    async def visit(page: Page) -> None:
        await emptied(page)
        await page.ended(await page.queue(two_stage))
        models = {model["role"]: model for model in (await page.status())["loaded_models"]}
        answer = await page.act("offload", models["text_encoder"]["key"])
        assert (answer.status, answer.body) == (200, {"done": True, "freed_bytes": models["text_encoder"]["bytes_on_card"]})
        assert (await page.act("pin", models["vae"]["key"])).status == 200
        # the flag is heeded before the next prompt, of which nothing runs again
        await page.post("/free", {"unload_models": True})
        await page.ended(await page.queue(two_stage))
        (left,) = (await page.status())["loaded_models"]
        assert (left["role"], left["bytes_on_card"]) == ("vae", models["vae"]["bytes_on_card"])
        await page.act("unpin", models["vae"]["key"])
        assert (await page.act("free")).body == {"done": True, "freed_bytes": left["bytes_on_card"]}
        assert (await page.status())["loaded_models"] == []

    browse(comfyui.url, visit)


def test_a_stopped_run_was_interrupted(comfyui: RealComfyUI, two_stage: dict[str, Any]) -> None:
    prompt = slow(two_stage)

    async def visit(page: Page) -> None:
        await emptied(page)
        await page.watch()
        prompt_id = await page.queue(prompt)
        high = next(key for key, node in prompt.items() if node["class_type"] == "KSamplerAdvanced")
        await page.until(lambda: any(kind == "progress" for kind, _ in page.told))
        await page.post("/interrupt")
        await page.until(lambda: any(one["state"] == "interrupted" for one in page.events("phase")))
        last = page.events("phase")[-1]
        assert last["prompt_id"] == prompt_id
        assert prompt[last["node_id"]]["class_type"] == prompt[high]["class_type"]

    browse(comfyui.url, visit)
