"""Runs out of memory inside forwards of a real ComfyUI's WAN models, again and again, and compares what comes out.

    python recovery_lab.py OUT.json MODELS FIXTURES [--case NAME ...] [--naive] [--card legacy|dynamic]

Run in the root of a checkout. With `--card` on the real one, whose allocator is capped for each error: there FIXTURES is not
looked at. On the CPU `FIXTURES/zz_fake_gpu` plays the card; errors are injected at every self-attention of
a sampling, before it and after it. Writes one entry for each case, which test_real_recovery.py looks at.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import importlib
import importlib.util
import json
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

parser = argparse.ArgumentParser()
parser.add_argument("out", type=Path)
parser.add_argument("models", type=Path)
parser.add_argument("fixtures", type=Path)
parser.add_argument("--case", action="append", default=[])
parser.add_argument("--naive", action="store_true", help="run a forward again without restoring anything: the failing example")
parser.add_argument("--card", choices=("legacy", "dynamic"), help="real errors of a real card, without or with DynamicVRAM")
OPTIONS = parser.parse_args()

sys.path.insert(0, str(Path.cwd()))
sys.path.append(str(Path(__file__).resolve().parent.parent))
sys.argv = ["main.py", *({"legacy": ["--disable-dynamic-vram"], "dynamic": []}[OPTIONS.card] if OPTIONS.card else ["--cpu"])]
os.environ["FAKE_VRAM_MB"] = "4000"
os.environ["VRAM_HEADROOM_RETRY_DYNAMIC"] = "1"
importlib.import_module("comfy.options").enable_args_parsing()
importlib.import_module("utils.install_util")  # ComfyUI's, before another module of that name is found
folder_paths: Any = importlib.import_module("folder_paths")
FOLDER = Path(tempfile.mkdtemp())
for kind in ("input", "output", "temp", "user"):
    (FOLDER / kind).mkdir()
folder_paths.set_user_directory(str(FOLDER / "user"))
folder_paths.set_input_directory(str(FOLDER / "input"))
if OPTIONS.card:
    importlib.import_module("main")  # chooses the allocator and starts comfy-aimdo
torch: Any = importlib.import_module("torch")
server: Any = importlib.import_module("server").PromptServer(asyncio.new_event_loop())
if not OPTIONS.card:
    spec: Any = importlib.util.spec_from_file_location("zz_fake_gpu", OPTIONS.fixtures / "zz_fake_gpu" / "__init__.py")
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
importlib.import_module("nodes")
importlib.import_module("loadpack").load_pack()
PACK: Any = importlib.import_module("vram_headroom.nodes.controls").Control.pack

TOLD: list[Any] = []
PACK.incidents.watch(TOLD.append)
PACK.incidents.watch(lambda incident: lift(incident))

sd: Any = importlib.import_module("comfy.sd")
utils: Any = importlib.import_module("comfy.utils")
samplers: Any = importlib.import_module("comfy.samplers")
sample: Any = importlib.import_module("comfy.sample")
management: Any = importlib.import_module("comfy.model_management")
wan: Any = importlib.import_module("comfy.ldm.wan.model")

STEPS = 4
COMPANY = OPTIONS.models / "diffusion_models" / "tiny_wan22_t2v_high_noise_fp16.safetensors"


NARROW = importlib.util.find_spec("comfy.ldm.wan.ar_model") is not None
"""Older releases know no text encoder narrower than 4096."""


def tiny(name: str = "tiny_wan21_t2v_textdim64", **config: Any) -> Any:
    """A fresh patcher on a tiny model."""
    if not NARROW:
        name = "tiny_wan21_t2v_fp16"
    path = str(OPTIONS.models / "diffusion_models" / f"{name}.safetensors")
    if not config:
        return sd.load_diffusion_model(path)
    state = utils.load_torch_file(path)
    metadata = {"config": json.dumps({"transformer": {"text_dim": 64, **config}})}
    return sd.load_diffusion_model_state_dict(state, metadata=metadata)


def conditioning(seed: int, tokens: int = 16) -> list[Any]:
    made = torch.Generator().manual_seed(seed)
    return [[torch.randn(1, tokens, 64 if NARROW else 4096, generator=made), {}]]


class Injected:
    """Counts self-attentions of every WAN block, and fails the ones it is told to."""

    def __init__(self) -> None:
        self.count = 0
        self.fail_at: dict[int, int] = {}
        """Number of a self-attention -> how often it and those after it fail."""
        self.after = False
        self.raised = 0
        for found in classes():
            self._wrap(found)

    def _wrap(self, owner: Any) -> None:
        inner = owner.forward

        def forward(module: Any, *args: Any, **kwargs: Any) -> Any:
            if not self.after:
                self._due()
            out = inner(module, *args, **kwargs)
            if self.after:
                self._due()
            return out

        owner.forward = forward

    def _due(self) -> None:
        number = self.count
        left = self.fail_at.get(number, 0)
        if left:
            self.fail_at[number] = left - 1
            self.raised += 1
            filled = torch.zeros(1 << 16)
            if OPTIONS.card:
                run_out()
            raise torch.OutOfMemoryError(f"CUDA out of memory (injected, {filled.numel()} numbers)")
        self.count += 1

    def arm(self, number: int = -1, times: int = 1, after: bool = False) -> None:
        self.count, self.raised, self.after = 0, 0, after
        self.fail_at = {} if number < 0 else {number: times}


def run_out() -> None:
    """The card's own error: no more than is there now may be allocated, until recovery has begun."""
    total, here = torch.cuda.mem_get_info()[1], torch.cuda.memory_reserved()
    torch.cuda.set_per_process_memory_fraction(min(1.0, (here + (64 << 20)) / total))
    torch.empty(here + (1 << 30), dtype=torch.uint8, device="cuda")


def lift(incident: Any) -> None:
    if OPTIONS.card:
        torch.cuda.set_per_process_memory_fraction(1.0)


def classes() -> Iterator[Any]:
    yield wan.WanSelfAttention
    if NARROW:
        yield importlib.import_module("comfy.ldm.wan.ar_model").CausalWanSelfAttention


INJECTED = Injected()
# many tiny forwards and, after each error, a collection: both take longer for what they have nothing to do with
torch.set_num_threads(1)
gc.freeze()


class Case:
    """One way to sample."""

    def __init__(self, name: str, sampler: str = "euler", frames: int = 3, make: Callable[[], Any] | None = None) -> None:
        self.name, self.sampler, self.frames = name, sampler, frames
        self.make = make or tiny
        self.run: Callable[[Any], Any] = self._sample
        self.texts: tuple[int, int] = (16, 16)
        """Tokens of cond and uncond: ComfyUI runs 16 and 17 one after the other, whatever memory there is."""
        self.alone = False
        """No other model is on the card, so that only the running one can give anything."""
        self.steps: list[int] = []

    def _sample(self, patcher: Any) -> Any:
        latent = torch.zeros(1, 16, self.frames, 8, 8)
        noise = sample.prepare_noise(latent, 7)
        self.steps = []
        return sample.sample(
            patcher,
            noise,
            STEPS,
            3.0,
            self.sampler,
            "simple",
            conditioning(1, self.texts[0]),
            conditioning(2, self.texts[1]),
            latent,
            callback=self._noted,
            seed=7,
            disable_pbar=True,
        )

    def _noted(self, step: int, denoised: Any, x: Any, total: int) -> None:
        self.steps.append(step)


def easycache(name: str) -> Callable[[], Any]:
    """With the largest threshold that leaves out one step less than all it may: the sum of two steps' changes reaches it, and
    that of the last alone does not, so that a forward which is only run again is left out."""
    nodes: Any = importlib.import_module("comfy_extras.nodes_easycache")

    def made(threshold: float) -> Any:
        return getattr(nodes, f"{name}Node").execute(tiny(), threshold, 0.0, 1.0, False).result[0]

    def forwards(threshold: float) -> int:
        INJECTED.arm()
        case = Case(name)
        case.run(made(threshold))
        return INJECTED.count

    def make() -> Any:
        low, high = 0.0, 3.0
        fewest = forwards(high)
        for _ in range(8):
            middle = (low + high) / 2
            low, high = (middle, high) if forwards(middle) > fewest else (low, middle)
        return made(low)

    return make


def with_lora() -> Any:
    patcher = tiny().clone()
    weights = {key: value for key, value in patcher.model_state_dict().items() if "self_attn.q.weight" in key}
    made = torch.Generator().manual_seed(5)
    added = {key: ("diff", (torch.randn(value.shape, generator=made) * 0.01,)) for key, value in weights.items()}
    assert patcher.add_patches(added, 0.7)
    return patcher


def context_windows() -> Any:
    nodes: Any = importlib.import_module("comfy_extras.nodes_context_windows")
    made = nodes.WanContextWindowsManualNode.execute(
        tiny(),
        context_length=9,
        context_overlap=4,
        context_schedule="standard_static",
        context_stride=1,
        closed_loop=False,
        fuse_method="pyramid",
        freenoise=False,
    )
    return made.result[0]


def causal(case: Case) -> None:
    case.make = lambda: tiny(causal_ar=True)

    def run(patcher: Any) -> Any:
        latent = torch.zeros(1, 16, case.frames, 8, 8)
        noise = sample.prepare_noise(latent, 7)
        case.steps = []
        sigmas = samplers.calculate_sigmas(patcher.get_model_object("model_sampling"), "simple", STEPS)
        made = samplers.ksampler("ar_video", {"num_frame_per_block": 1})
        return sample.sample_custom(
            patcher,
            noise,
            1.0,
            made,
            sigmas,
            conditioning(1),
            conditioning(2),
            latent,
            callback=case._noted,
            seed=7,
            disable_pbar=True,
        )

    case.run = run


class Foreign:
    """What another pack may put around or into a model; it counts, so running it twice is not running it once."""

    def __init__(self) -> None:
        self.calls = 0

    def wrapper(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return executor(*args, **kwargs)

    def function(self, apply: Any, given: dict[str, Any]) -> Any:
        self.calls += 1
        return apply(given["input"], given["timestep"], **given["c"])

    def patch(self, given: Any, *rest: Any) -> Any:
        self.calls += 1
        return given["x"]


def foreign(how: str) -> Callable[[], Any]:
    def make() -> Any:
        patcher, other = tiny().clone(), Foreign()
        if how in ("apply_model", "diffusion_model"):
            patcher.add_wrapper_with_key(how, "other", other.wrapper)
        elif how == "model_function":
            patcher.set_model_unet_function_wrapper(other.function)
        elif how == "patch":
            patcher.set_model_patch(other.patch, "attn1_patch")
        elif how == "cuda graphs":
            patcher.model_options["torch_compile_kwargs"] = {"mode": "reduce-overhead"}
        elif how == "options":
            patcher.model_options["transformer_options"]["other"] = other
        return patcher

    return make


FOREIGN = ("apply_model", "diffusion_model", "model_function", "patch", "cuda graphs", "options")


def cases() -> dict[str, Case]:
    apart, alone = Case("cond and uncond apart"), Case("alone on the card")
    apart.texts, alone.alone = (16, 17), True
    found = [Case("plain"), apart, alone, Case("ancestral", "euler_ancestral"), Case("uni_pc", "uni_pc")]
    found += [Case(name, make=easycache(name)) for name in ("EasyCache", "LazyCache")]
    lora, lora_alone = Case("LoRA", make=with_lora), Case("LoRA alone on the card", make=with_lora)
    lora_alone.alone = True
    found += [lora, lora_alone, Case("context windows", frames=5, make=context_windows)]
    if NARROW:
        found.append(Case("CausalAR", frames=2))
        causal(found[-1])
    found += [Case(f"foreign {how}", make=foreign(how)) for how in FOREIGN]
    return {case.name: case for case in found}


def outcome(case: Case, patcher: Any) -> dict[str, Any]:
    """One sampling: the picture's bytes or the error, what was told of it, and the steps."""
    TOLD.clear()
    try:
        latent, error = case.run(patcher), None
    except Exception as failure:
        latent, error = None, str(failure)
    return {
        "latent": latent,
        "error": error,
        "raised": INJECTED.raised,
        "forwards": INJECTED.count,
        "steps": list(case.steps),
        "kinds": [one.kind for one in TOLD],
        "same": all(one.same_picture for one in TOLD),
    }


def swept(case: Case) -> dict[str, Any]:
    """An error at every self-attention of the sampling, before it and after it, each in a sampling of its own."""
    patcher, company = case.make(), sd.load_diffusion_model(str(COMPANY))
    seen: dict[str, Any] = {"identical": 0, "refused": 0, "said": 0, "furthest": 0.0, "wrong": [], "repeated": [], "kinds": {}}
    INJECTED.arm()
    expected = outcome(case, patcher)
    assert expected["latent"] is not None, expected["error"]
    seen["attentions"] = expected["forwards"]
    for after in (False, True):
        for number in range(expected["forwards"]):
            management.unload_all_models()
            if not case.alone:
                management.load_models_gpu([company])
            INJECTED.arm(number, after=after)
            found = outcome(case, patcher)
            where = f"{number} {'after' if after else 'before'}"
            for kind in found["kinds"]:
                seen["kinds"][kind] = seen["kinds"].get(kind, 0) + 1
            if found["raised"] != 1:
                seen["wrong"].append(f"{where}: raised {found['raised']}")
            elif found["latent"] is None and "refused" in found["kinds"] and "Not tried again" in found["error"]:
                seen["refused"] += 1
            elif found["latent"] is None:
                seen["wrong"].append(f"{where}: {found['error']}")
            elif torch.equal(found["latent"], expected["latent"]) and found["same"]:
                seen["identical"] += 1
            elif not found["same"]:
                seen["said"] += 1
                seen["furthest"] = max(seen["furthest"], float((found["latent"] - expected["latent"]).abs().max()))
            else:
                seen["wrong"].append(f"{where}: another picture, {found['kinds']}")
            # a step that was done and is done again would be told of twice
            if found["latent"] is not None and found["steps"] != expected["steps"]:
                seen["repeated"].append(f"{where}: {found['steps']}")
    return seen


def main() -> None:
    chosen = {name: case for name, case in cases().items() if not OPTIONS.case or name in OPTIONS.case}
    if OPTIONS.naive:
        transaction: Any = importlib.import_module("vram_headroom.nodes.host.transaction")
        transaction.Snapshot.restore = lambda self: None
    said = {}
    with torch.inference_mode():
        for name, case in chosen.items():
            said[name] = swept(case)
            OPTIONS.out.write_text(json.dumps(said), encoding="utf-8")


logging.disable(logging.WARNING)
main()
