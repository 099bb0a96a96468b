"""Writes tests/data/variants.json: the tensors of every WAN model as the real ComfyUI classes build them, and what ComfyUI's
own detection makes of them. Nothing is allocated: the modules live on torch's meta device.

usage: python tests/host/record/record_variants.py --comfyui PATH [--comfyui OLDER_PATH]   (with the Python of that ComfyUI)

The tensors come from the first checkout; from each further one only its detection.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from folding import Tensors, folded, unfolded

DATA = Path(__file__).resolve().parents[2] / "data" / "variants.json"

BIG = {"dim": 5120, "ffn_dim": 13824, "num_heads": 40, "num_layers": 40, "out_dim": 16}
SMALL = {"dim": 1536, "ffn_dim": 8960, "num_heads": 12, "num_layers": 30, "out_dim": 16}
FIVE = {"dim": 3072, "ffn_dim": 14336, "num_heads": 24, "num_layers": 30, "out_dim": 48}

MODEL = "model:WanModel"
VARIANTS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "2.1 T2V 1.3B": (MODEL, {**SMALL, "model_type": "t2v", "in_dim": 16}, {}),
    "2.1 T2V 14B": (MODEL, {**BIG, "model_type": "t2v", "in_dim": 16}, {}),
    "2.1 I2V 14B": (MODEL, {**BIG, "model_type": "i2v", "in_dim": 36}, {}),
    "2.1 FLF2V 14B": (MODEL, {**BIG, "model_type": "i2v", "in_dim": 36, "flf_pos_embed_token_number": 514}, {}),
    "2.2 I2V A14B": (MODEL, {**BIG, "model_type": "t2v", "in_dim": 36}, {}),
    "2.2 TI2V 5B": (MODEL, {**FIVE, "model_type": "t2v", "in_dim": 48}, {}),
    "VACE 1.3B": ("model:VaceWanModel", {**SMALL, "in_dim": 16, "vace_layers": 15, "vace_in_dim": 96}, {}),
    "VACE 14B": ("model:VaceWanModel", {**BIG, "in_dim": 16, "vace_layers": 8, "vace_in_dim": 96}, {}),
    "Fun-Control 14B": (MODEL, {**BIG, "model_type": "i2v", "in_dim": 48}, {}),
    "Fun-Control 1.3B": (MODEL, {**SMALL, "model_type": "i2v", "in_dim": 48}, {}),
    "Fun-InP 1.3B": (MODEL, {**SMALL, "model_type": "i2v", "in_dim": 36}, {}),
    "2.2 Fun-Control A14B": (MODEL, {**BIG, "model_type": "t2v", "in_dim": 52, "in_dim_ref_conv": 16}, {}),
    "Fun-Camera 14B": ("model:CameraWanModel", {**BIG, "model_type": "camera", "in_dim": 32}, {}),
    "Fun-Camera 1.3B": ("model:CameraWanModel", {**SMALL, "model_type": "camera", "in_dim": 32}, {}),
    "2.2 Fun-Camera A14B": ("model:CameraWanModel", {**BIG, "model_type": "camera_2.2", "in_dim": 36}, {}),
    "2.2 S2V 14B": ("model:WanModel_S2V", {**BIG, "in_dim": 16}, {}),
    "2.2 Animate 14B": ("model_animate:AnimateWanModel", {**BIG, "in_dim": 36}, {}),
    "HuMo 17B": ("model:HumoWanModel", {**BIG, "in_dim": 36}, {}),
    "Animate 2 14B": ("model_animate2:WanAnimate2Model", {**BIG, "in_dim": 36}, {"model_type": "animate2"}),
    "SCAIL 14B": ("model:SCAILWanModel", {**BIG, "in_dim": 20}, {}),
    "SCAIL-2 14B": ("model:SCAIL2WanModel", {**BIG, "in_dim": 20}, {}),
    "WanDancer 14B": ("model_wandancer:WanDancerModel", {**BIG, "in_dim": 36}, {}),
    "causal 1.3B": ("ar_model:CausalWanModel", {**SMALL, "model_type": "t2v", "in_dim": 16}, {"causal_ar": True}),
}
"""Module and class under comfy.ldm.wan, its arguments (sizes of the published models), and what the file's metadata says of the
transformer where keys alone do not tell."""

VAES = {
    "VAE 2.1": ("vae", {"dim": 96, "z_dim": 16, "image_channels": 3, "conv_out_channels": 3}),
    "VAE 2.2": ("vae2_2", {"dim": 160, "z_dim": 48}),
}
VAE_SHAPE = {"dim_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_scales": [], "temperal_downsample": [False, True, True]}


def tensors_of(module: Any) -> Tensors:
    """The state dict of `module`: `F32` where the class insists on it, `F16` where it takes the type asked for."""
    import torch

    names = {torch.float16: "F16", torch.float32: "F32", torch.int64: "I64"}
    return {name: (names[tensor.dtype], tuple(tensor.shape)) for name, tensor in module.state_dict().items()}


def detected(tensors: Tensors, metadata: dict[str, str]) -> dict[str, Any]:
    """What this ComfyUI makes of a diffusion model's tensors."""
    import torch

    detection = import_module("comfy.model_detection")
    state = {name: torch.empty(shape, device="meta", dtype=torch.float16) for name, (_, shape) in tensors.items()}
    config = detection.model_config_from_unet(state, "", metadata=metadata)
    if config is None:
        return {"model": None}
    found = detection.detect_unet_config(state, "", metadata=metadata)
    told = ("model_type", "dim", "ffn_dim", "num_heads", "num_layers", "in_dim", "out_dim", "vace_layers")
    more = ("flf_pos_embed_token_number", "in_dim_ref_conv", "causal_ar")
    return {
        "model": type(config).__name__,
        "usage_factor": config.memory_usage_factor,
        **{key: found[key] for key in (*told, *more) if key in found},
    }


def build() -> dict[str, Any]:
    """Tensors of every model, by the checkout that is on the path."""
    import torch

    ops = import_module("comfy.ops")
    record: dict[str, Any] = {}
    with torch.device("meta"):
        for name, (where, arguments, transformer) in VARIANTS.items():
            file, _, cls = where.partition(":")
            kind = getattr(import_module(f"comfy.ldm.wan.{file}"), cls)
            made = kind(**arguments, device="meta", dtype=torch.float16, operations=ops.disable_weight_init)
            metadata = {"config": json.dumps({"transformer": transformer})} if transformer else {}
            record[name] = {"metadata": metadata, **folded(tensors_of(made))}
        for name, (file, arguments) in VAES.items():
            made = import_module(f"comfy.ldm.wan.{file}").WanVAE(**arguments, **VAE_SHAPE, dropout=0.0).half()
            record[name] = {"metadata": {}, **folded(tensors_of(made))}
        folder = Path(import_module("comfy").__path__[0])
        config = json.loads((folder / "text_encoders" / "umt5_config_xxl.json").read_text())
        made = import_module("comfy.text_encoders.t5").T5(config, torch.float16, "meta", ops.manual_cast)
        record["UMT5-XXL"] = {"metadata": {}, **folded(tensors_of(made))}
        config = json.loads((folder / "text_encoders" / "t5_config_xxl.json").read_text())
        made = import_module("comfy.text_encoders.t5").T5(config, torch.float16, "meta", ops.manual_cast)
        record["T5-XXL"] = {"metadata": {}, **folded(tensors_of(made))}
        config = json.loads((folder / "clip_vision_config_h.json").read_text())
        made = import_module("comfy.clip_model").CLIPVisionModelProjection(config, torch.float16, "meta", ops.manual_cast)
        record["CLIP vision H"] = {"metadata": {}, **folded(tensors_of(made))}
    return record


def one(checkout: Path, record: dict[str, Any] | None) -> None:
    """Print, as JSON, what the ComfyUI at `checkout` builds (`record` None) or detects."""
    sys.path.insert(0, str(checkout))
    sys.argv = [sys.argv[0], "--cpu"]
    import_module("comfy.options").enable_args_parsing()
    record = build() if record is None else record
    version = (checkout / "comfyui_version.py").read_text().split('"')[-2]
    for name, model in record.items():
        if name in VARIANTS:
            model.setdefault("detected", {})[version] = detected(unfolded(model), model["metadata"])
    print(json.dumps(record))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--comfyui", type=Path, action="append", required=True)
    parser.add_argument("--one", action="store_true", help="internal: print to stdout instead")
    arguments = parser.parse_args()
    if arguments.one:
        one(arguments.comfyui[0], json.loads(sys.stdin.read()))
        return
    record: Any = None
    for checkout in arguments.comfyui:
        done = subprocess.run(
            [sys.executable, __file__, "--one", "--comfyui", str(checkout.resolve())],
            input=json.dumps(record),
            capture_output=True,
            text=True,
        )
        if done.returncode:
            sys.exit(done.stderr)
        record = json.loads(done.stdout.splitlines()[-1])
    DATA.parent.mkdir(exist_ok=True)
    lines = (f"{json.dumps(name)}: {json.dumps(model, separators=(',', ':'))}" for name, model in record.items())
    DATA.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
