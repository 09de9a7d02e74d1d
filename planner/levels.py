"""Objectives that depend on how loaded each engine is: latency and energy.

Columns of the master problem are engines at a level: a simple fraction of all that their flow can be asked
for, so that like engines share evenly and unlike ones in proportions near any that pays. Mean end-to-end
latency and power are sums over engines, halves of the work included, so that fleets of all flows compare.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import TYPE_CHECKING, Literal

import numpy as np

from planc.cost_model.energy import watts
from planc.errors import InvalidField, ToolFailed
from planc.planner import solve
from planc.planner.offers import NEAR, SAME, Fleet, Offer
from planc.planner.operating_point import Array, Steady
from planc.planner.promising import left, promising

if TYPE_CHECKING:
    from planc.planner.search import Search
    from planc.planner.stream import Stream

Objective = Literal["min_latency", "min_energy"]

#: fractions with denominators up to the first, one n-th for all n up to the second and powers of two beyond
_FINE, _EVEN = 5, 16
#: a column states this much more than it was evaluated at: the master problem rounds loads down
_MARGIN = 5e-6


def fractions(most: int) -> list[Fraction]:
    """Shares of a flow that one of at most so many engines may carry, ascending."""
    fine = {Fraction(j, n) for n in range(1, min(most, _FINE) + 1) for j in range(1, n + 1)}
    even = {Fraction(1, n) for n in range(1, most + 1) if n <= _EVEN or n & (n - 1) == 0}
    return sorted(fine | even)


def by_level(search: Search, objective: Objective, deadline: float | None) -> Fleet | None:
    """The best fleet for latency or energy at the stated load. Raises InvalidField where none is stated."""
    if search.demand is None:
        raise InvalidField(
            where="request",
            field="objective",
            value=objective,
            reason="needs a stated load, and the workload says 'max'",
            mend="Give request_rate or concurrency, or use max_goodput or min_cost.",
        )
    limits = search.master_limits(search.demand)
    most = min(sum(g.gpus for g in search.groups), search.request.constraints.max_replicas or 10**9)
    rough = [one for stream in search.serving for one in _columns(stream, fractions(most), objective)]
    offers, columns = promising(rough, limits, deadline, Loaded(objective, limits, deadline))
    search.pruned["dominated"] = len(rough) - len(columns)
    solution = solve.solve(columns, limits, time_limit=left(deadline)) if columns else None
    if solution is None:
        return None
    if objective == "min_energy":
        return search.deployed(offers, columns, solution, search.demand, "watts")
    value, bound = (1e3 * total / search.demand for total in (solution.value, solution.bound))
    solution = replace(solution, value=value, bound=bound)
    return search.deployed(offers, columns, solution, search.demand, "e2e_mean_ms")


@dataclass(frozen=True, slots=True)
class Loaded:
    """Latency or power of engines at their levels as the goal of a search (`promising.Goal`)."""

    objective: Objective
    limits: solve.Limits
    deadline: float | None = None

    def hopeful(self, column: solve.Column) -> solve.Column:
        return replace(column, weight=column.weight * NEAR)

    def precise(self, offer: Offer, column: solve.Column) -> tuple[Offer, solve.Column]:
        state = offer.stream.at(offer)
        if not bool(state.meets(offer.stream.slos)[0, 0]):
            return offer, replace(column, load=0.0)
        cost = float(cost_of(self.objective, state)[0, 0])
        return offer, replace(column, weight=_weight(self.objective, offer, cost))

    def relaxation(self, columns: Sequence[solve.Column]) -> solve.Relaxation | None:
        return solve.relaxation(columns, self.limits)

    def value(self, columns: Sequence[solve.Column]) -> float:
        try:
            fleet = solve.solve(columns, self.limits, time_limit=left(self.deadline), first_only=True)
        except ToolFailed:  # out of time: more columns may hold a fleet that is bought greedily
            return math.inf
        return math.inf if fleet is None else fleet.value


def _columns(
    stream: Stream, shares: list[Fraction], objective: Objective
) -> Iterator[tuple[Offer, solve.Column]]:
    """Engines of a stream at each level that they can carry, with the limits that suit it best: least cost,
    then the smallest batch cap, then the smallest budget."""
    whole = stream.traffic.concurrency or stream.traffic.rate
    if not stream.offers or whole is None:
        return
    able = np.flatnonzero(stream.capacity > 0)
    bench, capacity = stream.bench.only(able.tolist()), stream.capacity[able]
    levels = np.array([[whole * float(share) for share in shares]])
    state = bench.at_load(levels)
    every = np.where(state.meets(stream.slos), cost_of(objective, state), np.inf)
    number = {id(engine): i for i, engine in enumerate(bench.engines)}
    for offer in stream.offers:
        rows = np.flatnonzero(bench.owner == number[id(offer.engine)])
        cost = every[rows]
        for k, load in enumerate(levels[0]):
            least = float(cost[:, k].min())
            if not math.isfinite(least) or (stream.allowed(offer.engine) < 1 and load > capacity[rows].max()):
                continue  # objectives are missed, or a simulation ruled it out
            enough = [int(row) for row, c in zip(rows, cost[:, k], strict=True) if c <= least * (1 + SAME)]
            row = min(enough, key=lambda r: (bench.limits[r].max_num_seqs, bench.limits[r].budget))
            found = replace(offer, limits=bench.limits[row], capacity=float(load))
            yield found, found.column(found.load * (1 + _MARGIN), _weight(objective, found, every[row, k]))


def cost_of(objective: Objective, state: Steady) -> Array:
    """What grows with the objective: seconds of a request, or the share of time that an engine runs."""
    return state.e2e if objective == "min_latency" else running_share(state)


def _weight(objective: Objective, offer: Offer, cost: float) -> float:
    """What an engine at its level adds to the objective: seconds that its requests take in a second, given
    those of one; or W, given the share of time that it runs."""
    if objective == "min_latency":
        return float(cost) * offer.capacity
    candidate = offer.engine.candidate
    return float(watts(candidate.group.gpu, cost)) * candidate.shape.world


def running_share(state: Steady) -> Array:
    """Share of time that an engine runs steps: all of it in a closed loop, else while anyone is there
    (a Poisson number in the system)."""
    if state.traffic.concurrency is not None:
        return np.ones_like(state.batch)
    busy: Array = -np.expm1(-np.maximum(state.batch, state.busy))
    return busy
