"""Bands only widen, sources only get worse."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planc.cost_model import catalogue
from planc.cost_model.energy import joules_per_token, watts
from planc.cost_model.quantity import ORDER, Quantity, worst

sources = st.sampled_from(ORDER)


@st.composite
def quantities(draw: st.DrawFn) -> Quantity:
    value = draw(st.floats(0.1, 100))
    return Quantity(value, value * draw(st.floats(0.3, 1)), value * draw(st.floats(1, 3)), draw(sources))


@settings(deadline=None)
@given(a=quantities(), b=quantities(), x=st.floats(0, 1), y=st.floats(0, 1))
def test_every_value_in_the_bands_stays_in_the_result(a: Quantity, b: Quantity, x: float, y: float) -> None:
    one = a.low + x * (a.high - a.low)
    two = b.low + y * (b.high - b.low)
    for result, got in ((a + b, one + two), (a - b, one - two), (a * b, one * two), (a / b, one / two)):
        slack = 1e-9 * max(abs(result.high), abs(result.low), 1)
        assert result.low - slack <= got <= result.high + slack
        assert result.source == worst((a.source, b.source))


@settings(deadline=None)
@given(a=quantities(), b=quantities())
def test_the_larger_of_two(a: Quantity, b: Quantity) -> None:
    assert a.max(b).value == max(a.value, b.value)
    assert a.max(b).high >= max(a.high, b.high)


def test_a_value_outside_its_band_is_refused() -> None:
    with pytest.raises(ValueError, match="not within"):
        Quantity(2.0, 3.0, 4.0, "assumed")
    with pytest.raises(ZeroDivisionError):
        Quantity.exact(1.0) / Quantity(0.0, -1.0, 1.0, "assumed")


def test_power_runs_from_idle_to_tdp_and_energy_is_power_over_rate() -> None:
    gpu = catalogue.gpu("h100_sxm")
    low, middle, high = watts(gpu, [0.0, 0.5, 1.0])
    assert low == gpu.idle_w < middle < high == gpu.tdp_w
    assert watts(gpu, 7.0) == gpu.tdp_w
    assert joules_per_token(gpu, 8, 1.0, 1000.0) == pytest.approx(8 * 700 / 1000)
    assert joules_per_token(gpu, 8, 0.0, 0.0) == float("inf")
