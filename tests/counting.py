"""Counts what reading a model file takes from the disk."""

import io
from typing import Any

import pytest
from vram_headroom.vram.estimate import header


class CountingFile(io.FileIO):
    """The real file; counts every byte that leaves the operating system."""

    taken = 0

    def readinto(self, buffer: Any) -> int:
        count = super().readinto(buffer) or 0
        type(self).taken += count
        return count

    def read(self, size: int | None = -1) -> bytes:
        content = super().read(-1 if size is None else size) or b""
        type(self).taken += len(content)
        return content

    def readall(self) -> bytes:
        content = super().readall()
        type(self).taken += len(content)
        return content


def count_reads(monkeypatch: pytest.MonkeyPatch) -> type[CountingFile]:
    """All model files opened from now on are CountingFiles, and none was read yet."""

    def counting_open(path: Any, mode: str = "r", buffering: int = -1) -> Any:
        assert mode == "rb"
        raw = CountingFile(path)
        return raw if buffering == 0 else io.BufferedReader(raw)

    monkeypatch.setattr(header, "open", counting_open, raising=False)
    CountingFile.taken = 0
    return CountingFile
