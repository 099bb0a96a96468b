"""The machine's memory as it is now: what programs could still have, and the container's limit if there is one."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from .plan.ram import SystemMemory

CGROUPS: Final = Path("/sys/fs/cgroup")
"""Where Linux shows a container its own limits (kernel documentation, cgroup-v2)."""

NO_LIMIT: Final = 1 << 60
"""Version 1 writes a number near 2**63 where there is none (kernel documentation, cgroup-v1/memory)."""


def read_system_memory(pinnable: int = 0, cgroups: Path = CGROUPS) -> SystemMemory | None:
    """One reading; None where psutil, which ComfyUI ships, is absent or fails. `pinnable` is what the host may pin."""
    try:
        import psutil

        memory, swap = psutil.virtual_memory(), psutil.swap_memory()
    except Exception:
        # not installed, or a system psutil cannot read: then nothing is said of system memory
        return None
    limit, used = read_limit(cgroups)
    return SystemMemory(
        total=int(memory.total),
        available=int(memory.available),
        limit=limit,
        limit_used=used,
        swap_free=int(swap.free),
        pinnable=pinnable,
    )


def held_by_process() -> int | None:
    """Bytes of system memory that this process holds (its resident set); None as for `read_system_memory`."""
    try:
        import psutil

        return int(psutil.Process().memory_info().rss)
    except Exception:
        return None


def read_limit(cgroups: Path) -> tuple[int | None, int]:
    """The container's limit and what it has used of it, less file pages that are dropped when asked. None: no limit."""
    for limit_name, used_name, stat_key in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
    ):
        limit, used = _number(cgroups / limit_name), _number(cgroups / used_name)
        if limit is None or used is None or limit >= NO_LIMIT:
            continue
        droppable = _stat((cgroups / limit_name).with_name("memory.stat"), stat_key)
        return limit, max(0, used - droppable)
    return None, 0


def _number(path: Path) -> int | None:
    """`max` and anything else that is no number is none."""
    try:
        return int(path.read_text("ascii").strip())
    except (OSError, ValueError):
        return None


def _stat(path: Path, key: str) -> int:
    try:
        lines = path.read_text("ascii").splitlines()
    except (OSError, ValueError):
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{key} ")), 0)
