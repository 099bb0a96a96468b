"""What of a report counts as a change."""

from typing import Any

import pytest
from vram_headroom.nodes.changes import GRAIN, RAM_GRAIN, differs

REPORT: dict[str, Any] = {
    "taken_at": 10.0,
    "devices": [{"name": "card", "used_bytes": 8 * GRAIN, "pressure_percent": 20.0, "age_seconds": 0.0, "stale": False}],
    "pipelines": [{"components": [{"key": 5, "bytes_on_card": 0, "pinned": False, "idle_seconds": 3.0}]}],
    "running": None,
    "waiting": [{"id": "a", "waited_seconds": 1.0}],
    "ram": {"available_bytes": 1 << 34, "limit_bytes": None},
}


def with_value(path: tuple[Any, ...], value: Any, report: Any = REPORT) -> Any:
    if not path:
        return value
    if isinstance(report, list):
        return [with_value(path[1:], value, one) if index == path[0] else one for index, one in enumerate(report)]
    return {**report, path[0]: with_value(path[1:], value, report[path[0]])}


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("taken_at",), 11.0),
        (("devices", 0, "age_seconds"), 9.0),
        (("devices", 0, "pressure_percent"), 20.1),
        (("devices", 0, "used_bytes"), 9 * GRAIN - 1),
        (("pipelines", 0, "components", 0, "idle_seconds"), 60.0),
        (("waiting", 0, "waited_seconds"), 60.0),
        (("ram", "available_bytes"), (1 << 34) - RAM_GRAIN + 1),
    ],
)
def test_time_and_crumbs_are_no_change(path: tuple[Any, ...], value: Any) -> None:
    assert not differs(REPORT, with_value(path, value))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("devices", 0, "used_bytes"), 9 * GRAIN),
        (("devices", 0, "stale"), True),
        (("devices",), []),
        (("pipelines", 0, "components", 0, "key"), 6),
        (("pipelines", 0, "components", 0, "pinned"), True),
        (("running",), {"prompt_id": "p", "node_id": "8"}),
        (("waiting",), []),
        (("ram", "available_bytes"), (1 << 34) - RAM_GRAIN),
        (("ram", "limit_bytes"), 1 << 34),
        (("ram",), None),
    ],
)
def test_everything_else_is(path: tuple[Any, ...], value: Any) -> None:
    changed = with_value(path, value)
    assert differs(REPORT, changed)
    assert differs(changed, REPORT)


def test_crumbs_add_up_to_a_change() -> None:
    told, changes = REPORT, 0
    for step in range(1, 11):
        now = with_value(("devices", 0, "used_bytes"), 8 * GRAIN + step * GRAIN // 4)
        if differs(told, now):
            told, changes = now, changes + 1
    assert changes == 2
