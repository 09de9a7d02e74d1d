"""The integer program against brute force, and packing against exhaustive search."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planc.planner.inventory import chain_limits, is_chain, patterns, place
from planc.planner.solve import UNIT, Column, Limits, integer_loads, integer_weights, solve, undominated


def packs(sizes: Sequence[int], islands: Sequence[int]) -> bool:
    """Exhaustive: every piece into every island."""
    if not sizes:
        return True
    first, rest = sizes[0], sizes[1:]
    for i in {room: i for i, room in enumerate(islands)}.values():
        if islands[i] >= first:
            left = list(islands)
            left[i] -= first
            if packs(rest, left):
                return True
    return False


def brute(columns: Sequence[Column], limits: Limits) -> tuple[int, ...] | None:
    """Best counts by trying all: least weight, least drop, most load (or most load first)."""
    loads = integer_loads(columns, limits.demand)
    weights, _ = integer_weights([c.weight for c in columns])
    drops = [round(c.drop * 1e6 * load / UNIT) for c, load in zip(columns, loads, strict=True)]
    best: tuple[tuple[int, ...], tuple[int, ...]] | None = None
    most = [sum(i // c.size for i in limits.islands[c.group]) // c.pieces for c in columns]
    for counts in itertools.product(*(range(m + 1) for m in most)):
        if len({c.family for n, c in zip(counts, columns, strict=True) if n}) > 1:
            continue
        total = lambda values: sum(n * v for n, v in zip(counts, values, strict=True))  # noqa: B023, E731
        if limits.demand is not None and total(loads) < UNIT:
            continue
        if limits.max_gpus is not None and total([c.gpus for c in columns]) > limits.max_gpus:
            continue
        if limits.max_replicas is not None and sum(counts) > limits.max_replicas:
            continue
        if limits.max_watts is not None and total([c.watts for c in columns]) > limits.max_watts:
            continue
        fits = all(
            packs(
                sorted(
                    (
                        c.size
                        for n, c in zip(counts, columns, strict=True)
                        if c.group == g
                        for _ in range(n * c.pieces)
                    ),
                    reverse=True,
                ),
                islands,
            )
            for g, islands in enumerate(limits.islands)
        )
        if not fits:
            continue
        if limits.demand is not None:
            rank = (total(weights), total(drops), -total(loads))
        else:
            rank = (-total(loads), total(weights), total(drops))
        if best is None or rank < best[0]:
            best = (rank, counts)
    if best is None or (limits.demand is None and best[0][0] == 0):
        return None
    return best[1]


def ranks(columns: Sequence[Column], limits: Limits, counts: Sequence[int]) -> tuple[int, ...]:
    loads = integer_loads(columns, limits.demand)
    weights, _ = integer_weights([c.weight for c in columns])
    total = lambda values: sum(n * v for n, v in zip(counts, values, strict=True))  # noqa: E731
    drops = [round(c.drop * 1e6 * load / UNIT) for c, load in zip(columns, loads, strict=True)]
    if limits.demand is not None:
        return total(weights), total(drops), -total(loads)
    return -total(loads), total(weights), total(drops)


@st.composite
def instances(draw: st.DrawFn) -> tuple[list[Column], Limits]:
    sizes = draw(st.sampled_from([(1, 2, 4), (1, 2), (2, 3), (1, 3), (2, 4), (2, 3, 4)]))
    islands = tuple(
        tuple(draw(st.lists(st.sampled_from([2, 3, 4, 6]), min_size=1, max_size=2)))
        for _ in range(draw(st.integers(1, 2)))
    )
    columns = [
        Column(
            group=draw(st.integers(0, len(islands) - 1)),
            pieces=draw(st.sampled_from([1, 1, 1, 2])),
            size=draw(st.sampled_from(sizes)),
            load=draw(st.integers(1, 40)) / 8,
            weight=draw(st.integers(1, 60)) / 4,
            drop=draw(st.sampled_from([0.0, 0.002, 0.01])),
            watts=float(draw(st.integers(100, 900))),
            family=draw(st.sampled_from(["a", "b"])),
        )
        for _ in range(draw(st.integers(1, 4)))
    ]
    return columns, Limits(
        islands=islands,
        demand=draw(st.one_of(st.none(), st.integers(1, 90).map(lambda n: n / 8))),
        max_gpus=draw(st.one_of(st.none(), st.integers(2, 9))),
        max_replicas=draw(st.one_of(st.none(), st.integers(1, 3))),
        max_watts=draw(st.one_of(st.none(), st.integers(300, 3000).map(float))),
    )


@settings(max_examples=250, deadline=None, derandomize=True)
@given(instances())
def test_equals_brute_force(instance: tuple[list[Column], Limits]) -> None:
    columns, limits = instance
    expected, found = brute(columns, limits), solve(columns, limits)
    assert (expected is None) == (found is None)
    if expected is not None and found is not None:
        assert ranks(columns, limits, found.counts) == ranks(columns, limits, expected)
        assert found.status == "optimal"
        assert found.gap == 0


@settings(max_examples=100, deadline=None, derandomize=True)
@given(instances())
def test_dominated_columns_never_matter(instance: tuple[list[Column], Limits]) -> None:
    columns, limits = instance
    kept = [columns[i] for i in undominated(columns)]
    all_, few = solve(columns, limits), solve(kept, limits)
    assert (all_ is None) == (few is None)
    if all_ is not None and few is not None:
        assert few.value == pytest.approx(all_.value, rel=1e-5)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.lists(st.sampled_from([1, 2, 4, 8]), max_size=9),
    st.lists(st.integers(1, 9), min_size=1, max_size=3),
)
def test_chain_limits_say_exactly_what_fits(pieces: list[int], islands: list[int]) -> None:
    sizes = sorted(set(pieces)) or [1]
    assert is_chain(sizes)
    allowed = all(
        sum(factor * pieces.count(size) for size, factor in factors.items()) <= most
        for factors, most in chain_limits(sizes, islands)
    )
    assert allowed == packs(sorted(pieces, reverse=True), islands)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.lists(st.sampled_from([1, 2, 3, 4, 6]), max_size=7),
    st.lists(st.integers(1, 8), min_size=1, max_size=3),
)
def test_placement_fits_whenever_anything_does(pieces: list[int], islands: list[int]) -> None:
    found = place(pieces, islands)
    assert (found is not None) == packs(sorted(pieces, reverse=True), islands)
    if found is not None:
        taken = [
            (island, gpu)
            for (island, start), size in zip(found, pieces, strict=True)
            for gpu in range(start, start + size)
        ]
        assert len(taken) == len(set(taken))
        assert all(gpu < islands[island] for island, gpu in taken)


def test_patterns_are_the_maximal_fillings() -> None:
    assert patterns([2, 3], 7) == [{3: 2}, {3: 1, 2: 2}, {2: 3}]
    assert patterns([8], 4) == [{}]


def test_no_column_no_fleet() -> None:
    assert solve([], Limits(((8,),), 1.0)) is None


def test_shares_of_the_demand_add_up() -> None:
    """n engines that were sized for 1/n of the demand each carry it, whatever rounding says."""
    for n in range(1, 60):
        column = Column(0, 1, 1, 7.0 / n, 1.0, 0.0, 1.0)
        found = solve([column], Limits(((n,),), 7.0))
        assert found is not None
        assert found.counts == (n,)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(instances())
def test_out_of_time_gives_a_fleet_and_an_honest_bound(instance: tuple[list[Column], Limits]) -> None:
    columns, limits = instance
    best, hurried = solve(columns, limits), solve(columns, limits, time_limit=1e-9)
    if best is None:
        assert hurried is None
    elif hurried is not None:
        sign = 1 if limits.demand is not None else -1
        assert sign * hurried.bound <= sign * best.value * (1 + sign * 1e-5)
        assert sign * best.value <= sign * hurried.value * (1 + sign * 1e-5)
        assert hurried.status == ("optimal" if hurried.gap == 0 else "feasible")
