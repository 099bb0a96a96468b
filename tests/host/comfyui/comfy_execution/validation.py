"""Which output may be linked to which input."""

from typing import Any

WILDCARDS = {"*", "COMFY_MATCHTYPE_V3"}


def validate_node_input(received_type: Any, input_type: Any, strict: bool = False) -> bool:
    """Types are names, or several joined by commas; one in common is enough unless `strict`."""
    # Not `==`: custom nodes make wildcard strings by overriding __ne__.
    differ = received_type != input_type
    if not differ:
        return True
    if isinstance(received_type, list) and input_type == "COMBO":
        return True
    if not isinstance(received_type, str) or not isinstance(input_type, str):
        return False
    received = {part.strip() for part in received_type.split(",")}
    wanted = {part.strip() for part in input_type.split(",")}
    if (received | wanted) & WILDCARDS:
        return True
    return received <= wanted if strict else bool(received & wanted)
