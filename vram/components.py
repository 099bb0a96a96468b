"""What part a model plays in making a video."""

from __future__ import annotations

from enum import Enum


class ComponentRole(str, Enum):
    """The roles that memory policies tell apart; `clip_vision` is an OTHER with a name of its own in reports."""

    GENERATOR = "generator"
    TEXT_ENCODER = "text_encoder"
    VAE = "vae"
    CLIP_VISION = "clip_vision"
    OTHER = "other"
