"""The stand-in is held to what was recorded of a real ComfyUI, and nodes/host to what is recorded at all."""

from __future__ import annotations

import json
import math
import re
import struct
import sys
from difflib import unified_diff
from pathlib import Path
from typing import Any

import pytest
from host.process import start_host
from host.record.introspect import ABSENT, read_table
from host.record.record_surface import inspect_modules
from host.record.replay import Session, replay_now, scenario_from_json
from host.record.surface import Surface, load_surface
from host.record.uses import find_uses, problems

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
STANDIN = TESTS / "host" / "comfyui"
RECORD = TESTS / "host" / "record"
DATA = TESTS / "host" / "data"
MIRRORED = "0.33.0"
"""The ComfyUI whose surface and order of events the stand-in reproduces."""

REAL_ONLY = (
    "comfy.cli_args",
    "comfy.ldm",
    "comfy.model_detection",
    "comfy.model_prefetch",
    "comfy.ops",
    "comfy.quant_ops",
    "comfy.utils.weight_dtype",
)
"""What the stand-in leaves out with all below it: it has no models whose classes could be looked at or traced, fetches no
weights ahead and has no command line. nodes/host takes their absence for an answer (tests/test_detection.py,
tests/test_selfcheck.py); tests/real sees the real ones."""

NEWER = ("comfy_aimdo.control.get_simple_vram_headroom",)
"""What only a newer comfy-aimdo has than any recorded ComfyUI's; tests/test_aimdo_surface.py looks for it there."""

SURFACE = load_surface()
RECORDED: dict[str, Any] = json.loads((DATA / "events.json").read_text(encoding="utf-8"))


# what nodes/host uses


def test_nodes_host_uses_only_what_is_recorded() -> None:
    files = sorted((ROOT / "nodes" / "host").rglob("*.py"))
    found = [
        problem
        for path in files
        for problem in problems(path.read_text(encoding="utf-8"), path.relative_to(ROOT).as_posix(), SURFACE)
        if not any(f" {name} " in problem for name in NEWER)
    ]
    assert files
    assert not found, "\n".join(["add the names to tests/host/record/surface.txt and record them, or:", *found])


def small_surface() -> Surface:
    new = {
        "comfy": "module",
        "comfy.mm": "module",
        "comfy.mm.load": "function (models)",
        "comfy.mm.is_oom": "function (e)",
        "comfy.mm.State": "class",
        "comfy.mm.State.HIGH": "attribute",
        "comfy.mm.state": "value State",
        "comfy.mm.models": "value list",
        "comfy.mm.Loaded": "class (model)",
        "comfy.mm.Loaded.size": "method (self)",
        "comfy.mm.Loaded.clone": "method (self)",
        "comfy.elastic": "module",
        "comfy.elastic.enabled": "value bool",
        "server": "module",
        "server.PromptServer": "class (loop)",
        "server.PromptServer.instance": "attribute",
        "server.PromptServer.app": "attribute",
        "server.PromptServer.gone": ABSENT,
        "nodes": "module",
        "nodes.NODE_CLASS_MAPPINGS": "value dict",
        "nodes.VAELoader": "class ()",
        "nodes.VAELoader.load_vae": "method (self, vae_name)",
    }
    later = ("comfy.mm.is_oom", "comfy.elastic", "comfy.elastic.enabled")
    old = {name: ABSENT if name in later else kind for name, kind in new.items()}
    return Surface(
        {"2.0": new, "1.0": old},
        {
            "server.PromptServer.instance": "server.PromptServer",
            "comfy.mm.state": "comfy.mm.State",
            "comfy.mm.Loaded.clone": "comfy.mm.Loaded",
        },
        {"comfy.mm.models": "comfy.mm.Loaded"},
    )


UNRECORDED = "is not recorded"
BAD_SAMPLES = [
    ("import comfy.mm as mm\nmm.missing", 2, "comfy.mm.missing", UNRECORDED),
    ("import comfy.mm\ncomfy.mm.missing()", 2, "comfy.mm.missing", UNRECORDED),
    ("from comfy import mm\nx = mm\nx.missing", 3, "comfy.mm.missing", UNRECORDED),
    ("from comfy.mm import missing", 1, "comfy.mm.missing", UNRECORDED),
    ("from comfy.mm import *", 1, "comfy.mm.*", UNRECORDED),
    ("import comfy_extras.nodes_wan", 1, "comfy_extras.nodes_wan", UNRECORDED),
    ("import comfy.other", 1, "comfy.other", UNRECORDED),
    ("import comfy.mm as mm\ngetattr(mm, 'missing', None)", 2, "comfy.mm.missing", UNRECORDED),
    ("import comfy.mm as mm\nhasattr(mm, 'missing')", 2, "comfy.mm.missing", UNRECORDED),
    ("import comfy.mm as mm\nsetattr(mm, 'missing', 1)", 2, "comfy.mm.missing", UNRECORDED),
    ("import comfy.mm as mm\nmm.missing = 1", 2, "comfy.mm.missing", UNRECORDED),
    ("import comfy.mm as mm\nmm.State.LOW", 2, "comfy.mm.State.LOW", UNRECORDED),
    ("import comfy.mm as mm\nmm.state.missing", 2, "comfy.mm.State.missing", UNRECORDED),
    ("import comfy.mm as mm\nfor one in list(mm.models):\n    one.missing", 3, "comfy.mm.Loaded.missing", UNRECORDED),
    ("import comfy.mm as mm\n[one.missing for one in mm.models]", 2, "comfy.mm.Loaded.missing", UNRECORDED),
    ("import comfy.mm as mm\nmm.models[0].clone().missing", 2, "comfy.mm.Loaded.missing", UNRECORDED),
    ("from comfy.mm import Loaded\ndef f(one: Loaded | None):\n    one.missing", 3, "comfy.mm.Loaded.missing", UNRECORDED),
    (
        "from comfy.mm import Loaded\ndef f(ones: list['Loaded']):\n    ones[0].missing",
        3,
        "comfy.mm.Loaded.missing",
        UNRECORDED,
    ),
    ("from server import PromptServer\nPromptServer.instance.missing", 2, "server.PromptServer.missing", UNRECORDED),
    (
        "from server import PromptServer\nhere = getattr(PromptServer, 'instance', None)\nhere.missing",
        3,
        "server.PromptServer.missing",
        UNRECORDED,
    ),
    (
        "from server import PromptServer\n\nclass A:\n    def f(self):\n        self.it.missing\n\n"
        "    def __init__(self):\n        self.it = PromptServer.instance",
        5,
        "server.PromptServer.missing",
        UNRECORDED,
    ),
    (
        "def late():\n    import comfy.mm\n    return comfy.mm\n\ndef f():\n    late().missing",
        6,
        "comfy.mm.missing",
        UNRECORDED,
    ),
    ("import nodes as n\nn.NODE_CLASS_MAPPINGS['VAELoader']().missing", 2, "nodes.VAELoader.missing", UNRECORDED),
    ("import importlib\nmm = importlib.import_module('comfy.mm')\nmm.missing", 3, "comfy.mm.missing", UNRECORDED),
    ("import importlib\nimportlib.import_module('comfy.missing')", 2, "comfy.missing", UNRECORDED),
    ("import sys\nsys.modules['comfy.mm'].missing", 2, "comfy.mm.missing", UNRECORDED),
    ("probe('comfy.mm', 'missing')", 1, "comfy.mm.missing", UNRECORDED),
    ("SEAM = 'comfy.mm.missing'", 1, "comfy.mm.missing", UNRECORDED),
    ("import comfy.mm as mm\nwrap('seam', mm, 'missing', print)", 2, "comfy.mm.missing", UNRECORDED),
    ("from server import PromptServer\nPromptServer.gone", 2, "server.PromptServer.gone", "is in no recorded ComfyUI"),
    ("import comfy.mm as mm\nmm.is_oom(1)", 2, "comfy.mm.is_oom", "is absent from 1.0"),
    ("import comfy.mm as mm\ngetattr(mm, 'is_oom')", 2, "comfy.mm.is_oom", "is absent from 1.0"),
    ("from comfy.elastic import enabled", 1, "comfy.elastic", "is absent from 1.0"),
    (
        "try:\n    def f():\n        import comfy.elastic\nexcept ImportError:\n    pass",
        3,
        "comfy.elastic",
        "is absent from 1.0",
    ),
]


@pytest.mark.parametrize(("source", "line", "name", "why"), BAD_SAMPLES)
def test_a_use_of_what_is_not_there_is_named_with_its_line(source: str, line: int, name: str, why: str) -> None:
    found = problems(source, "nodes/host/x.py", small_surface())
    assert any(problem.startswith(f"nodes/host/x.py:{line}: {name} {why}") for problem in found), found


GOOD_SAMPLES = [
    "import comfy.mm as mm\nmm.load(mm.models)\nmm.state.name\nmm.State.HIGH.value\nmm.load.__wrapped__",
    "import comfy.mm as mm\nif hasattr(mm, 'is_oom'):\n    mm.is_oom(1)",
    "import comfy.mm as mm\nask = getattr(mm, 'is_oom', None)",
    "try:\n    import comfy.elastic as elastic\nexcept ImportError:\n    elastic = None\nif elastic:\n    elastic.enabled",
    "import contextlib\nwith contextlib.suppress(ImportError):\n    from comfy.elastic import enabled",
    "import importlib.util\nimportlib.util.find_spec('comfy.elastic')",
    "from server import PromptServer\nPromptServer.instance.app.middlewares.append(1)",
    "from . import server\nserver.anything\nfrom .nodes import thing\nthing.anything",
    "import comfy.mm as mm\nmm = object()\nmm.anything",
    "import comfy.mm as mm\ndef f(mm):\n    mm.anything",
    "import comfy.mm as mm\nmm.models.append(1)\nmm.models[0].size()",
    "import nodes\nnodes.NODE_CLASS_MAPPINGS['VAELoader']().load_vae('x')\nnodes.NODE_CLASS_MAPPINGS.get('Other').anything",
    "x = 'comfy.mm is a module'\ny = 'nodes.json'\nz = 'server.py'",
]


@pytest.mark.parametrize("source", GOOD_SAMPLES)
def test_a_use_that_every_recorded_version_survives_passes(source: str) -> None:
    assert problems(source, "x.py", small_surface()) == []


def test_the_table_and_the_recorded_data_name_the_same_things() -> None:
    names = [name for name, _, _ in read_table((RECORD / "surface.txt").read_text(encoding="utf-8"))]
    classes = {*SURFACE.instance_of.values(), *SURFACE.elements_of.values()}
    assert len(set(names)) == len(names)
    assert classes <= set(names)
    for version, recorded in SURFACE.versions.items():
        assert list(recorded) == names, version
    assert {"0.33.0", "0.8.0"} <= set(SURFACE.versions)


# the stand-in's surface

SET_UP = """
from pathlib import Path
from standin.settings import Settings, configure
base = Path({base!r})
configure(Settings(pack_root=Path({root!r}), base=base, models=base / "models", vram_bytes=16 * 2**30))
"""


@pytest.fixture(scope="module")
def standin_surface(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    base = tmp_path_factory.mktemp("surface")
    first = base / "set_up.py"
    first.write_text(SET_UP.format(base=str(base), root=str(ROOT)), encoding="utf-8")
    return inspect_modules(STANDIN, sys.executable, first)


def test_what_the_stand_in_offers_has_the_recorded_kind_and_signature(standin_surface: dict[str, str]) -> None:
    recorded = SURFACE.versions[MIRRORED]
    different = {
        name: f"stand-in: {offered}; ComfyUI: {recorded[name]}"
        for name, offered in standin_surface.items()
        if offered != ABSENT
        and comparable(offered) != comparable(recorded[name])
        and not (recorded[name] == "attribute" and offered.startswith("method"))
    }
    assert not different, "\n".join(f"{name}: {how}" for name, how in different.items())


def test_the_stand_in_offers_what_the_pack_and_the_probe_use(standin_surface: dict[str, str]) -> None:
    recorded = SURFACE.versions[MIRRORED]
    used = {
        use.name
        for path in (*(ROOT / "nodes" / "host").rglob("*.py"), RECORD / "probe" / "__init__.py")
        for use in find_uses(path.read_text(encoding="utf-8"), SURFACE)
        if recorded.get(use.name, ABSENT) != ABSENT
    }
    missing = [name for name in used if standin_surface[name] == ABSENT]
    assert sorted(name for name in missing if not f"{name}.".startswith(tuple(f"{left}." for left in REAL_ONLY))) == []


def comparable(entry: str) -> str:
    """Constructors are the stand-in's own affair: what they make is handed out by its loaders. A default that is left out is
    the same to a caller whether it is empty or None; so is a function, whether the class or the instance holds it."""
    if entry.startswith("class"):
        return "class"
    return re.sub(r"=(\[\]|\{\})", "=None", entry)


# what holds in every recorded version: the order that nodes/host relies on

RUNS = [
    pytest.param(data["events"], id=f"{version}: {name}")
    for version, recorded in RECORDED.items()
    for name, data in recorded["scenarios"].items()
    if data["status"] == 200
]


def span(events: list[str], start: str, end: str) -> tuple[int, int]:
    return (
        next(index for index, event in enumerate(events) if re.match(start, event)),
        max(index for index, event in enumerate(events) if re.match(end, event)),
    )


@pytest.mark.parametrize("events", RUNS)
def test_a_prompt_is_handled_validated_and_then_executed(events: list[str]) -> None:
    assert events[:3] == ["on_prompt", "validate_start", "validate_end ok"]
    first, last = span(events, "execute_start", "execute_end")
    assert all(first < index < last for index, event in enumerate(events) if event.startswith(("node_", "load", "sample_")))
    assert events[-1] == "ws executing -"


@pytest.mark.parametrize("events", RUNS)
def test_each_node_ends_before_the_next_starts_and_what_it_loads_lies_between(events: list[str]) -> None:
    running: str | None = None
    for event in events:
        what, node, *_ = [*event.split(), ""]
        if what == "node_start":
            assert running is None, event
            running = node
        elif what in ("load", "loaded", "sample_start", "sample_end", "step", "node_end"):
            assert running == node, event
            running = None if what == "node_end" else running
    assert running is None


# the order of events

MODEL_FILES: dict[str, tuple[str, dict[str, tuple[int, ...]]]] = {
    "unet_name": (
        "diffusion_models",
        {
            "head.modulation": (1, 2, 128),
            "head.head.weight": (64, 128),
            "patch_embedding.weight": (128, 16, 1, 2, 2),
            "blocks.0.self_attn.q.weight": (128, 128),
            "blocks.0.ffn.0.weight": (256, 128),
            "blocks.1.self_attn.q.weight": (128, 128),
            "blocks.1.ffn.0.weight": (256, 128),
            "text_embedding.0.weight": (128, 4096),
        },
    ),
    "clip_name": (
        "text_encoders",
        {
            "encoder.block.0.layer.0.SelfAttention.q.weight": (64, 4096),
            "encoder.block.23.layer.1.DenseReluDense.wi_1.weight": (10240, 1),
            "encoder.final_layer_norm.weight": (4096,),
            "shared.weight": (400, 4096),
        },
    ),
    "vae_name": (
        "vae",
        {
            "decoder.head.0.gamma": (16, 1, 1, 1),
            "decoder.conv1.weight": (64, 16, 3, 3, 3),
            "decoder.middle.0.residual.0.gamma": (64, 1, 1, 1),
            "decoder.middle.0.residual.2.weight": (64, 64, 3, 3, 3),
        },
    ),
}
"""Loader input -> its folder and the few F16 tensors by which a file of that kind is known."""


def write_models(folder: Path, prompts: dict[str, Any]) -> None:
    """A file for each model that the prompts name, but for the one they are refused for."""
    for inputs in (node["inputs"] for prompt in prompts.values() for node in prompt.values()):
        for widget, (kind, tensors) in MODEL_FILES.items():
            name = inputs.get(widget)
            if name is not None and name != "missing.safetensors":
                wider = {"patch_embedding.weight": (128, 36, 1, 2, 2)} if "i2v" in name else {}
                write_sparse(folder / kind / name, tensors | wider)


def write_sparse(path: Path, tensors: dict[str, tuple[int, ...]]) -> None:
    header: dict[str, Any] = {}
    end = 0
    for name, shape in tensors.items():
        begin, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)


MIRRORED_EVENTS = RECORDED[MIRRORED]


@pytest.fixture(scope="module")
def replayed(tmp_path_factory: pytest.TempPathFactory) -> Session:
    models = tmp_path_factory.mktemp("fidelity") / "models"
    write_models(models, MIRRORED_EVENTS["prompts"])
    scenarios = [scenario_from_json(name, data) for name, data in MIRRORED_EVENTS["scenarios"].items()]
    with start_host(models=models, custom_nodes=[RECORD / "probe"]) as host:  # beside the pack: it must not disturb the order
        return replay_now(host.url, MIRRORED_EVENTS["prompts"], scenarios)


@pytest.mark.parametrize("name", MIRRORED_EVENTS["scenarios"])
def test_the_stand_in_does_what_comfyui_did_in_that_order(replayed: Session, name: str) -> None:
    recorded, played = MIRRORED_EVENTS["scenarios"][name], replayed.played[name]
    changed = list(unified_diff(recorded["events"], played.events, "ComfyUI", "stand-in", n=2, lineterm=""))
    assert not changed, "\n".join(changed)
    assert (played.status, played.answer, played.history) == tuple(recorded[key] for key in ("status", "answer", "history"))


def test_messages_carry_the_recorded_keys(replayed: Session) -> None:
    assert replayed.keys == MIRRORED_EVENTS["keys"]
