"""Writes tests/data/templates/vocabulary.json: the types of every node class that the recorded template prompts name.

usage, in the repository's root:
python tests/host/record/record_vocabulary.py OBJECT_INFO

OBJECT_INFO is what a running ComfyUI answers at /object_info, saved to a file (recorded from 0.33.0). Per class: inputs with
their types (COMBO for lists of choices), widget defaults, output types and names, and whether it is an output node.
"""

import argparse
import json
from pathlib import Path
from typing import Any

DATA = Path(__file__).resolve().parents[2] / "data" / "templates"


def spec(info: dict[str, Any]) -> dict[str, Any]:
    inputs: dict[str, str] = {}
    defaults: dict[str, Any] = {}
    for group in ("required", "optional"):
        for name, entry in info["input"].get(group, {}).items():
            kind = entry[0]
            inputs[name] = kind if isinstance(kind, str) else "COMBO"
            if len(entry) > 1 and isinstance(entry[1], dict) and "default" in entry[1]:
                defaults[name] = entry[1]["default"]
    found = {"inputs": inputs, "outputs": [kind if isinstance(kind, str) else "COMBO" for kind in info["output"]]}
    if defaults:
        found["defaults"] = defaults
    if info.get("output_node"):
        found["is_output"] = True
    if names := list(info.get("output_name", [])):
        found["output_names"] = names
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("object_info", type=Path)
    known = json.loads(parser.parse_args().object_info.read_text("utf-8"))
    named: set[str] = set()
    for path in DATA.glob("*/*.json"):
        prompt = json.loads(path.read_text("utf-8")).get("output", {})
        named |= {str(node.get("class_type")) for node in prompt.values() if isinstance(node, dict)}
    lines = (
        f"{json.dumps(name)}:{json.dumps(spec(known[name]), separators=(',', ':'))}" for name in sorted(named & known.keys())
    )
    (DATA / "vocabulary.json").write_text("{\n" + ",\n".join(lines) + "\n}\n", "utf-8")


if __name__ == "__main__":
    main()
