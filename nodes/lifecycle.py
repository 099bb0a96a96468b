"""What a prompt does to pipelines as it runs: they are in use, their parts leave by their policies, nodes are measured."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import NamedTuple

from ..vram.books import Component, UnknownPipelineError
from ..vram.components import ComponentRole
from ..vram.device import DeviceReadError, PagedAccelerator, peak_counter
from ..vram.estimate.caches import vae_features, video_runtime_overhead
from ..vram.handle import ModelHandle
from ..vram.monitor import NoAcceleratorError
from ..vram.offloader import ActivePipelineError, PlacementError
from ..vram.peaks import PeakLedger
from ..vram.pins import room_for_pins
from ..vram.plan.types import Phase, Plan
from ..vram.policy import VideoComponentPolicy
from ..vram.run_record import RunRecord
from ..vram.sampler import Sampler
from ..vram.units import say_gib
from .host.execution import NodeSpan, PromptSpan
from .host.seams import MODEL_LOADS
from .pack import Pack

logger = logging.getLogger("vram_headroom")

POLICY_NODE = "VRAMHeadroomComponentPolicy"


class Ruling(NamedTuple):
    """A policy that a node of a graph gave to a model."""

    node_id: str
    handle: ModelHandle
    inputs: str
    """Of the node, as text: another setting is another ruling, and the node then runs again."""
    policy: VideoComponentPolicy


class Lifecycle:
    """Follows ComfyUI's worker thread. Everything here runs on it, but the sampler's looks."""

    def __init__(self, pack: Pack, sampler: Sampler | None = None, peaks: PeakLedger | None = None) -> None:
        self._pack = pack
        self._in_use: dict[str, None] = {}
        self._rulings: dict[object, Ruling] = {}
        self._prompt: PromptSpan | None = None
        self._pins_said = ""
        self._videos: dict[NodeSpan, tuple[str, int]] = {}
        """Running nodes that hold the caches of a video, with its pipeline and card."""
        self._elastic_pins: tuple[int, tuple[Component, ...]] = (-1, ())
        """With the offloader's revision that they were found at."""
        self._phases: dict[str, Phase] | None = None
        """Of the prompt that runs, by node; None as long as there is no plan of it."""
        card = next(iter(pack.monitor.accelerators), None)
        self.record = RunRecord(pack.monitor.now)
        self.counts_pages = not isinstance(card, PagedAccelerator)
        """The peak counter sees everything that this process holds; torch's does not see pages of elastic weights."""
        self.peaks = peaks or PeakLedger(peak_counter(card), self._held)
        self._sampler = sampler or Sampler(self._look)
        host = pack.host
        host.execution.watch(self)
        host.execution.watch_nodes(self)
        host.placement.before_load(self._before_load)
        host.placement.keep_loaded(self._pinned)
        host.worker.at_idle(self._become_idle)

    def plan(self) -> Plan | None:
        """Of the prompt that runs, as it was when it started; made now for one that was queued unchecked. None where no prompt
        runs or it can't be planned."""
        if self._prompt is None:
            return None
        found = self._pack.plans.get(self._prompt.prompt_id)
        if found is None:
            try:
                found = self._pack.plan(self._prompt.prompt, self._prompt.outputs)
            except ValueError:
                return None
            self._pack.plans.put(self._prompt.prompt_id, found)
            self._phases = None
        return found

    def rule(self, key: object, policy: VideoComponentPolicy, node_id: str) -> bool:
        """A policy node's word on a registered model: it holds while that node is in the graph that runs."""
        component = self._component(key)
        if component is None:
            return False
        self._rulings[key] = Ruling(node_id, component.handle, self._inputs_of(node_id), policy)
        known = self._pack.offloader.set_policy(key, policy, node_id)
        self._find_elastic_pins()
        return known

    # the prompt

    def prompt_started(self, span: PromptSpan) -> None:
        self._prompt = span
        self._pins_said = ""
        self._phases = None
        self.record.start(span.prompt_id)
        self._apply_rulings()
        self._find_elastic_pins()
        self.peaks.start_prompt(span.prompt_id)
        # the first model that comes to the card is early enough, where we are told of it
        if not self._pack.host.seams.live(MODEL_LOADS):
            self._sample()

    def _sample(self) -> None:
        if self._pack.monitor.accelerators:
            self._sampler.start()

    def _look(self) -> None:
        """The sampler's: a node that runs for long counts although nothing has been said of it yet."""
        execution = self._pack.host.execution
        for span in execution.long_spans():
            self.peaks.begin(span, span.node_id, span.class_type)
            # one that has ended between the two lines was told of before, or will not be again
            if not execution.is_open(span):
                self.peaks.drop(span)
        self.peaks.sample()

    def prompt_ended(self, span: PromptSpan) -> None:
        self._sampler.stop()
        self._videos = {}
        self._prompt = None
        self.record.end(self._pack.host.execution.outcome)
        if not self._pack.host.worker.tells_when_idle and not self._pack.host.worker.prompts_waiting():
            self._become_idle()

    def _become_idle(self) -> None:
        """Nothing runs and nothing waits: every use ends, and what leaves when idle does."""
        used, self._in_use = tuple(self._in_use), {}
        for pipeline in used:
            try:
                self._pack.offloader.mark_idle(pipeline)
            except LookupError:
                continue  # its graph has dropped it meanwhile
        self._offload_elastic(set(used))

    def _offload_elastic(self, pipelines: set[str]) -> None:
        """No threshold moves elastic weights; where a person has said that they leave when idle, their pages do."""
        for pipeline, component in self._pack.offloader.components():
            if pipeline in pipelines and component.handle.elastic and component.policy.offload_when_idle:
                try:
                    self._pack.offloader.offload_component(component.handle.key)
                except (PlacementError, ActivePipelineError) as error:
                    logger.info("%s", error)

    def _apply_rulings(self) -> None:
        """Policies of nodes that are in this graph hold; where none is, what the model was registered with."""
        if not self._rulings:
            return
        offloader = self._pack.offloader
        registered = {component.handle.key: component for _, component in offloader.components()}
        # a model that is gone may have left its key to another one
        self._rulings = {key: ruling for key, ruling in self._rulings.items() if ruling.handle.alive and key in registered}
        for key, ruling in self._rulings.items():
            if self._inputs_of(ruling.node_id) == ruling.inputs:
                offloader.set_policy(key, ruling.policy, ruling.node_id)
            elif registered[key].ruled_by is not None:
                offloader.set_policy(key, None)

    def _inputs_of(self, node_id: str) -> str:
        """What a policy node of this graph is set to, in one text; empty for a node that is not there or is none."""
        prompt = self._prompt.prompt if self._prompt else None
        node = prompt.get(node_id) if isinstance(prompt, dict) else None
        if not isinstance(node, dict) or node.get("class_type") != POLICY_NODE:
            return ""
        return repr(sorted((node.get("inputs") or {}).items(), key=lambda item: str(item[0])))

    # nodes

    def node_started(self, span: NodeSpan) -> None:
        self.peaks.begin(span, span.node_id, span.class_type)
        self._keep_elastic_pins()
        if self._phases is None:
            self._find_phases()
        if self._phases:
            phase = self._phases.get(span.shown_id)
            if phase is not None:
                self.record.mark(span.shown_id, span.since)
            self._note_video(span, phase)

    def node_ended(self, span: NodeSpan, error: BaseException | None) -> None:
        keys = self._pack.host.uses.of(span)
        self.peaks.end(span, failed=error is not None)
        if error is not None:
            self.record.fail(span.shown_id)
        if not keys:
            return
        offloader, monitor = self._pack.offloader, self._pack.monitor
        for key in keys:
            pipeline = offloader.pipeline_of(key)
            component = self._component(key)
            if pipeline is not None and component is not None:
                handle = component.handle
                monitor.record_component_vram(pipeline, component.name, handle.bytes_on_card(), handle.device_index)
        held = self._videos.pop(span, None)
        if held is not None and held not in self._videos.values():
            monitor.clear_video_memory(*held)

    def _before_load(self, keys: tuple[int, ...]) -> None:
        """Models are about to come to the card: their pipelines are in use, and before a generator comes, registered or not,
        text encoders leave where their policies say so."""
        if self._prompt is None:
            return
        self._sample()
        offloader = self._pack.offloader
        registered = self._components(keys)
        for pipeline, _ in registered:
            if pipeline not in self._in_use:
                self._in_use[pipeline] = None
                offloader.mark_active(pipeline)
        roles = {component.handle.key: component.role for _, component in registered}
        host = self._pack.host
        coming = (roles.get(id(model)) or host.models.role(model) for model in host.placement.coming())
        if ComponentRole.GENERATOR not in coming:
            return
        for pipeline in self._in_use:
            try:
                offloader.offload_between_uses(pipeline)
            except PlacementError as error:
                logger.warning("%s", error)
            except UnknownPipelineError:
                continue  # its graph has dropped it meanwhile

    # pins

    def _pinned(self) -> frozenset[int]:
        return frozenset(key for key in self._pack.offloader.pinned_keys() if isinstance(key, int))

    def _find_elastic_pins(self) -> None:
        """As long as there are any, every node is told of: ComfyUI resets all watermarks after each."""
        revision = self._pack.offloader.revision
        if self._elastic_pins[0] == revision:
            return
        found = (component for _, component in self._pack.offloader.components())
        pins = tuple(component for component in found if component.handle.elastic and component.policy.pin_to_gpu)
        self._elastic_pins = revision, pins
        self._pack.host.execution.every_node(self, bool(pins))

    def _keep_elastic_pins(self) -> None:
        """Before a node, watermarks are set again, where the plan has room."""
        self._find_elastic_pins()
        pinned = [component for component in self._elastic_pins[1] if component.handle.alive]
        if not pinned:
            return
        wanted = sum(component.handle.total_bytes() for component in pinned)
        plan = self.plan()
        room = room_for_pins(plan, self._pack.host.models.rules(), self._pack.other_programs()) if plan else 0
        if wanted > room:
            self._say_once(
                f"{', '.join(component.name for component in pinned)} can't be kept on the card during this prompt: "
                f"{say_gib(wanted)} are wanted and its largest phase leaves {say_gib(room)}"
            )
            return
        for component in pinned:
            keep = getattr(component.handle, "keep_pages", None)
            if not callable(keep) or not keep(self._pack.host.models.pages):
                self._say_once(f"{component.name} can't be kept on the card: this ComfyUI has no way to keep pages of a model")

    def _say_once(self, message: str) -> None:
        if message != self._pins_said:
            self._pins_said = message
            logger.info("%s", message)

    # what is measured

    def _find_phases(self) -> None:
        plan = self._pack.plans.get(self._prompt.prompt_id) if self._prompt else None
        if plan is not None:
            # of a node with several, the first
            self._phases = {planned.phase.node_id: planned.phase for planned in reversed(plan.phases)}

    def _note_video(self, span: NodeSpan, phase: Phase | None) -> None:
        """The caches of a video count for its pipeline from the node that makes them until it has ended."""
        if phase is None or phase.kind not in ("sample", "vae_decode", "vae_encode"):
            return
        pipeline, index = self._pipeline_of(phase)
        if pipeline is None or not phase.width or not phase.height:
            return
        monitor = self._pack.monitor
        self._videos[span] = (pipeline, index)
        if phase.kind == "sample":
            causal = any(model.arch.causal for model in phase.models)
            held = video_runtime_overhead(width=phase.width, height=phase.height, frames=phase.frames or 1, causal=causal)
            monitor.record_video_memory(pipeline, held.kv_cache, held.temporal_buffer, 0, index)
        elif (phase.frames or 1) > 1:
            kind = "2.2" if any(model.arch.spatial_stride == 16 for model in phase.models) else "2.1"
            way = "decode" if phase.kind == "vae_decode" else "encode"
            monitor.record_video_memory(pipeline, vae_cache=vae_features(kind, way, phase.width, phase.height), index=index)

    def _pipeline_of(self, phase: Phase) -> tuple[str | None, int]:
        """The pipeline that the phase's first registered model belongs to, and the card it is placed on."""
        files = {_base(model.file) for model in phase.models}
        found = ((name, c) for name, c in self._pack.offloader.components() if _base(c.name) in files)
        name, component = next(found, (None, None))
        return name, component.handle.device_index if component else 0

    def _held(self) -> int | None:
        """What this process holds on the first card; each look is also a sample of the run."""
        try:
            held = self._pack.monitor.snapshot().ours
        except (NoAcceleratorError, DeviceReadError):
            return None
        if held is not None:
            self.record.sample(held)
        return held

    def _components(self, keys: Iterable[object]) -> list[tuple[str, Component]]:
        wanted = set(keys)
        return [(name, c) for name, c in self._pack.offloader.components() if c.handle.key in wanted]

    def _component(self, key: object) -> Component | None:
        return next((component for _, component in self._components((key,))), None)


def _base(file: str) -> str:
    """A file without its folder: loaders name a model by what their widget says, others by the file alone."""
    return file.replace("\\", "/").rsplit("/", 1)[-1]
