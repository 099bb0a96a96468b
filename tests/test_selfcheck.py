"""The self-check: what the formulas say against what modules are traced to need, and what becomes of the difference."""

from __future__ import annotations

import json
import tempfile
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from insidehost import ask_inside
from vram_headroom.vram.estimate.backend import Backend, Correction
from vram_headroom.vram.estimate.dit import DitShape, dit_forward
from vram_headroom.vram.estimate.tokens import Video
from vram_headroom.vram.selfcheck import (
    KEPT,
    AbsentError,
    Checker,
    Kind,
    Plan,
    SelfCheck,
    Store,
    Subject,
    conclude,
    host_key,
    report,
    run,
)

HOST = "ComfyUI 0.40.0"
BACKEND = Backend(comfyui=(0, 33, 0), fused_rope=True, fused_rms_norm=True, allocator="native")
WAN = DitShape(dim=5120, ffn_dim=13824, heads=40, layers=40, in_channels=16, out_channels=16)
VIDEO = Video(832, 480, 81)
NEEDS = 2 * 1000 * 1000 * 4
"""Two layers of 1000 x 1000 on 1000 rows in fp32: the result of the first lives while the second is made."""


def two_layers(rows: int = 1000) -> Callable[[], object]:
    layers = torch.nn.Sequential(torch.nn.Linear(1000, 1000), torch.nn.Linear(1000, 1000)).to("meta")
    given = torch.empty(rows, 1000, device="meta")
    return lambda: layers(given)


def subject(ratio: float = 1.0, kind: Kind = "dit", name: str = "two layers", **changes: Any) -> Subject:
    """Two layers, of which the formula says `1 / ratio` of what they need."""
    return Subject(kind, name, round(NEEDS / ratio), changes.get("prepare", two_layers))


def check(*subjects: Subject) -> SelfCheck:
    return run(subjects, "key", HOST)


# what is found


@pytest.mark.parametrize("ratio", [1.0, 1.009, 0.992])
def test_within_one_percent_nothing_is_shown(ratio: float) -> None:
    found = check(subject(ratio))
    assert (found.state, found.message, found.corrections) == ("agrees", "", ())
    assert found.vouched(BACKEND) == BACKEND
    assert [(row.expected, row.traced) for row in found.rows] == [(round(NEEDS / ratio), NEEDS)]


@pytest.mark.parametrize("ratio", [1.011, 0.988])
def test_beyond_one_percent_it_is_shown(ratio: float) -> None:
    found = check(subject(ratio))
    assert found.state == "rescaled"
    assert "estimates follow it" in found.message
    assert found.corrections[0].factor == pytest.approx(ratio, abs=0.001)


def test_a_host_that_needs_a_tenth_more_is_followed_and_said() -> None:
    found = check(subject(1.1))
    (correction,) = found.corrections
    assert correction == Correction("dit", correction.factor, HOST)
    assert correction.factor == pytest.approx(1.1, abs=1e-6)
    assert found.message == f"{HOST} needs 110 % of what the formulas say for sampling; estimates follow it."
    before = dit_forward(WAN, VIDEO, BACKEND)
    after = dit_forward(WAN, VIDEO, found.vouched(BACKEND))
    assert after.expected == round(before.expected * correction.factor)
    assert after.upper == pytest.approx(before.upper * correction.factor, abs=2)
    assert sum(term.bytes for term in after.terms) == after.expected
    assert any(HOST in line and "Rescaled by 1.100" in line for line in after.assumptions)


def test_a_host_that_needs_less_is_followed_too() -> None:
    found = check(subject(0.8))
    assert found.corrections[0].factor == pytest.approx(0.8, abs=1e-6)
    assert "80 % of what the formulas say" in found.message


def test_each_kind_has_its_own_factor() -> None:
    found = check(subject(1.2, "vae_decode"), subject(1.0, "dit"), subject(1.05, "vae_encode"))
    factors = {correction.kind: round(correction.factor, 3) for correction in found.corrections}
    assert factors == {"vae_decode": 1.2, "vae_encode": 1.05}
    assert "for decoding" in found.message
    assert "for encoding images" in found.message


def test_shapes_that_are_off_by_different_factors_take_the_larger_and_say_the_span() -> None:
    found = check(subject(1.02, name="small"), subject(1.15, name="large"))
    (off,) = found.off
    assert (round(off.smallest, 3), round(off.largest, 3), off.one_factor) == (1.02, 1.15, False)
    assert found.corrections[0].factor == off.largest
    assert "102 % to 115 %, depending on the size," in found.message
    assert "take the larger" in found.message
    assert check(subject(1.10), subject(1.12)).off[0].one_factor


def test_what_can_not_be_traced_is_a_state_with_a_reason() -> None:
    def moved() -> Callable[[], object]:
        raise TypeError("WanModel.__init__() got an unexpected keyword argument 'dim'")

    found = check(subject(kind="dit", name="14B", prepare=moved), subject(1.0, "vae_decode"))
    assert found.state == "failed"
    assert [row.kind for row in found.rows] == ["vae_decode"]
    assert "for sampling could not be checked (14B: TypeError: WanModel.__init__() got an unexpected" in found.message


def test_a_forward_that_makes_nothing_is_no_agreement() -> None:
    assert check(subject(prepare=lambda: lambda: None)).state == "failed"


def test_of_a_new_version_that_could_not_be_checked_estimates_span_every_possibility() -> None:
    def broken() -> Callable[[], object]:
        raise AttributeError("no WanModel")

    found = check(subject(prepare=broken))
    new = replace(BACKEND, comfyui=(0, 40, 0))
    known = dit_forward(WAN, VIDEO, new)
    doubtful = dit_forward(WAN, VIDEO, found.vouched(new))
    assert doubtful.upper > known.upper * 1.1
    assert doubtful.lower <= known.lower
    assert any("not known" in line for line in doubtful.assumptions)
    # of a version that the recorded traces are of, more is known than a broken check can take away
    assert found.vouched(BACKEND) == BACKEND


def test_the_report_is_what_a_status_shows() -> None:
    shown = report(check(subject(1.1))).as_json()
    assert json.loads(json.dumps(shown)) == {
        "state": "rescaled",
        "message": f"{HOST} needs 110 % of what the formulas say for sampling; estimates follow it.",
        "rows": [{"kind": "dit", "name": "two layers", "expected": round(NEEDS / 1.1), "traced": NEEDS}],
    }


# what is kept


def test_another_version_or_another_formula_is_another_key() -> None:
    keys = {
        host_key(["comfyui=0.33.0"], [subject()]),
        host_key(["comfyui=0.34.0"], [subject()]),
        host_key(["comfyui=0.33.0"], [subject(1.1)]),
        host_key(["comfyui=0.33.0"], [subject(), subject(kind="vae_decode")]),
    }
    assert len(keys) == 4
    assert host_key(["comfyui=0.33.0"], [subject()]) in keys


def test_a_kept_result_says_again_what_it_said(tmp_path: Path) -> None:
    store = Store(tmp_path / "user" / "selfcheck.json")
    found = check(subject(1.1), subject(1.0, "vae_decode"))
    store.save(found)
    assert store.load("key") == found
    assert store.load("another key") is None


def test_the_last_eight_keys_are_kept_and_nothing_lies_beside(tmp_path: Path) -> None:
    store = Store(tmp_path / "selfcheck.json")
    for number in range(KEPT + 3):
        store.save(replace(check(subject()), host_key=str(number)))
    store.save(replace(check(subject(1.1)), host_key="5"))
    assert [number for number in range(KEPT + 3) if store.load(str(number))] == [3, 4, 5, 6, 7, 8, 9, 10]
    again = store.load("5")
    assert again is not None
    assert again.state == "rescaled"
    assert [path.name for path in tmp_path.iterdir()] == ["selfcheck.json"]


GOOD = {"kind": "dit", "name": "14B", "expected": 100, "traced": 110}
DAMAGED = [
    b"",
    b"\xff\xfe\x00",
    b"[" * 100_000,
    b'{"results": [{"key": "key", "host": "h", "rows": [',
    b'{"results": "none"}',
    b"[1, 2]",
    *(
        json.dumps({"results": [{"key": "key", "host": "h", "rows": rows}]}).encode()
        for rows in ([], None, [GOOD | {"kind": "other"}], [GOOD | {"traced": 0}], [GOOD | {"expected": "1"}], [GOOD, {}])
    ),
]


@pytest.mark.parametrize("content", DAMAGED)
def test_a_damaged_file_is_an_empty_one_and_is_written_anew(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "selfcheck.json"
    path.write_bytes(content)
    assert Store(path).load("key") is None
    Store(path).save(check(subject()))
    assert Store(path).load("key") == check(subject())


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["results", "key", "host", "rows", *GOOD]), inner, max_size=4)
    ),
    max_leaves=9,
)


@given(JSON)
def test_any_json_in_the_file_is_read_without_an_error(content: object) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "selfcheck.json"
        path.write_text(json.dumps(content), encoding="utf-8")
        assert Store(path).load("key") is None


# when it runs


class Lab:
    """A checker whose host is busy when told so, and which counts the forwards it prepares."""

    def __init__(self, path: Path, ratio: float = 1.0) -> None:
        self.busy = False
        self.prepared = 0
        self.hurdles: list[Callable[[], None]] = []
        subjects = tuple(replace(subject(ratio, name=f"forward {n}"), prepare=self.prepare) for n in range(3))
        self.plan = Plan(host_key(["comfyui=0.40.0"], subjects), HOST, subjects)
        self.checker = Checker(lambda: self.plan, lambda: self.busy, Store(path))

    def prepare(self) -> Callable[[], object]:
        self.prepared += 1
        for hurdle in self.hurdles:
            hurdle()
        return two_layers()

    def states(self) -> tuple[str, str]:
        """On the first look, and when what it started is done."""
        first = self.checker.look().state
        self.checker.finish()
        return first, self.checker.look().state


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if "selfcheck" in thread.name]


def test_the_first_look_starts_it_and_the_next_sees_the_result(tmp_path: Path) -> None:
    lab = Lab(tmp_path / "s.json", ratio=1.1)
    assert threads() == []
    assert lab.states() == ("waiting", "rescaled")
    assert lab.prepared == 3
    assert threads() == []


def test_a_result_of_an_earlier_start_is_not_traced_again(tmp_path: Path) -> None:
    Lab(tmp_path / "s.json", ratio=1.1).states()
    later = Lab(tmp_path / "s.json", ratio=1.1)
    found = later.checker.look()
    assert (found.state, later.prepared, threads()) == ("rescaled", 0, [])
    assert found.corrections[0].host == HOST


def test_while_something_is_queued_nothing_runs(tmp_path: Path) -> None:
    lab = Lab(tmp_path / "s.json")
    lab.busy = True
    assert lab.states() == ("waiting", "waiting")
    assert lab.prepared == 0
    lab.busy = False
    assert lab.states() == ("waiting", "agrees")


def test_a_prompt_that_starts_stops_it_and_a_later_look_runs_it_whole(tmp_path: Path) -> None:
    lab = Lab(tmp_path / "s.json")
    lab.hurdles = [lambda: setattr(lab, "busy", True)]
    assert lab.states() == ("waiting", "waiting")
    assert lab.prepared == 1
    assert not (tmp_path / "s.json").exists()
    lab.hurdles, lab.busy = [], False
    assert lab.states() == ("waiting", "agrees")
    assert lab.prepared == 1 + 3


def test_looks_while_it_runs_start_no_second(tmp_path: Path) -> None:
    lab = Lab(tmp_path / "s.json")
    seen: list[tuple[str, int]] = []
    lab.hurdles = [lambda: seen.append((lab.checker.look().state, len(threads())))]
    assert lab.states() == ("waiting", "agrees")
    assert seen == [("waiting", 1)] * 3


def test_a_failure_is_not_tried_again_on_every_look_but_at_the_next_start(tmp_path: Path) -> None:
    def hurdle() -> None:
        raise KeyError("blocks")

    lab = Lab(tmp_path / "s.json")
    lab.hurdles = [hurdle]
    assert lab.states() == ("waiting", "failed")
    assert lab.states() == ("failed", "failed")
    assert lab.prepared == 1
    again = Lab(tmp_path / "s.json")
    assert again.states() == ("waiting", "agrees")


def test_a_host_without_wan_is_asked_once_and_nothing_is_kept(tmp_path: Path) -> None:
    def hurdle() -> None:
        raise AbsentError

    lab = Lab(tmp_path / "s.json")
    lab.hurdles = [hurdle]
    assert lab.states() == ("waiting", "absent")
    assert lab.checker.look().message == ""
    assert lab.prepared == 1
    assert not (tmp_path / "s.json").exists()


def test_a_folder_that_can_not_be_written_costs_only_the_next_start_its_result(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a file where a folder should be")
    lab = Lab(tmp_path / "file" / "s.json", ratio=1.1)
    assert lab.states() == ("waiting", "rescaled")
    assert lab.states() == ("rescaled", "rescaled")


def test_no_rows_and_no_failures_is_nothing_to_check() -> None:
    assert conclude("key", HOST, []).state == "absent"


def test_the_stand_in_has_nothing_to_trace_and_says_so_quietly(tmp_path: Path) -> None:
    script = """
import logging
lines = []
logging.getLogger().addHandler(type("Keep", (logging.Handler,), {"emit": lambda self, record: lines.append(str(record.msg))})())
logging.getLogger("vram_headroom").setLevel(logging.INFO)
lines.clear()
from vram_headroom.nodes.host.selfcheck import describe, host_selfcheck
checker = host_selfcheck(lambda: False)
first = checker.look().state
checker.finish()
last = checker.look()
answer({"states": [first, last.state], "message": last.message, "lines": lines, "key": describe().key})
"""
    said = ask_inside(script, tmp_path)
    assert (said["states"], said["message"], said["lines"]) == (["waiting", "absent"], "", [])
    assert said["key"].startswith("comfyui=0.33.0 torch=")
