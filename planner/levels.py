"""Objectives that depend on how loaded each engine is: latency and energy.

Columns of the master problem are engines at 1/n of the demand, for every number n of replicas.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from planc.cost_model.energy import watts
from planc.errors import InvalidField
from planc.planner import solve
from planc.planner.evaluate import Engine, Precise
from planc.planner.offers import NEAR, SAME, Fleet, Offer
from planc.planner.steady_state import Array, Steady

if TYPE_CHECKING:
    from planc.planner.search import Search


def by_level(search: Search, objective: str, time_limit: float | None) -> Fleet | None:
    """Latency and energy depend on each engine's load: columns are engines at 1/n of the demand."""
    if search.demand is None:
        raise InvalidField(
            where="request",
            field="objective",
            value=objective,
            reason="needs a stated load, and the workload says 'max'",
            mend="Give request_rate or concurrency, or use max_goodput or min_cost.",
        )
    if not search.offers:
        return None
    most = min(sum(g.gpus for g in search.groups), search.request.constraints.max_replicas or 10**9)
    numbers = [n for n in range(1, most + 1) if n <= 16 or n & (n - 1) == 0]
    levels = np.array([[search.demand / n for n in numbers]])
    state = search.bench.at_load(levels)
    good = state.meets(search.slos)
    cost = state.e2e if objective == "min_latency" else _watts(search, state)
    cost = np.where(good, cost, np.inf)
    offers, columns = [], []
    for number, engine in enumerate(search.bench.engines):
        rows = np.flatnonzero(search.bench.owner == number)
        fits = sum(i // engine.candidate.pieces[1] for i in engine.candidate.group.islands)
        for k, n in enumerate(numbers):
            least = float(cost[rows, k].min())
            row = search.main.smallest(rows, -cost[:, k], -least * (1 + SAME)) if np.isfinite(least) else 0
            if not np.isfinite(least) or n > fits // engine.candidate.pieces[0]:
                continue
            if search.main.allowed(engine) < 1 and levels[0, k] > search.main.capacity[rows].max():
                continue  # a simulation ruled it out
            offer = Offer(engine, search.bench.limits[row], float(levels[0, k]), search.main)
            share = float(levels[0, k]) if objective == "min_latency" else engine.candidate.shape.world
            offers.append(offer)
            columns.append(offer.column(offer.capacity, float(cost[row, k]) * share))
    columns = _precisely(search, offers, columns, objective)
    chosen = solve.undominated(columns)
    search.pruned["dominated"] = len(columns) - len(chosen)
    offers, columns = [offers[i] for i in chosen], [columns[i] for i in chosen]
    solution = solve.solve(columns, search.master_limits(search.demand), time_limit=time_limit)
    if solution is None:
        return None
    unit = "e2e_mean_ms" if objective == "min_latency" else "watts"
    if objective == "min_latency":
        solution = replace(
            solution,
            value=solution.value / search.demand * 1e3,
            bound=solution.bound / search.demand * 1e3,
        )
    return search.deployed(offers, columns, solution, search.demand, unit)


def _precisely(
    search: Search, offers: Sequence[Offer], columns: Sequence[solve.Column], objective: str
) -> list[solve.Column]:
    """The best few columns of each size and level by the step model; the others are dropped."""
    kinds: dict[tuple[object, ...], list[int]] = {}
    for i, column in enumerate(columns):
        kinds.setdefault((column.group, column.pieces, column.size, column.load, column.family), []).append(i)
    found = [replace(column, load=0.0) for column in columns]
    for members in kinds.values():
        best = min(columns[i].weight for i in members)
        for i in members:
            if columns[i].weight > best / NEAR:
                continue
            offer = offers[i]
            state = Precise(offer.engine, offer.limits, search.traffic).at(offer.capacity)
            if bool(state.meets(search.slos)[0, 0]):
                value = state.e2e if objective == "min_latency" else _watts(search, state, offer.engine)
                world = offer.engine.candidate.shape.world
                share = offer.capacity if objective == "min_latency" else world
                found[i] = replace(columns[i], weight=float(np.ravel(value)[0]) * share)
    return found


def _watts(search: Search, state: Steady, engine: Engine | None = None) -> Array:
    """Power of one GPU of each row, W."""
    busy = running_share(state)
    if engine is not None:
        return watts(engine.candidate.group.gpu, busy)
    out = np.empty_like(busy)
    for number, mine in enumerate(search.bench.engines):
        rows = search.bench.owner == number
        out[rows] = watts(mine.candidate.group.gpu, busy[rows])
    return out


def running_share(state: Steady) -> Array:
    """Share of time that an engine runs steps: all of it in a closed loop, else while anyone is there
    (a Poisson number in the system)."""
    if state.traffic.concurrency is not None:
        return np.ones_like(state.batch)
    busy: Array = -np.expm1(-np.maximum(state.batch, state.busy))
    return busy
