"""Records which inputs and outputs the nodes of the official WAN workflows have, by asking a real ComfyUI.

    python tests/host/record/record_nodes.py --comfyui CHECKOUT --python PYTHON_WITH_ITS_REQUIREMENTS --also PROMPTS_DIR

It starts that ComfyUI on the CPU in an empty base folder, puts one marker file into every model folder, and asks
/object_info. Wherever a marker comes back, the recorded list holds `$models:<folder>` or `$input:<kind>` instead: the list
is one of files, not of the node. Descriptions, tooltips and other prose are left out.
"""

import argparse
import json
import logging
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.request import urlopen

logger = logging.getLogger("record_nodes")

OUT = Path(__file__).resolve().parent.parent / "data" / "nodes.json"

# What the front end needs besides (its default graph, its list of model loaders), and what people put into WAN graphs.
ALWAYS = (
    *("CheckpointLoaderSimple", "ImageOnlyCheckpointLoader", "UNETLoader", "CLIPLoader", "CLIPVisionLoader", "VAELoader"),
    *("LoraLoader", "LoraLoaderModelOnly", "ControlNetLoader", "UpscaleModelLoader", "StyleModelLoader", "GLIGENLoader"),
    *("ModelSamplingAuraFlow", "EmptySD3LatentImage", "EmptyLatentImage", "KSampler", "KSamplerAdvanced"),
    *("VAEDecodeTiled", "VAEEncode", "VAEEncodeTiled", "SaveLatent", "LoadLatent"),
    *("SaveImage", "PreviewImage", "SaveAnimatedWEBP", "PrimitiveString", "PrimitiveStringMultiline"),
    *("PrimitiveInt", "PrimitiveFloat", "PrimitiveBoolean"),
)
# The front end resolves these itself; ComfyUI never sees them.
FRONT_END_ONLY = {"Note", "MarkdownNote", "Reroute", "PrimitiveNode"}

PROSE_KEYS = {"tooltip", "description", "placeholder", "help", "hint", "documentation"}
PROSE_FIELDS = {"description", "output_tooltips", "search_aliases", "help", "price_badge", "essentials_category"}
INPUT_MARKERS = {
    "$input:image": "_marker.png",
    "$input:video": "_marker.mp4",
    "$input:audio": "_marker.wav",
    "$input:latent": "_marker.latent",
}
LONGEST_DEFAULT = 60  # characters; anything longer is example text


def workflow_node_types(workflow: dict[str, Any]) -> Iterator[str]:
    """The types of the nodes on the canvas and in its subgraphs; a subgraph's own id is no type."""
    subgraphs = (workflow.get("definitions") or {}).get("subgraphs", [])
    own = {graph["id"] for graph in subgraphs} | FRONT_END_ONLY
    for graph in [workflow, *subgraphs]:
        yield from (node["type"] for node in graph["nodes"] if node["type"] not in own)


def wanted_types(prompt_folders: Iterable[Path]) -> set[str]:
    spec = find_spec("comfyui_workflow_templates_json")
    if spec is None or spec.origin is None:
        raise SystemExit("comfyui-workflow-templates-json is not installed here")
    wanted = set(ALWAYS)
    for path in (Path(spec.origin).parent / "templates").glob("*wan*.json"):
        if not path.name.startswith("api_"):
            wanted.update(workflow_node_types(json.loads(path.read_text("utf-8"))))
    for folder in prompt_folders:
        for path in folder.glob("*.json"):
            prompt = json.loads(path.read_text("utf-8"))
            wanted.update(node["class_type"] for node in prompt.get("prompt", prompt).values())
    return wanted


def without_prose(value: Any, markers: dict[str, str]) -> Any:
    """The definition as it is, file names turned into their marker, words left out."""
    if isinstance(value, dict):
        kept = {key: item for key, item in value.items() if key not in PROSE_KEYS}
        default = kept.get("default")
        if isinstance(default, str) and (len(default) > LONGEST_DEFAULT or default in markers):
            del kept["default"]
        return {key: without_prose(item, markers) for key, item in kept.items()}
    if isinstance(value, list):
        return [without_prose(item, markers) for item in value]
    return markers.get(value, value) if isinstance(value, str) else value


def get(url: str) -> Any:
    with urlopen(url, timeout=120) as answer:
        return json.load(answer)


def wait_until_up(url: str, process: subprocess.Popen[bytes], seconds: float = 180) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if process.poll() is not None:
            raise SystemExit(f"ComfyUI ended with {process.returncode}")
        try:
            get(f"{url}/system_stats")
            return
        except OSError:
            time.sleep(0.3)
    raise SystemExit("ComfyUI did not come up")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def place_markers(url: str, base: Path) -> dict[str, str]:
    """Marker file name -> what the recorded list says in its place."""
    markers: dict[str, str] = {}
    for folder in get(f"{url}/models"):
        path = base / "models" / folder
        if folder in ("custom_nodes", "configs"):
            continue
        path.mkdir(parents=True, exist_ok=True)
        name = f"_marker_{folder}.safetensors"
        (path / name).touch()
        markers[name] = f"$models:{folder}"
    (base / "input").mkdir(exist_ok=True)
    for marker, name in INPUT_MARKERS.items():
        (base / "input" / name).touch()
        markers[name] = marker
    return markers


def record(comfyui: Path, python: str, wanted: set[str]) -> dict[str, Any]:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryDirectory() as base:
        command = [python, "main.py", "--cpu", "--listen", "127.0.0.1", "--port", str(port), "--disable-auto-launch"]
        command += ["--base-directory", base, "--disable-all-custom-nodes", "--disable-api-nodes"]
        process = subprocess.Popen(command, cwd=comfyui, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            wait_until_up(url, process)
            version = get(f"{url}/system_stats")["system"]["comfyui_version"]
            markers = place_markers(url, Path(base))
            known = get(f"{url}/object_info")
        finally:
            process.terminate()
            process.wait()
    for name in sorted(wanted - known.keys()):
        logger.warning("%s does not know %s", version, name)
    nodes = {}
    for name in sorted(wanted & known.keys()):
        kept = {field: value for field, value in known[name].items() if field not in PROSE_FIELDS}
        nodes[name] = without_prose(kept, markers)
    return {"comfyui_version": version, "nodes": nodes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfyui", type=Path, required=True, help="a checkout of ComfyUI")
    parser.add_argument("--python", default=sys.executable, help="an interpreter that has its requirements")
    parser.add_argument("--also", type=Path, action="append", default=[], help="a folder of prompts in the API format")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    recorded = record(args.comfyui.resolve(), args.python, wanted_types(args.also))
    args.out.write_text(json.dumps(recorded, indent=1, ensure_ascii=False) + "\n", "utf-8")
    logger.info("%d node types of ComfyUI %s -> %s", len(recorded["nodes"]), recorded["comfyui_version"], args.out)


if __name__ == "__main__":
    main()
