"""Which offers the master problem must see: columns by the step model of the few that may matter.

Three bounds leave the others out, each with 5 % more than was interpolated: an offer that one or several
others of its family surely replace; a family whose linear relaxation is worse than the best fleet found; an
engine whose reduced cost in it is more than what lies between the two.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from planc.planner import solve
from planc.planner.offers import NEAR, Offer

#: columns from which a first fleet of a family is made
_CORE = 32

Rough = Sequence[tuple[Offer, solve.Column]]
Columns = tuple[list[Offer], list[solve.Column]]


class Goal(Protocol):
    """What fleets are compared by; less is better."""

    def hopeful(self, column: solve.Column) -> solve.Column:
        """The best that a column can turn out to be when the step model evaluates it."""
        ...

    def precise(self, offer: Offer, column: solve.Column) -> tuple[Offer, solve.Column]:
        """A column by the step model; load 0 where it cannot be."""
        ...

    def relaxation(self, columns: Sequence[solve.Column]) -> solve.Relaxation | None:
        """What no fleet of these columns is better than; None when there is no fleet."""
        ...

    def value(self, columns: Sequence[solve.Column]) -> float:
        """Of the best fleet; infinite when there is none."""
        ...


@dataclass(frozen=True, slots=True)
class Carrying:
    """The master problem's own goal, of engines at their capacity: least weight, or most load."""

    limits: solve.Limits
    deadline: float | None = None
    _unproved: dict[tuple[solve.Column, ...], solve.Solution] = field(default_factory=dict, compare=False)

    def hopeful(self, column: solve.Column) -> solve.Column:
        return replace(column, load=column.load / NEAR)

    def precise(self, offer: Offer, column: solve.Column) -> tuple[Offer, solve.Column]:
        return at_capacity(offer, column)

    def relaxation(self, columns: Sequence[solve.Column]) -> solve.Relaxation | None:
        found = solve.relaxation(columns, self.limits)
        return found and replace(found, bound=self._sign * found.bound)

    def value(self, columns: Sequence[solve.Column]) -> float:
        fleet = solve.solve(columns, self.limits, time_limit=left(self.deadline), first_only=True)
        if fleet is not None and fleet.status != "optimal":
            self._unproved[tuple(columns)] = fleet
        return math.inf if fleet is None else self._sign * fleet.value

    def solution(self, columns: Sequence[solve.Column]) -> solve.Solution | None:
        """The best fleet; solved once where a gap stays open, for ties are only broken where none does."""
        return self._unproved.get(tuple(columns)) or solve.solve(
            columns, self.limits, time_limit=left(self.deadline)
        )

    @property
    def _sign(self) -> float:
        return 1.0 if self.limits.demand is not None else -1.0


def at_capacity(offer: Offer, column: solve.Column) -> tuple[Offer, solve.Column]:
    """An offer and its column with the capacity that the step model finds."""
    exact = offer.precise()
    return exact, exact.stream.column(exact, exact.load) if column.feed else replace(column, load=exact.load)


def promising(
    rough: Rough, limits: solve.Limits, deadline: float | None = None, goal: Goal | None = None
) -> Columns:
    """Offers and their columns, by the step model.

    rough      offers with columns of their interpolated capacities
    deadline   of time.perf_counter()
    goal       None: the master problem's own
    """
    goal = goal or Carrying(limits, deadline)
    hopeful = [goal.hopeful(column) for _, column in rough]
    several_fit = limits.max_replicas is None
    kept: list[int] = []
    for mine in _rivals([column for _, column in rough]).values():
        kept += [
            i
            for i in mine
            if not any(
                solve.replaces(rough[j][1], hopeful[i])
                or (several_fit and solve.outdoes(rough[j][1], hopeful[i]))
                for j in mine
                if j != i
            )
        ]
    families: dict[str, list[int]] = {}
    several = len({column.owner for _, column in rough}) > 1
    for i in sorted(kept):
        families.setdefault("" if several else rough[i][1].family, []).append(i)
    return _within_bounds(families, rough, hopeful, goal, limits)


def _within_bounds(
    families: Mapping[str, list[int]],
    rough: Rough,
    hopeful: Sequence[solve.Column],
    goal: Goal,
    limits: solve.Limits,
) -> Columns:
    relaxed = {}
    for name, members in families.items():
        relaxation = goal.relaxation([hopeful[i] for i in members])
        if relaxation is not None:
            relaxed[name] = relaxation
    several_fit = limits.max_replicas is None
    found: list[tuple[float, Columns]] = []
    best = math.inf
    for name in sorted(relaxed, key=lambda name: (relaxed[name].bound, name)):
        bound = relaxed[name].bound
        if bound > best + 1e-9 * abs(best):
            break
        costs = dict(zip(families[name], relaxed[name].reduced_costs, strict=True))
        core = sorted(costs, key=lambda i: (costs[i], i))[:_CORE]
        mine = goal.value(_precise(rough, core, goal, several_fit)[1])
        best = min(best, mine)
        members = [i for i in costs if costs[i] <= best - bound + 1e-6 * abs(bound)]
        columns = _precise(rough, members, goal, several_fit)
        if len(members) > len(core):
            mine = min(mine, goal.value(columns[1]))  # in little time the larger problem may end worse
            best = min(best, mine)
        found.append((mine, columns))
    slack = limits.gap * abs(best) + 1e-6 * abs(best) if math.isfinite(best) else 0.0
    kept = [columns for mine, columns in found if mine <= best + slack]
    return [o for offers, _ in kept for o in offers], [c for _, columns in kept for c in columns]


def _precise(rough: Rough, chosen: Iterable[int], goal: Goal, multiples: bool) -> Columns:
    made = [goal.precise(*rough[i]) for i in sorted(chosen)]
    kept = solve.undominated([column for _, column in made], multiples)
    return [made[i][0] for i in kept], [made[i][1] for i in kept]


def _rivals(columns: Sequence[solve.Column]) -> dict[tuple[object, ...], list[int]]:
    """Columns of which one could stand in for another: of the same group, family and flow."""
    found: dict[tuple[object, ...], list[int]] = {}
    for i, c in enumerate(columns):
        found.setdefault((c.owner, c.group, c.family, c.flow), []).append(i)
    return found


def left(deadline: float | None) -> float | None:
    """Seconds until a deadline, some at least."""
    return None if deadline is None else max(deadline - time.perf_counter(), 0.02)
