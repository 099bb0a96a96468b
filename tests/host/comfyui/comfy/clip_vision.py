"""The CLIP vision object that a loader returns."""

from typing import Any

import torch
from standin import peaks
from standin.card import Booked
from standin.faults import faults
from standin.models import CLIPVisionModelProjection, ModelFile, build
from standin.streaming import forward

from . import model_management, model_patcher


class Output(dict[str, Any]):
    """Hidden states by name, as attributes too."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError as error:
            raise AttributeError(name) from error


class ClipVisionModel:
    def __init__(self, model: CLIPVisionModelProjection) -> None:
        self.model = model
        self.load_device = model_management.text_encoder_device()
        self.dtype = model_management.text_encoder_dtype(self.load_device)
        offload_device = model_management.text_encoder_offload_device()
        self.patcher = model_patcher.CoreModelPatcher(model, self.load_device, offload_device)

    def encode_image(self, image: torch.Tensor, crop: bool = True) -> Output:
        model_management.load_model_gpu(self.patcher)
        activations = Booked(peaks.CLIP_VISION_BYTES * image.shape[0], "CLIP vision activations", self.load_device)
        with activations, forward(self.patcher):
            faults.reach("vision")
            hidden = self.model(image[..., :3].movedim(-1, 1).float())
            faults.reach("vision", after=True)
        return Output(last_hidden_state=hidden, image_embeds=hidden[:, 0], penultimate_hidden_states=hidden)


def load(ckpt_path: str) -> ClipVisionModel | None:
    file = ModelFile(ckpt_path)
    return ClipVisionModel(build(CLIPVisionModelProjection, file)) if file.is_clip_vision else None
