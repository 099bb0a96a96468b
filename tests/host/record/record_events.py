"""Records the order of events while prompts run in a real ComfyUI.

    python tests/host/record/record_events.py --comfyui CHECKOUT --python PYTHON --prompts FOLDER \\
        [--packs FOLDER ...] [-- MAIN_PY_ARGUMENTS]
    python tests/host/record/record_events.py --url http://127.0.0.1:8188 --prompts FOLDER

With --comfyui it starts that checkout on the CPU, with the probe and no other packs than those given, and stops it again; with
--url the probe must be there. FOLDER holds prompts in API format whose models that ComfyUI has. Writes ../data/events.json,
one key per ComfyUI version. What is committed there ran on a simulated GPU of 4000 MB, provided by a pack: on a plain CPU the
only difference is that CLIPLoader loads its model at once.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from replay import Prompt, Scenario, Session, replay_now

HERE = Path(__file__).resolve().parent
DATA = HERE.parent / "data" / "events.json"


# scenarios


def plan(prompts: dict[str, Prompt], known_classes: set[str]) -> list[Scenario]:
    """Each prompt new and repeated; then the smallest one bent in ways that a host refuses, skips, stops or fails.

    Adds the bent prompts to `prompts`.
    """
    names = sorted(prompts)
    scenarios: list[Scenario] = []
    for name in names:
        scenarios += [Scenario(f"{name}: new", name), Scenario(f"{name}: again", name, fresh=False)]

    base = min((name for name in names if _find(prompts[name], "KSampler")), key=lambda name: len(prompts[name]))

    def bend(how: str, *edits: Callable[[Prompt], None]) -> str:
        name = f"{base}, {how}"
        prompts[name] = copy.deepcopy(prompts[base])
        for edit in edits:
            edit(prompts[name])
        return name

    sampler, decoder, preview = (_find(prompts[base], c)[0] for c in ("KSampler", "VAEDecode", "PreviewImage"))
    (shift, *_), (unet, *_) = _find(prompts[base], "ModelSamplingSD3"), _find(prompts[base], "UNETLoader")

    other_seed = bend("other seed", lambda p: p[sampler]["inputs"].update(seed=2))
    scenarios += [Scenario("base", base), Scenario("only the seed changed", other_seed, fresh=False)]

    refused = {
        "an unknown node class": lambda p: p[shift].update(class_type="NoSuchNode"),
        "no node class": lambda p: p[shift].pop("class_type"),
        "a file that is not in the list": lambda p: p[unet]["inputs"].update(unet_name="missing.safetensors"),
        "a required input is missing": lambda p: p[decoder]["inputs"].pop("vae"),
        "a value below its minimum": lambda p: p[sampler]["inputs"].update(steps=0),
        "a value above its maximum": lambda p: p[sampler]["inputs"].update(cfg=1000.0),
        "a value of the wrong type": lambda p: p[sampler]["inputs"].update(steps="many"),
        "a link of the wrong type": lambda p: p[decoder]["inputs"].update(samples=[unet, 0]),
        "no output node": lambda p: p.pop(preview),
    }
    for how, edit in refused.items():
        scenarios.append(Scenario(how, bend(how, edit), "refuse", fresh=False))
    scenarios.append(Scenario("no prompt", None, "refuse", fresh=False))

    def second_output(p: Prompt) -> None:
        p["90"] = copy.deepcopy(p[decoder])
        p["91"] = {"class_type": "PreviewImage", "inputs": {"images": ["90", 0]}}

    two = bend("two outputs", second_output)
    half = bend("one of two outputs is bad", second_output, lambda p: p["90"]["inputs"].pop("vae"))
    scenarios += [
        Scenario("one of two outputs is bad", half, fresh=False),
        Scenario("one of two outputs is asked for", two, targets=(preview,)),
        Scenario("then the other one", two, fresh=False, targets=("91",)),
    ]

    if "ComfySwitchNode" in known_classes:

        def switch(p: Prompt) -> None:
            p["92"] = copy.deepcopy(p[shift])
            p["93"] = {
                "class_type": "ComfySwitchNode",
                "inputs": {"switch": True, "on_false": [shift, 0], "on_true": ["92", 0]},
            }
            p[sampler]["inputs"]["model"] = ["93", 0]

        scenarios.append(Scenario("a lazy switch", bend("a lazy switch", switch)))

    scenarios += [
        Scenario("interrupted after the first step", base, "interrupt"),
        Scenario("and then run again", base, fresh=False),
        Scenario("out of memory in the first step", base, "oom"),
        Scenario("and then run once more", base, fresh=False),
    ]
    return scenarios


def _find(prompt: Prompt, class_type: str) -> list[str]:
    return [node for node, data in prompt.items() if data["class_type"] == class_type]


def read_prompts(folder: Path) -> dict[str, Prompt]:
    prompts: dict[str, Prompt] = {}
    for path in sorted(folder.glob("*.json")):
        body = json.loads(path.read_text(encoding="utf-8"))
        nodes = body.get("prompt", body)
        prompts[path.stem] = {n: {k: v for k, v in data.items() if k != "_meta"} for n, data in nodes.items()}
    if not prompts:
        raise SystemExit(f"no prompts in {folder}")
    return prompts


# a real ComfyUI


@contextlib.contextmanager
def running(checkout: Path, python: str, packs: list[Path], arguments: list[str]) -> Iterator[str]:
    """A ComfyUI on the CPU with the probe and those packs, in a base folder of its own; yields its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as base:
        for pack in (HERE / "probe", *packs):
            link = Path(base, "custom_nodes", pack.name)
            link.parent.mkdir(exist_ok=True)
            link.symlink_to(pack.resolve(), target_is_directory=True)
        command = [python, "main.py", "--cpu", "--listen", "127.0.0.1", "--port", str(port), "--disable-auto-launch"]
        command += ["--base-directory", base, *arguments]
        process = subprocess.Popen(command, cwd=checkout, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        try:
            output = process.stdout
            assert output is not None
            said: list[str] = []
            for line in output:
                said.append(line)
                if "To see the GUI go to" in line:
                    break
            else:
                raise RuntimeError("ComfyUI did not start:\n" + "".join(said[-40:]))
            threading.Thread(target=lambda: list(output), daemon=True).start()  # an unread pipe would stop it
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait()


def get_json(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=60) as response:
        return json.load(response)


# the file


def to_json(prompts: dict[str, Prompt], scenarios: list[Scenario], session: Session) -> dict[str, Any]:
    told: dict[str, Any] = {}
    for scenario in scenarios:
        entry: dict[str, Any] = {"prompt": scenario.prompt, "mode": scenario.mode, "fresh": scenario.fresh}
        if scenario.targets is not None:
            entry["targets"] = list(scenario.targets)
        told[scenario.name] = entry | session.played[scenario.name]._asdict()
    return {"keys": session.keys, "prompts": prompts, "scenarios": told}


def dump(recorded: dict[str, Any]) -> str:
    """JSON with one line per prompt and per message type, and events in lines of readable width."""
    versions = []
    for version, data in sorted(recorded.items(), key=lambda item: [int(x) for x in item[0].split(".")], reverse=True):
        keys = ",\n".join(f"   {json.dumps(k)}: {json.dumps(v)}" for k, v in data["keys"].items())
        prompts = ",\n".join(f"   {json.dumps(k)}: {json.dumps(v)}" for k, v in data["prompts"].items())
        scenarios = ",\n".join(f"   {json.dumps(k)}: {_dump_scenario(v)}" for k, v in data["scenarios"].items())
        versions.append(
            f' {json.dumps(version)}: {{\n  "device": {json.dumps(data["device"])},\n  "keys": {{\n{keys}\n  }},\n'
            f'  "prompts": {{\n{prompts}\n  }},\n  "scenarios": {{\n{scenarios}\n  }}\n }}'
        )
    return "{\n" + ",\n".join(versions) + "\n}\n"


def _dump_scenario(entry: dict[str, Any]) -> str:
    rest = "".join(f"    {json.dumps(k)}: {json.dumps(v)},\n" for k, v in entry.items() if k != "events")
    # Spaces inside an event must not become line breaks.
    joined = ", ".join(json.dumps(event).replace(" ", "\0") for event in entry["events"])
    lines = textwrap.wrap(joined, 116, break_long_words=False, break_on_hyphens=False)
    events = "\n".join(f"     {line}" for line in lines).replace("\0", " ")
    return f'{{\n{rest}    "events": [\n{events}\n    ]\n   }}'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--comfyui", type=Path, help="a ComfyUI checkout")
    where.add_argument("--url", help="a running ComfyUI that has the probe pack")
    parser.add_argument("--python", default=sys.executable, help="the Python that this ComfyUI runs in")
    parser.add_argument("--prompts", type=Path, required=True, help="a folder of prompts in API format")
    parser.add_argument("--packs", type=Path, nargs="*", default=[], help="custom nodes it needs besides the probe")
    parser.add_argument("arguments", nargs="*", help="further arguments of main.py, after --")
    options = parser.parse_args()
    prompts = read_prompts(options.prompts)
    with contextlib.ExitStack() as stack:
        url = options.url or stack.enter_context(
            running(options.comfyui.resolve(), options.python, options.packs, options.arguments)
        )
        system = get_json(f"{url}/system_stats")
        version = system["system"]["comfyui_version"]
        scenarios = plan(prompts, set(get_json(f"{url}/object_info")))
        session = replay_now(url, prompts, scenarios)
    recorded = json.loads(DATA.read_text(encoding="utf-8")) if DATA.exists() else {}
    recorded[version] = {"device": system["devices"][0]["name"], **to_json(prompts, scenarios, session)}
    DATA.write_text(dump(recorded), encoding="utf-8")


if __name__ == "__main__":
    main()
