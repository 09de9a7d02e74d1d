"""The simulator against queueing theory: what holds exactly, and what holds in the mean."""

from __future__ import annotations

import heapq
import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from planc.runtime.simulator import closed_loop, open_loop
from planc.runtime.simulator.load import empirical, fixed, lognormal, poisson, uniform
from tests.runtime.simulated import Linear, run, server, simulate


@pytest.mark.parametrize("busy", [0.3, 0.6, 0.85])
def test_prompts_one_by_one_are_an_m_d_1_queue(busy: float) -> None:
    """Mean wait rho D / (2 (1 - rho)) (Pollaczek-Khinchine)."""
    service, count = 0.05, 30_000
    load = open_loop(poisson(busy / service, count, seed=3), fixed(10), fixed(1))
    found = simulate(server(Linear(service), prompts_per_step=1), load)
    wait = float((found.admitted_s - found.arrival_s).mean())
    assert wait == pytest.approx(busy * service / (2 * (1 - busy)), rel=0.06)
    assert np.allclose(found.ttft_s, found.admitted_s - found.arrival_s + service)
    assert found.summary()["utilisation"] == pytest.approx(busy, rel=0.02)


@pytest.mark.parametrize(("seats", "busy", "near"), [(1, 0.5, 0.08), (4, 0.7, 0.08), (16, 0.85, 0.25)])
def test_seats_with_exponential_stays_are_an_m_m_c_queue(seats: int, busy: float, near: float) -> None:
    """Mean wait C(c, a) / (c mu - rate), C the Erlang C formula; steps are short against a stay.

    20,000 requests leave the mean of a busy queue uncertain by `near`; the same arrivals and stays served
    by first come, first served without steps give the same mean wait within a step.
    """
    step, mean, count = 0.001, 400, 20_000
    outputs = np.random.default_rng(11).geometric(1 / mean, count)
    rate = busy * seats / (mean * step)
    arrivals = poisson(rate, count, seed=6)
    found = simulate(server(Linear(step), max_num_seqs=seats), open_loop(arrivals, fixed(1), outputs))
    wait = float((found.admitted_s - found.arrival_s).mean())

    free, waits = [0.0] * seats, 0.0
    for arrival, output in zip(arrivals.tolist(), outputs.tolist(), strict=True):
        start = max(arrival, heapq.heappop(free))
        waits += start - arrival
        heapq.heappush(free, start + output * step)
    assert wait == pytest.approx(waits / count, abs=step)

    erlangs = busy * seats
    terms = [erlangs**k / math.factorial(k) for k in range(seats)]
    last = erlangs**seats / math.factorial(seats) / (1 - busy)
    chance = last / (sum(terms) + last)
    assert wait == pytest.approx(chance / (seats / (mean * step) - rate), rel=near)


def test_littles_law_holds_exactly() -> None:
    """Time integral of requests in the system = sum of their stays."""
    load = open_loop(poisson(2.0, 800, seed=1), uniform(1, 300), uniform(1, 200))
    found, left = run(server(Linear(0.01, 1e-4, 1e-7, 1e-5), 60, max_num_seqs=16), load)
    assert found.preemptions.sum() > 0
    _, running, waiting, _ = left.timeline.columns
    assert sum(running) + sum(waiting) == pytest.approx(float(found.e2e_s.sum()), rel=1e-9)


def test_a_closed_loop_of_equal_requests_has_the_reckoned_throughput() -> None:
    """c clients, prompts of one step, n tokens: after the start each cycle of n steps answers c requests."""
    clients, tokens = 8, 50
    load = closed_loop(clients, clients * 20, fixed(4), fixed(tokens))
    found = simulate(server(Linear(0.01)), load)
    assert found.summary()["requests_s"] == pytest.approx(clients / (tokens * 0.01), rel=1e-9)
    assert np.allclose(found.tpot_s, 0.01)
    assert np.allclose(found.ttft_s, 0.01)


def test_the_same_seed_gives_the_same_records_and_another_one_others() -> None:
    load = closed_loop(8, 64, uniform(10, 200), uniform(10, 60))
    of = server(Linear(0.01, 1e-4, 1e-7, 1e-5))
    one, same, other = (simulate(of, load, seed=seed) for seed in (1, 1, 2))
    assert np.array_equal(one.finish_s, same.finish_s)
    assert not np.array_equal(one.finish_s, other.finish_s)


def test_more_cache_never_hurts() -> None:
    load = closed_loop(32, 320, fixed(200), uniform(50, 200))
    times = []
    for blocks in (100, 150, 250, 400, 700, 2000):
        found = simulate(server(Linear(0.01, 1e-4, 1e-7, 1e-5), blocks, reserved_output=1.0), load)
        assert not found.preemptions.any()
        times.append(found.duration_s)
    assert all(more <= less * 1.001 for less, more in pairwise(times))
    assert times[0] > 2 * times[-1]


def test_the_start_burst_is_told_from_the_steady_state() -> None:
    """c prompts at once wait for each other; later ones only for the running step."""
    load = closed_loop(32, 640, uniform(900, 1000), uniform(900, 1000))
    found = simulate(server(Linear(0.005, 0, 0, 1e-4), 100_000, max_num_batched_tokens=1000), load)
    burst, steady = found.only(np.arange(640) < 32), found.steady()
    assert steady.prompt.size == 608
    assert burst.ttft_s.mean() > 5 * steady.ttft_s.mean()
    staggered = closed_loop(32, 640, uniform(900, 1000), uniform(900, 1000), burst=False, ramp_s=30.0)
    slow = simulate(server(Linear(0.005, 0, 0, 1e-4), 100_000, max_num_batched_tokens=1000), staggered)
    assert slow.ttft_s[:32].mean() < 0.3 * burst.ttft_s.mean()


def test_lengths_have_the_moments_they_were_asked_for() -> None:
    draw = np.random.default_rng(0)
    drawn = lognormal(800, 0.7)(draw, 100_000)
    assert drawn.mean() == pytest.approx(800, rel=0.01)
    assert drawn.std() / drawn.mean() == pytest.approx(0.7, rel=0.02)
    assert set(uniform(3, 5)(draw, 1000).tolist()) == {3, 4, 5}
    assert set(empirical([7, 9])(draw, 100).tolist()) == {7, 9}


def test_clients_that_start_late_hold_nobody_up() -> None:
    load = closed_loop(4, 40, fixed(4), fixed(10), burst=False, ramp_s=2.0)
    found = simulate(server(Linear(0.01)), load)
    assert found.arrival_s[:4] == pytest.approx([0.0, 0.5, 1.0, 1.5])
    assert found.ttft_s.max() < 0.02 + 1e-9
    assert found.finish_s[0] == pytest.approx(0.1)
    assert found.arrival_s[4] == pytest.approx(0.1)


def test_a_frontend_that_streams_too_slowly_sets_the_pace() -> None:
    load = closed_loop(20, 400, fixed(100), uniform(100, 300))
    free = simulate(server(Linear(0.01)), load)
    idle = simulate(server(Linear(0.01), stream_us=400.0), load)  # 8 ms of messages to a step of 10
    behind = simulate(server(Linear(0.01), stream_us=1000.0), load)  # 20 ms of them
    assert idle.tpot_s == pytest.approx(free.tpot_s)
    assert behind.output.sum() / behind.finish_s.max() == pytest.approx(1000, rel=0.05)
    assert behind.steady().ttft_s.mean() > 10 * free.steady().ttft_s.mean()


def test_clients_start_together_again_after_a_warm_up() -> None:
    load = replace(closed_loop(4, 20, fixed(100), uniform(10, 90)), warm_up=8)
    found = simulate(server(Linear(0.01)), load)
    assert found.arrival_s[8:12] == pytest.approx(found.finish_s[:8].max())
    assert np.all(found.arrival_s[12:] > found.arrival_s[8])
