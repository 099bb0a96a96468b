"""A long video sampled in windows of a few frames, whose results are averaged."""

from typing import Any

import torch


class IndexListContextWindow:
    """Frames that are sampled together."""

    def __init__(
        self,
        index_list: list[int],
        dim: int = 0,
        total_frames: int = 0,
        modality_windows: dict[int, Any] | None = None,
        context_overlap: int = 0,
    ) -> None:
        self.index_list = index_list
        self.dim = dim
        self.total_frames = total_frames


class ContextHandler:
    """Windows of `length` frames, each `overlap` of them further."""

    def __init__(self, length: int, overlap: int) -> None:
        self._length, self._step = length, length - overlap

    def should_use_context(self, model: Any, conds: Any, x_in: torch.Tensor, timestep: Any, model_options: Any) -> bool:
        return x_in.shape[2] > self._length

    def execute(
        self,
        calc_cond_batch: Any,
        model: Any,
        conds: list[Any],
        x_in: torch.Tensor,
        timestep: torch.Tensor,
        model_options: dict[str, Any],
    ) -> list[torch.Tensor]:
        sums, counts = [torch.zeros_like(x_in) for _ in conds], torch.zeros_like(x_in)
        frames = x_in.shape[2]
        for start in range(0, frames - self._length + self._step, self._step):
            index = list(range(min(start, frames - self._length), min(start, frames - self._length) + self._length))
            model_options["transformer_options"]["context_window"] = IndexListContextWindow(index, 2, frames)
            for total, out in zip(sums, calc_cond_batch(model, conds, x_in[:, :, index], timestep, model_options), strict=True):
                total[:, :, index] += out
            counts[:, :, index] += 1
        return [total / counts for total in sums]
