"""Launch flags of ComfyUI that the replay knows: what each would change in the host's rules, as advice in words."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Final, NamedTuple

from ..units import GIB, say_gib
from .bench import Picture, Setup
from .types import HostRules, Plan

USUAL_RESERVE: Final = 700 << 20
"""The most ComfyUI reserves by itself: 700 MiB on Windows with a card above 15 GB (comfy/model_management.py, 0.8 and 0.33)."""


class _Flag(NamedTuple):
    id: str
    title: str
    picture: Picture
    rules: HostRules
    note: str


def launch_setups(rules: HostRules | None, replan: Callable[[HostRules], Plan] | None, plan: Plan) -> tuple[Setup, ...]:
    """Every launch flag that would change `rules`. Whether it helps is for the plan under the new rules to say."""
    if rules is None or replan is None:
        return ()
    return tuple(
        Setup(f"flag_{flag.id}", flag.title, flag.picture, partial(replan, flag.rules), flag.note)
        for flag in _flags(rules, max((planned.short for planned in plan.phases), default=0))
    )


def _flags(rules: HostRules, short: int) -> Iterator[_Flag]:
    """What the flags do is read in ComfyUI's comfy/cli_args.py and comfy/model_management.py, 0.8 and 0.33."""
    if rules.gpu_only or rules.vram_state == "HIGH_VRAM":
        yield _Flag(
            "no_highvram",
            "Start ComfyUI without --highvram and --gpu-only",
            "nothing",
            replace(rules, vram_state="NORMAL_VRAM", gpu_only=False),
            "These flags keep whole models on the card; without them models leave it, or stream, to make room.",
        )
    if not rules.flash_attention:
        yield _Flag(
            "pytorch_attention",
            "Start ComfyUI with --use-pytorch-cross-attention",
            "nothing",
            replace(rules, flash_attention=True),
            "PyTorch's attention needs memory that grows with the tokens only.",
        )
    if rules.vram_state in ("LOW_VRAM", "NO_VRAM"):
        yield _Flag(
            "no_lowvram",
            "Start ComfyUI without --lowvram and --novram",
            "nothing",
            replace(rules, vram_state="NORMAL_VRAM", text_encoder_on_card=True),
            "These flags keep the text encoder off the card, and --novram all weights; without them what has room stays there.",
        )
    if not rules.smart_memory:
        yield _Flag(
            "no_disable_smart_memory",
            "Start ComfyUI without --disable-smart-memory",
            "nothing",
            replace(rules, smart_memory=True),
            "This flag moves every model to system memory as soon as another is needed, also where both have room.",
        )
    if rules.reserve_bytes > USUAL_RESERVE:
        less = rules.reserve_bytes - HostRules().reserve_bytes
        yield _Flag(
            "less_reserve",
            f"Start ComfyUI without --reserve-vram: it keeps {say_gib(rules.reserve_bytes)} free",
            "nothing",
            _reserving(rules, -less),
            "What is reserved is left to other programs and never used by weights.",
        )
    if rules.patchers == "dynamic":
        yield _Flag(
            "disable_dynamic_vram",
            "Start ComfyUI with --disable-dynamic-vram",
            "slower",
            replace(rules, patchers="legacy"),
            "Models are then placed by ComfyUI's estimates before they run, and no longer page by page.",
        )
    else:
        if rules.vram_state == "NORMAL_VRAM" and rules.text_encoder_on_card:
            yield _Flag(
                "lowvram",
                "Start ComfyUI with --lowvram",
                "slower",
                replace(rules, vram_state="LOW_VRAM", text_encoder_on_card=False),
                "The text encoder then runs on the CPU.",
            )
        if rules.vram_state != "NO_VRAM":
            yield _Flag(
                "novram",
                "Start ComfyUI with --novram",
                "slower",
                replace(rules, vram_state="NO_VRAM", text_encoder_on_card=False),
                "All weights then stream through the card in every step, and the text encoder runs on the CPU.",
            )
        if rules.smart_memory:
            yield _Flag(
                "disable_smart_memory",
                "Start ComfyUI with --disable-smart-memory",
                "slower",
                replace(rules, smart_memory=False),
                "Every model then leaves the card as soon as another is needed.",
            )
    if short:
        tenths = -(-(rules.reserve_bytes + short) * 10 // GIB)
        yield _Flag(
            "reserve_vram",
            f"Start ComfyUI with --reserve-vram {tenths / 10:g}",
            "slower",
            _reserving(rules, tenths * GIB // 10 - rules.reserve_bytes),
            "ComfyUI then leaves that much of the card free of weights, and streams them instead.",
        )
    if rules.vae_compute_bytes > 2:
        yield _Flag(
            "bf16_vae",
            "Start ComfyUI with --bf16-vae",
            "lower_precision",
            replace(rules, vae_compute_bytes=2),
            "The VAE then computes in 16 bit, which takes half the memory.",
        )


def _reserving(rules: HostRules, more: int) -> HostRules:
    """minimum_inference_memory is 0.8 GiB and the reserve (comfy/model_management.py); under DynamicVRAM it is the headroom."""
    if rules.patchers == "dynamic":
        return replace(rules, headroom_bytes=max(0, rules.headroom_bytes + more), reserve_bytes=rules.reserve_bytes + more)
    return replace(
        rules,
        reserve_bytes=max(0, rules.reserve_bytes + more),
        minimum_inference_bytes=max(0, rules.minimum_inference_bytes + more),
    )
