"""Tiny WAN-shaped torch models that stand for real checkpoint files: quick to compute, and in the books as heavy as the file.

Which family a file is, its widths and its bytes come from its safetensors header. Weights are random but fixed by the file's
name, so the same prompt gives the same output. The cost of a forward does not grow with the video: latents are pooled first.
"""

import json
import math
import os
import struct
import weakref
import zlib
from collections import Counter
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from .faults import faults

if TYPE_CHECKING:
    from comfy_aimdo.model_vbar import ModelVBAR

    from vram.device import Booking, SimulatedCard

    from .pages import CardPages
    from .streaming import Staged

WIDTH = 32
TEXT_WIDTH = 64
TEXT_TOKENS = 512
TOKEN_GRID = (4, 8, 8)
LATENT_SCALE = 0.4  # what ComfyUI's latent formats do to a latent before it is sampled, and undo after


class Tensor(NamedTuple):
    shape: tuple[int, ...]
    dtype: str
    nbytes: int


class Module(NamedTuple):
    """One module of the real model: its weight, bias and scales together."""

    name: str
    nbytes: int
    aligned_bytes: int
    """With each tensor rounded up to 1 KiB, as DynamicVRAM lays them out (0.33, memory_management.py, vram_aligned_size)."""


class ModelFile:
    """The header of a safetensors file: the only thing of it that is ever read."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.name = os.path.basename(path)
        with open(path, "rb") as file:
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            header = file.read(length) if 0 < length < 100_000_000 else b""
        if len(header) != length or not header:
            raise RuntimeError(f"Error while deserializing header of {path}: not a whole safetensors file")
        entries: dict[str, Any] = json.loads(header)
        entries.pop("__metadata__", None)
        self.tensors = {
            key.removeprefix("model.diffusion_model."): Tensor(
                tuple(entry["shape"]), entry["dtype"], entry["data_offsets"][1] - entry["data_offsets"][0]
            )
            for key, entry in entries.items()
        }

    @cached_property
    def tensor_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @cached_property
    def layers(self) -> tuple[int, ...]:
        """Bytes of each module (its weight, bias and scales together), the largest first."""
        sizes: Counter[str] = Counter()
        for key, tensor in self.tensors.items():
            sizes[key.rpartition(".")[0]] += tensor.nbytes
        return tuple(sorted(sizes.values(), reverse=True))

    @cached_property
    def modules(self) -> tuple[Module, ...]:
        """In the order of their names, block 2 before block 10: about the order in which a forward comes to them."""
        sizes: dict[str, list[int]] = {}
        for key, tensor in self.tensors.items():
            sizes.setdefault(key.rpartition(".")[0], []).append(tensor.nbytes)
        return tuple(
            Module(name, sum(sizes[name]), sum(-(-size // 1024) * 1024 for size in sizes[name]))
            for name in sorted(sizes, key=_numbers_as_numbers)
        )

    @property
    def is_diffusion_model(self) -> bool:
        return "head.modulation" in self.tensors and "patch_embedding.weight" in self.tensors

    @property
    def is_text_encoder(self) -> bool:
        return any(key.startswith("encoder.block.") for key in self.tensors)

    @property
    def is_vae(self) -> bool:
        return "decoder.middle.0.residual.0.gamma" in self.tensors

    @property
    def is_clip_vision(self) -> bool:
        return any(key.startswith(("vision_model.", "visual.")) for key in self.tensors)


def _numbers_as_numbers(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (0, part) for part in name.split(".")]


class StandInModel(nn.Module):
    """The module a patcher handles: a few real layers, and the books of the real file."""

    # A dynamic patcher sets these three, by device and by patcher.
    dynamic_vbars: dict[Any, "ModelVBAR"]
    dynamic_pins: dict[Any, dict[str, bool]]
    dynamic_patchers: set[int]

    def __init__(self, file: ModelFile) -> None:
        super().__init__()
        self.file = file
        self.device: torch.device | None = None
        self.dtype = torch.float32
        self.model_loaded_weight_memory = 0
        self.current_weight_patches_uuid: Any = None
        self.current_patcher: Any = None
        self.booking: Booking | None = None
        self.finalizer: weakref.finalize[..., Any] | None = None
        self.staged: Staged | None = None
        """Its layers, once a dynamic patcher has loaded it."""

    def forget_booking(self, card: "SimulatedCard | CardPages") -> None:
        if self.booking is not None:
            if self.finalizer is not None:
                self.finalizer.detach()
            card.release(self.booking)
            self.booking = self.finalizer = None

    def memory_required(self, input_shape: Any, cond_shapes: Any = None) -> float:
        return 0.0


class LatentFormat(NamedTuple):
    latent_channels: int
    spacial_downscale_ratio: int
    temporal_downscale_ratio: int = 4
    latent_dimensions: int = 3


class Block(nn.Module):
    """Self attention, cross attention to the text, feed-forward: a transformer block as WAN's, narrow."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.query, self.key_value = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH)
        self.ffn = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(approximate="tanh"), nn.Linear(4 * WIDTH, WIDTH))

    def forward(
        self, x: torch.Tensor, text: torch.Tensor, kept: dict[str, Any] | None = None, text_kept: dict[str, Any] | None = None
    ) -> torch.Tensor:
        """`kept`, `text_kept`: caches of a causal model's earlier tokens and of the text, written to in the order of 0.33's."""
        faults.reach("attention")
        q, k, v = self.qkv(self.norm1(x)).chunk(3, -1)
        if kept is not None:
            start, end = kept["end"], kept["end"] + k.shape[1]
            kept["k"][:, start:end], kept["v"][:, start:end], kept["end"] = k, v, end
            k, v = kept["k"][:, :end], kept["v"][:, :end]
        x = x + self.out(F.scaled_dot_product_attention(q, k, v))
        faults.reach("attention", after=True)
        if text_kept is not None and text_kept.get("is_init"):
            k, v = text_kept["k"], text_kept["v"]
        else:
            k, v = self.key_value(text).chunk(2, -1)
            if text_kept is not None:
                text_kept.update(k=k, v=v, is_init=True)
        x = x + F.scaled_dot_product_attention(self.query(self.norm2(x)), k, v)
        return x + self.ffn(self.norm3(x))


class TinyDiT(nn.Module):
    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.patch_embedding = nn.Conv3d(in_channels, WIDTH, kernel_size=(1, 2, 2), stride=(1, 2, 2))
        self.text_embedding = nn.Linear(TEXT_WIDTH, WIDTH)
        self.time_embedding = nn.Linear(1, WIDTH)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(WIDTH, out_channels)

    def forward(
        self, x: torch.Tensor, timestep: torch.Tensor, context: torch.Tensor, transformer_options: Any = None, **options: Any
    ) -> torch.Tensor:
        from comfy.patcher_extension import WrapperExecutor, WrappersMP, get_all_wrappers

        wrappers = get_all_wrappers(WrappersMP.DIFFUSION_MODEL, transformer_options)
        executor = WrapperExecutor.new_class_executor(self._forward, self, wrappers)
        return executor.execute(x, timestep, context, transformer_options or {})

    def _forward(
        self, x: torch.Tensor, timestep: torch.Tensor, context: torch.Tensor, transformer_options: dict[str, Any]
    ) -> torch.Tensor:
        frames, height, width = x.shape[2:]
        grid = (min(frames, TOKEN_GRID[0]), 2 * TOKEN_GRID[1], 2 * TOKEN_GRID[2])
        embedded = self.patch_embedding(F.adaptive_avg_pool3d(x, grid))
        shape = embedded.shape[2:]
        transformer_options["grid_sizes"] = tuple(shape)
        tokens = embedded.flatten(2).transpose(1, 2) + self.time_embedding(timestep.reshape(-1, 1, 1).float())
        text = self.text_embedding(context)
        causal = transformer_options.get("ar_state")
        for index, block in enumerate(self.blocks):
            transformer_options["block_index"] = index
            kept = (causal["kv_caches"][index], causal["crossattn_caches"][index]) if causal else (None, None)
            tokens = block(tokens, text, *kept)
        coarse = self.head(tokens).transpose(1, 2).reshape(x.shape[0], -1, *shape)
        return F.interpolate(coarse, size=(frames, height, width), mode="trilinear", align_corners=False)

    # What a causal model offers beside.

    def init_kv_caches(self, batch: int, frames: int) -> list[dict[str, Any]]:
        tokens = frames * TOKEN_GRID[1] * TOKEN_GRID[2]
        return [{"k": torch.zeros(batch, tokens, WIDTH), "v": torch.zeros(batch, tokens, WIDTH), "end": 0} for _ in self.blocks]

    def init_crossattn_caches(self) -> list[dict[str, Any]]:
        return [{"is_init": False} for _ in self.blocks]


class FlowSampling:
    """How a flow model's latent is mixed with noise (0.33, model_sampling.py, CONST)."""

    def noise_scaling(
        self, sigma: torch.Tensor, noise: torch.Tensor, latent_image: torch.Tensor, max_denoise: bool = False
    ) -> torch.Tensor:
        return sigma * noise + (1.0 - sigma) * latent_image

    def inverse_noise_scaling(self, sigma: torch.Tensor, latent: torch.Tensor) -> torch.Tensor:
        return latent / (1.0 - sigma)


class WAN21(StandInModel):
    """A WAN diffusion model, 2.1 or 2.2, under the name ComfyUI gives it."""

    def __init__(self, file: ModelFile) -> None:
        super().__init__(file)
        self.dim, self.in_dim = file.tensors["patch_embedding.weight"].shape[:2]
        self.out_dim = math.prod(file.tensors["head.head.weight"].shape[:1]) // 4
        self.diffusion_model = TinyDiT(self.in_dim, self.out_dim)
        # ComfyUI 0.33, supported_models.py: dim / 2222
        self.memory_usage_factor = self.dim / 2222
        self.latent_format = LatentFormat(self.out_dim, 16 if self.out_dim == 48 else 8)
        self.model_sampling = FlowSampling()

    def memory_required(self, input_shape: Any, cond_shapes: Any = None) -> float:
        """ComfyUI's estimate of one forward (0.33, model_base.py)."""
        import comfy.model_management as mm

        area = input_shape[0] * math.prod(input_shape[2:])
        if mm.xformers_enabled() or mm.pytorch_attention_flash_attention():
            return area * mm.dtype_size(self.dtype) * 0.01 * self.memory_usage_factor * 2**20
        return area * 0.15 * self.memory_usage_factor * 2**20

    def process_latent_in(self, latent: torch.Tensor) -> torch.Tensor:
        return latent * LATENT_SCALE

    def process_latent_out(self, latent: torch.Tensor) -> torch.Tensor:
        return latent / LATENT_SCALE

    def apply_model(
        self,
        x: torch.Tensor,
        t: torch.Tensor,
        c_concat: torch.Tensor | None = None,
        c_crossattn: torch.Tensor | None = None,
        control: Any = None,
        transformer_options: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        from comfy.patcher_extension import WrapperExecutor, WrappersMP, get_all_wrappers

        wrappers = get_all_wrappers(WrappersMP.APPLY_MODEL, transformer_options)
        executor = WrapperExecutor.new_class_executor(self._apply_model, self, wrappers)
        return executor.execute(x, t, c_concat, c_crossattn, control, transformer_options or {}, **kwargs)

    def _apply_model(
        self,
        x: torch.Tensor,
        t: torch.Tensor,
        c_concat: torch.Tensor | None,
        c_crossattn: torch.Tensor,
        control: Any,
        transformer_options: dict[str, Any],
    ) -> torch.Tensor:
        """What is left of `x` without its noise."""
        from comfy import samplers

        given = x
        if self.in_dim > x.shape[1]:
            extra = torch.zeros(x.shape[0], self.in_dim - x.shape[1], *x.shape[2:])
            if c_concat is not None:
                extra[:, : c_concat.shape[1]] = c_concat[:, : extra.shape[1]]
            given = torch.cat([x, extra], dim=1)
        with samplers.on_card_while(self, x, transformer_options):
            velocity = self.diffusion_model(given, t, c_crossattn, transformer_options.copy())
        patches = self.current_patcher.patches.values() if self.current_patcher else ()
        gain = 1.0 + 0.01 * sum(strength for group in patches for strength, *_ in group)
        return x - t.reshape(-1, 1, 1, 1, 1) * velocity * gain


class WAN21_CausalAR(WAN21):  # noqa: N801 - ComfyUI's name
    """A model that makes a video frame by frame."""


class WanTEModel(StandInModel):
    """UMT5-shaped: bytes to embeddings, one encoder block, padded to 512 tokens."""

    def __init__(self, file: ModelFile) -> None:
        super().__init__(file)
        self.shared = nn.Embedding(256, TEXT_WIDTH)
        self.encoder = nn.TransformerEncoderLayer(TEXT_WIDTH, 4, 2 * TEXT_WIDTH, dropout=0.0, batch_first=True)
        self.encoder.eval()

    def encode_token_weights(self, tokens: list[int]) -> torch.Tensor:
        embedded = self.encoder(self.shared(torch.tensor([tokens])))
        return F.pad(embedded, (0, 0, 0, TEXT_TOKENS - embedded.shape[1]))


class WanVAE(StandInModel):
    """A causal video VAE's shape: (1 + 4k) frames to (1 + k) latents, 8 or 16 pixels to one."""

    def __init__(self, file: ModelFile) -> None:
        super().__init__(file)
        self.is_22 = "decoder.upsamples.0.upsamples.0.residual.2.weight" in file.tensors
        self.channels = 48 if self.is_22 else 16
        self.stride = 16 if self.is_22 else 8
        self.to_pixels = nn.Conv3d(self.channels, 3, kernel_size=(3, 1, 1), padding=(1, 0, 0))
        self.to_latent = nn.Conv3d(3, self.channels, kernel_size=(3, 1, 1), padding=(1, 0, 0))

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        small = torch.sigmoid(self.to_pixels(z))
        frames = max(0, z.shape[2] * 4 - 3)
        # The first latent is one frame, each later one is four.
        source = torch.cat([torch.zeros(1), torch.arange(1, z.shape[2]).repeat_interleave(4)]).long()[:frames]
        return small[:, :, source].repeat_interleave(self.stride, 3).repeat_interleave(self.stride, 4)

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        latents = max(1, (pixels.shape[2] + 3) // 4)
        frames = pixels[:, :, torch.arange(latents).mul(4).clamp(max=pixels.shape[2] - 1)]
        small = F.avg_pool3d(frames, (1, self.stride, self.stride))
        return self.to_latent(small)


class CLIPVisionModelProjection(StandInModel):
    """A vision tower's shape: an image to 257 tokens."""

    def __init__(self, file: ModelFile) -> None:
        super().__init__(file)
        self.patches = nn.Conv2d(3, TEXT_WIDTH, kernel_size=14, stride=14)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        patches = self.patches(F.interpolate(pixels, size=(224, 224))).flatten(2).transpose(1, 2)
        return torch.cat([patches.mean(1, keepdim=True), patches], 1)


def build(kind: type[StandInModel], file: ModelFile) -> Any:
    """A model of this kind whose weights are fixed by the file's name."""
    with torch.random.fork_rng(devices=[]), torch.inference_mode(False):
        torch.manual_seed(zlib.crc32(file.name.encode()))
        return kind(file).requires_grad_(False)
