"""Statuses, plans and events, made up: for tests of what the panel makes of them, whatever the server says today."""

from typing import Any

from playwright.sync_api import Locator, expect
from session import STATUS, Session

GIB = 1 << 30
PANEL = "#vram-headroom-panel"
TAB = "vram-headroom"
WATCH = "**/api/v1/hardware/vram/watch"

DISPATCH = """([type, detail]) => window.comfyAPI.api.api.dispatchEvent(new CustomEvent(type, { detail }))"""
TOGGLE = "(id) => window.comfyAPI.app.app.extensionManager.sidebarTab.toggleSidebarTab(id)"


def gib(amount: float) -> int:
    return int(amount * GIB)


def device(total: float = 16.0, ours: float = 0.0, others: float = 0.0, back: float = 0.0, index: int = 0, **rest: Any) -> dict:
    """A card; sizes in GiB. `back`: of ours, what is given back by itself."""
    used, free = ours + others, total - ours - others
    sizes = {"total": total, "used": used, "free": free, "reserved": ours, "active": ours, "ours": ours, "others": others}
    found: dict[str, Any] = {f"{name}_bytes": gib(size) for name, size in sizes.items()}
    found |= {"index": index, "name": "NVIDIA RTX 4070 Ti", "kind": "cuda", "reclaimable_free_bytes": gib(free + back)}
    found |= {"utilization_percent": 100 * used / total, "pressure_percent": 100 * (used - back) / total}
    return {**found, "stale": False, "age_seconds": 0.1, **rest}


def model(key: int, file: str, role: str, size: float, on_card: float = 0.0, **rest: Any) -> dict[str, Any]:
    """A model that ComfyUI has loaded."""
    found = {"key": key, "name": "WAN21", "file": file, "role": role, "dtype": "float8_e4m3fn", "pipeline": None}
    found |= {"bytes": gib(size), "bytes_on_card": gib(on_card), "registered": False, "in_use": False, "elastic": False}
    return {**found, "device_index": 0, "age_seconds": 0.0, **rest}


def component(key: int, name: str, role: str, size: float, on_card: float = 0.0, **rest: Any) -> dict[str, Any]:
    """A model of a pipeline."""
    placement = "cpu" if on_card == 0 else "gpu" if on_card >= size else "partial"
    found = {"key": key, "name": name, "role": role, "placement": placement, "dtype": "float8_e4m3fn", "node_id": None}
    found |= {
        "bytes": gib(size),
        "bytes_on_card": gib(on_card),
        "pinned": False,
        "elastic": False,
        "policy": "",
        "in_use": False,
    }
    return {**found, "idle_seconds": 130.0, "age_seconds": 0.0, "device_index": 0, **rest}


SEAMS = [
    {"name": "node start and end", "kind": "private", "since": "0.8", "state": "live", "without_it": "no peaks"},
    {"name": "tiled VAE decode", "kind": "private", "since": "0.8", "state": "absent", "without_it": "tiles are not shown"},
]


def status(*devices: dict[str, Any], **rest: Any) -> dict[str, Any]:
    found: dict[str, Any] = {"version": "0.1.0", "devices": list(devices), "pipelines": [], "loaded_models": [], "waiting": []}
    found |= {
        "running": None,
        "seams": SEAMS,
        "ram": {"total_bytes": 64 * GIB, "available_bytes": 40 * GIB, "limit_bytes": None},
    }
    found["ram"]["ours_bytes"] = 18 * GIB
    found["host"] = {"comfyui_version": "0.33.0", "patchers": "dynamic", "vram_state": "NORMAL_VRAM", "reserve_bytes": gib(0.4)}
    rows = [{"kind": "forward", "name": "WAN T2V 14B, 81 frames", "expected": gib(3.75), "traced": gib(3.75)}]
    found["self_check"] = {"state": "agrees", "message": "The estimates agree with this ComfyUI's own code.", "rows": rows}
    return {**found, **rest}


def busy(index: int = 0) -> dict[str, Any]:
    """A card in the middle of sampling, with every kind of part on it."""
    return device(12.0, ours=9.9, others=1.1, back=1.9, index=index)


def running(**rest: Any) -> dict[str, Any]:
    """A pipeline that samples, and a model that the host alone knows."""
    parts = [
        component(
            1, "WAN 2.2 high noise", "generator", 13.3, 5.6, in_use=True, idle_seconds=0.0, elastic=True, age_seconds=3.2
        ),
        component(2, "WAN 2.2 low noise", "generator", 13.3),
        component(3, "UMT5-XXL", "text_encoder", 6.3, idle_seconds=12.0),
        component(4, "VAE 2.1", "vae", 0.24, 0.24, pinned=True),
    ]
    pipelines = [{"name": "wan", "state": "active", "components": parts}]
    models = [
        model(9, "sd_xl_base_1.0.safetensors", "generator", 4.8, 1.7, dtype="float16"),
        *(model(p["key"], "", p["role"], 1, p["bytes_on_card"] / GIB, registered=True, in_use=p["in_use"]) for p in parts),
    ]
    return status(busy(), **{"pipelines": pipelines, "loaded_models": models, **rest})


TERMS = {"self-attention": 1.2, "hidden states": 0.64, "rotary table": 0.03}


def phase(
    kind: str, title: str, node: str, weights: float, needed: float, steps: int | None = None, **rest: Any
) -> dict[str, Any]:
    peak = weights + needed
    found: dict[str, Any] = {"kind": kind, "title": title, "node_ids": [node], "steps": steps, "resident_bytes": gib(weights)}
    found |= {"other_models_bytes": 0, "streamed_bytes": 0, "reserve_bytes": gib(0.4), "short_bytes": 0, "cache_bytes": 0}
    found["activation_bytes"] = {"expected": gib(needed), "lower": gib(0.97 * needed), "upper": gib(1.1 * needed)}
    found["peak_allocated_bytes"] = {
        "expected": gib(peak),
        "lower": gib(weights + 0.97 * needed),
        "upper": gib(weights + 1.1 * needed),
    }
    share = sum(TERMS.values())
    found["activation_terms"] = [{"name": name, "bytes": gib(needed * size / share)} for name, size in TERMS.items()]
    found |= {"peak_reserved_bytes": None, "available_bytes": gib(11 - weights), "other_programs_bytes": gib(1.1)}
    return {**found, "models": [], "loras": [], "leaving": [], **rest}


def plan(total: float = 12.0) -> dict[str, Any]:
    """Two text encodings, two experts, a decode."""
    return {
        "fits": True,
        "verdict": "fits_with_offload",
        "message": "Runs on this card.",
        "plan_id": "p",
        "card": {"name": "NVIDIA RTX 4070 Ti", "total_bytes": gib(total), "free_bytes": gib(total - 1.1)},
        "ram": None,
        "models": [],
        "phases": [
            phase("text_encode", "Text encoding", "1", 6.3, 0.37),
            phase("text_encode", "Text encoding", "2", 6.3, 0.37),
            phase("sample", "Sampling (high noise)", "3", 7.0, 3.2, steps=10, streamed_bytes=gib(6.3)),
            phase("sample", "Sampling (low noise)", "4", 7.0, 3.2, steps=10, streamed_bytes=gib(6.3)),
            phase("vae_decode", "VAE decoding", "5", 0.24, 6.4),
        ],
        "peak_phase": 2,
        "bus_bytes": 0,
        "bus_seconds": None,
        "fixes": [],
        "assumptions": [],
    }


def event(session: Session, type_: str, /, **detail: Any) -> None:
    """As the server's websocket would bring it."""
    name = type_ if type_ in ("progress", "reconnected", "reconnecting") else f"vram_headroom.{type_}"
    session.page.evaluate(DISPATCH, [name, detail])


def ramp(start: float, end: float, low: float, high: float, count: int = 12) -> list[list[float]]:
    """Samples that rise at once and then stay, wavering a little."""
    step = (end - start) / count
    return [[start + i * step, gib(low if i == 0 else high - (0.05 if i % 3 == 0 else 0.0))] for i in range(count)]


def play(session: Session, until: int, state: str = "running", prompt_id: str = "run", **rest: Any) -> None:
    """The events of a run up to a phase of `plan()`: 0 and 1 encode, 2 and 3 sample, 4 decodes; 5 is its end."""
    heights = (6.6, 6.6, 10.1, 10.0, 6.5)
    event(session, "plan", prompt_id=prompt_id, plan=plan())
    peaks: list[dict[str, Any]] = []
    for index in range(until + 1):
        before = ramp(2 * index - 2, 2 * index, heights[index - 2] if index > 1 else 0.2, heights[index - 1]) if index else []
        if index:
            peak = {"phase": index - 1, "node_id": str(index), "peak_bytes": gib(heights[index - 1]), "exact": True}
            peaks.append({**peak, "lower_bound": False})
        over = index == until and (state != "running" or until == 5)
        told = (
            {"phase": None, "node_id": None}
            if over and index == 5
            else {"phase": min(index, 4), "node_id": str(min(index, 4) + 1)}
        )
        event(
            session,
            "phase",
            prompt_id=prompt_id,
            state=state if over else "running",
            at=2 * index,
            samples=before,
            measured=peaks,
            **told,
        )
    if until in (2, 3) and state == "running":
        node = str(until + 1)
        event(session, "progress", prompt_id=prompt_id, node=node, value=4, max=10)
        told = {"phase": until, "node_id": node, "at": 2 * until + 1, "measured": peaks}
        event(
            session,
            "phase",
            prompt_id=prompt_id,
            state="running",
            samples=ramp(2 * until, 2 * until + 1, 7.0, heights[until]),
            **told,
        )


def serve(session: Session, answer: dict[str, Any], run: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    """The server says this from now on, to whoever asks and whoever watches; the list of heartbeats it was sent."""
    beats: list[dict[str, Any]] = []
    page = session.page
    # a version of its own, by which the panel is seen to show this answer and not one from before
    session.served += 1
    answer = {**answer, "version": f"0.1.{session.served}"}
    for path in (STATUS, WATCH):
        page.unroute(path)
    page.route(STATUS, lambda route: route.fulfill(json=answer))

    def watched(route: Any) -> None:
        beats.append(route.request.post_data_json)
        if beats[-1]["watching"]:
            route.fulfill(json={"status": answer, "run": run})
        else:
            route.fulfill(status=204)

    page.route(WATCH, watched)
    session.page.evaluate(DISPATCH, ["status", None])
    return beats


def open_panel(session: Session, shows: str = "NVIDIA RTX 4070 Ti") -> Locator:
    """Returns once this is in it: the first thing it draws may be a reading from before."""
    panel = session.page.locator(PANEL)
    if panel.count() == 0:
        session.page.evaluate(TOGGLE, TAB)
    expect(panel).to_contain_text(shows, timeout=20_000)
    if session.served:
        expect(panel.locator(".vrh-about")).to_contain_text(f"VRAM Headroom 0.1.{session.served}ComfyUI", timeout=20_000)
    return panel


def close_panel(session: Session) -> None:
    panel = session.page.locator(PANEL)
    if panel.count():
        session.page.evaluate(TOGGLE, TAB)
    expect(panel).to_have_count(0, timeout=20_000)


BADGES = """() => {
    const found = {};
    const walk = (graph, prefix) => {
        for (const node of graph.nodes) {
            const texts = (node.badges ?? []).map((badge) => (typeof badge === "function" ? badge() : badge).text);
            if (texts.some(Boolean)) found[`${prefix}${node.id}`] = texts.filter(Boolean).join(" ");
            if (node.subgraph) walk(node.subgraph, `${prefix}${node.id}:`);
        }
    };
    const app = window.comfyAPI.app.app;
    walk(app.rootGraph ?? app.graph, "");
    return found;
}"""
"""What the badges of every node say, as the canvas asks them, in subgraphs too."""


def badges(session: Session) -> dict[str, str]:
    return session.page.evaluate(BADGES)
