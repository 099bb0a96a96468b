"""The picture that ComfyUI ships in its input folder, so that nodes which load one have one."""

from pathlib import Path

import torch

from .behaviours.media import write_png


def write_example_image(path: Path) -> None:
    """A soft gradient."""
    row = torch.linspace(0, 1, 128)
    pixels = torch.stack([row.expand(128, 128), row[:, None].expand(128, 128), torch.full((128, 128), 0.5)], -1)
    write_png(str(path), pixels[None])
