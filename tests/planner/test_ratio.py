"""The least weight per load of whole fleets, against all fleets there are."""

from __future__ import annotations

from dataclasses import replace

import pytest

from planc.planner.ratio import PerLoad, cheapest
from tests.planner.test_flows import carries, fits, fleets, instance


@pytest.mark.parametrize("seed", range(60))
def test_no_fleet_has_a_lower_ratio(seed: int) -> None:
    """Of those with the lowest, the one that carries most is found, and its inventory suffices."""
    columns, limits = instance(seed)
    limits = replace(limits, demand=None)
    every = []
    for counts in fleets(columns, limits):
        weight = sum(n * c.weight for n, c in zip(counts, columns, strict=True))
        if (load := carries(columns, limits, counts)) > 1e-9:
            every.append((weight / load, load))
    found = cheapest(columns, limits)
    if not every:
        assert found is None
        return
    assert found is not None
    assert found.status == "optimal"
    least = min(ratio for ratio, _ in every)
    assert found.value == pytest.approx(least, rel=1e-5)
    assert found.value == pytest.approx(found.bound)
    most = max(load for ratio, load in every if ratio <= least * (1 + 1e-6))
    assert carries(columns, limits, found.counts) == pytest.approx(most, rel=1e-4)
    assert fits(columns, limits, found.counts)


@pytest.mark.parametrize("seed", range(30))
def test_relaxed_ratios_and_reduced_costs_hold_for_every_fleet(seed: int) -> None:
    columns, limits = instance(seed)
    limits = replace(limits, demand=None)
    relaxed = PerLoad(limits).relaxation(columns)
    for counts in fleets(columns, limits):
        weight = sum(n * c.weight for n, c in zip(counts, columns, strict=True))
        if (load := carries(columns, limits, counts)) > 1e-9:
            assert relaxed is not None
            used = max(cost for cost, n in zip(relaxed.reduced_costs, counts, strict=True) if n)
            assert weight / load >= relaxed.bound + used - 1e-6
