"""After an out-of-memory error: what is freed and tried again, and what is kept when that does not help."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Any, Final, TypeVar

from ..vram.decoding import Tiling
from ..vram.incidents import Incident, Kind
from ..vram.recovery import Rung, describe, given_up, is_out_of_memory, let_go_of_frames, run_with_recovery, was_given_up
from ..vram.units import say_gib
from .host.decoding import VaeCall
from .host.execution import PromptSpan
from .host.freeing import free_others, halve
from .host.latents import keep
from .host.progress import Reached, SamplingRun
from .host.sampling import Forward
from .pack import Pack
from .tiles import Tiles

logger = logging.getLogger("vram_headroom")

T = TypeVar("T")

DYNAMIC_VARIABLE: Final = "VRAM_HEADROOM_RETRY_DYNAMIC"
"""Environment variable: 1 tries forwards of models that DynamicVRAM pages again, too. Off until it was seen on a card."""

WITHOUT_PRICE: Final = (Rung.CACHE, Rung.IDLE_PIPELINES, Rung.TEXT_ENCODER)
"""Freed together before the first retry: three retries do not reach five rungs, and none of these makes a step slower."""


class Recovery:
    """Tells the host's parts what to do when memory runs out, and writes down what came of it. Worker thread only."""

    def __init__(self, pack: Pack) -> None:
        self._pack = pack
        self._prompt: PromptSpan | None = None
        pack.host.execution.watch(self)
        pack.host.sampling.rescue_with(self)
        pack.host.decoder.rescue_with(self)
        pack.host.encoders.rescue_with(self)

    def prompt_started(self, span: PromptSpan) -> None:
        self._prompt = span

    def prompt_ended(self, span: PromptSpan) -> None:
        self._prompt = None

    # a step

    def forward(self, forward: Forward) -> Any:
        attempts = Attempts(self, forward)
        return run_with_recovery(forward, attempts.free, attempts.on_retry, attempts.last_resort, refuse=attempts.refusal)

    def sampling_failed(self, run: SamplingRun, said: str) -> str:
        reached = _or_none(run.reached)
        where = f"Memory ran out in step {run.done + 1} of {run.steps}"
        if reached is None:
            kept = (
                "No step was done yet, so there is nothing to keep."
                if run.done == 0
                else f"What {run.sampler} has done so far can't be taken up again, so nothing is kept."
            )
            return self._gave_up(f"{where}: {said}\n{kept}")
        return self._gave_up(f"{where}: {said}\n{self._keep_steps(run, reached)}")

    def _keep_steps(self, run: SamplingRun, reached: Reached) -> str:
        facts: dict[str, object] = {
            "made_by": "sampling",
            "sigma_index": reached.step,
            "sigma": reached.sigma,
            "seed": run.seed,
            "sampler": run.sampler,
            "steps": run.steps,
            "exact": run.exact,
        }
        schedule = self._schedule(run, reached.step)
        if schedule is not None:
            facts |= {"resume_steps": schedule[0], "resume_start_at_step": schedule[1]}
        name, why_not = self._keep(reached.latent, facts)
        if name is None:
            return why_not
        if schedule is not None:
            how = f"add_noise disable, steps {schedule[0]}, start_at_step {schedule[1]}"
        else:
            how = f"add_noise disable and start_at_step where {reached.step} of this sampler's {run.steps} steps are done"
        exact = (
            "The result is the one that this run would have given, but for rounding."
            if run.exact
            else f"The result comes close to what this run would have given, and is not the same{_why(run)}."
        )
        return (
            f"The {reached.step} steps that are done are kept in {name} (ComfyUI's input folder). To go on: Load Latent with "
            f"that file, then KSampler (Advanced) with {how}, and all else as it was. {exact}"
        )

    def _schedule(self, run: SamplingRun, index: int) -> tuple[int, int] | None:
        """`steps` and `start_at_step` of a KSampler (Advanced) that goes on; None where the node's own can't be read."""
        node = self._node()
        inputs = node.get("inputs", {})
        steps = inputs.get("steps")
        if not isinstance(steps, int):
            return None
        if node.get("class_type") == "KSamplerAdvanced":
            start = inputs.get("start_at_step")
            return (steps, start + index) if isinstance(start, int) else None
        if node.get("class_type") == "KSampler":
            denoise = inputs.get("denoise", 1.0)
            if not isinstance(denoise, (int, float)) or denoise <= 0:
                return None
            # comfy/samplers.py, KSampler.set_steps: the last `steps` of that many
            total = steps if denoise > 0.9999 else int(steps / denoise)
            return total, total - steps + index
        return None

    def _node(self) -> dict[str, Any]:
        prompt = self._prompt.prompt if self._prompt else None
        found = prompt.get(self._ids()[1]) if isinstance(prompt, dict) else None
        return found if isinstance(found, dict) else {}

    # encoders and VAEs

    def encoder(self, call: Callable[[], Any], patcher: Any) -> Any:
        stage = Stage(self, patcher, "encoding")
        try:
            return run_with_recovery(call, stage.free, stage.on_retry)
        except Exception as error:
            if not was_given_up(error):
                raise
            said = str(error)
        raise given_up(self._gave_up(f"Memory ran out in an encoder: {said}"))

    def vae(self, call: VaeCall) -> Any:
        what = "decoding" if call.way == "decode" else "encoding"
        stage = Stage(self, call.vae.patcher, what)
        try:
            return run_with_recovery(call.first, stage.free, stage.on_retry, lambda: self._smaller_tiles(call, what))
        except Exception as error:
            if not was_given_up(error):
                raise
            said = str(error)
        kept = self._keep_undecoded(call) if call.way == "decode" else ""
        raise given_up(self._gave_up(f"Memory ran out {what}: {said}{kept}"))

    def _smaller_tiles(self, call: VaeCall, what: str) -> Callable[[], Any] | None:
        """From the largest that fit to the smallest there are; None for what is no video."""
        if call.latent is None and call.video is None:
            return None
        tiles = Tiles(self._pack, call.vae)

        def smaller() -> Any:
            room = tiles.room() or 0
            if call.latent is not None:
                wanted = tiles.of_decode(call.latent, room)
            elif call.video is not None:
                wanted = tiles.of_encode(call.video, room)
            else:
                raise given_up(f"{what} has no tiles")
            said = ""
            for attempt, tiling in enumerate(wanted, start=1):
                self.throw_if_interrupted()
                done, said = _tried(call.in_tiles, tiling)
                if not said:
                    self._say_tiles(what, tiling, attempt)
                    return done
                logger.warning("%s in tiles of %d px and %d frames does not fit", what, tiling.size, tiling.frames)
                self._pack.host.decoder.empty_cache()
            raise given_up(f"{said}\nNot even the smallest tiles fit.")

        return smaller

    def _say_tiles(self, what: str, tiling: Tiling, attempt: int) -> None:
        message = (
            f"memory ran out {what}: done in tiles of {tiling.size} px, {tiling.frames} frames at a time, which are blended at "
            "their edges"
        )
        self.record("tiles", message, attempt, same=False)

    def _keep_undecoded(self, call: VaeCall) -> str:
        name, why_not = self._keep(call.given, {"made_by": "decode"})
        if name is None:
            return f"\n{why_not}"
        return (
            f"\nThe latent is kept as it was in {name} (ComfyUI's input folder). To go on: Load Latent with that file, then a "
            "VAE decode, in smaller tiles or on a machine with more memory."
        )

    # what is freed

    def free(self, rung: Rung, key: int, patcher: Any) -> int:
        """What one rung frees for the running model `key`, in bytes."""
        offloader, models = self._pack.offloader, self._pack.host.models
        owner = offloader.pipeline_of(key)
        index = getattr(patcher.load_device, "index", None) or 0
        freed = offloader.free_rung(rung, owner, index)
        if rung is Rung.IDLE_PIPELINES:
            freed += free_others({key}, patcher.load_device, models)
        policy = offloader.policy_of(key)
        pinned = policy is not None and policy.pin_to_gpu
        if not freed and rung is (Rung.PINS if pinned else Rung.PART_OF_GENERATOR):
            # of no pipeline, left to ComfyUI by its policy, or pinned and yet running
            freed += halve(patcher, models)
        return freed

    # what is told

    def record(
        self, kind: Kind, message: str, attempt: int = 0, freed: int = 0, same: bool = True, file: str | None = None
    ) -> None:
        prompt_id, node_id = self._ids()
        moment = self._pack.monitor.now()
        self._pack.incidents.record(Incident(prompt_id, node_id, kind, attempt, moment, freed, same, message, file))
        level = logging.INFO if kind in ("retry", "kept") else logging.WARNING
        logger.log(level, "node %s: %s", node_id, message)

    def throw_if_interrupted(self) -> None:
        self._pack.host.sampling.throw_if_interrupted()

    def _keep(self, latent: Any, facts: dict[str, object]) -> tuple[str | None, str]:
        """The file's name, and else why there is none."""
        prompt_id, node_id = self._ids()
        try:
            name = keep(latent, prompt_id, node_id, {"prompt_id": prompt_id, "node_id": node_id, **facts}, self._graph())
        except OSError as error:
            logger.warning("the latent could not be kept: %s", error)
            return None, f"The latent could not be kept: {error}"
        if name is None:
            return None, "It is set that no latents are kept."
        self.record("kept", f"the latent is kept in {name}, which Load Latent lists", file=name)
        return name, ""

    def _graph(self) -> object:
        return self._prompt.prompt if self._prompt else None

    def _gave_up(self, message: str) -> str:
        self.record("gave_up", message, same=False)
        return message

    def _ids(self) -> tuple[str, str]:
        execution = self._pack.host.execution
        running = execution.running
        return (running.prompt_id, execution.current_node() or running.node_id or "") if running else ("", "")


class Retries:
    """What is freed for one call that memory ran out in, and how often it was tried again."""

    def __init__(self, recovery: Recovery) -> None:
        self._recovery = recovery
        self._count = 0
        self._freed = 0

    def _free(self, rung: Rung, key: int, patcher: Any) -> int:
        """Bytes, of all rungs without a price together at the last of them: between those nothing is tried again."""
        self._freed += self._recovery.free(rung, key, patcher)
        if rung in WITHOUT_PRICE and rung is not WITHOUT_PRICE[-1]:
            return 0
        freed, self._freed = self._freed, 0
        return freed

    def _try_again(self, rung: Rung, freed: int, where: str, how: str) -> None:
        self._count += 1
        what = "what was idle" if rung in WITHOUT_PRICE else rung.words
        self._recovery.record("retry", f"memory ran out {where}; freed {what} ({say_gib(freed)}) and {how}", self._count, freed)
        self._recovery.throw_if_interrupted()


class Stage(Retries):
    """A call of an encoder or a VAE: everything else leaves, what is pinned at last."""

    def __init__(self, recovery: Recovery, patcher: Any, what: str) -> None:
        super().__init__(recovery)
        self._patcher = patcher
        self._what = what

    def free(self, rung: Rung) -> int:
        self._recovery.throw_if_interrupted()
        # half of a VAE or of an encoder is not worth what streaming it takes, and its host loads it anew for each call
        if rung is Rung.PART_OF_GENERATOR:
            return 0
        return self._free(rung, id(self._patcher.model), self._patcher)

    def on_retry(self, rung: Rung, freed: int) -> None:
        self._try_again(rung, freed, self._what, "try again")


class Attempts(Retries):
    """One forward that memory ran out in, from the first error to the answer or the end."""

    def __init__(self, recovery: Recovery, forward: Forward) -> None:
        super().__init__(recovery)
        self._forward = forward

    def refusal(self) -> str | None:
        reason = self._forward.unknown_state()
        if reason is None and self._forward.pages_weights and os.environ.get(DYNAMIC_VARIABLE) != "1":
            reason = (
                "DynamicVRAM pages this model's weights, and on a card it was not yet seen that a step can be repeated there "
                f"({DYNAMIC_VARIABLE}=1 tries it)"
            )
        if reason is not None:
            self._recovery.record("refused", f"memory ran out in a step, and it is not tried again: {reason}", same=False)
        return reason

    def free(self, rung: Rung) -> int:
        self._recovery.throw_if_interrupted()
        self._forward.clean_up()
        if rung in (Rung.PART_OF_GENERATOR, Rung.PINS) and not self._may_shrink():
            return 0
        return self._free(rung, self._forward.key, self._forward.patcher)

    def on_retry(self, rung: Rung, freed: int) -> None:
        self._try_again(rung, freed, "in a step", "repeat the step")

    def last_resort(self) -> Callable[[], Any] | None:
        """Less at once, not the same to the last bit: cond and uncond in turn, and of a model with a LoRA a part streams."""
        in_turn = self._forward.in_turn()
        streams = self._forward.is_patched and self._forward.can_shrink
        if in_turn is None and not streams:
            return None
        ways = ["cond and uncond one after the other"] * (in_turn is not None) + ["a part of its weights streamed"] * streams

        def smaller() -> Any:
            self._recovery.throw_if_interrupted()
            self._forward.clean_up()
            freed = self._recovery.free(Rung.PART_OF_GENERATOR, self._forward.key, self._forward.patcher) if streams else 0
            message = f"memory ran out in a step; repeat it with {' and '.join(ways)}: close to the same picture, not the same"
            self._recovery.record("smaller", message, self._count + 1, freed, same=False)
            return (in_turn or self._forward)()

        return smaller

    def _may_shrink(self) -> bool:
        """Whether the model's own weights may leave without another picture coming of it."""
        return self._forward.can_shrink and not self._forward.is_patched


def _tried(call: Callable[[Tiling], T], tiling: Tiling) -> tuple[T | None, str]:
    """What came of it, and the error's own words where memory ran out; its frames are let go of."""
    try:
        return call(tiling), ""
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        said = describe(error)
        let_go_of_frames(error)
    return None, said


def _why(run: SamplingRun) -> str:
    if run.masked:
        return ": a file holds no noise mask, so set it again"
    return (
        ": the cache of steps starts anew" if run.cached else f": {run.sampler} looks back at earlier steps or draws new noise"
    )


def _or_none(call: Callable[[], T]) -> T | None:
    """What is kept is a help: an error in making it must not hide the one it is about."""
    try:
        return call()
    except Exception:
        logger.exception("the latent of this sampling can't be kept")
        return None
