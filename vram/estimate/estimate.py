"""What an estimate is: a frozen value that says what it predicts, between which bounds, made of which terms."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Final, Literal, NamedTuple

Measure = Literal["peak_allocated", "peak_reserved"]
"""What tensors use at once, or what the allocator has taken from the card at once."""

Purpose = Literal["required", "observed"]
"""What must fit, or what a monitor will show: a host fills a card on purpose, so the second says nothing about the first."""


class Term(NamedTuple):
    """One part of an estimate, in bytes, with the name a person reads."""

    name: str
    bytes: int


@dataclass(frozen=True, slots=True)
class Estimate:
    """Bytes: the expected value between its bounds.

    `terms` sum to `expected`; a value given without terms is one of its own. Raises ValueError that names the argument if the
    bounds do not hold the expected value, if a number is negative or if the terms do not sum to it.
    """

    expected: int
    lower: int
    upper: int
    terms: tuple[Term, ...] = ()
    assumptions: tuple[str, ...] = ()
    predicts: Measure = "peak_allocated"
    purpose: Purpose = "required"

    def __post_init__(self) -> None:
        if self.lower < 0:
            raise ValueError(f"lower must not be negative, not {self.lower}")
        if not self.lower <= self.expected <= self.upper:
            raise ValueError(f"expected must lie between lower and upper, not {self.expected} in {self.lower} to {self.upper}")
        if not self.terms and self.expected:
            object.__setattr__(self, "terms", (Term("total", self.expected),))
        if sum(term.bytes for term in self.terms) != self.expected:
            raise ValueError(f"terms must sum to expected, {self.expected}, not to {sum(term.bytes for term in self.terms)}")

    @classmethod
    def of(
        cls,
        terms: Iterable[Term],
        *,
        below: int = 0,
        above: int = 0,
        assumptions: tuple[str, ...] = (),
        predicts: Measure = "peak_allocated",
        purpose: Purpose = "required",
    ) -> Estimate:
        """The sum of `terms`, which may be `below` bytes less or `above` bytes more. Terms of 0 bytes are left out."""
        kept = tuple(term for term in terms if term.bytes)
        expected = sum(term.bytes for term in kept)
        return cls(expected, max(0, expected - below), expected + above, kept, assumptions, predicts, purpose)

    def and_also(self, other: Estimate) -> Estimate:
        """Both at once. Raises ValueError where they predict different things: such numbers have no sum."""
        if (self.predicts, self.purpose) != (other.predicts, other.purpose):
            raise ValueError(
                f"other must predict the same: {self.purpose} {self.predicts}, not {other.purpose} {other.predicts}"
            )
        return replace(
            self,
            expected=self.expected + other.expected,
            lower=self.lower + other.lower,
            upper=self.upper + other.upper,
            terms=(*self.terms, *other.terms),
            assumptions=tuple(dict.fromkeys((*self.assumptions, *other.assumptions))),
        )

    def plus(self, nbytes: int, name: str) -> Estimate:
        """This and `nbytes` that are known exactly, under `name`."""
        terms = (Term(name, nbytes),) if nbytes else ()
        return self.and_also(Estimate(nbytes, nbytes, nbytes, terms, predicts=self.predicts, purpose=self.purpose))


NOTHING: Final = Estimate(0, 0, 0)
