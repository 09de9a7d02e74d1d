"""The master problem with traffic classes, prefill and decode halves, spares and spot machines, against all
fleets there are."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence

import pytest

from planc.planner.shares import loads
from planc.planner.solve import Column, Flow, Limits, Master, relaxation, solve

CLASSES = (0.6, 0.4)
FLOWS = (
    Flow(CLASSES),
    Flow((1.0, 0.0)),
    Flow((0.0, 1.0)),
    Flow(CLASSES, "prefill", 1),
    Flow(CLASSES, "decode", 1),
    Flow((0.0, 1.0), "prefill", 2),
    Flow((0.0, 1.0), "decode", 2),
)


def instance(seed: int) -> tuple[list[Column], Limits]:
    draw = random.Random(seed)
    islands = tuple((draw.choice([2, 4]),) * draw.choice([1, 2]) for _ in range(draw.choice([1, 2])))
    columns = []
    for _ in range(draw.choice([3, 4, 5])):
        size = draw.choice([1, 2, 4])
        group = draw.randrange(len(islands))
        if size > max(islands[group]):
            size = 1
        columns.append(
            Column(
                group,
                1,
                size,
                load=size * draw.choice([0.8, 1.0, 1.3]),
                weight=size * draw.choice([1.0, 1.5, 2.0]),
                drop=0.0,
                watts=0.0,
                flow=draw.randrange(len(FLOWS)),
                firm=draw.random() < 0.7,
            )
        )
    limits = Limits(
        islands,
        draw.choice([None, 1.1, 2.3, 3.7]),
        classes=CLASSES,
        flows=FLOWS,
        spare=draw.choice([0, 0, 1]),
        firm_share=draw.choice([0.0, 0.0, 0.5]),
    )
    return columns, limits


def carries(columns: Sequence[Column], limits: Limits, counts: Sequence[int]) -> float:
    """Requests/s that a fleet serves: the class that is served least for its share decides."""

    def of(chosen: Sequence[int], spare: int) -> float:
        amounts = [0.0] * len(FLOWS)
        for flow in range(len(FLOWS)):
            mine = [columns[i].load for i in chosen for _ in range(counts[i]) if columns[i].flow == flow]
            amounts[flow] = sum(sorted(mine)[: len(mine) - spare] if spare else mine)
        whole = [sum(FLOWS[f].shares[k] * amounts[f] for f in range(3)) for k in range(2)]
        for first, second in ((3, 4), (5, 6)):
            both = [
                min(FLOWS[first].shares[k] * amounts[first], FLOWS[second].shares[k] * amounts[second])
                for k in range(2)
            ]
            whole = [a + b for a, b in zip(whole, both, strict=True)]
        return min(part / share for part, share in zip(whole, CLASSES, strict=True))

    every = range(len(columns))
    most = of(every, limits.spare)
    if limits.firm_share:
        most = min(most, of([i for i in every if columns[i].firm], 0) / limits.firm_share)
    return most


def fits(columns: Sequence[Column], limits: Limits, counts: Sequence[int]) -> bool:
    for group, islands in enumerate(limits.islands):
        rooms = list(islands)
        sizes = sorted(
            (c.size for c, n in zip(columns, counts, strict=True) if c.group == group for _ in range(n)),
            reverse=True,
        )
        for size in sizes:  # sizes divide each other, so largest first into any island is exact
            home = next((i for i, room in enumerate(rooms) if room >= size), None)
            if home is None:
                return False
            rooms[home] -= size
    return True


def fleets(columns: Sequence[Column], limits: Limits) -> list[tuple[int, ...]]:
    most = [sum(i // c.size for i in limits.islands[c.group]) for c in columns]
    every = itertools.product(*(range(m + 1) for m in most))
    return [counts for counts in every if any(counts) and fits(columns, limits, counts)]


@pytest.mark.parametrize("seed", range(200))
def test_no_fleet_is_better(seed: int) -> None:
    columns, limits = instance(seed)
    found = solve(columns, limits)
    every = [(counts, carries(columns, limits, counts)) for counts in fleets(columns, limits)]
    if limits.demand is None:
        best = max((amount for _, amount in every), default=0.0)
        assert (found.value if found else 0.0) == pytest.approx(best, rel=1e-5, abs=1e-5)
    else:
        enough = [counts for counts, amount in every if amount >= limits.demand * (1 + 1e-5)]
        price = [sum(n * c.weight for n, c in zip(counts, columns, strict=True)) for counts in enough]
        assert (found.value if found else math.inf) == pytest.approx(min(price, default=math.inf))
    if found:
        assert found.status == "optimal"
        assert fits(columns, limits, found.counts)


@pytest.mark.parametrize("seed", range(60))
def test_a_master_without_time_finds_a_fleet_where_there_is_one(seed: int) -> None:
    columns, limits = instance(seed)
    best = solve(columns, limits)
    master = Master(columns, limits, columns, None)
    found = master._simple()
    if best is None or not any(best.counts):
        assert found is None
        return
    assert found is not None
    assert fits(columns, limits, master.best)
    amount = carries(columns, limits, master.best)
    assert amount > 0 if limits.demand is None else amount >= limits.demand * (1 - 1e-5)


@pytest.mark.parametrize("seed", range(60))
def test_relaxed_bounds_and_reduced_costs_hold_for_every_fleet(seed: int) -> None:
    columns, limits = instance(seed)
    relaxed = relaxation(columns, limits)
    for counts in fleets(columns, limits):
        amount = carries(columns, limits, counts)
        if limits.demand is not None and amount < limits.demand * (1 + 1e-5):
            continue
        assert relaxed is not None
        used = max(cost for cost, n in zip(relaxed.reduced_costs, counts, strict=True) if n)
        if limits.demand is not None:
            price = sum(n * c.weight for n, c in zip(counts, columns, strict=True))
            assert price >= relaxed.bound + used - 1e-6
        else:
            assert amount <= relaxed.bound - used + 1e-4


@pytest.mark.parametrize("seed", range(60))
def test_every_class_is_served_and_nothing_is_overfull(seed: int) -> None:
    columns, limits = instance(seed)
    found = solve(columns, limits)
    if found is None:
        return
    carried = loads(columns, found.counts, limits)
    demand = limits.demand or found.value
    for column, load in zip(columns, carried, strict=True):
        assert load <= column.load * (1 + 1e-5)
    for number, share in enumerate(CLASSES):
        whole, spot = 0.0, 0.0
        for column, n, load in zip(columns, found.counts, carried, strict=True):
            flow = FLOWS[column.flow]
            part = n * load * flow.shares[number]
            if flow.role != "decode":
                whole += part
                spot += part * (not column.firm)
        assert whole >= share * demand * (1 - 1e-4)
        if limits.firm_share:
            assert spot <= (1 - limits.firm_share) * share * demand * (1 + 1e-4)
