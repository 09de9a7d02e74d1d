"""The planner's closed forms against the simulator, on step times of real models."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import pytest

from planc.cost_model import catalogue
from planc.cost_model.collectives import Fabric
from planc.cost_model.shape import EngineShape
from planc.cost_model.step import StepModel
from planc.planner.operating_point import Steady
from planc.planner.steady_state import steady
from planc.planner.step_times import Exact
from planc.planner.traffic import Traffic
from planc.runtime.simulator import Clock, Load, Rules, Server, closed_loop, open_loop, simulate
from planc.runtime.simulator.load import fixed, poisson
from tests.sample_tables import llama8b, llama70b, qwen235b

FP8 = {"weights": "fp8", "activations": "fp8", "kv": "fp8"}


@cache
def model(name: str) -> StepModel:
    table, gpu, shape = {
        "70b": (llama70b(), "h200_sxm", {"tp": 4, **FP8}),
        "8b": (llama8b(), "h100_sxm", {}),
        "moe": (qwen235b(), "h200_sxm", {"tp": 8, "ep": 8}),
    }[name]
    made = EngineShape("vllm", gpu, **shape)  # type: ignore[arg-type]
    return StepModel(table, made, catalogue.gpu(gpu), Fabric(8), catalogue.engine("vllm"))


@dataclass(frozen=True)
class Case:
    model: str
    isl: int
    osl: int
    users: int = 0
    rate: float = 0.0


def flow(case: Case) -> Traffic:
    one = np.array([1.0])
    made = Traffic(one * case.isl, one * case.osl, one)
    if case.users:
        return replace(made, concurrency=case.users, arrival_cv2=0.0)
    return replace(made, rate=case.rate)


def closed_form(case: Case, seats: int) -> Steady:
    """The state whose users, or rate, are the case's."""
    traffic = flow(case)
    times = Exact.of(model(case.model), traffic, 8192.0)
    low, high = 1e-4, float(seats)
    for _ in range(60):
        middle = (low * high) ** 0.5
        found = steady(times, traffic, np.array([[middle]]), np.array([[float(seats)]]))
        reached = found.users[0, 0] < case.users if case.users else found.rate[0, 0] < case.rate
        low, high = (middle, high) if reached else (low, middle)
    return steady(times, traffic, np.array([[low]]), np.array([[float(seats)]]))


def load(case: Case) -> Load:
    if case.users:
        # clients start over the length of two answers, so that their prompts do not come together
        return closed_loop(
            case.users, 20 * case.users, fixed(case.isl), fixed(case.osl), burst=False, ramp_s=0.04 * case.osl
        )
    return open_loop(poisson(case.rate, 3000, seed=2), fixed(case.isl), fixed(case.osl))


@pytest.mark.parametrize(
    "case",
    [
        Case("70b", 1024, 1024, users=8),
        Case("70b", 1024, 1024, users=64),
        Case("70b", 8192, 512, users=16),
        Case("70b", 512, 4096, users=128),
        Case("moe", 2000, 500, users=32),
        Case("8b", 1000, 200, rate=4.0),
        Case("8b", 1000, 200, rate=12.0),
        Case("8b", 4000, 100, rate=4.0),
        Case("moe", 1000, 500, rate=4.0),
    ],
    ids=str,
)
def test_closed_forms_agree_with_the_simulator(case: Case) -> None:
    """TPOT within 10 % (2 % where prompts take less than a third of the time), TTFT within 15 %."""
    seats = case.users or 256
    rules = Rules.of(catalogue.engine("vllm"), max_num_seqs=seats, max_num_batched_tokens=8192)
    found = simulate(Server(Clock(model(case.model)), rules, 1_000_000, 16), load(case)).steady()
    told = closed_form(case, 2 * seats)
    light = 1 - told._decode[0, 0] / told.tpot[0, 0] < 1 / 3
    assert told.tpot[0, 0] == pytest.approx(np.nanmean(found.tpot_s), rel=0.02 if light else 0.1)
    assert told.ttft[0, 0] == pytest.approx(found.ttft_s.mean(), rel=0.15)
