"""The machine's memory, and the limits a container is given, from files as the kernel writes them."""

from pathlib import Path

import psutil
import pytest
from vram_headroom.vram.system_memory import read_limit, read_system_memory


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_a_container_has_what_its_limit_leaves_and_file_pages_do_not_count(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        {"memory.max": "8000\n", "memory.current": "5000\n", "memory.stat": "anon 1000\ninactive_file 1500\nactive_file 7\n"},
    )
    assert read_limit(root) == (8000, 3500)
    found = read_system_memory(cgroups=root)
    assert found is not None
    assert (found.limit, found.limit_used, found.room) == (8000, 3500, 4500)


def test_the_older_kind_of_container_is_read_too(tmp_path: Path) -> None:
    files = {"memory.limit_in_bytes": "8000", "memory.usage_in_bytes": "5000", "memory.stat": "total_inactive_file 500"}
    assert read_limit(write(tmp_path, {f"memory/{name}": text for name, text in files.items()})) == (8000, 4500)


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"memory.max": "max\n", "memory.current": "5000\n"},
        {"memory/memory.limit_in_bytes": str(2**63 - 4096), "memory/memory.usage_in_bytes": "5"},
        {"memory.max": "a lot", "memory.current": "5"},
    ],
)
def test_without_a_limit_the_machine_is_the_limit(tmp_path: Path, files: dict[str, str]) -> None:
    root = write(tmp_path, files)
    assert read_limit(root) == (None, 0)
    found = read_system_memory(cgroups=root)
    assert found is not None
    assert found.total == psutil.virtual_memory().total
    assert 0 < found.room <= found.total
