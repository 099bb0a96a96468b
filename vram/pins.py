"""Whether elastic weights may be kept on the card through a whole prompt."""

from __future__ import annotations

from .plan.types import HostRules, Plan


def room_for_pins(plan: Plan, rules: HostRules, other_programs: int) -> int:
    """Bytes of elastic weights that can stay on the card through every phase of `plan`, whatever else it does.

    Kept pages are the one thing a hungry phase can't push out, so the upper bound of every phase counts, and a phase of which
    nothing is known leaves no room. `other_programs` are bytes that nobody here can free.
    """
    if not plan.runs or plan.verdict == "unknown":
        return 0
    needs = [planned.activation.upper if planned.activation else None for planned in plan.phases]
    if any(need is None for need in needs):
        return 0
    worst = max((need for need in needs if need is not None), default=0)
    return max(0, plan.card.total - other_programs - rules.headroom_bytes - plan.card.safety_margin - worst)
