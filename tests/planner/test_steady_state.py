"""The closed forms: against queueing theory, against a step-by-step simulation, and their own laws."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planc.planner.operating_point import Array, Steady
from planc.planner.priors import priors
from planc.planner.queues import normal_cdf, rate_of, seat_queue
from planc.planner.request import make_request
from planc.planner.steady_state import steady
from planc.planner.traffic import Traffic, traffic
from tests.planner.cases import raw
from tests.planner.scheduler import simulate

FIXED, PER_SEQ, PER_TOKEN = 8e-3, 60e-6, 30e-6


@dataclass(frozen=True)
class Linear:
    """Steps that cost FIXED + PER_SEQ b + PER_TOKEN q."""

    tokens: float = 2048.0
    prompt: float = 1000.0
    stages: float = 1.0
    ranks: float = 1.0
    first: float = 1.0

    @property
    def budget(self) -> Array:
        return np.array([[self.tokens]])

    @property
    def pp(self) -> Array:
        return np.array([[self.stages]])

    @property
    def dp(self) -> Array:
        return np.array([[self.ranks]])

    @property
    def request_s(self) -> Array:
        return np.array([[priors().request_s]])

    @property
    def lag_steps(self) -> Array:
        return np.array([[priors().lag_steps]])

    @property
    def first_token(self) -> Array:
        return np.array([[self.first]])

    @property
    def per_seq(self) -> Array:
        return np.ones((1, 1))

    @property
    def pace(self) -> Array:
        return np.ones((1, 1))

    @property
    def places(self) -> tuple[float, ...]:
        return (-1.0, 1.0)

    def at(self, seqs: Array) -> tuple[Array, Array, Array]:
        plain = FIXED + PER_SEQ * seqs
        room = np.maximum(self.tokens - seqs, 1.0)
        pieces = np.where(self.prompt < room, 1.0, self.prompt / room + 0.5)
        return plain, pieces * plain + PER_TOKEN * self.prompt, plain + PER_TOKEN * room


def load(isl: float = 1000, osl: float = 200, **workload: object) -> Traffic:
    return traffic(
        make_request(raw(workload={"isl": isl, "osl": osl, **(workload or {"rate": "max"})})), "causal_lm"
    )


def at_rate(rate: float, flow: Traffic, seats: float = 256.0, times: Linear | None = None) -> Steady:
    low, high = 1e-6, seats
    times = times or Linear(prompt=flow.isl_mean)
    for _ in range(60):
        middle = (low * high) ** 0.5
        found = steady(times, flow, np.array([[middle]]), np.array([[seats]]))
        low, high = (middle, high) if found.rate[0, 0] < rate else (low, middle)
    return steady(times, flow, np.array([[high]]), np.array([[seats]]))


@pytest.mark.parametrize(
    ("isl", "osl", "share", "budget"),
    [
        (1000, 200, 0.3, 2048),
        (1000, 200, 0.6, 2048),
        (4000, 300, 0.5, 2048),
        (300, 400, 0.15, 1024),
        (8000, 100, 0.7, 2048),
        (500, 100, 0.5, 8192),
        (2000, 60, 0.6, 4096),
    ],
)
def test_agrees_with_a_simulated_scheduler(isl: int, osl: int, share: float, budget: int) -> None:
    """Means within 8 % (TPOT) and 20 % (TTFT), 95th percentiles within 25 %, at up to 70 % prompt load."""
    flow = load(isl, osl)
    rate = share / (isl * (PER_TOKEN + FIXED / budget))
    found = at_rate(rate, flow, 400.0, Linear(tokens=budget, prompt=isl))
    seen = simulate(
        lambda seqs, chunk, cached: FIXED + PER_SEQ * seqs + PER_TOKEN * chunk,
        isl=isl, osl=osl, rate=rate, budget=budget, seats=400, requests=3000, seed=1,
    )  # fmt: skip
    assert found.rate[0, 0] == pytest.approx(seen.rate, rel=0.08)
    assert found.tpot[0, 0] == pytest.approx(seen.tpot.mean(), rel=0.08)
    assert found.batch[0, 0] == pytest.approx(seen.batch, rel=0.12)
    constant = priors().request_s + priors().lag_steps * found.tpot[0, 0]
    assert found.ttft[0, 0] - constant == pytest.approx(seen.ttft.mean(), rel=0.2)
    assert found.quantile("ttft", 0.95)[0, 0] - constant == pytest.approx(
        np.quantile(seen.ttft, 0.95), rel=0.25
    )
    assert found.quantile("tpot", 0.95)[0, 0] == pytest.approx(np.quantile(seen.tpot, 0.95), rel=0.2)


@given(batch=st.floats(0.01, 250), isl=st.floats(10, 8000), osl=st.floats(2, 2000))
@settings(deadline=None, max_examples=40)
def test_littles_law(batch: float, isl: float, osl: float) -> None:
    flow = load(isl, osl)
    found = steady(Linear(prompt=isl), flow, np.array([[batch]]), np.array([[256.0]]))
    assert found.rate[0, 0] * flow.decode_steps * found.tpot[0, 0] == pytest.approx(
        found.batch[0, 0], rel=1e-9
    )
    assert found.batch[0, 0] >= batch * (1 - 1e-9)


@given(rate=st.floats(0.01, 0.9), isl=st.floats(100, 8000))
@settings(deadline=None, max_examples=40)
def test_the_prompt_queue_is_pollaczek_khinchine(rate: float, isl: float) -> None:
    """With one-token answers and steps that only carry prompts, the wait is that of an M/D/1 queue."""
    flow = load(isl, 1, rate="max")
    full = Linear(prompt=isl, tokens=isl)
    service = float(full.at(np.array([[0.0]]))[2][0, 0])  # an upper bound of the service time
    found = steady(full, flow, np.array([[rate]]), np.array([[1.0]]))
    busy = float(found.busy[0, 0])
    assert 0 < busy <= priors().stable
    per_request = busy / float(found.rate[0, 0])
    assert per_request == pytest.approx(service, rel=0.02)
    assert found._queue_wait[0, 0] == pytest.approx(busy / (1 - busy) * per_request / 2, rel=1e-6)


def test_erlang_c_is_approximated() -> None:
    """Halfin and Whitt's chance to wait against the exact Erlang C, within 0.03."""
    for seats, offered in ((16, 8.0), (32, 26.0), (64, 58.0), (128, 110.0), (256, 250.0)):
        term, total = 1.0, 1.0
        for k in range(1, seats):
            term *= offered / k
            total += term
        last = term * offered / seats * seats / (seats - offered)
        exact = last / (total + last)
        chance, wait = seat_queue(np.array([[offered]]), np.array([[float(seats)]]), np.array([[2.0]]))
        assert chance[0, 0] == pytest.approx(exact, abs=0.03)
        assert wait[0, 0] == pytest.approx(2.0 / (seats - offered))


def test_normal_distribution() -> None:
    from statistics import NormalDist

    x = np.linspace(0, 8, 200)
    assert np.allclose(normal_cdf(x), [NormalDist().cdf(v) for v in x], atol=1e-7)


@given(st.floats(0.1, 200), st.floats(1e-3, 10), st.floats(0, 1), st.integers(1, 16))
def test_rate_solves_its_equation(batch: float, cycle: float, extra: float, dp: int) -> None:
    one = lambda v: np.array([[float(v)]])  # noqa: E731
    rate = rate_of(one(batch), one(cycle), one(extra), one(dp))[0, 0]
    assert rate * cycle == pytest.approx(batch * max(1 - rate * extra, 0.0) ** dp, rel=1e-5, abs=1e-9)


def test_everything_grows_with_load() -> None:
    flow = load()
    batch = np.geomspace(0.05, 120, 60)[None, :]
    found = steady(Linear(), flow, batch, np.array([[256.0]]))
    stable = np.isfinite(found.ttft[0])
    for values in (
        found.rate,
        found.ttft,
        found.tpot,
        found.e2e,
        found.quantile("ttft", 0.99),
        found.quantile("tpot", 0.9),
    ):
        assert np.all(np.diff(values[0][stable]) >= -1e-12)
    assert stable[0]


@given(q=st.floats(0.5, 0.99), batch=st.floats(0.1, 60))
@settings(deadline=None, max_examples=40)
def test_percentiles_ascend(q: float, batch: float) -> None:
    found = steady(Linear(), load(isl=1000, osl=100), np.array([[batch]]), np.array([[128.0]]))
    for metric in ("ttft", "tpot", "e2e", "itl"):
        assert found.quantile(metric, q)[0, 0] <= found.quantile(metric, min(q + 0.009, 0.999))[0, 0] + 1e-12


def test_more_tokens_in_the_cache_mean_less_ttft() -> None:
    cold, warm = load(rate="max"), load(rate="max", prefix_hit_rate=0.5)
    slow = steady(Linear(prompt=1000), cold, np.array([[10.0]]), np.array([[256.0]]))
    fast = steady(Linear(prompt=500), warm, np.array([[10.0]]), np.array([[256.0]]))
    assert fast.ttft[0, 0] < slow.ttft[0, 0]
    assert fast.rate[0, 0] > slow.rate[0, 0]


def test_overload_is_infinite() -> None:
    flow = load(isl=8000, osl=2)
    found = steady(Linear(prompt=8000), flow, np.array([[200.0]]), np.array([[256.0]]))
    assert np.isinf(found.ttft[0, 0])
    assert not found.meets(())[0, 0]


def test_closed_loop_counts_its_users() -> None:
    flow = load(isl=500, osl=300, concurrency=32)
    batch = np.linspace(1, 31, 200)[None, :]
    found = steady(Linear(prompt=500), flow, batch, np.array([[64.0]]))
    at = int(np.argmin(np.abs(found.users[0] - 32)))
    seen = simulate(
        lambda seqs, chunk, cached: FIXED + PER_SEQ * seqs + PER_TOKEN * chunk,
        isl=500, osl=300, rate=1.0, budget=2048, seats=64, requests=1200, seed=2, users=32,
    )  # fmt: skip
    assert found.tpot[0, at] == pytest.approx(seen.tpot.mean(), rel=0.06)
    assert found.rate[0, at] == pytest.approx(seen.rate, rel=0.08)


def test_stages_divide_the_batch_and_multiply_the_latency() -> None:
    flow = load()
    one = steady(Linear(), flow, np.array([[32.0]]), np.array([[256.0]]))
    two = steady(Linear(stages=2.0), flow, np.array([[64.0]]), np.array([[256.0]]))
    assert two.rate[0, 0] == pytest.approx(one.rate[0, 0], rel=0.15)
    assert two.tpot[0, 0] > 1.8 * one.tpot[0, 0]


def test_scale_stretches_time() -> None:
    flow = replace(load(), rate=None)
    base = steady(Linear(), flow, np.array([[8.0]]), np.array([[256.0]]))
    slow = steady(Linear(), flow, np.array([[8.0]]), np.array([[256.0]]), 2.0)
    assert slow.tpot[0, 0] == pytest.approx(2 * base.tpot[0, 0])
    assert slow.rate[0, 0] == pytest.approx(base.rate[0, 0] / 2)
