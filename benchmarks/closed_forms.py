"""The planner's closed forms beside the simulator, on step times of real models (docs/simulator.md).

    python benchmarks/closed_forms.py

Both sides have vLLM's rules, the same step model, fixed lengths, and no cache to run out of. A closed loop's
clients start over the length of two answers, so that their prompts do not come together.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from planc.cost_model import catalogue
from planc.cost_model.collectives import Fabric
from planc.cost_model.shape import EngineShape
from planc.cost_model.step import StepLoad, StepModel
from planc.planner.operating_point import Steady
from planc.planner.steady_state import steady
from planc.planner.step_times import Exact
from planc.planner.traffic import Traffic
from planc.runtime.simulator import Clock, Load, Rules, Server, closed_loop, open_loop, simulate
from planc.runtime.simulator.load import fixed, poisson
from tests.sample_tables import llama8b, llama70b, qwen235b

NAMES = {
    "70b": "Llama-3.1-70B, 4 x H200 fp8",
    "8b": "Llama-3.1-8B, H100",
    "moe": "Qwen3-235B, 8 x H200 EP8",
}
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
    """users of a closed loop, or requests per second of an open one"""

    model: str
    isl: int
    osl: int
    users: int = 0
    rate: float = 0.0

    def __str__(self) -> str:
        load = f"{self.users} users" if self.users else f"{self.rate:g} requests/s"
        return f"{NAMES[self.model]}, {self.isl}/{self.osl}, {load}"

    @property
    def seats(self) -> int:
        return self.users or 256


CASES = (
    Case("70b", 1024, 1024, users=8),
    Case("70b", 1024, 1024, users=64),
    Case("70b", 8192, 512, users=16),
    Case("70b", 512, 4096, users=128),
    Case("moe", 2000, 500, users=32),
    Case("8b", 1000, 200, rate=4.0),
    Case("8b", 1000, 200, rate=12.0),
    Case("8b", 4000, 100, rate=4.0),
    Case("moe", 1000, 500, rate=4.0),
)


def flow(case: Case) -> Traffic:
    one = np.array([1.0])
    made = Traffic(one * case.isl, one * case.osl, one)
    if case.users:
        return replace(made, concurrency=case.users, arrival_cv2=0.0)
    return replace(made, rate=case.rate)


def closed_form(case: Case) -> Steady:
    """The state whose users, or rate, are the case's."""
    traffic, seats = flow(case), 2 * case.seats
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
        return closed_loop(
            case.users, 20 * case.users, fixed(case.isl), fixed(case.osl), burst=False, ramp_s=0.04 * case.osl
        )
    return open_loop(poisson(case.rate, 3000, seed=2), fixed(case.isl), fixed(case.osl))


def simulated(case: Case) -> tuple[float, float]:
    """(TPOT, TTFT), s, in the steady state.

    Clients of a closed loop with fixed lengths come back at the same moment of a decode step, which one is up
    to a request's way to the scheduler. So that way is made longer by up to a step, a quarter at a time, and
    what it is longer by is taken off.
    """
    engine, clock = catalogue.engine("vllm"), Clock(model(case.model))
    rules = Rules.of(engine, max_num_seqs=case.seats, max_num_batched_tokens=8192)
    step = (
        float(model(case.model).seconds(StepLoad(case.users, case.isl + case.osl / 2))) if case.users else 0.0
    )
    found = []
    for late in (0.0, 0.25 * step, 0.5 * step, 0.75 * step) if step else (0.0,):
        server = Server(clock, replace(rules, request_ms=rules.request_ms + 1e3 * late), 1_000_000, 16)
        seen = simulate(server, load(case)).steady()
        found.append((np.nanmean(seen.tpot_s), seen.ttft_s.mean() - late))
    tpot, ttft = np.mean(found, axis=0)
    return float(tpot), float(ttft)


def main() -> None:
    print("| closed form against simulation | TPOT, ms | simulated | TTFT, ms | simulated |")
    print("|---|---|---|---|---|")
    for case in CASES:
        told, (tpot, ttft) = closed_form(case), simulated(case)
        times = 1e3 * np.array([told.tpot[0, 0], tpot, told.ttft[0, 0], ttft])
        print("| {} | {:.2f} | {:.2f} | {:.0f} | {:.0f} |".format(case, *times), flush=True)


if __name__ == "__main__":
    main()
