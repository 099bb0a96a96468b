"""Memory runs out inside of a step: the same picture to the last bit and no step done twice, or no retry, and it says so.

Against the stand-in, whose forwards change what ComfyUI's change; tests/real/test_real_recovery.py asks a real
ComfyUI the same.
"""

from pathlib import Path
from typing import Any

import pytest
from host.inside.recoverycases import CASES, FOREIGN
from host.lab import write_tiny_models
from insidehost import ask_inside

LAB = """
from host.inside import recoverylab
lab = recoverylab.Lab(base)
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("recovery")
    write_tiny_models(base / "models")
    for name in ("custom_nodes", "input", "output", "temp", "user/default"):
        (base / name).mkdir(parents=True)
    return base


@pytest.fixture(scope="module")
def swept(base: Path) -> dict[str, dict[str, Any]]:
    names = [*CASES, *(f"foreign {how}" for how in FOREIGN)]
    return ask_inside(LAB + f"answer({{name: lab.sweep(name) for name in {names!r}}})", base, served=True)


@pytest.fixture(scope="module")
def naive(base: Path) -> dict[str, dict[str, Any]]:
    names = ("plain", "EasyCache", "CausalAR")
    return ask_inside(LAB + f"recoverylab.naive()\nanswer({{name: lab.sweep(name) for name in {names!r}}})", base, served=True)


@pytest.mark.parametrize("name", [name for name in CASES if name != "LoRA alone on the card"])
def test_an_error_at_any_self_attention_costs_nothing_of_the_picture(swept: dict[str, Any], name: str) -> None:
    found = swept[name]
    assert found["wrong"] == []
    assert found["identical"] == 2 * found["attentions"] >= 8
    assert found["kinds"] == {"retry": 2 * found["attentions"]}


@pytest.mark.parametrize("name", CASES)
def test_no_completed_step_is_repeated(swept: dict[str, Any], name: str) -> None:
    assert swept[name]["repeated"] == []


def test_where_only_another_picture_can_be_had_it_is_said(swept: dict[str, Any]) -> None:
    """A LoRA that is streamed is added in another precision, and nothing else is on the card that could leave."""
    found = swept["LoRA alone on the card"]
    assert (found["wrong"], found["identical"]) == ([], 0)
    assert found["said"] == 2 * found["attentions"]
    assert found["kinds"] == {"smaller": 2 * found["attentions"]}


@pytest.mark.parametrize("how", FOREIGN)
def test_what_may_keep_state_of_its_own_is_never_run_again_and_it_is_said(swept: dict[str, Any], how: str) -> None:
    found = swept[f"foreign {how}"]
    assert found["wrong"] == []
    assert found["refused"] == 2 * found["attentions"]
    assert found["kinds"]["refused"] == 2 * found["attentions"]
    assert "retry" not in found["kinds"]


def test_running_a_forward_again_without_putting_anything_back_is_no_retry(naive: dict[str, Any]) -> None:
    """The failing example: caches of keys and values have grown already, and EasyCache leaves the step out."""
    assert naive["plain"]["wrong"] == []
    for name in ("EasyCache", "CausalAR"):
        assert len(naive[name]["wrong"]) >= naive[name]["attentions"] // 2, name
