"""Changes to a prompt: what they leave alone, what they refuse, and at which widget a linked value is written."""

import copy
import json
from pathlib import Path
from typing import Any

import planlab
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planlab import node
from vram_headroom.vram.plan.patch import Change, ReplaceNode, SetInput, Widget, Widgets, apply, change_report
from vram_headroom.vram.plan.prompt import parse_prompt

TEMPLATES = Path(__file__).parent / "data" / "templates" / "prompts"

LENGTH = Widget("74", "length")


def widgets(prompt: dict[str, Any]) -> Widgets:
    return Widgets(parse_prompt(prompt, planlab.VOCABULARY))


def by_seconds(fps: object = 16.0, seconds: object = 5.0, expression: str = "floor(a * b) + 1") -> dict[str, Any]:
    """Two experts whose length is computed, as in the official template; the frame rate is read elsewhere too."""
    prompt = planlab.two_experts(length=("127b", 1))
    kind = "PrimitiveFloat" if isinstance(seconds, float) else "PrimitiveInt"
    prompt["seconds"] = node(kind, value=seconds)
    prompt["fps"] = node("PrimitiveFloat", value=fps)
    prompt["127b"] = node(
        "ComfyMathExpression", **{"expression": expression, "values.a": ("seconds", 0), "values.b": ("fps", 0)}
    )
    prompt["80"]["inputs"]["fps"] = ["fps", 0]
    return prompt


# apply


def test_the_original_prompt_is_never_changed_and_what_does_not_change_is_shared() -> None:
    prompt = planlab.two_experts()
    before = copy.deepcopy(prompt)
    patched = apply(prompt, (SetInput("74", "length", 49), ReplaceNode("87", "VAEDecodeTiled", {"samples": ["78", 0]})))
    assert prompt == before
    assert patched["74"]["inputs"] == {"width": 640, "height": 640, "length": 49, "batch_size": 1}
    assert patched["87"] == {"class_type": "VAEDecodeTiled", "inputs": {"samples": ["78", 0]}}
    assert patched["75"] is prompt["75"]
    assert list(patched) == list(prompt)


def test_a_replaced_node_keeps_its_title() -> None:
    prompt = {"1": {**node("VAEDecode", vae=("2", 0)), "_meta": {"title": "Decode"}}}
    assert apply(prompt, [ReplaceNode("1", "VAEDecodeTiled", {})])["1"]["_meta"] == {"title": "Decode"}


def test_a_list_is_an_array_widget_and_never_a_link() -> None:
    prompt = {"1": {"class_type": "A", "inputs": {"points": {"__value__": [1, 2]}, "new": 1}}}
    change = SetInput("1", "points", ["75", 0])
    assert apply(prompt, [change])["1"]["inputs"]["points"] == {"__value__": ["75", 0]}
    assert change_report(prompt, change) == {"node_id": "1", "input": "points", "value": ["75", 0], "old": [1, 2]}


def test_an_optional_widget_that_the_prompt_leaves_out_is_added() -> None:
    prompt = {"1": node("CLIPLoader", clip_name="a")}
    assert apply(prompt, [SetInput("1", "device", "cpu")])["1"]["inputs"] == {"clip_name": "a", "device": "cpu"}
    assert change_report(prompt, SetInput("1", "device", "cpu")) == {
        "node_id": "1",
        "input": "device",
        "value": "cpu",
        "old": None,
    }


def test_a_replacement_is_told_with_what_was_there() -> None:
    prompt = {"1": node("VAEDecode", vae=("2", 0))}
    report = change_report(prompt, ReplaceNode("1", "VAEDecodeTiled", {"vae": ["2", 0], "tile_size": 256}))
    assert json.loads(json.dumps(report)) == {
        "node_id": "1",
        "class_type": "VAEDecodeTiled",
        "inputs": {"vae": ["2", 0], "tile_size": 256},
        "old_class_type": "VAEDecode",
        "old_inputs": {"vae": ["2", 0]},
    }


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ([SetInput("9", "width", 1)], "node 9 is not in the prompt"),
        ([ReplaceNode("9", "A", {})], "node 9 is not in the prompt"),
        ([SetInput("2", "width", 1)], "node 2 is not a JSON object"),
        ([SetInput("3", "width", 1)], "node 3 is not a JSON object"),
        ([SetInput("1", "model", 1)], "model of node 1 is linked"),
        ([SetInput("1", "width", float("nan"))], "the value for width of node 1 is no JSON: float"),
        ([SetInput("1", "width", object())], "the value for width of node 1 is no JSON: object"),
        ([ReplaceNode("1", "A", {"x": {1: 2}})], "the value for x of node 1 is no JSON: dict"),
        ([SetInput("1", "width", 1), SetInput("1", "width", 2)], "width of node 1 can't be both 1 and 2"),
        (["width"], "changes must hold SetInput and ReplaceNode only"),
    ],
)
def test_what_cannot_be_changed_is_named(changes: list[Change], says: str) -> None:
    prompt: dict[str, Any] = {"1": node("A", model=("4", 0), width=5), "2": 7, "3": {"class_type": "A", "inputs": []}}
    with pytest.raises(ValueError, match=says):
        apply(prompt, changes)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["inputs", "class_type", "1", "x"]), inner),
    max_leaves=12,
)
IDS = st.sampled_from(["1", "2", "x"])
CHANGES = st.lists(
    st.builds(SetInput, IDS, IDS, JSON) | st.builds(ReplaceNode, IDS, IDS, st.dictionaries(IDS, JSON, max_size=2)), max_size=3
)


@given(prompt=st.dictionaries(IDS, JSON), changes=CHANGES)
@settings(max_examples=200, deadline=None)
def test_whatever_is_asked_it_is_done_or_refused_with_a_value_error(prompt: dict[str, Any], changes: list[Change]) -> None:
    before = repr(prompt)
    try:
        patched = apply(prompt, changes)
        assert set(patched) == set(prompt)
    except ValueError:
        pass
    assert repr(prompt) == before


# where a value is written


def test_a_plain_widget_is_set_where_it_is() -> None:
    assert widgets(planlab.two_experts()).settings({LENGTH: 49}) == (SetInput("74", "length", 49),)


def test_a_linked_value_is_set_at_the_constant_it_comes_from() -> None:
    prompt = planlab.two_experts(length=("s", 0))
    prompt["s"] = node("ComfySwitchNode", switch=False, on_false=("r", 0), on_true=("never", 0))
    prompt["r"] = node("Reroute", **{"": ("p", 0)})
    prompt["p"] = node("PrimitiveInt", value=81)
    prompt["never"] = node("PrimitiveInt", value=161)
    assert widgets(prompt).settings({LENGTH: 49}) == (SetInput("p", "value", 49),)


def test_a_node_that_passes_its_own_width_on_is_where_the_width_is_set() -> None:
    prompt = planlab.two_experts(width=("c", 1), height=("c", 2))
    prompt["c"] = node("WanCameraEmbedding", width=832, height=480)
    found = widgets(prompt).settings({Widget("74", "width"): 416, Widget("74", "height"): 240})
    assert found == (SetInput("c", "height", 240), SetInput("c", "width", 416))


def test_behind_arithmetic_the_constant_is_solved_for_and_a_frame_rate_that_others_read_stays() -> None:
    assert widgets(by_seconds()).settings({LENGTH: 49}) == (SetInput("seconds", "value", 3.0),)
    # 2.166 s of 24 frames are 51.98 frames
    assert widgets(by_seconds(fps=24.0)).settings({LENGTH: 53}) == (SetInput("seconds", "value", 2.167),)


def test_whole_seconds_give_only_the_lengths_they_give() -> None:
    found = widgets(by_seconds(seconds=5))
    assert found.settings({LENGTH: 49}) == (SetInput("seconds", "value", 3),)
    assert found.settings({LENGTH: 53}) is None


def test_of_two_constants_that_could_be_meant_neither_is_changed() -> None:
    prompt = by_seconds()
    del prompt["80"]["inputs"]["fps"]
    assert widgets(prompt).settings({LENGTH: 49}) is None


def test_a_constant_that_is_also_something_else_is_not_changed() -> None:
    prompt = planlab.two_experts(length=("114", 0))
    assert widgets(prompt).settings({LENGTH: 17}) is None, "114 is the number of steps as well, through a switch"
    prompt = planlab.two_experts(length=("p", 0), width=("p", 0))
    prompt["p"] = node("PrimitiveInt", value=81)
    assert widgets(prompt).settings({LENGTH: 17}) is None


def test_a_square_of_one_constant_stays_a_square() -> None:
    prompt = planlab.two_experts(width=("p", 0), height=("p", 0))
    prompt["p"] = node("PrimitiveInt", value=640)
    sides = (Widget("74", "width"), Widget("74", "height"))
    assert widgets(prompt).settings(dict.fromkeys(sides, 512)) == (SetInput("p", "value", 512),)
    assert widgets(prompt).settings(dict(zip(sides, (512, 256), strict=True))) is None


def test_what_is_only_known_when_it_has_run_has_no_widget() -> None:
    prompt = planlab.two_experts(length=("x", 0))
    prompt["x"] = node("RandomSize", seed=1)
    assert widgets(prompt).settings({LENGTH: 17}) is None
    assert widgets(planlab.two_experts(length=("gone", 0))).settings({LENGTH: 17}) is None


def test_a_value_that_goes_in_a_circle_has_no_widget() -> None:
    prompt = planlab.two_experts(length=("p", 0))
    prompt["p"] = node("PrimitiveInt", value=("p", 0))
    assert widgets(prompt).settings({LENGTH: 17}) is None


@pytest.mark.parametrize(
    ("template", "latent", "expected"),
    [
        ("video_wan2_2_14B_t2v", "128:74", SetInput("128:126", "value", 3.0)),
        ("video_wan2_2_14B_i2v", "129:98", SetInput("129:161", "value", 3.0)),
        ("video_wan2_2_14B_s2v", "93", SetInput("104", "value", 49)),
        ("text_to_video_wan", "40", SetInput("40", "length", 49)),
        ("video_wan_vace_flf2v", "220:49", SetInput("220:131", "value", 3)),
    ],
)
def test_the_length_of_official_workflows_is_set_where_a_person_would(template: str, latent: str, expected: SetInput) -> None:
    prompt = json.loads((TEMPLATES / f"{template}.json").read_text(encoding="utf-8"))["output"]
    assert widgets(prompt).settings({Widget(latent, "length"): 49}) == (expected,)


@given(fps=st.sampled_from([8.0, 12.5, 16.0, 23.976, 24.0, 25.0, 30.0, 60.0]), steps=st.integers(1, 40), whole=st.booleans())
@settings(max_examples=80, deadline=None)
def test_a_value_that_is_set_arrives(fps: float, steps: int, whole: bool) -> None:
    prompt = by_seconds(fps, 10 if whole else 10.0)
    wanted = 4 * steps + 1
    found = widgets(prompt).settings({LENGTH: wanted})
    if found is None:
        assert whole or 10 * fps + 1 < wanted
    else:
        assert parse_prompt(apply(prompt, found), planlab.VOCABULARY).value("74", "length") == wanted
