"""Plays what was recorded of a real ComfyUI's loads through the replay, and says where they differ."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from vram_headroom.vram.estimate import dit, vae
from vram_headroom.vram.estimate.tokens import Video
from vram_headroom.vram.plan.modules import Module
from vram_headroom.vram.plan.residency import Need, Replay, Weights
from vram_headroom.vram.plan.types import Card, HostRules, ModelRef, ModelRole

MIB = 1 << 20
LOADERS: Mapping[str, ModelRole] = {"UNETLoader": "generator", "CLIPLoader": "text_encoder", "VAELoader": "vae"}
TINY_DIM = 128


class Compared(NamedTuple):
    loads: int
    certain: int
    """Loads with a single outcome."""
    worst: int
    """Of the others, those where the worst outcome is what happened."""
    wrong: tuple[str, ...]


def rules_of(recorded: Mapping[str, Any], name: str) -> HostRules:
    settings = recorded["rules"][name]
    return HostRules(
        version=recorded["version"],
        vram_state=settings["vram_state"],
        reserve_bytes=settings["reserve"],
        minimum_inference_bytes=round(settings["minimum_inference"]),
        minimum_weight_ratio=settings["ratio"],
        flash_attention=False,
        compute_bytes=4,
        vae_compute_bytes=4,
        offload_streams=settings["streams"],
        smart_memory=settings["smart_memory"],
        keeps_load_order=not recorded["version"].startswith("0.8."),
        free_from_list=settings["from_list"],
    )


def compare(recorded: Mapping[str, Any], only: str | None = None) -> Compared:
    """All runs, or those under one set of rules."""
    loads = certain = worst = 0
    wrong: list[str] = []
    for run in recorded["runs"]:
        if only not in (None, run["rules"]):
            continue
        replay = Replay(Card("simulated", run["mib"] * MIB, run["mib"] * MIB), rules_of(recorded, run["rules"]))
        prompt = recorded["prompts"][run["prompt"]]
        refs: dict[str, ModelRef] = {}
        for node, loader, patched, required, minimum, full, loaded, buffers, free in run["loads"] + run["again"]:
            where = f"{recorded['version']} {run['rules']}, {run['prompt']} on {run['mib']} MiB, node {node}"
            file, known = _model(recorded, prompt[loader])
            role = LOADERS[prompt[loader]["class_type"]]
            ref = refs[loader] = ModelRef(loader, role, file, f"/m/{file}", known["bytes"], known["bytes"], known["class"])
            least, most = activations(prompt, node, recorded["version"])
            if abs(most - required) > 1 or (minimum is not None and abs(least - minimum) > 1):
                wrong.append(f"{where}: asked for {required} and {minimum}, not {most} and {least}")
            modules = tuple(
                Module(size, streaming, bool(castable))
                for streaming, size, castable in known["modules"]["patched" if patched else "plain"]
            )
            weights = {ref.key: Weights(modules, "lora" if patched else "")}
            seen = replay.phase(Need((ref,), least, most, weights, full))
            actual = {refs[other].key: size for other, size in loaded.items() if size}
            loads += 1
            certain += len(seen.outcomes) == 1
            if actual not in [dict(outcome) for outcome in seen.outcomes]:
                wrong.append(f"{where}: {loaded} is none of {seen.outcomes}")
                break
            if dict(seen.after) != actual:
                continue
            worst += len(seen.outcomes) > 1
            if seen.buffer != round(buffers.get(loader, 0)):
                wrong.append(f"{where}: buffer of {buffers.get(loader, 0)}, not {seen.buffer}")
            if seen.free != free:
                wrong.append(f"{where}: {free} free, not {seen.free}")
    return Compared(loads, certain, worst, tuple(wrong))


def _model(recorded: Mapping[str, Any], loader: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    file = next(value for name, value in loader["inputs"].items() if name.endswith("_name"))
    return file, recorded["models"][file]


def activations(prompt: Mapping[str, Any], node: str, version: str) -> tuple[int, int]:
    """What this node's load must leave free, and what others are evicted for, by the estimator's formulas."""
    kind = prompt[node]["class_type"]
    size = next(data["inputs"] for data in prompt.values() if "length" in data["inputs"])
    video = Video(size["width"], size["height"], size["length"])
    latent = video.latent()
    if kind.startswith("KSampler"):
        single, double = (
            dit.host_memory_required(latent._replace(batch=batch), usage_factor=TINY_DIM / 2222, element_bytes=4, flash=False)
            for batch in (1, 2)
        )
        return single, double
    if kind == "CLIPTextEncode":
        return 0, 0
    if kind == "VAEDecode":
        needed = vae.host_decode_required("2.1", latent, element_bytes=4)
    else:
        needed = vae.host_encode_required("2.1", video, element_bytes=4)
    return needed, needed
