"""Whether the closed forms still hold for the installed host: its own code is traced and compared, and the result is kept."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Literal, NamedTuple, get_args

from .estimate.backend import NEWEST_TRACED, OLDEST_TRACED, Backend, Correction
from .trace import TraceOptions, trace_forward

logger = logging.getLogger("vram_headroom")

Kind = Literal["dit", "vae_decode", "vae_encode", "text_encode"]
State = Literal["waiting", "absent", "agrees", "rescaled", "failed"]
"""`waiting`: not run yet. `absent`: this host has nothing to trace. `agrees`: nothing has to be shown. `rescaled`: estimates
follow the trace. `failed`: its code could not be traced, so nobody knows."""

AGREES_WITHIN: Final = 0.01
"""Closed form and trace of one forward are taken for equal up to this: the forms' own residual is at most 0.5 %, traced on the
WAN classes of ComfyUI 0.8 and 0.33."""

SAME_WITHIN: Final = 0.03
"""Ratios of one kind that lie closer together than this are one factor; further apart, the band has to hold them all."""

KEPT: Final = 8
"""Results kept in the store: a person who goes back and forth between two versions and two attentions has four."""

WORDS: Final[Mapping[Kind, str]] = MappingProxyType(
    {
        "dit": "sampling",
        "vae_decode": "decoding",
        "vae_encode": "encoding images",
        "text_encode": "encoding the prompt",
    }
)


@dataclass(frozen=True, slots=True)
class Subject:
    """One forward to trace. `prepare` builds the module and its inputs, off the card, and returns the forward of them."""

    kind: Kind
    name: str
    expected: int
    """Bytes that the closed form says."""
    prepare: Callable[[], Callable[[], object]]
    options: Callable[[], TraceOptions] = TraceOptions
    """Of the trace, asked when it begins: some are functions of the host."""


class Plan(NamedTuple):
    """What to check."""

    key: str
    """Of the host, see `host_key`."""
    host: str
    subjects: tuple[Subject, ...]


class Row(NamedTuple):
    """One forward that was traced, in bytes."""

    kind: Kind
    name: str
    expected: int
    traced: int

    @property
    def ratio(self) -> float:
        """Trace over closed form."""
        return self.traced / self.expected


class Failure(NamedTuple):
    """Forwards of one kind that could not be traced."""

    kind: Kind
    reason: str


class Off(NamedTuple):
    """A kind of forward for which the closed form is off: trace over closed form, between two shapes."""

    kind: Kind
    smallest: float
    largest: float

    @property
    def one_factor(self) -> bool:
        """Whether one factor fits all shapes; if not, what a shape needs lies anywhere between the two ratios."""
        return self.largest / self.smallest - 1 <= SAME_WITHIN


@dataclass(frozen=True, slots=True)
class SelfCheck:
    """What the check found. `message` is for a person, empty where there is nothing to show."""

    host_key: str
    """What the result is for: versions, attention, kernels and closed forms. Another key needs another check."""
    host: str
    """`ComfyUI 0.33.0`."""
    state: State
    message: str = ""
    rows: tuple[Row, ...] = ()
    failures: tuple[Failure, ...] = ()

    @property
    def off(self) -> tuple[Off, ...]:
        """The kinds of which a row is off."""
        found: dict[Kind, list[float]] = {}
        for row in self.rows:
            found.setdefault(row.kind, []).append(row.ratio)
        return tuple(
            Off(kind, min(ratios), max(ratios))
            for kind, ratios in found.items()
            if any(abs(ratio - 1) > AGREES_WITHIN for ratio in ratios)
        )

    @property
    def corrections(self) -> tuple[Correction, ...]:
        """A factor for each kind that is off: its largest ratio, so that no traced shape needs more than is said."""
        return tuple(Correction(off.kind, off.largest, self.host, None if off.one_factor else off.smallest) for off in self.off)

    def vouched(self, backend: Backend) -> Backend:
        """`backend` as far as this check vouches for it: with its corrections; of a version that nobody traced and that could
        not be checked, nothing is known, so an estimate spans every possibility."""
        checked = replace(backend, corrections=self.corrections)
        traced_by_us = backend.comfyui is not None and OLDEST_TRACED <= backend.comfyui < _next_minor(NEWEST_TRACED)
        if traced_by_us or not any(failure.kind == "dit" for failure in self.failures):
            return checked
        return replace(checked, comfyui=None, fused_rope=None, fused_rms_norm=None)


class Report(NamedTuple):
    """What the status shows of the check."""

    state: State
    message: str
    rows: tuple[Row, ...]

    def as_json(self) -> dict[str, object]:
        """`{"state", "message", "rows": [{"kind", "name", "expected", "traced"}]}`, bytes as numbers."""
        return {"state": self.state, "message": self.message, "rows": [row._asdict() for row in self.rows]}


def report(check: SelfCheck) -> Report:
    """The part of a check that is shown."""
    return Report(check.state, check.message, check.rows)


class Postponed(Exception):  # noqa: N818
    """The host has work to do: the check was given up and says nothing."""


class AbsentError(Exception):
    """The host has no WAN classes at all. What `prepare` of a subject raises then."""


def host_key(parts: Iterable[str], subjects: Iterable[Subject]) -> str:
    """What a result is for: `parts` name versions and kernels; the figures of the closed forms are in it as a digest, so that
    a result that was found with other forms is no result."""
    forms = "\n".join(f"{subject.kind}|{subject.name}|{subject.expected}" for subject in subjects)
    return " ".join((*parts, f"forms={hashlib.sha256(forms.encode()).hexdigest()[:12]}"))


def run(subjects: Sequence[Subject], key: str, host: str, stop: Callable[[], bool] = lambda: False) -> SelfCheck:
    """Trace every subject and compare. Raises Postponed as soon as `stop`, asked before each, says so; AbsentError.

    A subject that can't be built or traced is a failure of its kind, whatever else it raises.
    """
    rows: list[Row] = []
    failures: dict[Kind, str] = {}
    for subject in subjects:
        if stop():
            raise Postponed
        if subject.kind in failures:
            continue
        try:
            traced = trace_forward(subject.prepare(), options=subject.options()).peak_bytes
        except (Postponed, AbsentError):
            raise
        except Exception as error:
            # the host's code, or its signature, is not what it was: that is what the check is there to find
            failures[subject.kind] = f"{subject.name}: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
            continue
        if traced <= 0 or subject.expected <= 0:
            failures[subject.kind] = f"{subject.name}: nothing was counted"
            continue
        rows.append(Row(subject.kind, subject.name, subject.expected, traced))
    return conclude(key, host, rows, [Failure(kind, reason) for kind, reason in failures.items()])


def conclude(key: str, host: str, rows: Iterable[Row], failures: Iterable[Failure] = ()) -> SelfCheck:
    """State and message of what was traced."""
    check = SelfCheck(key, host, "agrees", "", tuple(rows), tuple(failures))
    parts = [_rescaled(host, off) for off in check.off]
    state: State = "rescaled" if parts else "agrees"
    if check.failures:
        state = "failed"
        what = " and ".join(WORDS[failure.kind] for failure in check.failures)
        newest = ".".join(map(str, NEWEST_TRACED))
        parts.append(
            f"What {host} needs for {what} could not be checked ({'; '.join(failure.reason for failure in check.failures)}). "
            f"Estimates are those for ComfyUI {newest}."
        )
    elif not check.rows:
        state = "absent"
    return replace(check, state=state, message=" ".join(parts))


def waiting(key: str, host: str) -> SelfCheck:
    """Not run yet: the host is busy, or nobody has looked."""
    return SelfCheck(key, host, "waiting")


def absent(key: str, host: str) -> SelfCheck:
    """This host has no WAN classes."""
    return SelfCheck(key, host, "absent")


class Checker:
    """Runs the check on a thread of its own when somebody looks, nothing is known and the host has nothing to do.

    `describe` says what to check; it is asked on each look and has to be cheap. `busy` says whether the host runs or has queued
    anything: then the check waits, and one that runs is given up at its next forward, to run again on a later look.
    """

    def __init__(self, describe: Callable[[], Plan], busy: Callable[[], bool], store: Store) -> None:
        self._describe = describe
        self._busy = busy
        self._store = store
        self._lock = threading.Lock()
        self._known: dict[str, SelfCheck] = {}
        self._thread: threading.Thread | None = None

    def look(self) -> SelfCheck:
        """What is known now. Waits for nothing but, the first time, for reading a small file."""
        plan = self._describe()
        with self._lock:
            known = self._known.get(plan.key)
            if known is None:
                known = self._known[plan.key] = self._store.load(plan.key) or waiting(plan.key, plan.host)
            if known.state == "waiting" and self._thread is None and not self._busy():
                self._thread = threading.Thread(target=self._run, args=(plan,), name="vram_headroom_selfcheck", daemon=True)
                self._thread.start()
            return known

    def finish(self) -> None:
        """Wait until no check runs."""
        thread = self._thread
        if thread is not None:
            thread.join()

    def _run(self, plan: Plan) -> None:
        found = waiting(plan.key, plan.host)
        try:
            found = run(plan.subjects, plan.key, plan.host, self._busy)
            if found.state in ("agrees", "rescaled"):
                self._store.save(found)
        except Postponed:
            logger.debug("the self-check waits until nothing runs")
        except AbsentError:
            found = absent(plan.key, plan.host)
        except OSError as error:
            logger.info("the result of the self-check can't be kept, so it will be run again: %s", error)
        except Exception as error:
            # ours, and not worth a try on every look
            logger.exception("the self-check broke")
            found = replace(found, state="failed", message=f"The self-check could not be run: {error}.")
        finally:
            if found.message:
                logger.info("%s", found.message)
            with self._lock:
                self._known[plan.key] = found
                self._thread = None


class Store:
    """The last results in one JSON file. A file that is missing, damaged or of another make is an empty one."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def load(self, key: str) -> SelfCheck | None:
        """The result for this key."""
        return next((check for check in self._all() if check.host_key == key), None)

    def save(self, check: SelfCheck) -> None:
        """Put it first, under its key; what can't be written is checked again next time. Raises OSError."""
        kept = [check, *(other for other in self._all() if other.host_key != check.host_key)][:KEPT]
        text = json.dumps({"results": [_as_json(one) for one in kept]}, indent=1)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        beside = self._path.with_name(f"{self._path.name}.{os.getpid()}.new")
        try:
            beside.write_text(text, encoding="utf-8")
            os.replace(beside, self._path)
        finally:
            beside.unlink(missing_ok=True)

    def _all(self) -> list[SelfCheck]:
        try:
            found = json.loads(self._path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return []
        results = found.get("results") if isinstance(found, dict) else None
        checks = [_from_json(one) for one in results] if isinstance(results, list) else []
        return [check for check in checks if check is not None]


def _as_json(check: SelfCheck) -> dict[str, object]:
    return {"key": check.host_key, "host": check.host, "rows": [row._asdict() for row in check.rows]}


def _from_json(found: Any) -> SelfCheck | None:
    """The check; None unless every part of it is what was written."""
    match found:
        case {"key": str() as key, "host": str() as host, "rows": [_, *_] as written}:
            rows = [_row(one) for one in written]
            return conclude(key, host, [row for row in rows if row]) if all(rows) else None
    return None


def _row(found: Any) -> Row | None:
    match found:
        case {"kind": str() as written, "name": str() as name, "expected": int() as expected, "traced": int() as traced}:
            kind = next((kind for kind in get_args(Kind) if kind == written), None)
            if kind is not None and expected > 0 and traced > 0:
                return Row(kind, name, expected, traced)
    return None


def _next_minor(version: tuple[int, int, int]) -> tuple[int, int, int]:
    return (version[0], version[1] + 1, 0)


def _rescaled(host: str, off: Off) -> str:
    what = WORDS[off.kind]
    if off.one_factor:
        return f"{host} needs {_percent(off.largest)} of what the formulas say for {what}; estimates follow it."
    span = f"{_percent(off.smallest)} to {_percent(off.largest)}, depending on the size,"
    return f"{host} needs {span} of what the formulas say for {what}; estimates take the larger."


def _percent(ratio: float) -> str:
    return f"{ratio * 100:.1f}".removesuffix(".0") + " %"
