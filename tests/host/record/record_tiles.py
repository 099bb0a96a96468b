"""Runs a real ComfyUI's fallback to tiles and writes which tiles it takes, one row for each video and card.

    PYTHON_OF_COMFYUI tests/host/record/record_tiles.py --comfyui CHECKOUT --out tests/data/tiles.json

Nothing is decoded: the VAE is ComfyUI's own, made for the shapes of its weights, and its model raises an out-of-memory error,
so that the fallback sizes its tiles for the card that is pretended. Rows of other versions stay in the file.
"""

from __future__ import annotations

import argparse
import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any, cast

COLUMNS = ("comfyui", "vae", "card_total", "frames", "height", "width", "tile_frames", "tile_rows", "tile_columns")
GIB = 1 << 30
CARDS = (6, 8, 12, 16, 24, 32)
VIDEOS = (
    (1, 480, 832),
    (13, 720, 1280),
    (33, 480, 832),
    (81, 256, 256),
    (81, 480, 832),
    (81, 720, 1280),
    (121, 704, 1280),
    (81, 1080, 1920),
    (17, 2160, 3840),
    (241, 480, 480),
)


def vae_of(kind: str) -> Any:
    """ComfyUI's VAE for weights that are there in shape only."""
    import torch

    sd = import_module("comfy.sd")
    keys: dict[str, tuple[int, ...]] = {"decoder.middle.0.residual.0.gamma": (384 if kind == "2.1" else 1024, 1, 1, 1)}
    if kind == "2.2":
        keys["decoder.upsamples.0.upsamples.0.residual.2.weight"] = (1024, 1024, 3, 3, 3)
        keys["decoder.conv1.weight"] = (1024, 48, 3, 3, 3)
    else:
        keys["encoder.conv1.weight"] = (96, 3, 3, 3, 3)
        keys["decoder.head.2.weight"] = (3, 96, 3, 3, 3)
        keys["decoder.head.0.gamma"] = (96, 1, 1, 1)
    with torch.device("meta"):
        return sd.VAE(sd={name: torch.empty(shape) for name, shape in keys.items()}, dtype=torch.float16)


def fall_back(vae: Any, kind: str, card_total: int, video: tuple[int, int, int]) -> tuple[int, int, int]:
    """The tile that a decode of `video` ends with on a card of `card_total` bytes: frames, rows and columns of the latent."""
    import torch

    model_management = cast(Any, import_module("comfy.model_management"))
    frames, height, width = video
    stride, channels = (8, 16) if kind == "2.1" else (16, 48)
    seen: list[tuple[int, int, int]] = []

    def out_of_memory(*args: Any, **kwargs: Any) -> Any:
        raise torch.cuda.OutOfMemoryError("out of memory")

    def tiled(samples: Any, tile_t: int = 999, tile_x: int = 32, tile_y: int = 32, overlap: Any = None) -> Any:
        seen.append((min(tile_t, samples.shape[2]), tile_y, tile_x))
        return torch.empty((1, 3, 1, 1, 1))

    vae.first_stage_model.decode = out_of_memory
    vae.decode_tiled_3d = tiled
    model_management.load_models_gpu = lambda *args, **kwargs: None
    model_management.get_total_memory = lambda *args, **kwargs: card_total
    vae.decode(torch.zeros((1, channels, (frames - 1) // 4 + 1, height // stride, width // stride)))
    return seen[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfyui", type=Path, required=True, help="a ComfyUI checkout")
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write or to add to")
    options = parser.parse_args()
    sys.path[:0] = [str(options.comfyui.resolve())]
    sys.argv = ["main.py", "--cpu"]
    import_module("comfy.options").enable_args_parsing()
    version = import_module("comfyui_version").__version__
    stored = json.loads(options.out.read_text(encoding="utf-8")) if options.out.exists() else {"rows": []}
    rows = [row for row in stored["rows"] if row[0] != version]
    for kind in ("2.1", "2.2"):
        vae = vae_of(kind)
        for card in CARDS:
            for video in VIDEOS:
                rows.append([version, kind, card * GIB, *video, *fall_back(vae, kind, card * GIB, video)])
    lines = ",\n".join("  " + json.dumps(row, separators=(",", ":")) for row in sorted(rows))
    options.out.write_text(f'{{\n "columns": {json.dumps(COLUMNS)},\n "rows": [\n{lines}\n ]\n}}\n', encoding="utf-8")
    print(f"{len(rows)} rows")


if __name__ == "__main__":
    main()
