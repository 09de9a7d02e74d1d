"""Histograms and timelines: bounded in size, exact in their sums."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from planc.runtime.simulator.load import open_loop, poisson, uniform
from planc.runtime.simulator.records import Gaps, Timeline
from tests.runtime.simulated import Linear, server, simulate


@given(
    first=st.floats(1e-4, 0.1), slope=st.floats(0, 1e-3), steps=st.integers(2, 3000), times=st.integers(1, 9)
)
def test_a_line_of_gaps_is_its_gaps_one_by_one(first: float, slope: float, steps: int, times: int) -> None:
    last = first + slope * (steps - 1)
    line, single = Gaps(), Gaps()
    line.add_line(first, last, steps, times)
    for k in range(steps):
        single.add(first + slope * k, times)
    assert line.count == single.count == steps * times
    assert line.mean == pytest.approx(single.mean, rel=1e-9)
    sums = [np.cumsum(gaps.counts) for gaps in (line, single)]
    assert np.abs(sums[0] - sums[1]).max() <= times  # one gap may fall on either side of an edge
    for q in (0.1, 0.5, 0.9):
        exact = np.quantile(first + slope * np.arange(steps), q, method="inverted_cdf")
        assert line.quantile(q) == pytest.approx(exact, rel=0.03)


@given(st.lists(st.tuples(st.floats(0, 50), st.floats(0, 3), st.floats(0, 9)), min_size=1, max_size=60))
def test_a_timeline_keeps_its_integral_in_bounded_space(parts: list[tuple[float, float, float]]) -> None:
    line, now, total = Timeline(bins=16, width=0.25), 0.0, 0.0
    for pause, seconds, value in parts:
        now += pause
        line.add(now, seconds, (1.0, value, 0.0, 0.0))
        now += seconds
        total += value * seconds
    assert sum(line.columns[1]) == pytest.approx(total, rel=1e-9, abs=1e-9)
    assert all(len(column) == 16 for column in line.columns)
    assert now <= 16 * line.width + 1e-9


def test_a_summary_says_what_the_columns_hold() -> None:
    load = open_loop(poisson(5.0, 400), uniform(10, 100), uniform(2, 40))
    found = simulate(server(Linear(0.01)), load)
    said = found.summary(slo={"ttft_ms": 15.0})
    ttft = 1e3 * (found.first_token_s - found.arrival_s)
    assert said["ttft_ms"]["mean"] == pytest.approx(ttft.mean())
    assert said["ttft_ms"]["p95"] == pytest.approx(np.percentile(ttft, 95))
    assert said["goodput_share"] == pytest.approx(np.mean(ttft <= 15.0))
    assert 0 < said["goodput_share"] < 1
    assert said["output_tok_s"] == pytest.approx(found.output.sum() / found.duration_s)
    assert said["itl_ms"]["mean"] == pytest.approx(10.0)
    assert 0 < said["utilisation"] < 1
    assert 0 < said["kv_occupancy"] < said["kv_occupancy_peak"] < 1


def test_simulating_needs_no_torch() -> None:
    code = (
        "import sys, planc.runtime.simulator\n"
        "print(sorted({'torch', 'transformers', 'triton', 'scipy', 'pandas'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"
