"""Which offers the master problem must see: columns by the step model of the few that may matter.

Three bounds leave the others out, each with 5 % more capacity than was interpolated: an offer that one or
several others of its family surely replace; a family whose linear relaxation is worse than the best fleet
found; an engine whose reduced cost in it is more than what lies between the two.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from planc.planner import solve
from planc.planner.offers import NEAR, Offer

#: columns from which a first fleet of a family is made
_CORE = 32

Rough = Sequence[tuple[Offer, solve.Column]]
Columns = tuple[list[Offer], list[solve.Column]]


def promising(
    rough: Rough, limits: solve.Limits, deadline: float | None = None, *, every: bool = False
) -> Columns:
    """Offers and their columns, by the step model.

    rough      offers with columns of their interpolated capacities
    deadline   of time.perf_counter()
    every      leave out only what is surely replaced: the objective is not the master problem's
    """
    hopeful = [replace(column, load=column.load / NEAR) for _, column in rough]
    several_fit = limits.max_replicas is None and not every
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
    if every:
        return _precise(rough, sorted(kept), multiples=False)
    families: dict[str, list[int]] = {}
    several = len({column.owner for _, column in rough}) > 1
    for i in sorted(kept):
        families.setdefault("" if several else rough[i][1].family, []).append(i)
    return _within_bounds(families, rough, hopeful, limits, deadline)


def _within_bounds(
    families: Mapping[str, list[int]],
    rough: Rough,
    hopeful: Sequence[solve.Column],
    limits: solve.Limits,
    deadline: float | None,
) -> Columns:
    sign = 1.0 if limits.demand is not None else -1.0
    relaxed = {}
    for name, members in families.items():
        relaxation = solve.relaxation([hopeful[i] for i in members], limits)
        if relaxation is not None:
            relaxed[name] = relaxation

    def value(columns: list[solve.Column]) -> float:
        fleet = solve.solve(columns, limits, time_limit=left(deadline), first_only=True)
        return math.inf if fleet is None else sign * fleet.value

    found: list[tuple[float, Columns]] = []
    best = math.inf
    for name in sorted(relaxed, key=lambda name: (sign * relaxed[name].bound, name)):
        bound = sign * relaxed[name].bound
        if bound > best + 1e-9 * abs(best):
            break
        costs = dict(zip(families[name], relaxed[name].reduced_costs, strict=True))
        core = sorted(costs, key=lambda i: (costs[i], i))[:_CORE]
        mine = value(_precise(rough, core, limits.max_replicas is None)[1])
        best = min(best, mine)
        members = [i for i in costs if costs[i] <= best - bound + 1e-6 * abs(bound)]
        columns = _precise(rough, members, limits.max_replicas is None)
        if len(members) > len(core):
            mine = value(columns[1])
            best = min(best, mine)
        found.append((mine, columns))
    slack = limits.gap * abs(best) + 1e-6 * abs(best) if math.isfinite(best) else 0.0
    kept = [columns for mine, columns in found if mine <= best + slack]
    return [o for offers, _ in kept for o in offers], [c for _, columns in kept for c in columns]


def _precise(rough: Rough, chosen: Iterable[int], multiples: bool) -> Columns:
    made = []
    for i in sorted(chosen):
        offer, column = rough[i]
        exact = offer.precise()
        made.append((exact, replace(column, load=exact.capacity)))
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
