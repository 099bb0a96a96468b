"""Nodes that act on models inside a graph: register, policy, offload, gate, status. All hand on what they are given."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, ClassVar, Final, NamedTuple

from ..vram.components import ComponentRole
from ..vram.policy import CHOICES, ROLE_RULE, chosen_policy, hosted_policy
from ..vram.status import status_report
from ..vram.units import say_gib
from .actions import offload_idle
from .lifecycle import Lifecycle
from .loaders import DEFAULT_PIPELINE, PIPELINE_INPUT
from .pack import Pack

logger = logging.getLogger("vram_headroom")

CATEGORY: Final = "VRAM Headroom/control"

ANYTHING: Final = "*"
"""ComfyUI's type of a socket that takes whatever is linked to it (comfy_execution/validation.py)."""


class Socket(NamedTuple):
    """An input that hands a model on, and the role it has where it is not known otherwise."""

    name: str
    kind: str
    role: ComponentRole


SOCKETS: Final = (
    Socket("model", "MODEL", ComponentRole.GENERATOR),
    Socket("clip", "CLIP", ComponentRole.TEXT_ENCODER),
    Socket("vae", "VAE", ComponentRole.VAE),
    Socket("clip_vision", "CLIP_VISION", ComponentRole.CLIP_VISION),
)


class Control:
    """What the nodes of this file share."""

    pack: ClassVar[Pack]
    lifecycle: ClassVar[Lifecycle]
    """Both set once, when the pack connects to ComfyUI."""

    FUNCTION = "run"
    CATEGORY = CATEGORY

    @classmethod
    def verdict(cls) -> str:
        """Of the prompt that runs: only whether it runs, since anything finer changes with what the card holds already, and a
        node that changes makes everything after it run again."""
        plan = cls.lifecycle.plan()
        return "unknown" if plan is None else "runs" if plan.runs else "does not fit"

    def said(self, text: str, *result: Any) -> dict[str, Any]:
        """What a node returns that has something to say: shown on the node (web/said.js), and in the log."""
        logger.info("node %s: %s", self.pack.host.execution.current_node(), text)
        return {"ui": {"text": [text]}, "result": result}


class ModelControl(Control):
    """A node with a socket for every kind of model, each handed on as it came."""

    RETURN_TYPES = tuple(socket.kind for socket in SOCKETS)
    RETURN_NAMES = tuple(socket.name for socket in SOCKETS)
    OUTPUT_TOOLTIPS = tuple(f"The {socket.kind} that came in, unchanged." for socket in SOCKETS)

    @staticmethod
    def sockets() -> dict[str, Any]:
        return {socket.name: (socket.kind, {"tooltip": f"A {socket.kind} from any loader."}) for socket in SOCKETS}

    def registered(self, pipeline: str, models: dict[str, Any]) -> Iterator[tuple[ComponentRole, int]]:
        """Register what is linked, unless it is already; role and key of all of it. Without a `pipeline` one that is registered
        stays where it is."""
        host, offloader = self.pack.host, self.pack.offloader
        for socket in SOCKETS:
            given = models.get(socket.name)
            patcher = getattr(given, "patcher", given)
            if getattr(patcher, "model", None) is None:
                continue
            handle = host.models.handle(patcher, None)
            known = offloader.pipeline_of(handle.key)
            if known is None or pipeline:
                offloader.register(
                    pipeline or known or DEFAULT_PIPELINE,
                    host.models.name_of(patcher),
                    socket.role,
                    handle,
                    host.execution.current_node(),
                    hosted_policy(socket.role, handle.elastic),
                )
            yield socket.role, handle.key


class RegisterModel(ModelControl):
    """Enters models of any loader in the books."""

    DESCRIPTION = (
        "Shows models of any loader (GGUF, checkpoints, other packs) by name in the VRAM bar and lets policies place them. "
        "It changes nothing of them."
    )
    SEARCH_ALIASES: ClassVar = ["register", "gguf", "vram", "track model"]

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"pipeline": PIPELINE_INPUT}, "optional": cls.sockets()}

    def run(self, pipeline: str, **models: Any) -> tuple[Any, ...]:
        for _ in self.registered(pipeline.strip() or DEFAULT_PIPELINE, models):
            pass
        return tuple(models.get(socket.name) for socket in SOCKETS)


class ComponentPolicy(ModelControl):
    """One rule for the models that are linked."""

    DESCRIPTION = (
        "Says what may become of a model when memory is wanted: pinned to the card, leaves when nothing runs, leaves before "
        "sampling, or ComfyUI decides. Holds while this node is in the graph."
    )
    SEARCH_ALIASES: ClassVar = ["pin", "keep loaded", "offload", "unload text encoder", "vram", "policy"]

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "policy": (
                    [ROLE_RULE, *CHOICES],
                    {
                        "tooltip": "recommended: VAE pinned, encoders leave between uses, diffusion models when idle. pinned: "
                        "stays until memory runs out. between uses: goes before sampling. idle: goes when the queue is empty."
                    },
                ),
                "priority": (
                    "INT",
                    {
                        "default": 1,
                        "min": 0,
                        "max": 9,
                        "tooltip": "Of models that may leave, the lowest goes first.",
                    },
                ),
            },
            "optional": cls.sockets(),
        }

    def run(self, policy: str, priority: int = 1, **models: Any) -> tuple[Any, ...]:
        node_id = self.pack.host.execution.current_node() or ""
        for role, key in self.registered("", models):
            chosen = chosen_policy(policy, role)
            if chosen is None:
                raise ValueError(f"Component Policy knows no policy {policy!r}; choose one from its list")
            self.lifecycle.rule(key, chosen if chosen.host_decides else replace(chosen, priority=priority), node_id)
        return tuple(models.get(socket.name) for socket in SOCKETS)


IDLE: Final = "everything idle"
TEXT: Final = "text encoders"


class OffloadNow(Control):
    """Sends models off the card at this place of the graph."""

    RETURN_TYPES = (ANYTHING,)
    RETURN_NAMES = ("value",)
    OUTPUT_TOOLTIPS = ("What came in, unchanged.",)
    DESCRIPTION = (
        "Sends models off the card when the graph comes to this node, and hands its input on. What is computing stays, and so "
        "does what is pinned."
    )
    SEARCH_ALIASES: ClassVar = ["free vram", "unload", "clean vram", "purge", "offload", "text encoder"]

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "value": (ANYTHING, {"tooltip": "Anything: put this node on the link after which the models are not needed."}),
                "what": ([TEXT, IDLE], {"tooltip": "text encoders: their work is done once prompts are encoded."}),
            }
        }

    @classmethod
    def IS_CHANGED(cls, **inputs: Any) -> str:
        return cls.verdict()

    def run(self, value: Any, what: str) -> dict[str, Any]:
        wanted = {ComponentRole.TEXT_ENCODER, ComponentRole.CLIP_VISION} if what == TEXT else None
        freed, stayed = offload_idle(self.pack, wanted)
        said = f"freed {say_gib(freed)}" if freed else "nothing to free"
        return self.said(f"{said}; {', '.join(stayed)} stayed" if stayed else said, value)


STOP: Final = "stop"
WARN: Final = "warn"


class DoesNotFitError(RuntimeError):
    """The graph needs more memory than the card can free; the message has the numbers."""


class Gate(Control):
    """Lets a graph pass only if it fits."""

    RETURN_TYPES = (ANYTHING,)
    RETURN_NAMES = ("value",)
    OUTPUT_TOOLTIPS = ("What came in, unchanged.",)
    DESCRIPTION = (
        "Looks at the memory plan of the whole graph before it hands its input on: a graph that does not fit is stopped here, "
        "before the sampler starts, or a warning is shown. Set it to warn to let it pass."
    )
    SEARCH_ALIASES: ClassVar = ["vram gate", "check", "guard", "fits", "out of memory"]

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "value": (ANYTHING, {"tooltip": "Anything: put this node on a link to the sampler."}),
                "if_it_does_not_fit": (
                    [STOP, WARN],
                    {"tooltip": "stop: the prompt ends here. warn: it goes on."},
                ),
            }
        }

    @classmethod
    def IS_CHANGED(cls, **inputs: Any) -> str:
        return cls.verdict()

    def run(self, value: Any, if_it_does_not_fit: str) -> dict[str, Any]:
        plan = self.lifecycle.plan()
        if plan is None:
            return self.said("Can't tell whether this graph fits: it could not be planned.", value)
        if not plan.runs and if_it_does_not_fit == STOP:
            raise DoesNotFitError(f"{plan.message} Set VRAM Gate to {WARN} to run it all the same.")
        return self.said(plan.message, value)


class Status(Control):
    """The state of the card as text and as JSON."""

    OUTPUT_NODE = True
    RETURN_TYPES = ("STRING", "STRING")
    RETURN_NAMES = ("text", "json")
    OUTPUT_TOOLTIPS = ("A few lines for a person.", "What GET /api/v1/hardware/vram answers.")
    DESCRIPTION = "Tells what the card holds when the graph comes to this node: as text, and as JSON for scripts."
    SEARCH_ALIASES: ClassVar = ["vram", "memory", "debug", "status", "free memory"]

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"optional": {"after": (ANYTHING, {"tooltip": "Anything: the status is read when this is there."})}}

    @classmethod
    def IS_CHANGED(cls, **inputs: Any) -> float:
        # it looks at the card, which is never the same twice, and nothing that costs anything comes after it
        return float("nan")

    def run(self, after: Any = None) -> dict[str, Any]:
        self.pack.host.models.publish()
        status = self.pack.status()
        lines = [
            f"{device.name}: {say_gib(device.used)} of {say_gib(device.total)} used, "
            f"{say_gib(device.reclaimable_free)} can be had"
            for device in status.devices
        ] or ["No accelerator."]
        lines += [
            f"{model.file or model.name} ({model.role.replace('_', ' ')}): {say_gib(model.bytes_on_card)} of "
            f"{say_gib(model.bytes)} on the card"
            for model in status.loaded_models
        ]
        text = "\n".join(lines)
        return self.said(text, text, json.dumps(status_report(status)))


REGISTER: Final = "VRAMHeadroomRegisterModel"
POLICY: Final = "VRAMHeadroomComponentPolicy"
OFFLOAD: Final = "VRAMHeadroomOffloadNow"
GATE: Final = "VRAMHeadroomGate"
STATUS: Final = "VRAMHeadroomStatus"

NODE_CLASSES: Final[dict[str, Any]] = {
    REGISTER: RegisterModel,
    POLICY: ComponentPolicy,
    OFFLOAD: OffloadNow,
    GATE: Gate,
    STATUS: Status,
}
NODE_NAMES: Final = {
    REGISTER: "Register Model (VRAM Headroom)",
    POLICY: "Component Policy (VRAM Headroom)",
    OFFLOAD: "Offload Now (VRAM Headroom)",
    GATE: "VRAM Gate",
    STATUS: "VRAM Status",
}
