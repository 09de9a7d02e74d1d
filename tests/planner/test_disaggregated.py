"""Prefill and decode pools: their steady states against queueing limits and the simulator, memory, links,
objectives, whole plans, and the checker."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import pytest

from planc.cost_model import catalogue
from planc.cost_model.collectives import Fabric
from planc.cost_model.shape import EngineShape, handover_refusals
from planc.cost_model.step import StepModel
from planc.planner import disaggregated
from planc.planner.candidates import Candidate
from planc.planner.check import check
from planc.planner.evaluate import Room
from planc.planner.inventory import Group, groups
from planc.planner.operating_point import FIRST, Array, Steady
from planc.planner.plan import Plan, Pool, Replica, Role
from planc.planner.slo import objectives
from planc.planner.steady_state import steady
from planc.planner.step_times import Exact
from planc.planner.traffic import Traffic
from planc.runtime.simulator import Clock, Records, Rules, Server, open_loop
from planc.runtime.simulator.disaggregated import simulate_disaggregated
from planc.runtime.simulator.load import fixed, poisson
from tests.planner.cases import planned, request, table
from tests.planner.test_steady_state import Linear
from tests.sample_tables import llama8b, llama70b, qwen235b

ONE = np.array([1.0])


def flow(isl: float, osl: float, rate: float | None = None) -> Traffic:
    return Traffic(ONE * isl, ONE * osl, ONE, rate=rate)


def at(
    times: Any, traffic: Traffic, batch: float, role: Role, seats: float = 128.0, wire: float = 0.0
) -> Steady:
    one = np.array([[1.0]])
    return steady(times, traffic, batch * one, seats * one, role=role, transfer_s=wire)


def at_rate(times: Any, traffic: Traffic, rate: float, role: Role, wire: float = 0.0) -> Steady:
    low, high = 1e-4, 256.0
    for _ in range(60):
        middle = (low * high) ** 0.5
        found = at(times, traffic, middle, role, 256.0, wire)
        low, high = (middle, high) if found.rate[0, 0] < rate else (low, middle)
    return at(times, traffic, low, role, 256.0, wire)


def value(array: Array) -> float:
    return float(array[0, 0])


# -- steady states ------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", [100.0, 20_000.0])
def test_decoding_is_free_of_prompts(prompt: float) -> None:
    """TPOT is a plain step's whatever the prompts' length, and Little's law holds."""
    found = at(Linear(), flow(prompt, 200), 30.0, "decode")
    plain, _, _ = Linear().at(np.array([[31.0]]))
    assert value(found.tpot) == pytest.approx(value(plain))
    assert value(found.rate) == pytest.approx(30 / (200 * value(plain)))
    assert value(found.quantile("itl", 0.99)) == pytest.approx(value(found.tpot), rel=0.1)


@pytest.mark.parametrize("wire", [0.0, 0.5])
def test_where_the_first_token_comes_from_moves_time_between_ttft_and_tpot(wire: float) -> None:
    """A request is done at the same time; an engine that computes the token again is later by its step and
    by the way to it."""
    ends = {}
    for name in ("prefill", "decode", "again"):
        found = at(Linear(first=FIRST[name]), flow(1000, 200), 20.0, "decode", wire=wire)
        ends[name] = value(found.e2e)
        assert (value(found.ttft) == 0) == (name == "prefill")
        if name != "prefill":
            assert value(found.ttft) > wire
            assert value(found.tpot) == pytest.approx(value(found._decode))
    lag = value(Linear().lag_steps) * value(found._decode)
    assert ends["decode"] == pytest.approx(ends["prefill"] + lag)
    request_s = value(Linear().request_s)
    assert ends["again"] == pytest.approx(ends["decode"] + value(found._decode) + request_s)


def test_one_prompt_per_step_is_pollaczek_and_khinchine() -> None:
    times = Linear(tokens=1000.0, prompt=1000.0)
    traffic = flow(1000, 200)
    *_, full = times.at(np.array([[1.0]]))
    for share in (0.2, 0.5, 0.8):
        rate = share / value(full)
        found = at_rate(times, traffic, rate, "prefill")
        wait = share / (1 - share) * value(full) / 2
        assert value(found.ttft) == pytest.approx(value(full) + wait + value(times.request_s), rel=0.02)
    assert value(found.tpot) == 0.0


def test_prompts_that_come_together_share_a_step() -> None:
    """A wider budget carries more, and shortens the wait at the same rate."""
    narrow, wide = Linear(tokens=1000.0), Linear(tokens=8000.0)
    _, _, full = narrow.at(np.array([[1.0]]))
    rate = 0.9 / value(full)
    waits = [value(at_rate(times, flow(1000, 200), rate, "prefill").ttft) for times in (narrow, wide)]
    assert waits[1] < 0.7 * waits[0]


@cache
def model(name: str) -> StepModel:
    wide = {"weights": "fp8", "activations": "fp8", "kv": "fp8"}
    found, gpu, shape = {
        "70b": (llama70b(), "h200_sxm", {"tp": 4, **wide}),
        "8b": (llama8b(), "h100_sxm", {}),
        "moe": (qwen235b(), "h200_sxm", {"tp": 8, "ep": 8}),
        "stages": (llama70b(), "h200_sxm", {"pp": 8}),
    }[name]
    made = EngineShape("vllm", gpu, **shape)  # type: ignore[arg-type]
    return StepModel(found, made, catalogue.gpu(gpu), Fabric(8), catalogue.engine("vllm"))


@dataclass(frozen=True)
class Case:
    model: str
    isl: int
    osl: int
    rate: float
    decoders: int = 1

    def simulated(self, first: Any, wire: float) -> Records:
        rules = Rules.of(catalogue.engine("vllm"), max_num_seqs=256, max_num_batched_tokens=8192)
        one = Server(Clock(model(self.model)), rules, 1_000_000, 16)
        load = open_loop(poisson(self.rate, 3000, seed=2), fixed(self.isl), fixed(self.osl))
        found = simulate_disaggregated(
            [one], [one] * self.decoders, load, transfer_s=lambda tokens: wire, first_token=first
        )
        return found.steady()


CASES = [
    Case("8b", 1000, 200, 16.0),
    Case("8b", 4000, 100, 6.0),
    Case("70b", 2000, 500, 6.0),
    Case("moe", 1000, 500, 16.0, 2),
]


@pytest.mark.parametrize(
    ("case", "first"),
    [*((case, first) for case in CASES for first in ("prefill", "again")),
     (Case("stages", 4000, 500, 4.0), "prefill")],
    ids=str,
)  # fmt: skip
def test_closed_forms_agree_with_the_simulator(case: Case, first: str) -> None:
    """TPOT within 5 %, mean TTFT within 10 %, its 99th percentile within 30 %."""
    wire, traffic = 0.02, flow(case.isl, case.osl)
    found = case.simulated(first, wire)

    def times(role: Role) -> Exact:
        exact = Exact.of(model(case.model), traffic.of(role), 8192.0)
        return replace(exact, first_token=np.array([[FIRST[first]]]))

    prefill = at_rate(times("prefill"), traffic, case.rate, "prefill")
    decode = at_rate(times("decode"), traffic, case.rate / case.decoders, "decode", wire)
    assert value(decode.tpot) == pytest.approx(np.nanmean(found.tpot_s), rel=0.05)
    assert value(prefill.ttft + decode.ttft) == pytest.approx(found.ttft_s.mean(), rel=0.1)
    late = value(prefill.quantile("ttft", 0.99) + decode.quantile("ttft", 0.99))
    assert late == pytest.approx(np.quantile(found.ttft_s, 0.99), rel=0.3)


# -- memory -------------------------------------------------------------------------------


def group(**nodes: Any) -> Group:
    found: Group = groups(request(inventory={"nodes": [{"gpu": "h200_sxm", "gpus_per_node": 8, **nodes}]}))[0]
    return found


def candidate(home: Group, **shape: Any) -> Candidate:
    return Candidate(home, catalogue.engine("vllm"), EngineShape("vllm", home.gpu.name, **shape), 0.0)


def test_limits_of_each_role() -> None:
    """A prefill engine holds prompts, so more of them than a decode engine holds sequences; it needs no batch
    cap beyond a full step, and a decode engine no budget beyond its cap."""
    caps, budgets = (8, 64, 256, 1024), (2048, 8192)
    rooms = {
        role: Room(table("llama70b"), candidate(group(), tp=2), flow(4000, 8000), 16384, None, role)
        for role in ("aggregated", "prefill", "decode")
    }
    assert rooms["prefill"].seats(1024, 2048) > 1.5 * rooms["decode"].seats(1024, 2048)
    prefill, decode = (rooms[role].all(caps, budgets) for role in ("prefill", "decode"))
    assert {item.max_num_seqs for item in prefill} == {8}
    assert len({item.max_num_seqs for item in decode}) == len(decode)
    assert all(item.budget == 2048 for item in decode if item.max_num_seqs <= 1024)


# -- links --------------------------------------------------------------------------------


def test_a_cache_crosses_the_link_that_is_there() -> None:
    """Neighbours hand over faster than nodes do, twice the tokens take twice the time, and a narrow engine
    has to send all of it by itself."""
    one, two = group(count=1), group(count=2)
    narrow, wide = EngineShape("vllm", "h200_sxm", tp=2), EngineShape("vllm", "h200_sxm", tp=8)

    def seconds(a: EngineShape, b: EngineShape, home: Group, tokens: float = 4000.0) -> float:
        return disaggregated.transfer_seconds(llama70b(), a, b, tokens, home, home)

    assert seconds(wide, wide, one) < 0.5 * seconds(wide, wide, two)
    assert seconds(wide, wide, two, 8000) == pytest.approx(2 * seconds(wide, wide, two), rel=0.05)
    assert seconds(narrow, wide, two) == pytest.approx(4 * seconds(wide, wide, two), rel=0.05)
    assert seconds(narrow, narrow, two) == pytest.approx(seconds(narrow, wide, two), rel=0.05)
    bytes_ = 4000 * 327_680 / 8
    assert seconds(wide, wide, two) == pytest.approx(bytes_ / 50e9, rel=0.3)  # 400 Gbit/s per GPU


def test_the_slower_end_of_two_groups_counts() -> None:
    fast, slow = group(count=2), groups(
        request(inventory={"nodes": [{"gpu": "l40s", "gpus_per_node": 8, "count": 2}]})
    )[0]  # fmt: skip
    found = disaggregated.link(fast, replace(slow, index=1))
    assert found.bytes_s == min(g.fabric.outer(g.gpu).bytes_s for g in (fast, slow))


def test_what_cannot_hand_over() -> None:
    staged = EngineShape("vllm", "h200_sxm", pp=2)
    vllm, planc = catalogue.engine("vllm"), catalogue.engine("planc")
    assert not handover_refusals(staged, llama70b(), vllm, "prefill")
    assert not handover_refusals(staged, llama70b(), vllm, "aggregated")
    assert [no.field for no in handover_refusals(staged, llama70b(), vllm, "decode")] == ["pp"]
    assert [no.field for no in handover_refusals(staged, llama70b(), planc, "prefill")] == ["serving"]


# -- objectives ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "limits",
    [
        {"ttft_p99_ms": 2000, "tpot_mean_ms": 30},
        {"ttft_mean_ms": 500, "e2e_p95_ms": 9000, "itl_p99_ms": 50},
        {"e2e_mean_ms": 5000},
        {"tpot_p90_ms": 20},
        {},
    ],
    ids=str,
)
def test_halves_that_keep_their_objectives_keep_the_whole(limits: dict[str, float]) -> None:
    slos = objectives(limits)
    found = disaggregated.splits(llama70b(), (group(),), flow(4000, 500), slos)
    assert found
    for split in found:
        for slo in slos:
            own = [s.limit for half in (split.prefill, split.decode) for s in half if s.key == slo.key]
            if slo.metric in ("tpot", "itl"):
                assert own == [slo.limit]
                assert not [s for s in split.prefill if s.key == slo.key]
            else:
                assert all(limit > 0 for limit in own)
                assert sum(own) <= slo.limit * (1 + 1e-9)


def test_nothing_is_split_where_nothing_is_decoded() -> None:
    assert not disaggregated.splits(llama70b(), (group(),), flow(4000, 1), ())


# -- whole plans --------------------------------------------------------------------------

SPLIT = {
    "inventory": {"nodes": [{"gpu": "l40s", "gpus_per_node": 4, "count": 2}]},
    "workload": {"isl": 2000, "osl": 200, "request_rate": 4},
    "constraints": {
        "serving": ["disaggregated"],
        "max_num_seqs": [32, 128],
        "max_num_batched_tokens": [2048, 8192],
    },
}


def test_a_plan_with_two_pools_is_sound() -> None:
    made = planned(**SPLIT)
    assert {pool.role for pool in made.pools} == {"prefill", "decode"}
    assert check(made, table(), request(**SPLIT)) == []


def changed(made: Plan, role: str, **changes: Any) -> Plan:
    """The plan with every replica of one pool changed."""

    def of(pool: Pool) -> Pool:
        if pool.role != role:
            return pool
        replicas: list[Replica] = [replica.model_copy(update=changes) for replica in pool.replicas]
        return pool.model_copy(update={"replicas": replicas})

    return made.model_copy(update={"pools": [of(pool) for pool in made.pools]})


def faster(made: Plan, name: str, factor: float) -> Plan:
    better = made.predicted[name].model_copy(update={"value": made.predicted[name].value * factor})
    return made.model_copy(update={"predicted": {**made.predicted, name: better}})


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda made: changed(made, "decode", kv="fp8"), "unlike engines or formats"),
        (lambda made: changed(made, "decode", pp=2), "pipeline stages in a decode pool"),
        (lambda made: changed(made, "decode", traffic_share=0.5), "prefilled and"),
        (lambda made: made.model_copy(update={"pools": made.pools[:1]}), "without the other half"),
        (lambda made: faster(made, "requests_s", 8), "cannot take"),
        (lambda made: faster(made, "requests_s", 8), "has no room"),
        (lambda made: faster(made, "ttft_ms", 0.3), "TTFT is"),
        (lambda made: faster(made, "tpot_ms", 0.8), "TPOT is"),
    ],
)
def test_the_checker_finds_what_is_wrong(spoil: Any, says: str) -> None:
    from planc.planner.check_disaggregated import check_disaggregated

    found = check_disaggregated(spoil(planned(**SPLIT)), request(**SPLIT), table())
    assert any(says in line for line in found), found
