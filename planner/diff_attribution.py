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
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from planc.cost_model.table import CostTable
from planc.errors import PlancError
from planc.planner.counterfactual import Evaluator, Impossible, Outcome, flat
from planc.planner.diff_mixture import Decision, Mixture
from planc.planner.diff_walk import OLD, Between, Metrics, Names, joined
from planc.planner.plan import Plan

_DIGITS = 40  # binary, of a metric's largest figure
_SAME = 1e-3  # relative difference up to which the evaluator reproduces a plan's own number
UNSEEN = "not evaluated"


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

    Raises Impossible where one of the plans cannot be evaluated.
    """
    mixture, evaluator = Mixture(old, new), Evaluator(table)

    def evaluate(state: Names) -> Outcome:
        try:
            return evaluator.outcome(*mixture.at(state))
        except PlancError as error:  # of files that the request names
            raise Impossible(str(error)) from None
        except ArithmeticError as error:  # of numbers that no plan of planc's has
            raise Impossible(f"it cannot be computed ({error})") from None

    return shared_out(mixture.decisions, evaluate, (_stated(old), _stated(new)), _unseen(old, new))


def shared_out(
    decisions: Sequence[Decision],
    evaluate: Callable[[Names], Outcome],
    stated: tuple[Metrics, Metrics],
    rest: Decision,
) -> Attribution:
    """Shares the difference of two plans' own figures out among decisions.

    evaluate   a configuration by the names of the decisions that are as in the new plan
    stated     figures of both plans          rest   stands for what the evaluator does not reproduce

    Raises Impossible where one of the ends is.
    """
    if not all(math.isfinite(value) for side in stated for value in side.values()):
        raise Impossible("a plan's own figures are not finite")
    between = Between([decision.name for decision in decisions], _snapping(evaluate, decisions, stated))
    ends = between.ends()
    walks = [list(between.walk(start)) for start in (OLD, between.new)]
    steps = [step for walk in walks for step in walk]
    metrics = {end: between.outcome(end).metrics for step in steps for end in step.ends}
    grid = _Grid([*stated, *ends, *metrics.values()])
    parts = []
    for group in joined([step.taken for step in steps]):
        mine = [step for step in steps if step.taken <= group]
        changes = grid.sums((0.5, metrics[step.ends[0]], metrics[step.ends[1]]) for step in mine)
        members = tuple(decision for decision in decisions if decision.name in group)
        reasons = tuple(sorted({step.reason for step in mine if step.reason}))
        parts.append(Part(members, reasons, changes))
    parts.sort(key=lambda part: decisions.index(part.decisions[0]))
    unseen = grid.sums([(1.0, ends[1], stated[1]), (1.0, stated[0], ends[0])])
    if any(unseen.values()):
        parts.append(Part((rest,), (), unseen))
    orders = tuple(
        tuple(tuple(name for name in between.names if name in step.taken) for step in walk) for walk in walks
    )
    return Attribution(grid.rounded(stated[0]), grid.rounded(stated[1]), tuple(parts), orders)


def _unseen(old: Plan, new: Plan) -> Decision:
    """What stands for differences between plans and evaluator."""
    versions = ("", old.planc_version, new.planc_version)
    prints = (
        (name, getattr(old.fingerprint, name), getattr(new.fingerprint, name))
        for name in ("profile", "model")
    )
    return Decision(UNSEEN, tuple(row for row in (versions, *prints) if row[1] != row[2]))


def _stated(plan: Plan) -> Metrics:
    """A plan's own figures, to the nine digits that are written."""
    found = flat(plan.predicted, plan.predicted_by_class)
    return {name: float(f"{value:.9g}") for name, value in found.items()}


def _snapping(
    evaluate: Callable[[Names], Outcome], decisions: Sequence[Decision], stated: tuple[Metrics, Metrics]
) -> Callable[[Names], Outcome]:
    """The evaluator with a plan's own figures wherever it reproduces them."""

    def snapped(state: Names) -> Outcome:
        found = evaluate(state)
        if not decisions or 0 < len(state) < len(decisions):
            return found
        own = stated[bool(state)]
        close = (n for n, v in found.metrics.items() if math.isclose(own.get(n, v), v, rel_tol=_SAME))
        return Outcome({**found.metrics, **{n: own[n] for n in close if n in own}}, found.meets)

    return snapped


class _Grid:
    """Rounds metrics to whole multiples of a power of two, one for each metric, and adds them up exactly."""

    def __init__(self, every: Sequence[Metrics]) -> None:
        names = [name for name in sorted(every[0]) if all(name in metrics for metrics in every)]
        largest = {name: max(abs(metrics[name]) for metrics in every) for name in names}
        self._exponents = {name: math.frexp(value)[1] - _DIGITS for name, value in largest.items()}

    def rounded(self, metrics: Metrics) -> dict[str, float]:
        return {n: math.ldexp(round(math.ldexp(metrics[n], -e)), e) for n, e in self._exponents.items()}

    def sums(self, differences: Iterable[tuple[float, Metrics, Metrics]]) -> dict[str, float]:
        """Of (weight, from, to), for each metric. Exact for weights of 1 and 1/2."""
        found = dict.fromkeys(self._exponents, 0.0)
        for weight, start, end in differences:
            before, after = self.rounded(start), self.rounded(end)
            found = {name: value + weight * (after[name] - before[name]) for name, value in found.items()}
        return found
