"""Writes tests/data/footprints.json: what the real ComfyUI says its models weigh (`patcher.model_size()`), for tiny files in
every storage format, with every loader option, on cards of several generations that it is made to believe in.

usage: python tests/host/record/record_footprints.py --comfyui PATH [--comfyui OLDER_PATH]   (with the Python of that ComfyUI)

`cpu:0` plays the card, as torch keeps it apart from `cpu`: ComfyUI's own rules run on the answers of a card that is not there.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parent))

from folding import folded

DATA = Path(__file__).resolve().parents[2] / "data" / "footprints.json"

MIB = 1 << 20
GIB = 1 << 30
TINY = {"dim": 256, "ffn_dim": 512, "num_heads": 2, "num_layers": 2, "out_dim": 16}


class FakeCard(NamedTuple):
    """What ComfyUI asks of a card."""

    capability: tuple[int, int]
    total: int
    name: str


ADA = "8.9, 24 GiB"
CARDS = {
    ADA: FakeCard((8, 9), 24 * GIB, "NVIDIA GeForce RTX 4090"),
    "8.6, 24 GiB": FakeCard((8, 6), 24 * GIB, "NVIDIA GeForce RTX 3090"),
    "8.6, too small for 16 bit": FakeCard((8, 6), 0, "NVIDIA GeForce RTX 3090"),
    "7.5, 16 GiB": FakeCard((7, 5), 16 * GIB, "NVIDIA GeForce RTX 2080 SUPER"),
    "6.1, 8 GiB": FakeCard((6, 1), 8 * GIB, "NVIDIA GeForce GTX 1080"),
    "12.0, 32 GiB": FakeCard((12, 0), 32 * GIB, "NVIDIA GeForce RTX 5090"),
}

OPTIONS = ("default", "fp8_e4m3fn", "fp8_e4m3fn_fast", "fp8_e5m2")


def believe(card: FakeCard) -> None:
    """Have ComfyUI's model management take `cpu:0` for `card`."""
    import torch

    management: Any = import_module("comfy.model_management")
    device = torch.device("cpu", 0)
    fake = lambda asked: asked is None or (asked.type == "cpu" and asked.index is not None)  # noqa: E731
    properties = SimpleNamespace(
        major=card.capability[0], minor=card.capability[1], name=card.name, total_memory=card.total, multi_processor_count=80
    )
    management.cpu_state = management.CPUState.GPU
    management.vram_state = management.VRAMState.NORMAL_VRAM
    management.get_torch_device = lambda: device
    management.text_encoder_device = lambda: device
    management.is_device_cpu = lambda asked: asked.type == "cpu" and asked.index is None
    management.is_nvidia = lambda: True
    management.get_total_memory = lambda asked=None, torch_total_too=False: card.total
    management.get_free_memory = lambda asked=None, torch_free_too=False: card.total if fake(asked) else 64 * GIB
    torch.cuda.get_device_properties = lambda asked=None: properties  # pyright: ignore[reportAttributeAccessIssue]
    torch.cuda.is_bf16_supported = lambda including_emulation=True: card.capability >= (8, 0)


# the files


def tiny(cls: str = "model:WanModel", **arguments: Any) -> dict[str, Any]:
    """Weights of a tiny model of the real class, in fp32."""
    import torch

    file, _, name = cls.partition(":")
    kind = getattr(import_module(f"comfy.ldm.wan.{file}"), name)
    ops = import_module("comfy.ops").disable_weight_init
    with torch.device("meta"):
        made = kind(**{**TINY, **arguments}, device="meta", dtype=torch.float32, operations=ops)
    return {key: torch.zeros(tensor.shape) for key, tensor in made.state_dict().items()}


def stored(state: dict[str, Any], wide: str, linear: str | None = None, only: str = "") -> dict[str, Any]:
    """`state` in the type `wide`, its matrices whose name begins with `only` in the type `linear`."""
    import torch

    return {
        key: tensor.to(getattr(torch, linear if linear and _is_linear(key, tensor) and key.startswith(only) else wide))
        for key, tensor in state.items()
    }


def _is_linear(key: str, tensor: Any) -> bool:
    embedding = key.endswith(("shared.weight", "relative_attention_bias.weight", "trainable_cond_mask.weight"))
    return tensor.ndim == 2 and key.endswith(".weight") and not embedding


def scaled_fp8(state: dict[str, Any], marks: int = 0, scale_input: float | None = None, only: str = "") -> dict[str, Any]:
    """The first fp8_scaled: an empty or 2-element mark, and a scale beside each matrix."""
    import torch

    out = {"scaled_fp8": torch.zeros(marks, dtype=torch.float8_e4m3fn)}
    for key, tensor in stored(state, "float16", "float8_e4m3fn").items():
        out[key] = tensor
        if _is_linear(key, tensor) and key.startswith(only):
            layer = key.removesuffix("weight")
            out[layer + "scale_weight"] = torch.ones(())
            if scale_input is not None:
                out[layer + "scale_input"] = torch.tensor(scale_input)
    return out


PER_ROW = -1


class Quantised(NamedTuple):
    """A format of comfy_quant: type and width of the weight, and the tensors beside it (type, elements of a row's group)."""

    conf: dict[str, Any]
    weight: str
    per_byte: int
    scales: dict[str, tuple[str, int | None]]
    """Weights of a row that share a scale; 0: the whole row; None: the whole layer; PER_ROW: the row, in one dimension; any
    other negative number: a table of that many."""


FORMATS = {
    "fp8": Quantised({"format": "float8_e4m3fn"}, "float8_e4m3fn", 1, {"weight_scale": ("float32", None)}),
    "fp8_e5m2_quant": Quantised({"format": "float8_e5m2"}, "float8_e5m2", 1, {"weight_scale": ("float32", None)}),
    "fp8_input": Quantised(
        {"format": "float8_e4m3fn", "full_precision_matrix_mult": True},
        "float8_e4m3fn",
        1,
        {"weight_scale": ("float32", None), "input_scale": ("float32", None)},
    ),
    "nvfp4": Quantised(
        {"format": "nvfp4"},
        "uint8",
        2,
        {"weight_scale": ("float8_e4m3fn", 16), "weight_scale_2": ("float32", None), "input_scale": ("float32", None)},
    ),
    "mxfp8": Quantised({"format": "mxfp8"}, "float8_e4m3fn", 1, {"weight_scale": ("uint8", 32)}),
    "int8": Quantised({"format": "int8_tensorwise"}, "int8", 1, {"weight_scale": ("float32", None)}),
    "int8_rows": Quantised({"format": "int8_tensorwise"}, "int8", 1, {"weight_scale": ("float32", 0)}),
    "int8_convrot": Quantised(
        {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 256}, "int8", 1, {"weight_scale": ("float32", 0)}
    ),
    "w4a4": Quantised({"format": "convrot_w4a4"}, "int8", 2, {"weight_scale": ("float32", 64)}),
    "w4a8": Quantised(
        {"format": "asym_w4a8_int8"},
        "int8",
        2,
        {"weight_s_rel": ("float8_e4m3fn", 16), "weight_s_channel": ("float32", PER_ROW), "weight_codebook": ("float32", -16)},
    ),
}


def comfy_quant(state: dict[str, Any], form: Quantised, only: str = "") -> dict[str, Any]:
    """ComfyUI's own format: a JSON beside each matrix that begins with `only`, the rest in fp16."""
    import torch

    out: dict[str, Any] = {}
    for key, tensor in stored(state, "float16").items():
        if not (_is_linear(key, tensor) and key.startswith(only) and tensor.shape[1] % 64 == 0):
            out[key] = tensor
            continue
        rows, columns = tensor.shape
        layer = key.removesuffix("weight")
        out[key] = torch.zeros(rows, columns // form.per_byte).to(getattr(torch, form.weight))
        for name, (dtype, group) in form.scales.items():
            out[layer + name] = torch.ones(_scale_shape(group, rows, columns)).to(getattr(torch, dtype))
        out[layer + "comfy_quant"] = torch.tensor(list(json.dumps(form.conf).encode()), dtype=torch.uint8)
    return out


def _scale_shape(group: int | None, rows: int, columns: int) -> tuple[int, ...]:
    if group is None:
        return ()
    if group < 0:
        return (rows if group == PER_ROW else -group,)
    return (rows, columns // group if group else 1)


def in_metadata(state: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """comfy_quant in the file's metadata instead of tensors."""
    out = comfy_quant(state, FORMATS["fp8"], "blocks.")
    marks = [key.removesuffix(".comfy_quant") for key in out if key.endswith(".comfy_quant")]
    layers = {layer: {"format": "float8_e4m3fn"} for layer in marks}
    kept = {key: tensor for key, tensor in out.items() if not key.endswith(".comfy_quant")}
    return kept, {"_quantization_metadata": json.dumps({"layers": layers})}


def diffusion_files() -> dict[str, tuple[dict[str, Any], dict[str, str]]]:
    """Weights and metadata of each file."""
    t2v = tiny(model_type="t2v", in_dim=16)
    fp16 = stored(t2v, "float16")
    files = {
        "fp16": fp16,
        "bf16": stored(t2v, "bfloat16"),
        "fp32": t2v,
        "fp16, patch in fp32": {key: tensor.float() if "patch" in key else tensor for key, tensor in fp16.items()},
        "plain fp8": stored(t2v, "float16", "float8_e4m3fn"),
        "plain fp8, e5m2": stored(t2v, "float16", "float8_e5m2"),
        "plain fp8, norms too": stored(t2v, "float8_e4m3fn"),
        "fp8 in the blocks only": stored(t2v, "float16", "float8_e4m3fn", "blocks."),
        "scaled fp8": scaled_fp8(t2v),
        "scaled fp8, input scale": scaled_fp8(t2v, scale_input=0.5),
        "scaled fp8, input scale of 1": scaled_fp8(t2v, scale_input=1.0),
        "scaled fp8, full precision": scaled_fp8(t2v, marks=2),
        "scaled fp8 in the blocks only": scaled_fp8(t2v, only="blocks."),
        "mark of scaled fp8 without scales": {**fp16, "scaled_fp8": scaled_fp8({})["scaled_fp8"]},
        "whole checkpoint": {
            **{"model.diffusion_model." + key: tensor for key, tensor in fp16.items()},
            "vae.decoder.conv1.weight": fp16["head.head.weight"],
        },
        "whole checkpoint, scaled fp8": {"model.diffusion_model." + key: value for key, value in scaled_fp8(t2v).items()},
        "i2v": stored(tiny(model_type="i2v", in_dim=36), "float16"),
        "flf2v": stored(tiny(model_type="i2v", in_dim=36, flf_pos_embed_token_number=514), "bfloat16"),
        "fun control": stored(tiny(model_type="t2v", in_dim=52, in_dim_ref_conv=16), "float16"),
        "vace": stored(tiny("model:VaceWanModel", in_dim=16, vace_layers=1, vace_in_dim=96), "float16"),
        "camera": stored(tiny("model:CameraWanModel", model_type="camera", in_dim=32), "float16"),
        "humo": stored(tiny("model:HumoWanModel", in_dim=36), "float16"),
        "animate": stored(tiny("model_animate:AnimateWanModel", in_dim=36, num_layers=5), "bfloat16"),
        **{f"quantised {name}": comfy_quant(t2v, form, "blocks.") for name, form in FORMATS.items()},
        "quantised nvfp4 and fp8": {
            **comfy_quant(t2v, FORMATS["fp8"], "blocks.1."),
            **{key: tensor for key, tensor in comfy_quant(t2v, FORMATS["nvfp4"], "blocks.0.").items() if "blocks.0." in key},
        },
    }
    if Path(import_module("comfy").__path__[0], "ldm", "wan", "model_wandancer.py").exists():
        files["scail 2"] = stored(tiny("model:SCAIL2WanModel", in_dim=20), "float16")
    return {name: (state, {}) for name, state in files.items()} | {"quantised, in metadata": in_metadata(t2v)}


# the readings


def read(reading: dict[str, Any], state: dict[str, Any], metadata: dict[str, str]) -> None:
    """Load a diffusion model as UNETLoader does and note what it weighs."""
    import torch

    sd = import_module("comfy.sd")
    options: dict[str, Any] = {}
    if reading["weight_dtype"].startswith("fp8_e4m3fn"):
        options["dtype"] = torch.float8_e4m3fn
    if reading["weight_dtype"].endswith("_fast"):
        options["fp8_optimizations"] = True
    if reading["weight_dtype"] == "fp8_e5m2":
        options["dtype"] = torch.float8_e5m2
    try:
        patcher = sd.load_diffusion_model_state_dict(dict(state), model_options=options, metadata=dict(metadata))
        reading["bytes"] = patcher.model_size()
    except Exception as refusal:  # a format or model that this version does not know
        reading["refused"] = type(refusal).__name__
        return
    model = patcher.model
    if reading["file"] in PLACED and reading["card"] == ADA and reading["weight_dtype"] == "default":
        reading["placed"] = [place(patcher, share, streams) for share in (0.1, 0.3, 0.5, 0.9) for streams in (0, 2)]
    reading["dtype"] = str(model.get_dtype()).removeprefix("torch.")
    reading["cast_to"] = None if model.manual_cast_dtype is None else str(model.manual_cast_dtype).removeprefix("torch.")


PLACED = ("fp16", "plain fp8", "scaled fp8", "quantised nvfp4", "vace")
"""Files that are also loaded in part."""


def place(patcher: Any, share: float, streams: int) -> dict[str, int]:
    """Load a `share` of the model's bytes onto the card, as ComfyUI does where not all of it fits."""
    management: Any = import_module("comfy.model_management")
    management.NUM_STREAMS = streams
    budget = int(patcher.model_size() * share)
    patcher.load(management.get_torch_device(), lowvram_model_memory=budget)
    reading = {
        "budget": budget,
        "streams": streams,
        "on_card": int(patcher.loaded_size()),
        "buffer": int(patcher.model.model_offload_buffer_memory),
    }
    patcher.unpatch_model(management.unet_offload_device())
    return reading


def read_text_encoders(card: str) -> list[dict[str, Any]]:
    """UMT5 of a few KB in each storage format."""
    import torch

    wan, detect = import_module("comfy.text_encoders.wan"), import_module("comfy.text_encoders.sd3_clip").t5_xxl_detect
    sd, utils = import_module("comfy.sd"), import_module("comfy.utils")
    folder = Path(import_module("comfy").__path__[0]) / "text_encoders"
    shrunk = {"num_layers": 2, "d_model": 128, "d_ff": 256, "d_kv": 64, "num_heads": 2, "vocab_size": 400}
    config = {**json.loads((folder / "umt5_config_xxl.json").read_text()), **shrunk}
    ops = import_module("comfy.ops").manual_cast
    with torch.device("meta"):
        made = import_module("comfy.text_encoders.t5").T5(config, torch.float32, "meta", ops)
    state = {key: torch.zeros(tensor.shape) for key, tensor in made.state_dict().items()}
    original = wan.UMT5XXlModel.__init__

    def small(self: Any, *args: Any, model_options: Any = None, **rest: Any) -> None:
        options = model_options or {}
        override = {f"{options.get('model_name', '')}_model_config": shrunk}
        original(self, *args, model_options={**options, **override}, **rest)

    files = {
        "fp16": stored(state, "float16"),
        "bf16": stored(state, "bfloat16"),
        "fp32": state,
        "fp16 with its tokenizer": {**stored(state, "float16"), "spiece_model": torch.zeros(999, dtype=torch.uint8)},
        "plain fp8": stored(state, "float8_e4m3fn"),
        "plain fp8, norms in fp16": stored(state, "float16", "float8_e4m3fn"),
        "scaled fp8": scaled_fp8(state),
        "scaled fp8, norms in bf16": {
            key: tensor.bfloat16() if tensor.dtype == torch.float16 else tensor for key, tensor in scaled_fp8(state).items()
        },
        "quantised fp8": comfy_quant(state, FORMATS["fp8"]),
    }
    readings: list[dict[str, Any]] = []
    wan.UMT5XXlModel.__init__ = small
    for name, tensors in files.items():
        converted, _ = utils.convert_old_quants(dict(tensors), model_prefix="", metadata={})
        target = SimpleNamespace(params={}, clip=wan.te(**detect(converted)), tokenizer=lambda **_: None)
        clip = sd.CLIP(target, state_dict=[converted])
        readings.append({"file": name, "card": card, **header(tensors, {}), "bytes": clip.patcher.model_size()})
    wan.UMT5XXlModel.__init__ = original
    return readings


def read_others(card: str) -> dict[str, list[dict[str, Any]]]:
    """A small VAE in three types, and the image encoder, whose size is fixed."""
    import torch

    sd, vision = import_module("comfy.sd"), import_module("comfy.clip_vision")
    shape = {"dim_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_scales": [], "temperal_downsample": [False, True, True]}
    with torch.device("meta"):
        kind = import_module("comfy.ldm.wan.vae").WanVAE
        made = kind(dim=16, z_dim=16, **shape, image_channels=3, dropout=0.0)
    state = {key: torch.zeros(tensor.shape) for key, tensor in made.state_dict().items()}
    vaes = []
    for dtype in ("float16", "bfloat16", "float32"):
        tensors = stored(state, dtype)
        vae = sd.VAE(sd=dict(tensors))
        weight = {"bytes": vae.patcher.model_size(), "dtype": str(vae.vae_dtype).removeprefix("torch.")}
        vaes.append({"file": dtype, "card": card, **header(tensors, {}), **weight})
    folder = Path(import_module("comfy").__path__[0])
    model = vision.ClipVisionModel(str(folder / "clip_vision_config_h.json"))
    return {
        "vae": vaes,
        "clip_vision": [{"file": "variants: CLIP vision H", "card": card, "bytes": model.patcher.model_size()}],
    }


def header(state: dict[str, Any], metadata: dict[str, str]) -> dict[str, Any]:
    """What the header of such a file says."""
    names = {
        **{"float16": "F16", "bfloat16": "BF16", "float32": "F32", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2"},
        **{"uint8": "U8", "int8": "I8"},
    }
    tensors = {key: (names[str(tensor.dtype).removeprefix("torch.")], tuple(tensor.shape)) for key, tensor in state.items()}
    return {"metadata": metadata, **folded(tensors)}


def wanted(file: str) -> list[tuple[str, str]]:
    """The cards and options that `file` is read with."""
    every = [(ADA, "default"), ("8.6, 24 GiB", "default")]
    if file in ("fp16", "plain fp8", "plain fp8, norms too", "scaled fp8", "quantised nvfp4", "quantised int8"):
        return [(card, "default") for card in CARDS] + [(ADA, option) for option in OPTIONS[1:]]
    return [*every, (ADA, "fp8_e4m3fn")]


def one(checkout: Path) -> dict[str, Any]:
    sys.path.insert(0, str(checkout))
    sys.argv = [sys.argv[0], "--cpu"]
    import_module("comfy.options").enable_args_parsing()
    management: Any = import_module("comfy.model_management")
    minimum = int(management.minimum_inference_memory())
    files = diffusion_files()
    readings: list[dict[str, Any]] = []
    for file, (state, metadata) in files.items():
        parameters = sum(tensor.nelement() for tensor in state.values())
        small = int((minimum + parameters * 2 - MIB) / 0.88)
        for card, option in wanted(file):
            believed = CARDS[card] if CARDS[card].total else CARDS[card]._replace(total=small)
            believe(believed)
            reading = {"file": file, "card": card, "total": believed.total, "weight_dtype": option}
            read(reading, state, metadata)
            readings.append(reading)
    believe(CARDS[ADA])
    record = {
        "minimum_inference": minimum,
        "files": {file: header(state, metadata) for file, (state, metadata) in files.items()},
        "diffusion_models": readings,
        "text_encoders": read_text_encoders(ADA),
        **read_others(ADA),
    }
    believe(CARDS["7.5, 16 GiB"])
    record["vae"] += read_others("7.5, 16 GiB")["vae"]
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--comfyui", type=Path, action="append", required=True)
    parser.add_argument("--one", action="store_true", help="internal: print to stdout instead")
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(one(arguments.comfyui[0])))
        return
    record: dict[str, Any] = {}
    for checkout in arguments.comfyui:
        done = subprocess.run(
            [sys.executable, __file__, "--one", "--comfyui", str(checkout.resolve())], capture_output=True, text=True
        )
        if done.returncode:
            sys.exit(done.stderr)
        version = (checkout / "comfyui_version.py").read_text().split('"')[-2]
        record[version] = json.loads(done.stdout.splitlines()[-1])
    versions = list(record)
    for older in versions[1:]:  # the same files: their headers once
        for file, described in list(record[older]["files"].items()):
            if record[versions[0]]["files"].get(file) == described:
                del record[older]["files"][file]
    DATA.write_text(json.dumps(record, separators=(",", ":")).replace('{"file"', '\n{"file"') + "\n")


if __name__ == "__main__":
    main()
