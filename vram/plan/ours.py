"""What the planner has to know of this pack's own nodes that their types do not tell."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, NamedTuple

PASSES: Final[Mapping[str, str]] = {"VRAMHeadroomGate": "value", "VRAMHeadroomOffloadNow": "value"}
"""Nodes that hand one input on as it came, whatever it is: class -> that input."""

POLICY: Final = "VRAMHeadroomComponentPolicy"
"""The node that says what may become of the models that pass through it."""

DECODE: Final = "VRAMHeadroomVAEDecode"
"""The decode that turns to tiles only where the whole can't fit, and then to the largest that do (nodes/decoding.py)."""

STANDS_FOR: Final[Mapping[str, str]] = {
    "VRAMHeadroomLoadDiffusionModel": "UNETLoader",
    "VRAMHeadroomLoadTextEncoder": "CLIPLoader",
}
"""Loader of ours -> the stock one with the same file widget and output, where another pack has one for other files."""

NOTHING: Final = "none"
"""What a file widget says where no file is chosen."""


class Part(NamedTuple):
    """Of a loader of several models, one output: which widget names its file, and which are its load options."""

    file: str
    otherwise: str | None = None
    """The widget that names it where this one says NOTHING."""
    options: Mapping[str, str] = {}
    """Load option of the single loader -> widget."""


PARTS: Final[Mapping[tuple[str, int], Part]] = {
    ("VRAMHeadroomLoadPipeline", 0): Part("high_noise_model", None, {"weight_dtype": "weight_dtype"}),
    ("VRAMHeadroomLoadPipeline", 1): Part("low_noise_model", "high_noise_model", {"weight_dtype": "weight_dtype"}),
    ("VRAMHeadroomLoadPipeline", 2): Part("text_encoder", None, {"device": "text_encoder_device"}),
    ("VRAMHeadroomLoadPipeline", 3): Part("vae"),
    ("VRAMHeadroomLoadPipeline", 4): Part("clip_vision"),
}
"""By class and output (nodes/loaders.py, LoadPipeline)."""


def option_widget(class_type: str, file_widget: str, option: str) -> str:
    """What a loader calls the load option of the file that `file_widget` names: the option's own name but for our PARTS."""
    parts = (part for (name, _), part in PARTS.items() if name == class_type and file_widget in (part.file, part.otherwise))
    return next((part.options[option] for part in parts if option in part.options), option)
