"""What a real ComfyUI puts on a simulated card of ten sizes, held against the replay while it runs."""

import json
import sys
from pathlib import Path

import pytest
from host.record.record_residency import RULES, record, running
from loadpack import ROOT
from replayed import compare


@pytest.mark.parametrize("rules", ["lab", "nvidia"])
def test_every_load_is_predicted_to_the_byte(request: pytest.FixtureRequest, rules: str) -> None:
    given = {name: request.config.getoption(f"--comfyui{name}") for name in ("", "-models", "-fixtures")}
    checkout, models, fixtures = (Path(str(given[name])).resolve() for name in ("", "-models", "-fixtures"))
    if not given["-fixtures"]:
        pytest.skip("needs the lab's simulated GPU: --comfyui-fixtures")
    python = str(request.config.getoption("--comfyui-python") or sys.executable)
    version = (checkout / "comfyui_version.py").read_text(encoding="utf-8").split('"')[1]
    data = ROOT / "tests" / "data" / f"residency-{'.'.join(version.split('.')[:2])}.json"
    prompts = json.loads(data.read_text(encoding="utf-8"))["prompts"]
    with running(checkout, python, sorted(fixtures.iterdir()), models) as host:
        recorded = record(host, prompts, {rules: RULES[rules]})
    seen = compare(recorded)
    assert not seen.wrong, "\n".join(seen.wrong[:5])
    # six prompts on ten cards, each twice: four to six loads, then two to four
    assert seen.loads >= 360
