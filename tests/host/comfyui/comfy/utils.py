"""Progress bars, and the few tensor helpers the stand-in's nodes need."""

import json
import struct
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F  # noqa: N812

PROGRESS_BAR_ENABLED = True
PROGRESS_BAR_HOOK: Callable[..., None] | None = None
PROGRESS_THROTTLE_MIN_INTERVAL = 0.1
PROGRESS_THROTTLE_MIN_PERCENT = 0.5


def set_progress_bar_global_hook(function: Callable[..., None]) -> None:
    global PROGRESS_BAR_HOOK
    PROGRESS_BAR_HOOK = function


class ProgressBar:
    """Tells the hook how far a node is: the first and the last value always, others at most ten times a second."""

    def __init__(self, total: int, node_id: str | None = None) -> None:
        self.total = total
        self.current = 0
        self.hook = PROGRESS_BAR_HOOK
        self.node_id = node_id
        self._sent_at = 0.0
        self._sent_value = -1

    def update_absolute(self, value: int, total: int | None = None, preview: Any = None) -> None:
        self.total = self.total if total is None else total
        self.current = min(value, self.total)
        now = time.perf_counter()
        waited = now - self._sent_at >= PROGRESS_THROTTLE_MIN_INTERVAL
        moved = (self.current - max(0, self._sent_value)) * 100 >= PROGRESS_THROTTLE_MIN_PERCENT * self.total
        always = preview is not None or self._sent_value < 0 or self.current >= self.total
        if self.hook is not None and (always or (waited and moved)):
            self.hook(self.current, self.total, preview, node_id=self.node_id)
            self._sent_at, self._sent_value = now, self.current

    def update(self, value: int) -> None:
        self.update_absolute(self.current + value)


def save_torch_file(sd: dict[str, torch.Tensor], ckpt: str, metadata: dict[str, str] | None = None) -> None:
    """A safetensors file of 32 bit tensors."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    parts: list[bytes] = []
    end = 0
    for name, tensor in sd.items():
        data = tensor.float().contiguous().numpy().tobytes()
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [end, end + len(data)]}
        parts.append(data)
        end += len(data)
    text = json.dumps(header).encode()
    with open(ckpt, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text + b"".join(parts))


def common_upscale(samples: torch.Tensor, width: int, height: int, upscale_method: str, crop: str) -> torch.Tensor:
    """Resize (batch, channels, height, width); `center` keeps the proportions and cuts the rest."""
    if crop == "center":
        old_height, old_width = samples.shape[-2:]
        if old_width * height > old_height * width:
            cut = round(old_width - old_height * width / height) // 2
            samples = samples.narrow(-1, cut, old_width - 2 * cut)
        else:
            cut = round(old_height - old_width * height / width) // 2
            samples = samples.narrow(-2, cut, old_height - 2 * cut)
    mode = "nearest" if upscale_method == "nearest-exact" else upscale_method
    return F.interpolate(samples, size=(height, width), mode=mode)
