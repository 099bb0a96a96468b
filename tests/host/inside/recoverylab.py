"""Runs inside the stand-in with the pack: memory runs out at every self-attention of a sampling, and the latents are compared.

The same laws are looked at in a real ComfyUI by tests/real/recovery_lab.py.
"""

from __future__ import annotations

import gc
import importlib
import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from comfy import model_management, samplers, sd
from comfy.context_windows import ContextHandler
from comfy.model_patcher import CoreModelPatcher
from comfy_extras import nodes_easycache
from host.lab import Prompt, node, text_to_video, with_inputs
from standin.faults import Fault, faults
from standin.models import TEXT_WIDTH, ModelFile, WAN21_CausalAR, build

from .recoverycases import FOREIGN

STEPS = 4
SAME = "tiny_wan21_t2v_fp16.safetensors"
COMPANY = "tiny_wan22_t2v_high_noise_fp16.safetensors"


class Case:
    """One way to sample."""

    def __init__(self, sampler: str = "euler", frames: int = 3, around: Callable[[Any], Any] | None = None) -> None:
        self.sampler, self.frames = sampler, frames
        self.around = around or (lambda patcher: patcher)
        self.tokens: tuple[int, int] = (8, 8)
        """Of cond and uncond; of different lengths they are never in one forward."""
        self.alone = False
        """No other model is on the card, so that only the running one can give anything."""
        self.causal = False


class Foreign:
    """What another pack may put around or into a model. It counts, so running it twice is not running it once."""

    def __init__(self) -> None:
        self.calls = 0

    def wrapper(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return executor(*args, **kwargs)

    def function(self, apply: Any, given: dict[str, Any]) -> Any:
        self.calls += 1
        return apply(given["input"], given["timestep"], **given["c"])


def put_in(how: str) -> Callable[[Any], Any]:
    def around(patcher: Any) -> Any:
        patcher, other = patcher.clone(), Foreign()
        options = patcher.model_options["transformer_options"]
        if how in ("apply_model", "diffusion_model"):
            patcher.add_wrapper_with_key(how, "other", other.wrapper)
        elif how == "model function":
            patcher.model_options["model_function_wrapper"] = other.function
        elif how == "patch":
            options["patches"] = {"attn1_patch": [other.wrapper]}
        elif how == "attention":
            options["optimized_attention_override"] = other.wrapper
        elif how == "options":
            options["other"] = {"kept": [other]}
        elif how == "injection":
            patcher.injections = {"other": [other]}
        elif how == "replaced forward":
            patcher.object_patches["diffusion_model.forward"] = other.wrapper
        elif how == "hooks":
            patcher.hook_patches = {"a hook": {}}
        elif how == "CUDA graphs":
            patcher.model_options["torch_compile_kwargs"] = {"mode": "max-autotune"}
        return patcher

    return around


def with_lora(patcher: Any) -> Any:
    patcher = patcher.clone()
    patcher.add_patches({"blocks.0.ffn.0.weight": "diff"}, 0.7)
    return patcher


def with_windows(patcher: Any) -> Any:
    patcher = patcher.clone()
    patcher.model_options["context_handler"] = ContextHandler(3, 1)
    return patcher


def with_harmless(patcher: Any) -> Any:
    """What is known to keep no state: a plain function as a patch, and torch.compile without CUDA graphs."""
    patcher = patcher.clone()
    patcher.model_options["transformer_options"]["patches_replace"] = {"dit": {("double_block", 9): lambda given, more: given}}
    patcher.model_options["torch_compile_kwargs"] = {"mode": "max-autotune-no-cudagraphs"}
    return patcher


def cases() -> dict[str, Case]:
    found = {
        "plain": Case(),
        "cond and uncond apart": Case(),
        "alone on the card": Case(),
        "ancestral": Case("euler_ancestral"),
        "EasyCache": Case(around=lambda patcher: nodes_easycache.with_easycache(patcher, 0.4)),
        "LazyCache": Case(around=lambda patcher: nodes_easycache.with_lazycache(patcher, 0.4)),
        "LoRA": Case(around=with_lora),
        "LoRA alone on the card": Case(around=with_lora),
        "context windows": Case(frames=5, around=with_windows),
        "CausalAR": Case("ar_video", frames=2),
        "harmless": Case(around=with_harmless),
        **{f"foreign {how}": Case(around=put_in(how)) for how in FOREIGN},
    }
    found["cond and uncond apart"].tokens = (8, 9)
    found["CausalAR"].causal = True
    for name in ("alone on the card", "LoRA alone on the card"):
        found[name].alone = True
    return found


class Lab:
    """A served stand-in, and the pack in it, in this process."""

    def __init__(self, base: Path) -> None:
        controls: Any = importlib.import_module("vram_headroom.nodes.controls")
        self.pack = controls.Control.pack
        self.told: list[Any] = []
        self.pack.incidents.watch(self.told.append)
        # many tiny forwards and, after each error, a collection: both take longer for what they have nothing to do with
        torch.set_num_threads(1)
        gc.freeze()
        self.models = base / "models" / "diffusion_models"
        self.company = sd.load_diffusion_model(str(self.models / COMPANY))
        logging.getLogger("vram_headroom").setLevel(logging.ERROR)

    def patcher(self, case: Case) -> Any:
        path = str(self.models / SAME)
        if not case.causal:
            return case.around(sd.load_diffusion_model(path))
        device = model_management.get_torch_device()
        return CoreModelPatcher(build(WAN21_CausalAR, ModelFile(path)), device, torch.device("cpu"))

    def sample(self, case: Case, patcher: Any) -> dict[str, Any]:
        """One sampling: the latent or the error, what was told of it, and the steps that were done."""
        generator = torch.Generator().manual_seed(3)
        texts = [[[torch.randn(1, tokens, TEXT_WIDTH, generator=generator), {}]] for tokens in case.tokens]
        noise = torch.randn(1, 16, case.frames, 8, 8, generator=generator)
        guider = samplers.CFGGuider(patcher)
        guider.set_conds(*texts)
        guider.set_cfg(1.0 if case.causal else 4.0)
        self.told.clear()
        steps, latent, error = list[int](), None, None
        torch.manual_seed(11)
        try:
            latent = guider.sample(
                noise,
                torch.zeros_like(noise),
                samplers.ksampler(case.sampler),
                samplers.flow_sigmas(STEPS, 3.0),
                callback=lambda step, denoised, x, total: steps.append(step),
                seed=5,
            )
        except Exception as failure:
            error = f"{type(failure).__name__}: {failure}"
        return {
            "latent": latent,
            "error": error,
            "steps": steps,
            "kinds": [one.kind for one in self.told],
            "same": all(one.same_picture for one in self.told),
        }

    def set_up(self, case: Case) -> None:
        model_management.unload_all_models()
        if not case.alone:
            model_management.load_models_gpu([self.company])

    def sweep(self, name: str) -> dict[str, Any]:
        """An error at every self-attention of the sampling, before it and after it, each in a sampling of its own."""
        case = cases()[name]
        patcher = self.patcher(case)
        seen: dict[str, Any] = {"identical": 0, "refused": 0, "said": 0, "wrong": [], "repeated": [], "kinds": {}}
        self.set_up(case)
        faults.ask()
        expected = self.sample(case, patcher)
        assert expected["latent"] is not None, expected["error"]
        count = seen["attentions"] = faults.count("attention")
        for fault in (Fault("attention", number, 1, after) for after in (False, True) for number in range(count)):
            self.set_up(case)
            faults.ask(fault)
            found = self.sample(case, patcher)
            where = f"{fault.number} {'after' if fault.after else 'before'}"
            for kind in found["kinds"]:
                seen["kinds"][kind] = seen["kinds"].get(kind, 0) + 1
            if faults.raised != 1:
                seen["wrong"].append(f"{where}: raised {faults.raised}")
            elif found["latent"] is None and "refused" in found["kinds"] and "Not tried again" in found["error"]:
                seen["refused"] += 1
            elif found["latent"] is None:
                seen["wrong"].append(f"{where}: {found['error']}")
            elif not found["same"]:
                seen["said"] += 1
            elif torch.equal(found["latent"], expected["latent"]):
                seen["identical"] += 1
            else:
                seen["wrong"].append(f"{where}: another picture, {found['kinds']}")
            # a step that was done and is done again would be told of twice
            if found["latent"] is not None and found["steps"] != expected["steps"]:
                seen["repeated"].append(f"{where}: {found['steps']}")
        return seen


def naive() -> None:
    """A forward is only run again, with nothing put back: the failing example."""
    transaction: Any = importlib.import_module("vram_headroom.nodes.host.transaction")
    transaction.Snapshot.restore = lambda self: None


class Prompts(Lab):
    """The same, and an executor that runs graphs."""

    def __init__(self, base: Path, server: Any) -> None:
        super().__init__(base)
        execution: Any = importlib.import_module("execution")
        self.executor = execution.PromptExecutor(server)
        importlib.import_module("nodes").NODE_CLASS_MAPPINGS.update(sys.modules["vram_headroom"].NODE_CLASS_MAPPINGS)
        self.base = base

    def run(self, prompt: Prompt, prompt_id: str, *wanted: Fault) -> dict[str, Any]:
        """One prompt in which memory runs out as `wanted`."""
        self.told.clear()
        faults.ask(*wanted)
        targets = [key for key, value in prompt.items() if value["class_type"] in ("SaveLatent", "PreviewImage")]
        try:
            self.executor.execute(prompt, prompt_id, {}, targets)
            ok = self.executor.success
        except model_management.InterruptProcessingException:
            ok = False
        messages = dict(self.executor.status_messages)
        return {
            "ok": ok,
            "message": messages.get("execution_error", {}).get("exception_message", ""),
            "type": messages.get("execution_error", {}).get("exception_type", ""),
            "interrupted": "execution_interrupted" in messages,
            "told": [one._asdict() for one in self.told],
            "kinds": [one.kind for one in self.told],
            "raised": faults.raised,
            "counts": {name: faults.count(name) for name in WHERE},
            "loaded": [model.name for model in self.pack.host.models.loaded() if model.bytes_on_card],
            "latents": self.saved(),
        }

    def saved(self) -> list[str]:
        return sorted(path.name for path in (self.base / "input").glob("*.latent"))

    def forget(self) -> None:
        """Nothing cached, nothing loaded."""
        self.executor.reset()
        model_management.unload_all_models()

    def newest(self) -> torch.Tensor:
        """What Save Latent wrote last."""
        path = max((self.base / "output").rglob("*.latent"), key=lambda found: found.stat().st_mtime_ns)
        return load_latent(path)


WHERE = ("attention", "decode", "decode tile", "encode", "encode tile", "text encoder", "vision")


def load_latent(path: Path) -> torch.Tensor:
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        data = bytearray(file.read(header["latent_tensor"]["data_offsets"][1]))
    return torch.frombuffer(data, dtype=torch.float32).reshape(header["latent_tensor"]["shape"])


def metadata(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return json.loads(file.read(int.from_bytes(file.read(8), "little")))["__metadata__"]


def graph(steps: int = 5, sampler_name: str = "euler", side: int = 64, length: int = 5, **sampler: Any) -> Prompt:
    """A video whose latent is saved and decoded."""
    video = text_to_video(steps=steps, width=side, height=side, length=length)
    prompt = with_inputs(video, "8", sampler_name=sampler_name, **sampler)
    return {**prompt, "20": node("SaveLatent", samples=["8", 0], filename_prefix="latents/it")}


def begun(prompt: Prompt, end: int) -> Prompt:
    """The first steps only, as ComfyUI itself returns them with leftover noise."""
    half = resumed(prompt, "", prompt["8"]["inputs"]["steps"], 0)
    del half["30"]
    more = {"add_noise": "enable", "end_at_step": end, "return_with_leftover_noise": "enable"}
    return with_inputs(half, "8", latent_image=["6", 0], **more)


def resumed(prompt: Prompt, name: str, steps: int, start: int) -> Prompt:
    """As the message says: the kept latent through KSampler (Advanced)."""
    inputs = {key: prompt["8"]["inputs"][key] for key in ("model", "positive", "negative", "cfg", "sampler_name", "scheduler")}
    going_on = node(
        "KSamplerAdvanced",
        **inputs,
        add_noise="disable",
        noise_seed=1,
        steps=steps,
        latent_image=["30", 0],
        start_at_step=start,
        end_at_step=10000,
        return_with_leftover_noise="disable",
    )
    return {**prompt, "8": going_on, "30": node("LoadLatent", latent=name)}
