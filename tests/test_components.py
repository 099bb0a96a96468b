"""Roles and models are found by class, by layers and by name, in the real diffusers WAN and in things shaped like others."""

from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest
import tinywan
import torch
from torch import nn
from vram_headroom.vram.components import ComponentRole, FoundComponent, find_components, role_of

GENERATOR, TEXT, VAE, VISION, OTHER = (
    ComponentRole.GENERATOR,
    ComponentRole.TEXT_ENCODER,
    ComponentRole.VAE,
    ComponentRole.CLIP_VISION,
    ComponentRole.OTHER,
)


def module(class_name: str = "Thing", *layers: str, **parts: nn.Module) -> nn.Module:
    """A module of a class of that name, with some layer of each name, these parts, and one number of its own to place."""
    made: nn.Module = type(class_name, (nn.Module,), {})()
    for name, part in (parts | {name: nn.Linear(1, 1) for name in layers}).items():
        made.add_module(name, part)
    made.register_buffer("weight", torch.zeros(1))
    return made


def derived(thing: Any, **members: object) -> Any:
    """The same object, of a class of unknown name below its own."""
    thing.__class__ = type("Mine", (type(thing),), members)
    return thing


def refuse(asked: object) -> NoReturn:
    raise RuntimeError("not to be read")


class Patcher:
    """Shaped like ComfyUI's ModelPatcher."""

    def __init__(self, model: object) -> None:
        self.model = model
        self.load_device = torch.device("cpu", 0)
        self.parent: object = None

    def model_size(self) -> int:
        return 4

    def clone(self) -> "Patcher":
        clone = Patcher(self.model)
        clone.parent = self
        return clone


def roles(source: object) -> dict[str, ComponentRole]:
    return {found.name: found.role for found in find_components(source)}


def models(source: object) -> list[Any]:
    return [found.model for found in find_components(source)]


# diffusers, as installed


def test_a_diffusers_wan_pipeline_gives_its_three_models_and_no_scheduler_or_tokenizer() -> None:
    pipe = tinywan.pipeline()
    assert set(find_components(pipe)) == {
        FoundComponent("vae", VAE, pipe.vae),
        FoundComponent("text_encoder", TEXT, pipe.text_encoder),
        FoundComponent("transformer", GENERATOR, pipe.transformer),
    }


def test_two_experts_are_two_generators() -> None:
    pipe = tinywan.pipeline(experts=2)
    assert roles(pipe) == {"vae": VAE, "text_encoder": TEXT, "transformer": GENERATOR, "transformer_2": GENERATOR}
    assert pipe.transformer is not pipe.transformer_2


def test_image_to_video_adds_the_image_encoder() -> None:
    expected = {"vae": VAE, "text_encoder": TEXT, "image_encoder": VISION, "transformer": GENERATOR}
    assert roles(tinywan.image_pipeline()) == expected


def test_a_components_manager_gives_the_names_things_were_added_under() -> None:
    pipe = tinywan.image_pipeline()
    assert roles(tinywan.manager_of(pipe.components, "wan")) == roles(pipe)


def test_two_collections_of_one_manager_keep_their_generators_apart_and_their_shared_vae_once() -> None:
    first, second = tinywan.pipeline(), tinywan.generator(seed=9)
    manager = tinywan.manager_of(first.components, "wan")
    tinywan.manager_of({"transformer": second, "other_vae": first.vae}, "other", manager)
    found = {found.name: found.model for found in find_components(manager)}
    assert list(found) == ["vae", "text_encoder", "transformer", "transformer (2)"]
    assert found["transformer (2)"] is second


def test_an_object_that_holds_a_pipeline_gives_the_pipelines_models() -> None:
    holder = SimpleNamespace(pipe=tinywan.pipeline(), seed=3)
    assert roles(holder) == {"pipe.vae": VAE, "pipe.text_encoder": TEXT, "pipe.transformer": GENERATOR}


def test_a_pipeline_whose_components_cannot_be_read_is_searched_by_attribute() -> None:
    pipe = derived(tinywan.pipeline(), components=property(refuse))
    assert roles(pipe) == {"vae": VAE, "text_encoder": TEXT, "transformer": GENERATOR}


def test_the_tiny_pipeline_makes_the_same_video_twice() -> None:
    pipe = tinywan.pipeline(experts=2)
    first = tinywan.make_video(pipe)
    assert first.shape == (1, tinywan.FRAMES, 3, tinywan.HEIGHT, tinywan.WIDTH)
    assert first.std() > 0
    assert torch.equal(first, tinywan.make_video(pipe))


# roles


@pytest.mark.parametrize("name", ["vae", "text_encoder", "x", "scheduler", "controlnet"])
def test_the_class_goes_before_the_name(name: str) -> None:
    assert role_of(name, tinywan.generator()) is GENERATOR
    assert role_of(name, tinywan.vace_generator()) is GENERATOR
    assert role_of(name, tinywan.vae()) is VAE
    assert role_of(name, tinywan.text_encoder()) is TEXT
    assert role_of(name, tinywan.image_encoder()) is VISION


@pytest.mark.parametrize(
    ("role", "class_names"),
    [
        (GENERATOR, "WanTransformer3DModel WanVACETransformer3DModel WanAnimateTransformer3DModel WanModel WanModel_S2V"),
        (
            GENERATOR,
            "CausalWanModel SCAIL2WanModel WanDiffusionWrapper WAN21 WAN21_Vace WAN22_Animate WAN_Animate2 WanVideoModel",
        ),
        (GENERATOR, "FluxTransformer2DModel UNet2DConditionModel"),
        (VAE, "AutoencoderKLWan WanVAE Wan2_1_VAE WanVideoVAE WanVAEWrapper AutoencodingEngine TAEHV TAESD AutoencoderTiny"),
        (
            TEXT,
            "UMT5EncoderModel T5EncoderModel MT5EncoderModel T5 T5Encoder WanTEModel WanT5Model UMT5XXlModel WanTextEncoder",
        ),
        (TEXT, "CLIPTextModel CLIPTextModelWithProjection SD1ClipModel SDXLClipModel"),
        (VISION, "CLIPVisionModel CLIPVisionModelWithProjection CLIPVisionModelProjection SiglipVisionModel WanImageEncoder"),
        (OTHER, "WanUni3CControlnet WanControlNetModel Wav2Vec2Model StableDiffusionSafetyChecker"),
    ],
)
def test_names_of_implementations_tell_the_role(role: ComponentRole, class_names: str) -> None:
    told = {name: role_of("x", module(name)) for name in class_names.split()}
    assert told == dict.fromkeys(class_names.split(), role)


def test_a_subclass_of_unknown_name_keeps_its_parents_role() -> None:
    assert role_of("x", derived(module("WanModel"))) is GENERATOR
    assert role_of("x", derived(tinywan.vae())) is VAE


@pytest.mark.parametrize(
    ("role", "names"),
    [
        (GENERATOR, ("patch_embedding", "blocks", "head")),
        (GENERATOR, ("patch_embedding", "blocks", "proj_out", "rope")),
        (GENERATOR, ("diffusion_model", "model_sampling")),
        (VAE, ("encoder", "decoder", "quant_conv")),
        (VAE, ("encoder", "decoder", "post_quant_conv")),
        (VAE, ("encoder", "decoder", "conv1", "conv2")),
        (TEXT, ("shared", "encoder")),
        (TEXT, ("shared", "encoder", "decoder", "conv1")),
        (TEXT, ("embed_tokens", "layers", "norm")),
        (TEXT, ("token_embedding", "blocks", "norm")),
        (VISION, ("visual", "textual")),
        (VISION, ("embeddings", "encoder", "post_layernorm")),
        (OTHER, ("patch_embedding", "blocks")),
        (OTHER, ("encoder", "decoder")),
        (OTHER, ("linear_1", "linear_2")),
    ],
)
def test_layers_tell_the_role_of_an_unknown_class(role: ComponentRole, names: tuple[str, ...]) -> None:
    assert role_of("x", module("Thing", *names)) is role


def test_layers_go_before_the_name_so_an_oddly_named_generator_is_found() -> None:
    odd = module("Thing", "patch_embedding", "blocks", "head")
    assert roles({"vae_but_not_really": odd}) == {"vae_but_not_really": GENERATOR}
    assert roles(SimpleNamespace(zebra=odd)) == {"zebra": GENERATOR}


@pytest.mark.parametrize(
    ("role", "names"),
    [
        (GENERATOR, "generator transformer transformer_2 unet dit dit2 high_noise_model pipe.transformer"),
        (VAE, "vae tiny_vae first_stage_model autoencoder"),
        (TEXT, "text_encoder text_encoder_2 text_encoders.0 t5 clip te cond_stage_model"),
        (VISION, "image_encoder clip_vision"),
        (OTHER, "model x controlnet vocoder motion_encoder"),
    ],
)
def test_the_name_decides_only_when_class_and_layers_are_silent(role: ComponentRole, names: str) -> None:
    told = {name: role_of(name, nn.Linear(1, 1)) for name in names.split()}
    assert told == dict.fromkeys(names.split(), role)


def test_a_wrapper_has_the_role_of_what_it_wraps() -> None:
    inner = tinywan.generator()
    assert role_of("x", nn.DataParallel(inner)) is GENERATOR
    assert role_of("x", torch.compile(inner)) is GENERATOR
    assert role_of("x", module(model=inner, upcast=nn.Linear(1, 1))) is GENERATOR
    assert role_of("x", module(umt5xxl=module(transformer=tinywan.text_encoder()))) is TEXT


def test_a_module_that_wraps_itself_has_no_endless_role() -> None:
    snake = module()
    object.__setattr__(snake, "module", snake)
    assert role_of("x", snake) is OTHER
    assert role_of("x", None) is OTHER


# plain objects and mappings


def test_a_plain_object_and_a_mapping_give_the_same() -> None:
    parts: dict[str, object] = {
        "vae": tinywan.vae(),
        "generator": nn.Linear(1, 1),
        "text_encoder": nn.Linear(1, 1),
        "image_encoder": nn.Linear(1, 1),
        "upscaler": nn.Linear(1, 1),
        "scheduler": object(),
        "steps": 20,
        "dtype": torch.float16,
        "nothing": None,
    }
    expected = {"vae": VAE, "generator": GENERATOR, "text_encoder": TEXT, "image_encoder": VISION, "upscaler": OTHER}
    assert roles(parts) == expected
    assert roles(SimpleNamespace(**parts)) == expected


def test_attributes_behind_properties_and_slots_are_found() -> None:
    class Lazy:
        __slots__ = ("vae",)

        @property
        def text_encoder(self) -> nn.Module:
            return nn.Linear(1, 1)

    lazy = Lazy()
    lazy.vae = tinywan.vae()
    assert roles(lazy) == {"vae": VAE, "text_encoder": TEXT}


def test_plain_wrappers_as_in_wans_own_code_give_the_module_inside() -> None:
    encoder, low, high = tinywan.text_encoder(), tinywan.generator(), tinywan.generator(seed=1)
    visual = module("Thing", "visual", "textual")
    own = SimpleNamespace(
        text_encoder=SimpleNamespace(model=encoder, device="cpu", tokenizer=object()),
        vae=SimpleNamespace(model=tinywan.vae(), mean=torch.zeros(16)),
        clip=SimpleNamespace(model=visual),
        low_noise_model=low,
        high_noise_model=high,
    )
    expected = {"text_encoder": TEXT, "vae": VAE, "clip": VISION, "low_noise_model": GENERATOR, "high_noise_model": GENERATOR}
    assert roles(own) == expected
    assert models(own) == [encoder, own.vae.model, visual, low, high]


def test_a_pipeline_that_is_itself_a_module_is_taken_apart() -> None:
    pipe = module(
        "CausalInferencePipeline", generator=tinywan.generator(), text_encoder=tinywan.text_encoder(), vae=tinywan.vae()
    )
    assert roles(pipe) == {"generator": GENERATOR, "text_encoder": TEXT, "vae": VAE}


def test_a_single_module_is_one_component_under_its_class_name() -> None:
    assert roles(tinywan.vae()) == {"AutoencoderKLWan": VAE}
    assert roles(nn.Linear(1, 1)) == {"Linear": OTHER}


def test_a_text_encoder_with_two_towers_stays_one_model() -> None:
    both = module(vision_tower=tinywan.image_encoder(), language=tinywan.text_encoder())
    assert roles({"text_encoder": both}) == {"text_encoder": TEXT}


def test_a_list_of_models_is_numbered() -> None:
    assert roles({"text_encoders": [nn.Linear(1, 1), tinywan.text_encoder()]}) == {
        "text_encoders.0": TEXT,
        "text_encoders.1": TEXT,
    }


def test_a_shared_model_is_listed_once_under_its_first_name() -> None:
    shared = tinywan.generator()
    assert roles({"transformer": shared, "transformer_2": shared, "compiled": torch.compile(shared)}) == {
        "transformer": GENERATOR
    }


def test_a_module_without_weights_is_nothing_to_place() -> None:
    assert roles({"loss": nn.MSELoss(), "vae": tinywan.vae()}) == {"vae": VAE}


# shaped like ComfyUI


def test_a_patcher_is_one_component_and_stays_whole() -> None:
    patcher = Patcher(module("WAN21", diffusion_model=tinywan.generator()))
    assert find_components(patcher) == (FoundComponent("WAN21", GENERATOR, patcher),)


def test_things_with_a_patcher_give_the_patcher() -> None:
    clip = SimpleNamespace(patcher=Patcher(module("WanTEModel")), cond_stage_model=None)
    vae = SimpleNamespace(patcher=Patcher(module("WanVAE")), first_stage_model=None)
    tower = module("CLIPVisionModelProjection")
    vision = SimpleNamespace(patcher=Patcher(tower), model=tower, load_device=torch.device("cpu"))
    assert find_components(clip) == (FoundComponent("WanTEModel", TEXT, clip.patcher),)
    outputs = {"model": Patcher(module("WAN21")), "clip": clip, "vae": vae, "clip_vision": vision}
    assert roles(outputs) == {"model": GENERATOR, "clip": TEXT, "vae": VAE, "clip_vision": VISION}
    assert models(outputs) == [outputs["model"], clip.patcher, vae.patcher, vision.patcher]


def test_clones_of_a_patcher_and_its_module_are_one_model() -> None:
    patcher = Patcher(module("WAN21"))
    assert models([patcher, patcher.clone(), patcher.model]) == [patcher]


def test_a_patcher_around_something_that_is_no_module_still_counts() -> None:
    patcher = Patcher(SimpleNamespace(size=1))
    assert find_components({"vae": patcher}) == (FoundComponent("vae", VAE, patcher),)


def test_comfyuis_mark_on_a_text_encoders_patcher_tells_its_role() -> None:
    patcher = Patcher(module("SomethingNew"))
    patcher.__dict__["is_clip"] = True
    assert role_of("x", patcher) is TEXT


# odd objects


class Hostile:
    """Everything that can raise, raises."""

    def __init__(self) -> None:
        self.vae = tinywan.vae()

    @property
    def generator(self) -> NoReturn:
        raise RuntimeError("no generator for you")

    @property
    def components(self) -> NoReturn:
        raise ValueError("nor components")

    def __getattr__(self, name: str) -> NoReturn:
        raise KeyError(name)

    def __eq__(self, other: object) -> NoReturn:
        raise TypeError("incomparable")

    def __hash__(self) -> NoReturn:
        raise TypeError("unhashable")

    def __bool__(self) -> NoReturn:
        raise TypeError("neither true nor false")

    def __len__(self) -> NoReturn:
        raise TypeError("no length")


class HostileMapping(Mapping[str, object]):
    def __init__(self) -> None:
        self.vae = tinywan.vae()

    def __getitem__(self, key: str) -> object:
        if key == "generator":
            raise RuntimeError("not this one")
        return self.vae

    def __iter__(self) -> Iterator[str]:
        return iter(("generator", "vae"))

    def __len__(self) -> int:
        return 2


LyingClass = type("LyingClass", (), {"__class__": property(refuse)})


@pytest.mark.parametrize("make", [Hostile, HostileMapping])
def test_what_cannot_be_read_is_skipped_and_the_rest_is_found(make: type) -> None:
    assert roles(make()) == {"vae": VAE}
    assert roles({"pipe": make(), "odd": LyingClass()}) == {"pipe.vae": VAE}


@pytest.mark.parametrize("source", [None, 3, "vae", b"", [], {}, {1: 2}, object(), int, torch, torch.zeros(2), len])
def test_what_holds_no_model_gives_nothing(source: object) -> None:
    assert find_components(source) == ()


def test_an_object_that_hides_its_class_gives_nothing() -> None:
    assert find_components(LyingClass()) == ()
    assert role_of("vae", LyingClass()) is VAE


def test_a_cycle_ends() -> None:
    holder, prompter = SimpleNamespace(), SimpleNamespace()
    holder.pipeline, holder.prompter = holder, prompter
    holder.vae = tinywan.vae()
    parts: list[object] = [holder]
    parts.append(parts)
    prompter.back, prompter.parts = holder, parts
    assert roles(holder) == {"vae": VAE}


def test_a_property_that_makes_a_new_object_each_time_ends() -> None:
    class Endless:
        @property
        def pipe(self) -> "Endless":
            return Endless()

    assert find_components(Endless()) == ()


def test_a_long_collection_is_data_and_not_searched() -> None:
    class Counted(dict[str, int]):
        reads = 0

        def __getitem__(self, key: str) -> int:
            Counted.reads += 1
            return super().__getitem__(key)

    vocabulary = Counted({str(n): n for n in range(100_000)})
    assert roles({"tokenizer": SimpleNamespace(vocab=vocabulary), "vae": tinywan.vae()}) == {"vae": VAE}
    assert Counted.reads == 0
