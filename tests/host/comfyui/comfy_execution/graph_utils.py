"""Links, and the value that blocks what depends on it."""

from typing import Any


def is_link(obj: Any) -> bool:
    return isinstance(obj, list) and len(obj) == 2 and isinstance(obj[0], str) and isinstance(obj[1], int | float)


class ExecutionBlocker:
    """As an input: the node is not run. A message makes an error of it."""

    def __init__(self, message: str | None) -> None:
        self.message = message
