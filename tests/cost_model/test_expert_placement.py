"""Expert placement: against all placements of small layers, its bound, and what engines need of it."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planc.cost_model.expert_placement import contiguous, physical_map, place_experts
from planc.errors import InvalidField


def best(load: list[int], ranks: int, extra: int) -> float:
    """The fullest rank of the best placement: all sets of experts of all ranks."""
    slots = len(load) // ranks + extra
    choices = list(itertools.combinations(range(len(load)), slots))
    found = float("inf")
    for picked in itertools.combinations_with_replacement(choices, ranks):
        copies = np.bincount(np.concatenate(picked), minlength=len(load))
        if (copies > 0).all():
            each = np.array(load) / copies
            found = min(found, max(float(each[list(rank)].sum()) for rank in picked))
    return found


#: experts, ranks, extra slots
SMALL = [(4, 2, 0), (4, 2, 1), (6, 2, 0), (6, 2, 1), (6, 3, 0), (4, 4, 1), (3, 3, 1), (6, 3, 1)]


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(SMALL), st.data())
def test_equals_all_placements_tried_and_is_never_below_the_bound(
    case: tuple[int, int, int], data: st.DataObject
) -> None:
    experts, ranks, extra = case
    load = data.draw(st.lists(st.integers(0, 50), min_size=experts, max_size=experts))
    found = place_experts(load, ranks, extra)
    optimum = best(load, ranks, extra)
    fullest = float(found.tokens.max())
    assert found.bound <= optimum + 1e-9
    assert fullest == pytest.approx(optimum, rel=1e-6, abs=1e-9)
    for rank in found.experts:
        assert len(set(rank.tolist())) == experts // ranks + extra, "a rank holds an expert once"
    assert (np.bincount(found.experts.reshape(-1), minlength=experts) == found.copies).all()
    assert found.tokens.sum() == pytest.approx(sum(load))


def test_256_skewed_experts_on_64_ranks() -> None:
    """DeepSeek-V3's shape under a power law: one extra slot per rank brings it close to even."""
    load = np.random.default_rng(0).pareto(1.2, 256) + 1
    plain, spare = place_experts(load, 64), place_experts(load, 64, extra=1)
    assert contiguous(load, 64).imbalance > plain.imbalance > spare.imbalance
    assert spare.imbalance < 1.03
    assert spare.gap < 0.03


def test_equal_loads_stay_even_and_no_load_divides_nothing() -> None:
    assert place_experts(np.ones(64), 8).imbalance == pytest.approx(1.0)
    assert place_experts(np.zeros(8), 4, extra=1).imbalance == 1.0


def test_the_physical_map_lists_every_slot() -> None:
    placements = [place_experts(np.arange(8.0), 4, extra=1), place_experts(np.ones(8), 4, extra=1)]
    rows = physical_map(placements)
    assert [len(row) for row in rows] == [12, 12]
    assert all(set(row) == set(range(8)) for row in rows)


@pytest.mark.parametrize(
    ("load", "ranks", "extra", "field"),
    [
        ([], 1, 0, "load"),
        ([1.0, -1.0], 1, 0, "load"),
        ([1.0, float("nan")], 1, 0, "load"),
        ([[1.0]], 1, 0, "load"),
        ([1.0, 1.0, 1.0], 2, 0, "ranks"),
        ([1.0, 1.0], 0, 0, "ranks"),
        ([1.0, 1.0], 2, 2, "extra"),
        ([1.0, 1.0], 2, -1, "extra"),
    ],
)
def test_impossible_questions_are_refused(load: list[float], ranks: int, extra: int, field: str) -> None:
    with pytest.raises(InvalidField, match=field):
        place_experts(load, ranks, extra)
