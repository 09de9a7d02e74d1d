"""The lowest price per request of whole fleets, where no demand is stated.

Dinkelbach (Management Science 13, 1967): with q the ratio of the best fleet so far, find the fleet with the
least  weight - q carried.  Below zero its own ratio is lower and becomes q; at zero q is the least there is.
Each step is one integer program; a few suffice, as q falls faster than linearly.

Where a step stops early, with -d the bound of its objective, every fleet has  weight >= q carried - d,  and
none weighs less than the lightest engine w, so that no ratio is below  q w / (w + d).  Another bound is the
relaxation: divisible engines that carry next to nothing, so that the inventory does not matter.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from planc.planner import solve
from planc.planner.columns import carried, keeps
from planc.planner.offers import NEAR, Offer
from planc.planner.promising import at_capacity, left

#: the relaxation carries this share of the largest engine's load
_LITTLE = 1e-3
#: ratios that differ by less are equal: integer weights and loads resolve no more
_EQUAL = 1e-6
_STEPS = 30


@dataclass(frozen=True, slots=True)
class PerLoad:
    """Weight over load as the goal of a search (`promising.Goal`)."""

    limits: solve.Limits
    deadline: float | None = None

    def hopeful(self, column: solve.Column) -> solve.Column:
        return replace(column, load=column.load / NEAR)

    def precise(self, offer: Offer, column: solve.Column) -> tuple[Offer, solve.Column]:
        return at_capacity(offer, column)

    def relaxation(self, columns: Sequence[solve.Column]) -> solve.Relaxation | None:
        """A fleet with an engine of reduced cost r has a ratio worse than the bound by r over all that the
        inventory could carry."""
        most = solve.relaxation(columns, self.limits)
        least = _divisible(columns, self.limits)
        if most is None or least is None or most.bound <= 0:
            return None
        return replace(least, reduced_costs=tuple(cost / most.bound for cost in least.reduced_costs))

    def value(self, columns: Sequence[solve.Column]) -> float:
        found = cheapest(columns, self.limits, time_limit=left(self.deadline), first_only=True)
        return math.inf if found is None else found.value


def cheapest(
    columns: Sequence[solve.Column],
    limits: solve.Limits,
    *,
    time_limit: float | None = None,
    first_only: bool = False,
) -> solve.Solution | None:
    """The fleet of one family with the least weight per load; of equal ones the one that loses least
    accuracy, then the one that carries most. None when there is none. `value` and `bound`: weight per load.

    time_limit   seconds for all of it
    first_only   no matter which of equal fleets
    """
    deadline = None if time_limit is None else time.perf_counter() + time_limit
    found = []
    for mine in solve.families(columns):
        family = _Family([columns[i] for i in mine], limits, columns, deadline)
        if family.run(first_only):
            of = dict(zip(mine, family.counts, strict=True))
            found.append((family, tuple(of.get(i, 0) for i in range(len(columns)))))
    if not found:
        return None
    best, counts = min(found, key=lambda pair: pair[0].rank)
    bound = min(family.bound for family, _ in found)
    proved = bound >= best.ratio * (1 - _EQUAL)
    return solve.Solution(
        counts, "optimal" if proved else "feasible", best.ratio, best.ratio if proved else bound
    )


class _Family:
    """Columns of one family, and the best fleet of them that is known."""

    def __init__(
        self,
        columns: Sequence[solve.Column],
        limits: solve.Limits,
        every: Sequence[solve.Column],
        deadline: float | None,
    ) -> None:
        self.columns, self.limits, self.every, self.deadline = columns, limits, every, deadline
        self.counts: tuple[int, ...] = ()
        self.bound = 0.0
        self._master = self._program()

    def run(self, first_only: bool) -> bool:
        """Whether there is a fleet; `counts`, `ratio` and `bound` tell which."""
        self.counts = self._some()
        if not any(self.counts):
            return False
        if not self._improved():
            relaxed = _divisible(self.columns, self.limits)
            self.bound = max(self.bound, relaxed.bound if relaxed is not None else 0.0)
        elif not first_only:
            self._enlarge()
        self.bound = min(self.bound, self.ratio)
        return True

    @property
    def ratio(self) -> float:
        """Weight per load."""
        weight, load = self._both(self.counts)
        return weight / load * self._unit

    @property
    def rank(self) -> tuple[float, ...]:
        """For comparing families."""
        _, load = self._both(self.counts)
        drops = sum(
            n * c.drop * mine
            for n, c, mine in zip(self.counts, self.columns, self._master.loads, strict=True)
        )
        return float(f"{self.ratio:.7g}"), float(f"{drops / load:.7g}"), -load

    @property
    def _unit(self) -> float:
        return 1 / (self._master.scale * self._master.unit)

    def _program(self) -> solve.Master:
        return solve.Master(self.columns, self.limits, self.every, self.deadline)

    def _both(self, counts: Sequence[int]) -> tuple[int, int]:
        """Weight and load of a fleet, in integer units."""
        weight = sum(n * w for n, w in zip(counts, self._master.weights, strict=True))
        return weight, carried(self.columns, self.limits, counts, self._master.loads)

    def _some(self) -> tuple[int, ...]:
        """A fleet to begin with: the best single engine that serves everything, else the most that can be
        carried; () where nothing is."""
        lone = []
        for i in range(len(self.columns)):
            counts = tuple(int(i == j) for j in range(len(self.columns)))
            weight, load = self._both(counts)
            if load > 0 and self._fits(counts):
                lone.append((weight / load, i, counts))
        if lone:
            return min(lone)[2]
        most = solve.solve(self.columns, self.limits, time_limit=left(self.deadline), first_only=True)
        return most.counts if most is not None and most.value > 0 else ()

    def _fits(self, counts: Sequence[int]) -> bool:
        column = self.columns[counts.index(1)]
        return self._master.most(column) >= 1 and keeps(self.columns, self.limits, counts)

    def _improved(self) -> bool:
        """Dinkelbach's steps; whether they ended in proof. Afterwards the integer program holds fleets that
        are no worse."""
        for _ in range(_STEPS):
            weight, load = self._both(self.counts)
            self._master = self._program()
            goal = self._master.total(self._master.weights) - weight / load * self._master.carried
            found = self._master.optimise(goal, minimise=True, slack=self.limits.gap * weight)
            if found is None:
                return False
            value, least, proved = found
            if value > -1:
                lightest, missed = min(self._master.weights), 0.0 if proved else max(-least, 0.0)
                self.bound = weight / load * lightest / (lightest + missed) * self._unit
                return proved
            mine, carries = self._both(self._master.best)
            if not carries or mine * load >= weight * carries:
                return False
            self.counts = self._master.best
        return False

    def _enlarge(self) -> None:
        """Of all fleets with this ratio, the one that carries most."""
        master = self._master
        master.optimise(master.carried, minimise=False)
        numbers = range(1, len(self.columns) + 1)
        master.optimise(master.total([i * 1009 + i * i for i in numbers]), minimise=True)
        weight, load = self._both(self.counts)
        mine, carries = self._both(master.best)
        no_worse = mine * load <= weight * carries * (1 + _EQUAL)
        if carries >= load and no_worse and keeps(self.columns, self.limits, master.best):
            self.counts = master.best


def _divisible(columns: Sequence[solve.Column], limits: solve.Limits) -> solve.Relaxation | None:
    """Least weight per load of engines that are divisible at will, and reduced costs per load."""
    little = _LITTLE * max((column.load for column in columns), default=0.0)
    if little <= 0:
        return None
    found = solve.relaxation(columns, replace(limits, demand=little))
    return found and replace(found, bound=found.bound / little)
