"""Asks nodes/host about models and about itself inside a real ComfyUI's Python: no server, no card, no weights.

    python inside_comfyui.py OUT.json [aimdo]

Run in the root of a checkout. Writes what test_real_estimator.py looks at.
"""

from __future__ import annotations

import importlib
import json
import logging
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

OUT = Path(sys.argv[1])
AIMDO = "aimdo" in sys.argv
sys.argv = ["main.py", "--cpu"]
sys.path.insert(0, str(Path.cwd()))
sys.path.append(str(Path(__file__).resolve().parent.parent))

# Not import statements: order matters, and of this project only nodes/host may hold on to ComfyUI's names.
importlib.import_module("comfy.options").enable_args_parsing()
importlib.import_module("utils.install_util")  # ComfyUI's, before another module of that name is found
folder_paths: Any = importlib.import_module("folder_paths")
folder_paths.set_user_directory(tempfile.mkdtemp())
importlib.import_module("loadpack").load_pack()

torch: Any = importlib.import_module("torch")
ops: Any = importlib.import_module("comfy.ops")
management: Any = importlib.import_module("comfy.model_management")
selfcheck: Any = importlib.import_module("vram_headroom.nodes.host.selfcheck")
backends: Any = importlib.import_module("vram_headroom.nodes.host.backend")
detection: Any = importlib.import_module("vram_headroom.nodes.host.detection")
checkpoints: Any = importlib.import_module("vram_headroom.vram.estimate.checkpoint")
tokens: Any = importlib.import_module("vram_headroom.vram.estimate.tokens")
trace: Any = importlib.import_module("vram_headroom.vram.trace")
checks: Any = importlib.import_module("vram_headroom.vram.selfcheck")

META = {"device": torch.device("meta"), "dtype": torch.float16, "operations": ops.disable_weight_init}
UNET = {
    "use_checkpoint": False,
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 320,
    "use_spatial_transformer": True,
    "legacy": False,
}
HYBRID = {
    "in_channels": 16,
    "out_channels": 16,
    "vec_in_dim": 768,
    "context_in_dim": 4096,
    "hidden_size": 3072,
    "mlp_ratio": 4.0,
    "num_heads": 24,
    "axes_dim": [16, 56, 56],
    "qkv_bias": True,
    "guidance_embed": True,
}
"""What Flux and HunyuanVideo have in common."""


def flux() -> Any:
    made = importlib.import_module("comfy.ldm.flux.model").Flux
    return made(**HYBRID, patch_size=2, depth=19, depth_single_blocks=38, theta=10000, txt_ids_dims=[], **META)


def hunyuan_video() -> Any:
    made = importlib.import_module("comfy.ldm.hunyuan_video.model").HunyuanVideo
    later = {"byt5": False, "meanflow": False, "use_cond_type_embedding": False, "vision_in_dim": None, "meanflow_sum": False}
    return made(**HYBRID, patch_size=[1, 2, 2], depth=20, depth_single_blocks=40, theta=256, **later, **META)


def sdxl() -> Any:
    made = importlib.import_module("comfy.ldm.modules.diffusionmodules.openaimodel").UNetModel
    return made(
        **UNET,
        num_res_blocks=[2, 2, 2],
        channel_mult=[1, 2, 4],
        num_classes="sequential",
        adm_in_channels=2816,
        transformer_depth=[0, 0, 2, 2, 10, 10],
        transformer_depth_middle=10,
        transformer_depth_output=[0, 0, 0, 2, 2, 2, 10, 10, 10],
        use_linear_in_transformer=True,
        context_dim=2048,
        num_head_channels=64,
        **META,
    )


def sd15() -> Any:
    made = importlib.import_module("comfy.ldm.modules.diffusionmodules.openaimodel").UNetModel
    return made(
        **UNET,
        num_res_blocks=[2, 2, 2, 2],
        channel_mult=[1, 2, 4, 4],
        transformer_depth=[1, 1, 1, 1, 1, 1, 0, 0],
        transformer_depth_middle=1,
        transformer_depth_output=[1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
        use_linear_in_transformer=False,
        context_dim=768,
        num_heads=8,
        **META,
    )


def qwen_image() -> Any:
    made = importlib.import_module("comfy.ldm.qwen_image.model").QwenImageTransformer2DModel
    return made(in_channels=64, num_layers=60, **META)


def ltxv() -> Any:
    made = importlib.import_module("comfy.ldm.lightricks.model").LTXVModel
    return made(**META)


FAMILIES: dict[str, tuple[Callable[[], Any], str]] = {
    "Flux": (flux, ""),
    "SDXL": (sdxl, "model.diffusion_model."),
    "SD15": (sd15, "model.diffusion_model."),
    "QwenImage": (qwen_image, ""),
    "HunyuanVideo": (hunyuan_video, ""),
    "LTXV": (ltxv, ""),
}
SHAPES = {2: [(1, 1, 64, 64), (2, 1, 128, 96)], 3: [(1, 1, 64, 64), (2, 13, 24, 40)]}
"""Batch, latent frames, rows, columns."""


def detected(name: str, make: Callable[[], Any], prefix: str, folder: Path) -> dict[str, Any]:
    """What our detector says of a header, how long it took, and what a model that ComfyUI itself built says of some shapes."""
    state = {prefix + key: value for key, value in make().state_dict().items()}
    path = folder / f"{name}.safetensors"
    path.touch()
    tensors = {key: checkpoints.TensorInfo(key, "F16", tuple(value.shape), 2 * value.numel()) for key, value in state.items()}
    before = time.perf_counter()
    found = detection.HostDetector().detect(checkpoints.Checkpoint(str(path), 0, tensors, {}))
    seconds = time.perf_counter() - before
    if found is None:
        return {"found": None}
    with torch.device("meta"):
        # ComfyUI's own loader, which finds nothing to compute with in these tensors but takes them for weights
        management.unet_offload_device = lambda: torch.device("meta")
        built = importlib.import_module("comfy.sd").load_diffusion_model_state_dict(dict(state))
    dimensions = 2 if found.temporal_stride is None else 3
    rows = []
    for batch, frames, height, width in SHAPES[dimensions]:
        shape = [batch, found.latent_channels, *((frames,) if dimensions == 3 else ()), height, width]
        rows.append([found.bytes_per_cell * batch * frames * height * width, float(built.model.memory_required(shape))])
    same = [type(built.model.latent_format).__name__, type(built.model.model_config).__name__]
    return {"found": asdict(found), "seconds": seconds, "rows": rows, "built": same}


def checked() -> list[dict[str, Any]]:
    """The self-check for each way this ComfyUI's forwards may run."""
    if AIMDO:
        elastic: Any = importlib.import_module("comfy.memory_management")
        elastic.aimdo_enabled = True
    backend = backends.read_backend()
    results = []
    for rope, norm in ((False, False), (False, True), (True, True)):
        plan = selfcheck.plan_for(replace(backend, fused_rope=rope, fused_rms_norm=norm))
        before = time.perf_counter()
        found = checks.run(plan.subjects, plan.key, plan.host)
        results.append(
            {
                "state": found.state,
                "message": found.message,
                "seconds": time.perf_counter() - before,
                "ratios": {f"{row.kind} {row.name}": row.ratio for row in found.rows},
                "kinds": sorted({subject.kind for subject in plan.subjects}),
            }
        )
    return results


def vaes() -> list[list[Any]]:
    """What both VAEs need of a forward as the self-check prepares it."""
    rows = []
    for kind in selfcheck.VAES:
        for way in ("decode", "encode"):
            prepared = selfcheck.prepare_vae(kind, way, tokens.Video(832, 480, 17))
            rows.append([f"vae-{way}", kind, trace.trace_forward(prepared, options=selfcheck.vae_options()).peak_bytes])
    return rows


def around_cudnn() -> list[list[Any]]:
    """The same where ComfyUI works around a bug of cuDNN."""
    ops.NVIDIA_MEMORY_CONV_BUG_WORKAROUND = True
    try:
        return vaes()
    finally:
        ops.NVIDIA_MEMORY_CONV_BUG_WORKAROUND = False


def interrupted() -> dict[str, Any]:
    """An interrupt that a person sends while the check runs: what the check makes of it, and whether it is still there."""
    checker = selfcheck.host_selfcheck(lambda: False)
    management.interrupt_current_processing(True)
    checker.look()
    checker.finish()
    return {"interrupt is there": management.processing_interrupted(), "state": checker.look().state}


def looked() -> dict[str, Any]:
    """A first look, its result, and what a later start of ComfyUI reads."""
    checker = selfcheck.host_selfcheck(lambda: False)
    first = checker.look()
    checker.finish()
    file = Path(folder_paths.get_user_directory(), *selfcheck.FILE)
    again = selfcheck.host_selfcheck(lambda: True).look()
    states = [first.state, checker.look().state, again.state]
    return {"states": states, "kept": file.exists(), "host": first.host, "key": first.host_key}


def main() -> None:
    said: dict[str, Any] = {"backend": asdict(backends.read_backend()), "interrupted": interrupted()}
    management.interrupt_current_processing(False)
    said["looked"] = looked()
    said["checked"] = checked()
    said["vaes"] = vaes()
    said["around cuDNN"] = around_cudnn()
    if not AIMDO:
        with tempfile.TemporaryDirectory() as folder:
            said["detected"] = {name: detected(name, *family, Path(folder)) for name, family in FAMILIES.items()}
    OUT.write_text(json.dumps(said), encoding="utf-8")


logging.disable(logging.WARNING)
main()
