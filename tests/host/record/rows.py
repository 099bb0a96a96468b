"""A table of recorded forwards in a JSON file: one row per line, so that one changed figure is one changed line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

COLUMNS = (
    "component",
    "variant",
    "weights",
    "fused_rope",
    "fused_rms_norm",
    "workspace",
    "batch",
    "frames",
    "height",
    "width",
    "latent",
    "tokens",
    "peak_bytes",
    "reserved_bytes",
    "output_bytes",
    "kept_bytes",
)
KEY = COLUMNS[:10]
"""What says which forward a row is about."""

Row = tuple[Any, ...]


class Table:
    """The rows of one file, by their key. Rows of an earlier run are kept where all of `about` and the columns are the same."""

    def __init__(self, path: Path, about: dict[str, Any], columns: tuple[str, ...] = COLUMNS) -> None:
        self._path = path
        self._about = about
        self._columns = columns
        self._rows: dict[str, list[Any]] = {}
        if path.exists():
            stored = json.loads(path.read_text(encoding="utf-8"))
            if tuple(stored["columns"]) == columns and all(stored.get(name) == value for name, value in about.items()):
                self._rows = {json.dumps(row[: len(KEY)]): row for row in stored["rows"]}

    def __len__(self) -> int:
        return len(self._rows)

    def lacks(self, key: Row) -> bool:
        """Whether there is no such row, or one that says in its column `failure` why it has no figures."""
        row = self._rows.get(json.dumps(key))
        return row is None or bool(dict(zip(self._columns, row, strict=True)).get("failure"))

    def add(self, *row: Any) -> None:
        assert len(row) == len(self._columns)
        self._rows[json.dumps(row[: len(KEY)])] = list(row)

    def write(self) -> None:
        about = {**self._about, "columns": self._columns}
        head = ",\n".join(f" {json.dumps(name)}: {json.dumps(value)}" for name, value in about.items())
        rows = ",\n".join("  " + json.dumps(row, separators=(",", ":")) for row in self._rows.values())
        self._path.write_text(f'{{\n{head},\n "rows": [\n{rows}\n ]\n}}\n', encoding="utf-8")
