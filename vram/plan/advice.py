"""What would make a graph fit: fixes found by search, each proved by planning the graph with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any, Final, TypedDict

from ..units import GIB, say_gib
from .bench import PICTURES, Bench, Knob, Picture, Setup, Turn, in_words
from .flags import launch_setups
from .knobs import LEAST_FRAMES, LEAST_SIDE, block_swap, knobs
from .patch import Change, ReplaceNode, ReplaceNodeReport, SetInput, SetInputReport, apply, change_report
from .prompt import PromptError
from .siblings import FileLister
from .tiles import tiled_at_once
from .types import Card, HostRules, Library, NodeVocabulary, PhasePlan, Plan, Verdict

MAX_REPLANS: Final = 120
"""Plans made to advise on one that does not fit; one takes about a millisecond. What is not found by then is not offered."""

MAX_REPLANS_WHEN_IT_RUNS: Final = 20
"""The same for a plan that runs already: there the advice is a courtesy."""

MAX_COMBINATIONS: Final = 3
"""Fixes of several changes that are offered at once. Our choice: a person reads no more."""

MAX_SPEEDUPS: Final = 3
"""Fixes offered for what runs already. Our choice."""

CARD_SIZES: Final = tuple(size * GIB for size in (8, 10, 12, 16, 20, 24, 32, 40, 48, 64, 80, 96, 141, 180, 288))
"""Memory of cards on sale, as their makers name it (NVIDIA and AMD data sheets, RTX 3050 to MI355X)."""

NO_CARD: Final = "larger_card"
NO_MEMORY: Final = "more_memory"

FILES: Final = frozenset({"smaller_file", "smaller_text_encoder", "fp8_weights"})
"""Knobs for system memory that is only tight: other files, and nothing else about the video."""

TIGHT, SWAPS, ENDS = 1, 2, 3
"""System memory's burden: files are read again, the page file is used, the system ends ComfyUI. 0 is none."""


TRIED: Final = (
    "All that could be changed in this graph was tried, alone and together; "
    f"clips below {LEAST_FRAMES} frames and sides below {LEAST_SIDE} px are not offered."
)


@dataclass(frozen=True, slots=True)
class Context:
    """What the host knows beside the prompt. Every part but the vocabulary may be absent: what needs it is then not offered."""

    vocabulary: NodeVocabulary
    targets: tuple[str, ...] | None = None
    """As the plan was made with."""
    library: Library | None = None
    files: FileLister | None = None
    rules: HostRules | None = None
    replan_with: Callable[[HostRules], Plan] | None = None
    """The same prompt under other rules: what a launch flag would do."""
    replan_on: Callable[[Card], Plan] | None = None
    """The same prompt on another card."""
    policies: tuple[Setup, ...] = ()
    """Changes of policy the host offers."""
    other_programs: int = 0
    """Bytes of the card that other programs hold, where that is known."""
    bus_bytes_per_second: int | None = None
    """Measured, or None: then no seconds are told."""


@dataclass(frozen=True, slots=True)
class Fix:
    """One thing a person can do, with what it leads to."""

    id: str
    """A stable word; of a combination the words joined with `+`."""
    title: str
    changes: tuple[Change, ...]
    """For `patch.apply`. Empty: nothing in the graph changes, the title says what does."""
    saves: int
    """Bytes less that the worst phase needs beyond what it can have; where the card is enough, bytes less of system memory if
    that is short, else bytes less that cross the bus."""
    cost: str
    """What it costs in time where that is known; may be empty. Seconds only from a measured bandwidth."""
    picture: Picture
    verdict: Verdict
    plan: Plan
    """What the prompt with `changes` plans to."""
    note: str = ""


class FixReport(TypedDict):
    """A fix in the check's answer."""

    id: str
    title: str
    changes: list[SetInputReport | ReplaceNodeReport]
    saves_bytes: int
    cost: str
    picture: str
    verdict: str
    message: str
    plan_id: str
    note: str


def fix_report(prompt: Mapping[str, Any], fix: Fix) -> FixReport:
    """`fix` of `prompt` as JSON."""
    return FixReport(
        id=fix.id,
        title=fix.title,
        changes=[change_report(prompt, change) for change in fix.changes],
        saves_bytes=fix.saves,
        cost=fix.cost,
        picture=fix.picture,
        verdict=fix.verdict,
        message=fix.plan.message,
        plan_id=fix.plan.plan_id,
        note=fix.note,
    )


def advise(
    prompt: Mapping[str, Any], plan: Plan, replan: Callable[[Mapping[str, Any]], Plan], context: Context
) -> tuple[Fix, ...]:
    """Fixes for `prompt`, which planned to `plan`, best first: what leaves the picture as it is, then what costs least time.

    `replan` plans a changed prompt as `plan` was planned. Deterministic where it is. What does not fit the card is made to fit
    it, and system memory too where that can be. Where the card is enough, system memory that is short has its own fixes, of
    smaller files alone if it is only tight. For `fits_with_offload` there is also what streams less, or spares a decode that
    runs out of memory first, and leaves the picture alone. A prompt that is none has no fixes.
    """
    burden = _burden(plan)
    if (plan.verdict in ("fits", "unknown") and not burden) or plan.card.total <= 0 or not isinstance(prompt, Mapping):
        return ()
    bench = Bench(prompt, plan, context.vocabulary, context.library, context.files, context.targets)
    try:
        bench.order  # noqa: B018 - a graph that runs in a circle says so here
    except PromptError:
        return ()
    setups = (*launch_setups(context.rules, context.replan_with, plan), *context.policies, *_closed_programs(plan, context))
    serious = plan.verdict == "does_not_fit" or burden == ENDS
    search = _Search(bench, replan, context, MAX_REPLANS if serious else MAX_REPLANS_WHEN_IT_RUNS)
    if plan.verdict == "does_not_fit":
        return _ranked(search.fixes(setups))
    found = search.relief(setups) if burden else []
    if plan.verdict == "fits_with_offload":
        known = {fix.id for fix in found}
        found += [fix for fix in _ranked(search.speedups(setups)) if fix.id not in known][:MAX_SPEEDUPS]
    return _ranked(found)


def _closed_programs(plan: Plan, context: Context) -> tuple[Setup, ...]:
    on, other = context.replan_on, context.other_programs
    if on is None or other <= 0:
        return ()
    card = replace(plan.card, free=min(plan.card.total, plan.card.free + other))
    title = f"Close other programs: they hold {say_gib(other)} of this card"
    return (Setup("close_other_programs", title, "nothing", lambda: on(card)),)


class _SpentError(Exception):
    """No more plans are made."""


class _Search:
    """One question, and the plans made for it."""

    def __init__(self, bench: Bench, replan: Callable[[Mapping[str, Any]], Plan], context: Context, replans: int) -> None:
        self._bench = bench
        self._replan = replan
        self._context = context
        self._left = replans
        self._plans: dict[str, Plan | None] = {}
        self._turns: dict[tuple[str, int], Turn | None] = {}
        self._burden = _burden(bench.plan)
        self._bearable = SWAPS
        """The most burden on system memory that a fix may leave."""
        self._missing: int | None = None
        """The most bytes of system memory that a fix may leave missing, where that is asked."""

    # --- what does not fit

    def fixes(self, setups: tuple[Setup, ...]) -> list[Fix]:
        """What fits the card, and does not make the system end ComfyUI unless nothing else is found and it would anyway."""
        found: list[Fix] = []
        try:
            for bearable in (SWAPS, ENDS) if self._burden == ENDS else (SWAPS,):
                self._bearable = bearable
                found.extend(self._setups(setups, self._works))
                found.extend(self._by_turning(knobs(self._bench)))
                if found:
                    return found
            found.append(self._larger_card())
        except _SpentError:
            pass
        return found

    # --- what fits the card and not the system's memory

    def relief(self, setups: tuple[Setup, ...]) -> list[Fix]:
        """What makes less of a burden on system memory; nothing but files changes where it is only tight."""
        everything = knobs(self._bench)
        usable = everything if self._burden == ENDS else tuple(knob for knob in everything if knob.id in FILES)
        idle = tuple(setup for setup in setups if setup.picture == "nothing")
        short = self._bench.plan.ram.short if self._bench.plan.ram else 0
        found: list[Fix] = []
        try:
            # to swap half as much is worth it where to swap nothing can't be had
            for bearable, missing in ((self._burden - 1, None), *([(SWAPS, short // 2)] if self._burden == SWAPS else [])):
                self._bearable, self._missing = bearable, missing
                found.extend(self._setups(idle, self._works))
                found.extend(self._by_turning(usable))
                if found:
                    return found
            if self._burden == ENDS:
                found.append(self._more_memory())
        except _SpentError:
            pass
        return found

    # --- by turning

    def _by_turning(self, usable: Sequence[Knob]) -> Iterator[Fix]:
        """Each knob alone, then several at once where that spares the picture something."""
        before = _short(self._bench.plan)
        # the strongest setting of a knob tells whether it is enough, helps, or has nothing to do with it
        alone: dict[Knob, int] = {}
        helpful: list[tuple[Knob, int]] = []
        for knob in usable:
            level = self._strongest(knob)
            plan = None if level is None else self._plan(self._turn(knob, level))
            if plan is None or level is None:
                continue
            if self._works(plan):
                alone[knob] = self._mildest(knob, level)
                yield self._fix(((knob, alone[knob]),))
            elif _short(plan) < before:
                helpful.append((knob, level))
        if any(PICTURES.index(knob.picture) <= PICTURES.index("tiled") for knob in alone):
            return
        yield from self._together(helpful, alone)

    def _together(self, helpful: list[tuple[Knob, int]], alone: Mapping[Knob, int]) -> Iterator[Fix]:
        offered = 0
        everything = [*helpful, *alone.items()]
        compatible = self._compatible(helpful)
        if not alone and not self._works(self._plan(*(self._turn(knob, level) for knob, level in compatible))):
            return
        for count in (2, 3):
            if offered:
                return
            for chosen in combinations(everything, count):
                if offered == MAX_COMBINATIONS:
                    return
                levels = self._least(chosen, alone)
                if levels is not None:
                    offered += 1
                    yield self._fix(levels)
        if not offered and not alone:
            yield self._fix(self._pruned(compatible))

    def _least(self, chosen: tuple[tuple[Knob, int], ...], alone: Mapping[Knob, int]) -> tuple[tuple[Knob, int], ...] | None:
        """The mildest settings that work together: the last, which costs the picture most, is spared first. None if none do.

        A combination with a knob that would do alone is worth it only where it spares that knob something.
        """
        if any(knob in alone for knob, _ in chosen[:-1]):
            return None
        levels = dict(chosen)
        last = chosen[-1][0]
        if last not in alone and not self._works(self._plan(*(self._turn(knob, level) for knob, level in chosen))):
            return None
        for knob, _ in reversed(chosen):
            fixed = tuple(self._turn(other, level) for other, level in levels.items() if other is not knob)
            levels[knob] = self._mildest(knob, levels[knob], fixed)
            if knob is last and knob in alone and levels[knob] >= alone[knob]:
                return None
        return tuple(levels.items())

    def _compatible(self, helpful: list[tuple[Knob, int]]) -> tuple[tuple[Knob, int], ...]:
        """As many of them as don't exclude each other, those that cost the picture least first."""
        chosen: list[tuple[Knob, int]] = []
        for item in helpful:
            if _joined([self._turn(knob, level) for knob, level in (*chosen, item)]) is not None:
                chosen.append(item)
        return tuple(chosen)

    def _pruned(self, chosen: tuple[tuple[Knob, int], ...]) -> tuple[tuple[Knob, int], ...]:
        """All that helps, without what is not needed, each as mild as the others allow."""
        levels = self._without_idle(chosen)
        levels = self._least(levels, {}) or levels
        # what was needed beside the strongest settings may not be beside milder ones
        return self._without_idle(levels)

    def _without_idle(self, chosen: tuple[tuple[Knob, int], ...]) -> tuple[tuple[Knob, int], ...]:
        for item in reversed(chosen):
            rest = tuple(other for other in chosen if other is not item)
            if rest and self._works(self._plan(*(self._turn(knob, level) for knob, level in rest))):
                chosen = rest
        return chosen

    # --- what runs already

    def speedups(self, setups: tuple[Setup, ...]) -> list[Fix]:
        """What streams less or fails less, and leaves the picture, and the time everything else takes, alone."""
        streamed, failing = self._bench.plan.bus_bytes, _failing(self._bench.plan)
        self._bearable, self._missing = self._burden, None

        def faster(plan: Plan | None) -> bool:
            if plan is None or plan.verdict not in ("fits", "fits_with_offload") or not self._works(plan):
                return False
            now = (plan.bus_bytes, _failing(plan))
            return now[0] <= streamed and now[1] <= failing and now != (streamed, failing)

        found: list[Fix] = []
        try:
            found.extend(self._setups(tuple(setup for setup in setups if setup.picture == "nothing"), faster))
            # the host would decode in tiles too, after it has failed: the picture is no worse for it
            for knob in (*block_swap(self._bench, fewer=True), *tiled_at_once(self._bench)):
                level = self._strongest(knob)
                if level is not None and faster(self._plan(self._turn(knob, level))):
                    found.append(self._fix(((knob, self._mildest(knob, level, good=faster)),)))
        except _SpentError:
            pass
        return found

    # --- parts

    def _setups(self, setups: tuple[Setup, ...], good: Callable[[Plan | None], bool]) -> Iterator[Fix]:
        for setup in setups:
            key = f"setup {setup.id}"
            if key not in self._plans:
                self._plans[key] = self._made(setup.plan)
            plan = self._plans[key]
            if plan is not None and good(plan):
                yield Fix(
                    setup.id,
                    setup.title,
                    (),
                    self._saved(plan),
                    self._streaming(plan),
                    setup.picture,
                    plan.verdict,
                    plan,
                    self._note(plan, setup.note),
                )

    def _larger_card(self) -> Fix:
        """Said when nothing in the graph or around it is enough, with the card that would be where that can be planned."""
        plan, card = self._bench.plan, self._bench.plan.card
        note = TRIED
        on = self._context.replan_on
        sizes = [size for size in CARD_SIZES if size > card.total] if on else []
        for size in sizes:
            larger = replace(card, name=f"a card of {say_gib(size)}", total=size, free=size - (card.total - card.free))
            found = self._made(lambda larger=larger: on(larger) if on else None)
            if found is not None and self._works(found):
                title = f"Nothing short of a larger card: one of {size // GIB} GB would do"
                return Fix(
                    NO_CARD,
                    title,
                    (),
                    self._saved(found),
                    self._streaming(found),
                    "nothing",
                    found.verdict,
                    found,
                    self._note(found, note),
                )
        most = f", and none of up to {sizes[-1] // GIB} GB would do" if sizes else ""
        return Fix(NO_CARD, f"Nothing short of a larger card{most}", (), 0, "", "nothing", plan.verdict, plan, note)

    def _more_memory(self) -> Fix:
        """Said when nothing in the graph or around it leaves enough of the system's memory."""
        plan = self._bench.plan
        missing = plan.ram.short if plan.ram else 0
        title = f"Nothing short of more system memory, or a larger page file: {say_gib(missing)} are missing"
        return Fix(NO_MEMORY, title, (), 0, "", "nothing", plan.verdict, plan, self._note(plan, TRIED))

    def _note(self, plan: Plan, note: str) -> str:
        """`note`, and what `plan` says of system memory where that is short."""
        return " ".join(part for part in (note, plan.ram.message if plan.ram and _burden(plan) else "") if part)

    def _fix(self, levels: tuple[tuple[Knob, int], ...]) -> Fix:
        turns = [self._turn(knob, level) for knob, level in levels]
        plan = self._plan(*turns)
        if plan is None:
            raise AssertionError("a fix is made of settings that were planned")
        title = in_words([turns[0].title, *(turn.title[:1].lower() + turn.title[1:] for turn in turns[1:])])
        cost = [*(turn.cost for turn in turns), self._streaming(plan)]
        return Fix(
            id="+".join(knob.id for knob, _ in levels),
            title=title,
            changes=tuple(change for turn in turns for change in turn.changes),
            saves=self._saved(plan),
            cost="; ".join(dict.fromkeys(part for part in cost if part)),
            picture=PICTURES[max(PICTURES.index(knob.picture) for knob, _ in levels)],
            verdict=plan.verdict,
            plan=plan,
            note=self._note(plan, ""),
        )

    def _works(self, plan: Plan | None) -> bool:
        """It runs, no more of it is unknown than before, and system memory bears it."""
        if plan is None or not plan.runs or (plan.verdict == "unknown" and _unsized(plan) > _unsized(self._bench.plan)):
            return False
        if self._missing is not None and plan.ram is not None and plan.ram.short > self._missing:
            return False
        return _burden(plan) <= self._bearable and (_knows_memory(plan) or not _knows_memory(self._bench.plan))

    def _can_turn(self, knob: Knob, level: int) -> Turn | None:
        key = (knob.id, level)
        if key not in self._turns:
            self._turns[key] = knob.turn(level)
        return self._turns[key]

    def _turn(self, knob: Knob, level: int) -> Turn:
        turn = self._can_turn(knob, level)
        if turn is None:
            raise AssertionError(f"level {level} of {knob.id} was found before")
        return turn

    def _strongest(self, knob: Knob) -> int | None:
        """The strongest setting the graph can take; arithmetic in between may skip some."""
        weakest = max(-1, knob.levels - 65)
        return next((level for level in range(knob.levels - 1, weakest, -1) if self._can_turn(knob, level) is not None), None)

    def _mildest(
        self, knob: Knob, works: int, fixed: tuple[Turn, ...] = (), good: Callable[[Plan | None], bool] | None = None
    ) -> int:
        """The mildest setting that is good beside `fixed`, where `works` is one. Binary search: need falls with the level."""
        good = good or self._works
        low, high = 0, works
        while low < high:
            middle = (low + high) // 2
            level = next((level for level in range(middle, high) if self._can_turn(knob, level) is not None), None)
            if level is None:
                high = middle
            elif good(self._plan(*fixed, self._turn(knob, level))):
                works, high = level, middle
            else:
                low = level + 1
        return works

    def _plan(self, *turns: Turn) -> Plan | None:
        """The plan with these settings, None where they exclude each other. Raises _SpentError."""
        changes = _joined(turns)
        if changes is None:
            return None
        key = repr(sorted(map(repr, changes)))
        if key not in self._plans:
            self._plans[key] = self._made(lambda: self._replan(apply(self._bench.prompt, changes)))
        return self._plans[key]

    def _made(self, make: Callable[[], Plan | None]) -> Plan | None:
        if self._left <= 0:
            raise _SpentError
        self._left -= 1
        try:
            return make()
        except ValueError:
            # a change that contradicts another, or makes the prompt none
            return None

    def _saved(self, plan: Plan) -> int:
        before = self._bench.plan
        if before.verdict != "does_not_fit" or before.peak_phase is None:
            if self._bearable < self._burden or self._missing is not None:
                return max(0, _memory_need(before) - _memory_need(plan))
            return max(0, before.bus_bytes - plan.bus_bytes)
        worst = before.phases[before.peak_phase]
        same = next(
            (
                planned
                for planned in plan.phases
                if (planned.phase.node_id, planned.phase.kind) == (worst.phase.node_id, worst.phase.kind)
            ),
            None,
        )
        return max(0, _need(worst) - (_need(same) if same else 0))

    def _streaming(self, plan: Plan) -> str:
        per_step = max((planned.streamed for planned in plan.phases if planned.phase.kind == "sample"), default=0)
        if not per_step:
            return ""
        speed = self._context.bus_bytes_per_second
        seconds = f", {per_step / speed:.1f} s" if speed else ""
        return f"streams {say_gib(per_step)} per step{seconds}"


def _joined(turns: Sequence[Turn]) -> tuple[Change, ...] | None:
    """All their changes, or None where one replaces a node that another changes too, or two set one input differently."""
    changes = tuple(change for turn in turns for change in turn.changes)
    replaced = {change.node_id for change in changes if isinstance(change, ReplaceNode)}
    values: dict[tuple[str, str], object] = {}
    others = 0
    for change in changes:
        if isinstance(change, SetInput) and change.node_id not in replaced:
            others += 1
            if values.setdefault((change.node_id, change.input), change.value) != change.value:
                return None
    return changes if len(replaced) + others == len(changes) else None


def _need(planned: PhasePlan) -> int:
    """What a phase needs beyond what it can have: negative where there is room."""
    return planned.activation.expected - planned.available if planned.activation else -planned.available


def _short(plan: Plan) -> int:
    """Bytes missing on the card over all phases, and of system memory: what fixes are to bring down."""
    return sum(planned.short for planned in plan.phases) + (max(0, _memory_need(plan) - plan.ram.room) if plan.ram else 0)


def _burden(plan: Plan) -> int:
    """What the graph does to system memory, from 0 to ENDS; 0 where it was not planned or is not known."""
    if plan.ram is None or not _knows_memory(plan) or plan.ram.verdict == "fits":
        return 0
    if plan.ram.verdict == "does_not_fit":
        return ENDS
    return SWAPS if plan.ram.short else TIGHT


def _knows_memory(plan: Plan) -> bool:
    return plan.ram is not None and plan.ram.verdict != "unknown"


def _memory_need(plan: Plan) -> int:
    """System memory that is not taken yet, with the model files that are best kept in it."""
    ram = plan.ram
    return ram.need.expected - ram.present + ram.mapped if ram is not None and ram.need is not None else 0


def _failing(plan: Plan) -> int:
    """Phases that run out of memory before they are done in tiles."""
    return sum(planned.tiled is not None for planned in plan.phases)


def _unsized(plan: Plan) -> int:
    return sum(planned.activation is None for planned in plan.phases)


def _ranked(fixes: list[Fix]) -> tuple[Fix, ...]:
    """What leaves the picture as it is first, then by what it does to system memory and what crosses the bus; a click before
    what a person has to do."""

    def place(fix: Fix) -> tuple[int, bool, int, int, bool, int, str]:
        what = (PICTURES.index(fix.picture), fix.verdict == "unknown", _burden(fix.plan), fix.plan.bus_bytes)
        return (*what, not fix.changes, -fix.saves, fix.id)

    return tuple(sorted(fixes, key=place))
