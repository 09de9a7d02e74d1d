"""Mixed formats: the front equals brute force, and what it finds is what engines then are."""

from __future__ import annotations

from itertools import product

from hypothesis import given
from hypothesis import strategies as st

from planc.planner.mixtures import Choice, front

_CHOICE = st.builds(
    Choice,
    st.sampled_from(["a", "b", "c"]),
    st.integers(0, 40).map(float),
    st.integers(0, 20).map(lambda n: n / 1024),
)
_PARTS = st.lists(st.lists(_CHOICE, min_size=1, max_size=4), min_size=1, max_size=6)


@given(_PARTS, st.integers(0, 60).map(lambda n: n / 1024))
def test_the_front_is_that_of_all_assignments(parts: list[list[Choice]], budget: float) -> None:
    every = {
        (sum(choice.cost for choice in picked), sum(choice.drop for choice in picked))
        for picked in product(*parts)
    }
    within = {(cost, drop) for cost, drop in every if drop <= budget}
    best = sorted(
        (drop, cost)
        for cost, drop in within
        if not any((c <= cost and d <= drop) and (c, d) != (cost, drop) for c, d in within)
    )
    found = front(parts, budget)
    assert [(one.drop, one.cost) for one in found] == best
    for one in found:
        assert len(one.schemes) == len(parts)
