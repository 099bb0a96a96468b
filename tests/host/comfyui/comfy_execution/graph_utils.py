"""Links, and the value that blocks what depends on it."""

from typing import Any


def is_link(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and isinstance(value[1], int | float)


class ExecutionBlocker:
    """As an input: the node is not run. A message makes an error of it."""

    def __init__(self, message: str | None) -> None:
        self.message = message
