"""Caches beyond the GPU: what tiers hold, and when loading beats computing."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planc.cost_model.offload import Tier, break_even_bytes_s, reuse

EACH, PREFILL = 160e3, 40e-6  # bytes of a token's cache, seconds to compute it: break-even at 4 GB/s


def tier(name: str, tokens: float, gbytes_s: float) -> Tier:
    return Tier(name, tokens, gbytes_s * 1e9)  # type: ignore[arg-type]


def test_break_even_is_where_both_take_as_long() -> None:
    even = break_even_bytes_s(EACH, PREFILL)
    assert even == pytest.approx(4e9)
    assert EACH / even == pytest.approx(PREFILL)


def test_what_faster_tiers_hold_is_not_counted_again() -> None:
    found = reuse(
        0.6, 10_000, 1e6, [Tier("gpu", 1e5), tier("host", 5e5, 40), tier("nvme", 4e6, 8)], EACH, PREFILL
    )
    assert [part.share for part in found.held] == pytest.approx([0.1, 0.4, 0.5])
    assert all(part.loaded for part in found.held)
    assert found.hit_rate == pytest.approx(0.6)
    assert found.offloads


@pytest.mark.parametrize(("gbytes_s", "loaded"), [(3.9, False), (5.0, True)])
def test_below_break_even_tokens_are_computed_again(gbytes_s: float, loaded: bool) -> None:
    """A store takes 5 ms to begin with: 6,000 tokens of 40 us make that little."""
    found = reuse(0.6, 10_000, 1e6, [Tier("gpu", 1e5), tier("store", 1e7, gbytes_s)], EACH, PREFILL)
    assert found.held[1].loaded is loaded
    assert found.hit_rate == pytest.approx(0.6 if loaded else 0.06)
    assert (found.load_s > 0) is loaded


def test_short_prefixes_are_not_worth_the_start() -> None:
    long, short = (
        reuse(0.5, prompt, 1e6, [tier("store", 1e7, 40)], EACH, PREFILL) for prompt in (10_000, 200)
    )
    assert long.offloads
    assert not short.offloads


def test_everything_on_the_gpu_takes_no_time() -> None:
    found = reuse(0.6, 1000, 1000, [Tier("gpu", 1e5), tier("host", 1e6, 40)], EACH, PREFILL)
    assert (found.hit_rate, found.load_s, found.offloads) == (0.6, 0.0, False)


@given(
    st.floats(0.01, 0.99),
    st.floats(1e2, 1e5),
    st.floats(1e3, 1e8),
    st.lists(st.tuples(st.floats(0, 1e8), st.floats(0.1, 100)), min_size=1, max_size=3),
)
def test_more_room_never_hurts(
    potential: float, prompt: float, working: float, sizes: list[tuple[float, float]]
) -> None:
    """Hits stay within the potential; loading is never slower than computing what is loaded; a larger last
    tier finds no less."""
    names = ("host", "nvme", "store")
    tiers = [tier(name, *size) for name, size in zip(names, sizes, strict=False)]
    found = reuse(potential, prompt, working, tiers, EACH, PREFILL)
    assert 0 <= found.hit_rate <= potential * (1 + 1e-9)
    assert found.load_s <= found.hit_rate * prompt * PREFILL * (1 + 1e-9)
    more = [*tiers[:-1], Tier(tiers[-1].name, math.inf, tiers[-1].bytes_s)]
    assert reuse(potential, prompt, working, more, EACH, PREFILL).hit_rate >= found.hit_rate - 1e-12
