"""Why the metrics of two plans differ: each change shared out among the decisions, adding up exactly.

Two walks lead from one plan to the other, one decision at a time, and every configuration on the way is
evaluated: one walk starts at the old plan, one at the new. Each takes, of the decisions that are left, the
first in canonical order that leads to a configuration which keeps the objectives; so a smaller fleet waits
for less traffic, and more traffic for a larger fleet. Where there is none, the first that can be: it fits,
its shape is not refused, it carries its load. Where none of those, the fewest decisions that can be taken
together are. A decision's part is the mean of its two steps, which makes `attribution(b, a)` the mirror of
`attribution(a, b)`.

What the evaluator does not see (another profile or version, a simulated figure) is the difference between
a plan's own numbers and the evaluator's for it, and gets a part of its own.

Parts add up exactly: figures are whole multiples of a power of two, 40 binary digits below the largest
figure of the metric, so that their sums are exact in floating point, in any order.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, islice
from typing import Any

from planc.cost_model.table import CostTable
from planc.planner.counterfactual import Evaluator, Impossible, Outcome, flat
from planc.planner.diff_mixture import Decision, Mixture
from planc.planner.plan import Plan

_DIGITS = 40  # binary, of a metric's largest figure
_SAME = 1e-4  # relative difference up to which the evaluator reproduces a plan's own number
_TOGETHER = 3  # decisions taken at once before all that are left are
UNSEEN = "not evaluated"
_TRIES = 200  # sets of decisions looked at for one step

Metrics = Mapping[str, float]
Set = frozenset[str]


@dataclass(frozen=True, slots=True)
class Part:
    """What some decisions did to each metric. Several where they cannot be told apart; then `reasons` say
    why none of them could be taken by itself."""

    decisions: tuple[Decision, ...]
    reasons: tuple[str, ...]
    changes: Metrics

    @property
    def name(self) -> str:
        return " + ".join(decision.name for decision in self.decisions)

    def text(self, arrow: str = "->") -> str:
        return "; ".join(decision.text(arrow) for decision in self.decisions)

    def mirrored(self) -> Part:
        changes = {name: -change + 0.0 for name, change in self.changes.items()}
        return Part(tuple(decision.mirrored() for decision in self.decisions), self.reasons, changes)

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "decisions": [decision.to_json() for decision in self.decisions],
            "reasons": list(self.reasons),
            "changes": dict(self.changes),
        }


@dataclass(frozen=True, slots=True)
class Attribution:
    """Parts in canonical order. Of every metric they add up to new - old, exactly.

    walks   decisions in the order they were taken, from the old plan and from the new one
    """

    old: Metrics
    new: Metrics
    parts: tuple[Part, ...]
    walks: tuple[tuple[tuple[str, ...], ...], ...]

    @property
    def unseen(self) -> Part | None:
        """What no decision explains."""
        return next((part for part in self.parts if part.name == UNSEEN), None)

    def change(self, metric: str) -> float:
        return self.new[metric] - self.old[metric]

    def mirrored(self) -> Attribution:
        return Attribution(
            self.new, self.old, tuple(part.mirrored() for part in self.parts), self.walks[::-1]
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "metrics": {
                name: {"old": self.old[name], "new": self.new[name], "change": self.change(name)}
                for name in self.old
            },
            "parts": [part.to_json() for part in self.parts],
            "walks": dict(zip(("from_old", "from_new"), self.walks, strict=True)),
        }


def attribution(old: Plan, new: Plan, table: CostTable) -> Attribution:
    """Shares out every metric that both plans state.

    Raises Impossible where one of the plans cannot be evaluated, PlancError where its request cannot be read.
    """
    mixture = Mixture(old, new)
    between = _Between(mixture, Evaluator(table))
    walks = tuple(tuple(between.walk(start)) for start in (frozenset[str](), between.all))
    visited = [between.metrics(state) for walk in walks for step in walk for state in step.ends]
    ends = [between.metrics(end) for end in (frozenset[str](), between.all)]
    figures = _Figures([*between.stated, *ends, *visited])
    written, reached = ([figures.ticks(side) for side in sides] for sides in (between.stated, ends))
    parts = []
    for group in _joined([step.taken for walk in walks for step in walk]):
        mine = [step for walk in walks for step in walk if step.taken <= group]
        around = [[figures.ticks(between.metrics(state)) for state in step.ends] for step in mine]
        changes = figures.halves({n: sum(b[n] - a[n] for a, b in around) for n in figures.names})
        reasons = tuple(sorted({step.reason for step in mine if step.reason}))
        decisions = tuple(decision for decision in mixture.decisions if decision.name in group)
        parts.append(Part(decisions, reasons, changes))
    parts.sort(key=lambda part: mixture.decisions.index(part.decisions[0]))
    gaps = [{n: 2 * (s[n] - r[n]) for n in figures.names} for s, r in zip(written, reached, strict=True)]
    unseen = figures.halves({n: gaps[1][n] - gaps[0][n] for n in figures.names})
    if any(unseen.values()):
        parts.append(Part((_unseen(old, new),), (), unseen))
    sides = [figures.halves({n: 2 * side[n] for n in figures.names}) for side in written]
    order = tuple(tuple(between.listed(step.taken) for step in walk) for walk in walks)
    return Attribution(sides[0], sides[1], tuple(parts), order)


def _unseen(old: Plan, new: Plan) -> Decision:
    """What stands for differences between plans and evaluator."""
    versions = ("", old.planc_version, new.planc_version)
    prints = (
        (name, getattr(old.fingerprint, name), getattr(new.fingerprint, name))
        for name in ("profile", "model")
    )
    return Decision(UNSEEN, tuple(row for row in (versions, *prints) if row[1] != row[2]))


# -- walks -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Step:
    """Decisions taken from the new plan, where those in `before` already are."""

    taken: Set
    before: Set
    reason: str

    @property
    def ends(self) -> tuple[Set, Set]:
        return self.before, self.before | self.taken


class _Between:
    """Configurations between two plans by the decisions that are as in the new one, each evaluated once."""

    def __init__(self, mixture: Mixture, evaluator: Evaluator) -> None:
        self.names = tuple(decision.name for decision in mixture.decisions)
        self.all: Set = frozenset(self.names)
        self.stated = tuple(_stated(plan) for plan in mixture.plans)
        self._mixture, self._evaluator = mixture, evaluator
        self._known: dict[Set, Outcome | Impossible] = {}

    def metrics(self, state: Set) -> Metrics:
        return self.outcome(state).metrics

    def outcome(self, state: Set) -> Outcome:
        """What one configuration does; a plan's own figures where the evaluator agrees. Raises Impossible."""
        if state not in self._known:
            try:
                found = self._evaluator.outcome(*self._mixture.at(state))
                if self.all and state in (frozenset(), self.all):
                    found = _snapped(found, self.stated[bool(state)])
                self._known[state] = found
            except Impossible as error:
                self._known[state] = error
        known = self._known[state]
        if isinstance(known, Impossible):
            raise known
        return known

    def walk(self, start: Set) -> Iterator[_Step]:
        """Steps from one plan to the other."""
        state, other = start, self.all - start
        self.metrics(state)
        self.metrics(other)
        while state != other:
            left = [name for name in self.names if (name in state) != (name in other)]
            taken, reason = self._next(state, left)
            yield _Step(taken, state & (state ^ taken), reason)
            state ^= taken

    def _next(self, state: Set, left: Sequence[str]) -> tuple[Set, str]:
        """What is taken now, and where that is more than one decision why its first cannot be by itself."""
        refused: dict[str, str] = {}
        poor: list[str] = []
        for name in left:
            try:
                if self.outcome(state ^ {name}).meets:
                    return frozenset((name,)), ""
                poor.append(name)
            except Impossible as error:
                refused[name] = str(error)
        if poor:
            return frozenset(poor[:1]), ""
        sets = (c for size in range(2, _TOGETHER + 1) for c in combinations(left, size))
        for tried in islice(sets, _TRIES):
            if self._can_be(state ^ frozenset(tried)):
                return frozenset(tried), f"{tried[0]} alone: {refused[tried[0]]}"
        return frozenset(left), f"{left[0]} alone: {refused[left[0]]}"

    def _can_be(self, state: Set) -> bool:
        try:
            self.outcome(state)
        except Impossible:
            return False
        return True

    def listed(self, names: Set) -> tuple[str, ...]:
        return tuple(name for name in self.names if name in names)


def _joined(groups: Sequence[Set]) -> list[Set]:
    """The finest partition that splits none of the groups."""
    found: list[Set] = []
    for group in groups:
        touching = [other for other in found if other & group]
        found = [other for other in found if not other & group]
        found.append(group.union(*touching))
    return found


# -- exact figures -----------------------------------------------------------------------


class _Figures:
    """Metrics as whole numbers of ticks, a power of two for each metric."""

    def __init__(self, states: Sequence[Metrics]) -> None:
        self.names = [name for name in sorted(states[0]) if all(name in state for state in states)]
        self._exponents = {
            name: math.frexp(max(abs(state[name]) for state in states))[1] - _DIGITS for name in self.names
        }

    def ticks(self, values: Metrics) -> dict[str, int]:
        return {name: round(math.ldexp(values[name], -e)) for name, e in self._exponents.items()}

    def halves(self, counts: Mapping[str, int]) -> dict[str, float]:
        """Half ticks as numbers."""
        return {name: math.ldexp(counts[name], e - 1) for name, e in self._exponents.items()}


def _stated(plan: Plan) -> Metrics:
    """A plan's own figures, to the nine digits that are written."""
    found = flat(plan.predicted, plan.predicted_by_class)
    return {name: float(f"{value:.9g}") for name, value in found.items()}


def _snapped(found: Outcome, own: Metrics) -> Outcome:
    """An outcome with a plan's own figures wherever it reproduces them."""
    close = {n: v for n, v in own.items() if math.isclose(v, found.metrics.get(n, v), rel_tol=_SAME)}
    return Outcome({n: close.get(n, v) for n, v in found.metrics.items()}, found.meets)
