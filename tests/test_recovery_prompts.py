"""Whole prompts that memory runs out in: what is tried again, what is kept and can be taken up again, and who may stop it."""

import re
from pathlib import Path
from typing import Any

import pytest
from host.lab import write_tiny_models
from insidehost import ask_inside

LAB = """
from host.inside.recoverylab import *
lab = Prompts(base, server)
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("prompts")
    write_tiny_models(base / "models")
    for name in ("custom_nodes", "input", "output", "temp", "user/default"):
        (base / name).mkdir(parents=True)
    return base


SAMPLING = """
said = {}
said["four"] = lab.run(graph(), "four", Fault("attention", 5, 4))
said["next"] = lab.run(graph(), "four", )
lab.forget()
said["three"] = lab.run(graph(), "three", Fault("attention", 5, 3))
lab.forget()
said["ancestral"] = lab.run(graph(sampler_name="euler_ancestral"), "ancestral", Fault("attention", 5, 4))
lab.forget()
said["first step"] = lab.run(graph(), "first", Fault("attention", 0, 9))
lab.forget()
late = graph(steps=6, denoise=0.5)
said["denoise"] = lab.run(late, "denoise", Fault("attention", 5, 9))
lab.forget()
advanced = resumed(graph(), said["four"]["latents"][0], 5, 2)
said["advanced"] = lab.run(advanced, "advanced", Fault("attention", 3, 9))
lab.forget()
refusing = graph()
said["unloaded"] = lab.run(refusing, "again")
said["facts"] = json.loads(metadata(base / "input" / said["four"]["told"][-2]["file"])["vram_headroom"])
said["graph"] = json.loads(metadata(base / "input" / said["four"]["told"][-2]["file"])["prompt"]) == graph()
said["unfinished"] = [path.name for path in (base / "input").iterdir() if not path.name.endswith(".latent")]
answer(said)
"""

RESTARTED = """
import nodes
choices = nodes.NODE_CLASS_MAPPINGS["LoadLatent"].INPUT_TYPES()["required"]["latent"][0]
whole = lab.run(graph(), "whole")
expected = lab.newest()
lab.forget()
going_on = lab.run(resumed(graph(), {name!r}, {steps}, {start}), "resumed")
found = lab.newest()
half = lab.run(begun(graph(), {start}), "half")
same = torch.equal(lab.newest(), load_latent(base / "input" / {name!r}))
difference = float((found - expected).abs().max())
answer([whole["ok"], going_on["ok"], half["ok"] and same, choices, difference, going_on["counts"]["attention"]])
"""


@pytest.fixture(scope="module")
def sampling(base: Path) -> dict[str, Any]:
    return ask_inside(LAB + SAMPLING, base, served=True)


def resume_of(message: str) -> tuple[str, int, int]:
    """File, steps and start_at_step, as the message tells a person."""
    found = re.search(r"kept in (\S+\.latent) .*steps (\d+), start_at_step (\d+)", message)
    assert found, message
    return found[1], int(found[2]), int(found[3])


def test_four_errors_in_a_row_end_in_one_clear_error(sampling: dict[str, Any]) -> None:
    four = sampling["four"]
    assert (four["ok"], four["raised"], four["type"]) == (False, 4, "torch.OutOfMemoryError")
    assert four["kinds"] == ["retry", "retry", "smaller", "kept", "gave_up"]
    assert [one["attempt"] for one in four["told"]] == [1, 2, 3, 0, 0]
    assert all(one["prompt_id"] == "four" and one["node_id"] == "8" for one in four["told"])
    assert all(one["freed_bytes"] > 0 for one in four["told"][:2])
    # two blocks, cond and uncond together: the sixth self-attention is the third step's
    assert four["message"].startswith("Memory ran out in step 3 of 5: CUDA out of memory")
    assert "Gave up after 3 retries" in four["message"]
    assert resume_of(four["message"]) == ("vram_headroom_four_8.latent", 5, 2)
    assert "The result is the one that this run would have given" in four["message"]


def test_after_it_models_are_unloaded_and_the_next_prompt_runs(sampling: dict[str, Any]) -> None:
    assert sampling["four"]["loaded"] == []
    assert (sampling["next"]["ok"], sampling["next"]["kinds"]) == (True, [])
    assert len(sampling["next"]["loaded"]) == 2


def test_three_errors_in_a_row_are_survived_and_said_not_to_be_the_same_picture(sampling: dict[str, Any]) -> None:
    three = sampling["three"]
    assert (three["ok"], three["raised"]) == (True, 3)
    assert [one["same_picture"] for one in three["told"]] == [True, True, False]


def test_what_is_kept_says_where_it_stood(sampling: dict[str, Any]) -> None:
    facts = sampling["facts"]
    assert (facts["sigma_index"], facts["seed"], facts["sampler"], facts["steps"]) == (2, 1, "euler", 5)
    assert 0 < facts["sigma"] < 1
    assert sampling["graph"] is True
    assert sampling["unfinished"] == ["example.png"] or sampling["unfinished"] == []


def test_after_a_restart_load_latent_lists_it_and_euler_goes_on_to_the_same_latent(
    base: Path, sampling: dict[str, Any]
) -> None:
    name, steps, start = resume_of(sampling["four"]["message"])
    script = RESTARTED.format(name=name, steps=steps, start=start)
    whole, resumed, same, choices, difference, attentions = ask_inside(LAB + script, base, served=True)
    assert (whole, resumed) == (True, True)
    assert name in choices
    assert same is True, "KSampler (Advanced) returns the very same with leftover noise"
    assert difference <= 1e-5
    # three of five steps, two blocks
    assert attentions == 6


def test_a_sampler_that_draws_noise_is_said_to_come_only_close(sampling: dict[str, Any]) -> None:
    message = sampling["ancestral"]["message"]
    assert resume_of(message) == ("vram_headroom_ancestral_8.latent", 5, 2)
    assert "is not the same: euler_ancestral looks back at earlier steps or draws new noise" in message


def test_where_no_step_was_done_nothing_is_kept_and_it_is_said(sampling: dict[str, Any]) -> None:
    first = sampling["first step"]
    assert "kept" not in first["kinds"]
    assert first["message"].startswith("Memory ran out in step 1 of 5")
    assert "No step was done yet, so there is nothing to keep." in first["message"]


def test_the_steps_to_set_count_what_the_node_leaves_out(sampling: dict[str, Any]) -> None:
    # denoise 0.5: the last six of twelve steps, two of them done
    assert resume_of(sampling["denoise"]["message"])[1:] == (12, 8)
    # start_at_step 2 of 5, one more done
    assert resume_of(sampling["advanced"]["message"])[1:] == (5, 3)


VAE = """
said = {}
def video(): return graph(steps=1, side=192, length=17)
plain = lab.run(video(), "plain")
latent = lab.newest()
def again(name, *wanted):
    lab.forget()
    said[name] = lab.run(video(), name, *wanted)
again("once", Fault("decode", 0, 1))
again("after", Fault("decode", 0, 1, True))
again("tiles", Fault("decode", 0, 99), )
again("smaller", Fault("decode", 0, 99), Fault("decode tile", 0, 2))
again("never", Fault("decode", 0, 99), Fault("decode tile", 0, 999))
kept = base / "input" / "vram_headroom_never_9.latent"
said["kept is the latent"] = bool(torch.equal(load_latent(kept), latent))
said["facts"] = json.loads(metadata(kept)["vram_headroom"])
lab.forget()
reopened = {"1": node("LoadLatent", latent=kept.name), "2": node("VAELoader", vae_name=video()["3"]["inputs"]["vae_name"])}
reopened["3"] = node("VAEDecode", samples=["1", 0], vae=["2", 0])
reopened["4"] = node("PreviewImage", images=["3", 0])
said["reopened"] = lab.run(reopened, "reopened")
tiled = with_inputs(video(), "9", tile_size=64, overlap=16, temporal_size=8, temporal_overlap=4)
tiled["9"]["class_type"] = "VAEDecodeTiled"
lab.forget()
said["tiled once"] = lab.run(tiled, "tiled once", Fault("decode tile", 0, 1))
picture = {"1": node("EmptyImage", width=192, height=192, batch_size=5, color=3), "2": reopened["2"]}
picture["3"] = node("VAEEncode", pixels=["1", 0], vae=["2", 0])
picture["4"] = node("SaveLatent", samples=["3", 0], filename_prefix="latents/it")
lab.forget()
said["encoded"] = lab.run(picture, "encoded")
always = Fault("encode", 0, 99)
for name, wanted in (("encode once", [Fault("encode", 0, 1)]), ("encode tiles", [always, Fault("encode tile", 0, 1)]),
                     ("encode never", [always, Fault("encode tile", 0, 999)])):
    lab.forget()
    lab.set_up(Case())
    said[name] = lab.run(picture, name, *wanted)
lab.forget()
lab.set_up(Case())
said["text"] = lab.run(video(), "text", Fault("text encoder", 1, 1))
lab.forget()
said["text never"] = lab.run(video(), "text never", Fault("text encoder", 0, 99))
answer(said)
"""


@pytest.fixture(scope="module")
def vae(base: Path) -> dict[str, Any]:
    return ask_inside(LAB + VAE, base, served=True)


@pytest.mark.parametrize("name", ["once", "after"])
def test_a_decode_is_done_whole_again_once_everything_else_has_left(vae: dict[str, Any], name: str) -> None:
    found = vae[name]
    assert (found["ok"], found["kinds"], found["counts"]["decode tile"]) == (True, ["retry"], 0)
    assert found["told"][0]["freed_bytes"] > 0
    assert found["told"][0]["same_picture"] is True
    assert found["loaded"] == ["WanVAE"]


def test_a_decode_that_does_not_fit_is_done_in_tiles_and_smaller_ones_if_those_do_not(vae: dict[str, Any]) -> None:
    tiles, smaller = vae["tiles"], vae["smaller"]
    assert (tiles["ok"], tiles["kinds"]) == (True, ["retry", "tiles"])
    assert (smaller["ok"], smaller["kinds"], smaller["raised"]) == (True, ["retry", "tiles"], 4)
    assert (tiles["told"][-1]["attempt"], smaller["told"][-1]["attempt"]) == (1, 3)
    assert tiles["told"][-1]["same_picture"] is smaller["told"][-1]["same_picture"] is False
    assert tiles["told"][-1]["message"] != smaller["told"][-1]["message"]


def test_a_latent_that_can_never_be_decoded_is_kept_as_it_was(vae: dict[str, Any]) -> None:
    never = vae["never"]
    assert (never["ok"], never["kinds"]) == (False, ["retry", "kept", "gave_up"])
    assert "Not even the smallest tiles fit" in never["message"]
    assert "kept as it was in vram_headroom_never_9.latent" in never["message"]
    assert never["loaded"] == []
    assert vae["kept is the latent"] is True
    assert vae["facts"]["made_by"] == "decode"
    assert vae["reopened"]["ok"] is True


def test_a_tiled_decode_is_tried_again_in_the_same_tiles_first(vae: dict[str, Any]) -> None:
    found = vae["tiled once"]
    assert (found["ok"], found["kinds"], found["raised"]) == (True, ["retry"], 1)


def test_an_encode_is_done_whole_again_then_in_tiles(vae: dict[str, Any]) -> None:
    assert (vae["encoded"]["ok"], vae["encoded"]["kinds"]) == (True, [])
    assert (vae["encode once"]["ok"], vae["encode once"]["kinds"]) == (True, ["retry"])
    assert (vae["encode tiles"]["ok"], vae["encode tiles"]["kinds"], vae["encode tiles"]["raised"]) == (
        True,
        ["retry", "tiles"],
        3,
    )
    assert (vae["encode never"]["ok"], vae["encode never"]["kinds"]) == (False, ["retry", "gave_up"])


def test_a_text_is_encoded_again_once_others_have_left(vae: dict[str, Any]) -> None:
    assert (vae["text"]["ok"], vae["text"]["kinds"]) == (True, ["retry"])
    assert (vae["text never"]["ok"], vae["text never"]["kinds"]) == (False, ["gave_up"])
    assert vae["text never"]["message"].startswith("Memory ran out in an encoder: CUDA out of memory")


STOPPED = """
said = {}
def stop(one):
    if one.kind == stop_at[0]:
        model_management.interrupt_current_processing(True)
stop_at = [""]
lab.pack.incidents.watch(stop)
for name, kind, wanted in (("retry", "retry", [Fault("attention", 3, 9)]), ("smaller", "smaller", [Fault("attention", 3, 9)]),
                           ("decode", "retry", [Fault("decode", 0, 99)])):
    stop_at[0] = kind
    said[name] = lab.run(graph(), name, *wanted)
    stop_at[0] = ""
    lab.forget()
said["next"] = lab.run(graph(), "next")
answer(said)
"""


def test_an_interrupt_during_recovery_stops_at_once_and_is_no_error(base: Path) -> None:
    said = ask_inside(LAB + STOPPED, base, served=True)
    for name, raised in (("retry", 1), ("smaller", 3), ("decode", 1)):
        assert (said[name]["ok"], said[name]["interrupted"], said[name]["message"]) == (False, True, ""), name
        assert said[name]["raised"] == raised, name
        assert "gave_up" not in said[name]["kinds"], name
    assert said["next"]["ok"] is True


BOUNDED = """
import os
from vram_headroom.nodes.host import latents
tensor = torch.zeros(1, 16, 1, 8, 8)
names = [latents.keep(tensor, f"p{number}", "1:2.3", {}, {}) for number in range(latents.MOST_FILES + 3)]
(base / "input" / "mine.latent").write_bytes(b"")
first = lab.saved()
os.environ[latents.COUNT_VARIABLE] = "2"
latents.keep(tensor, "last", "8", {}, {})
few = lab.saved()
latents.MOST_BYTES = 1
latents.keep(tensor, "alone", "8", {}, {})
alone = lab.saved()
os.environ[latents.COUNT_VARIABLE] = "0"
off = lab.run(graph(), "off", Fault("attention", 5, 9))
os.environ[latents.COUNT_VARIABLE] = "3"
def full(*args, **kwargs): raise RuntimeError("No space left on device")
import comfy.utils
comfy.utils.save_torch_file = full
lab.forget()
disk = lab.run(graph(), "disk", Fault("attention", 5, 9))
answer([names, first, few, alone, off, disk, lab.saved()])
"""


def test_the_oldest_kept_latents_make_room_and_nobody_elses_do(tmp_path: Path) -> None:
    write_tiny_models(tmp_path / "models")
    for name in ("custom_nodes", "input", "output", "temp", "user/default"):
        (tmp_path / name).mkdir(parents=True)
    names, first, few, alone, off, disk, left = ask_inside(LAB + BOUNDED, tmp_path, served=True)
    assert names[0] == "vram_headroom_p0_1-2-3.latent"
    assert first == sorted([*names[-8:], "mine.latent"])
    assert few == sorted([names[-1], "vram_headroom_last_8.latent", "mine.latent"])
    assert alone == ["mine.latent", "vram_headroom_alone_8.latent"]
    assert "kept" not in off["kinds"]
    assert "It is set that no latents are kept" in off["message"]
    # a full disk does not hide what happened
    assert disk["message"].startswith("Memory ran out in step 3 of 5: CUDA out of memory")
    assert "No space left on device" in disk["message"]
    assert left == alone


HUNDRED = """
import gc, os, random, threading
import psutil
from prompts import with_our_loaders
from standin.card import card
import standin.settings as settings
chosen, process = random.Random(4), psutil.Process(os.getpid())
seen, ended, kinds = [], [], set()
offloader = lab.pack.offloader
files = [path.name for path in (base / "models" / "diffusion_models").iterdir() if "t2v" in path.name]
for number in range(100):
    card().set_others(16 * 2**30 - chosen.choice([1, 2, 4, 16]) * 2**30)
    prompt = with_inputs(graph(steps=2, seed=number), "4", text=f"prompt {number}")
    prompt = with_inputs(prompt, "1", unet_name=chosen.choice(files))
    if chosen.random() < 0.5:
        prompt = with_our_loaders(prompt)
    where = chosen.choice(["attention", "attention", "decode", "decode tile", "text encoder", ""])
    fault = Fault(where, chosen.randrange(4 if where == "attention" else 1), chosen.choice([1, 1, 2, 9]), chosen.random() < 0.5)
    done = lab.run(prompt, f"p{number}", *([fault] if where else []))
    ended.append(done["ok"])
    kinds |= set(done["kinds"])
    gc.collect()
    for thread in threading.enumerate():
        # it is told to end with its prompt and not waited for
        if thread.name == "vram_headroom_sample":
            thread.join(5)
    registered = sum(len(p.components) for p in offloader.status())
    seen.append([process.memory_info().rss, threading.active_count(), process.num_fds(),
                 len(model_management.current_loaded_models), registered, len(lab.pack.host.sampling._runs)])
lab.forget()
del prompt
gc.collect()
left = [booking.owner for booking in card().bookings]
answer([seen, ended, sorted(kinds), left, len(lab.saved())])
"""


def test_a_hundred_prompts_with_errors_on_cards_of_any_size_leave_nothing_behind(tmp_path: Path) -> None:
    write_tiny_models(tmp_path / "models")
    for name in ("custom_nodes", "input", "output", "temp", "user/default"):
        (tmp_path / name).mkdir(parents=True)
    seen, ended, kinds, left, kept = ask_inside(LAB + HUNDRED, tmp_path, served=True, seconds=240)
    assert set(ended) == {True, False}
    assert {"retry", "smaller", "kept", "gave_up"} <= set(kinds)
    rss, threads, files, models, components, runs = zip(*seen, strict=True)
    assert max(threads[20:]) <= max(threads[:20])
    assert files[-1] <= files[20]
    # a card's worth of models, and no registration of one that is gone
    assert max(models) <= 8
    assert max(components) <= 5
    assert set(runs) == {0}
    assert left == []
    assert kept <= 8
    early, late = sorted(rss[20:30])[5], sorted(rss[90:])[5]
    assert late - early < 24 << 20, [one >> 20 for one in rss[::10]]


DYNAMIC = """
import os
from dataclasses import replace
from standin import dynamic as dynamic_vram, settings
settings.configure(replace(settings.current(), dynamic=True))
dynamic_vram.enable_if_wanted()
from loadpack import load_pack
pack = load_pack()
from host.inside.recoverylab import *
lab = Prompts(base, server)
said = {}
said["off"] = lab.run(graph(), "off", Fault("attention", 5, 1))
lab.forget()
os.environ["VRAM_HEADROOM_RETRY_DYNAMIC"] = "1"
whole = lab.run(graph(), "whole")
expected = lab.newest()
lab.forget()
lab.run(graph(seed=2), "company")
said["on"] = lab.run(graph(), "on", Fault("attention", 5, 1))
said["same"] = bool(torch.equal(lab.newest(), expected))
answer(said)
"""


def test_what_dynamic_vram_pages_is_tried_again_only_where_that_is_switched_on(tmp_path: Path) -> None:
    write_tiny_models(tmp_path / "models")
    for name in ("custom_nodes", "input", "output", "temp", "user/default"):
        (tmp_path / name).mkdir(parents=True)
    said = ask_inside(DYNAMIC, tmp_path, served=True, pack=False)
    off = said["off"]
    assert (off["ok"], off["kinds"]) == (False, ["refused", "kept", "gave_up"])
    assert "DynamicVRAM pages this model's weights" in off["message"]
    assert resume_of(off["message"]) == ("vram_headroom_off_8.latent", 5, 2)
    on = said["on"]
    assert (on["ok"], on["raised"]) == (True, 1)
    assert on["kinds"] in (["retry"], ["smaller"])
    assert said["same"] is (on["kinds"] == ["retry"])
