"""Where text and pictures are encoded: a call that can be run again after an error."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, Protocol

import torch

from .seams import ENCODERS, SeamTable


class EncoderRescuer(Protocol):
    def encoder(self, call: Callable[[], Any], patcher: Any) -> Any:
        """What `call` answers, however often it had to be called. Worker thread."""
        ...


class HostEncoders:
    """CLIP.encode_from_tokens and ClipVisionModel.encode_image set all they go by when they begin, so they can be run again."""

    def __init__(self, seams: SeamTable) -> None:
        self._rescuer: EncoderRescuer | None = None
        clip = getattr(importlib.import_module("comfy.sd"), "CLIP", None)
        vision = getattr(importlib.import_module("comfy.clip_vision"), "ClipVisionModel", None)
        seams.wrap_all(ENCODERS, [(clip, "encode_from_tokens", self._around), (vision, "encode_image", self._around)])

    def rescue_with(self, rescuer: EncoderRescuer) -> None:
        self._rescuer = rescuer

    def _around(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        patcher = getattr(args[0], "patcher", None) if args else None
        if self._rescuer is None or patcher is None:
            return original(*args, **kwargs)
        random = torch.get_rng_state()

        def call() -> Any:
            torch.set_rng_state(random)
            return original(*args, **kwargs)

        return self._rescuer.encoder(call, patcher)
