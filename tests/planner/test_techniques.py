"""Speculative decoding and caches beyond the GPU as decisions: offered, priced, chosen, stated, simulated."""

from __future__ import annotations

from typing import Any

import pytest

from planc.errors import InvalidField
from planc.planner.check import check
from planc.planner.plan import Plan
from planc.planner.request import make_request
from planc.planner.search import Search
from planc.planner.techniques import read, speculations, stated
from planc.runtime.referee import Simulation
from tests.planner.cases import planned, raw, request, table

EAGLE = {"method": "eagle3", "num_speculative_tokens": [2, 4], "acceptance_rate": 0.75, "draft_model": "a/b"}
NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "acceptance_rate": 0.2}
LIMITS = {"weights": ["bf16"], "max_num_seqs": [128], "max_num_batched_tokens": [8192], "tp": [1, 2, 4]}


def constrained(*ways: dict[str, Any]) -> dict[str, Any]:
    return {**LIMITS, "speculative": list(ways)} if ways else LIMITS


def ways(plan: Plan) -> set[tuple[str, int] | None]:
    found = [read(replica.speculative) for replica in plan.replicas()]
    return {(way.method, way.draft) if way else None for way in found}


def test_a_request_offers_one_way_per_number_of_tokens() -> None:
    found = speculations(request(constraints=constrained(EAGLE, NGRAM)).constraints)
    assert [(way.method, way.draft, way.model) for way in found] == [
        ("eagle3", 2, "a/b"),
        ("eagle3", 4, "a/b"),
        ("ngram", 3, ""),
    ]
    assert [read(stated(way)) for way in found] == found
    assert read(stated(None)) is None


@pytest.mark.parametrize(
    ("way", "field"),
    [
        ({"method": "eagle", "num_speculative_tokens": 2, "acceptance_rate": 0.7}, "draft"),
        (
            {
                "method": "draft_model",
                "num_speculative_tokens": 2,
                "acceptance_rate": 0.7,
                "draft_model": "a",
            },
            "draft_parameters",
        ),
        ({"method": "ngram", "num_speculative_tokens": 0, "acceptance_rate": 0.7}, "at least 1"),
        ({"method": "ngram", "num_speculative_tokens": 2, "acceptance_rate": 1.2}, "at most 1"),
        ({"method": "magic", "num_speculative_tokens": 2, "acceptance_rate": 0.2}, "method"),
    ],
)
def test_what_is_missing_or_impossible_is_said(way: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidField, match=field):
        make_request(raw(constraints=constrained(way)))


def test_it_meets_an_objective_that_nothing_else_meets_as_cheaply() -> None:
    """At 16 ms per token the plain engine needs several GPUs to read its weights in time."""
    slo = {"ttft_p99_ms": 3000, "tpot_mean_ms": 16}
    plain = planned(slo=slo, constraints=constrained())
    drafted = planned(slo=slo, constraints=constrained(EAGLE, NGRAM))
    assert ways(plain) == {None}
    assert ways(drafted) <= {("eagle3", 2), ("eagle3", 4)}
    assert drafted.solver.value < plain.solver.value
    assert check(drafted, table(), request(slo=slo, constraints=constrained(EAGLE, NGRAM))) == []


def test_drafts_that_are_seldom_accepted_lose_where_batches_are_large() -> None:
    """Verified rows compete with other sequences for arithmetic, and most of them are thrown away."""
    search = Search(
        request(slo={"ttft_p99_ms": 30000, "tpot_mean_ms": 500}, constraints=constrained(NGRAM)), table()
    )
    best: dict[tuple[int, bool], float] = {}
    for offer in search.offers:
        candidate = offer.engine.candidate
        key = candidate.shape.tp, candidate.speculation is not None
        best[key] = max(best.get(key, 0.0), offer.precise().capacity)
    for tp in (1, 2, 4):
        assert best[tp, True] < best[tp, False]


def test_the_simulator_finds_the_same_time_per_token() -> None:
    slo = {"ttft_p99_ms": 3000, "tpot_mean_ms": 16}
    search = Search(request(slo=slo, constraints=constrained(EAGLE)), table())
    fleet = search.fleet()
    assert fleet is not None
    assert all(item.candidate.speculation for item in fleet.items)
    for verdict in Simulation().judge(search, fleet).verdicts:
        expected = 1e3 * float(verdict.items[0].state(search.traffic).tpot[0, 0])
        assert 1e3 * verdict.values["tpot_mean_ms"] == pytest.approx(expected, rel=0.1)


def test_tokens_of_one_step_come_together() -> None:
    """Half of the gaps and more are none; those between steps are longer than the mean."""
    slo = {"ttft_p99_ms": 3000, "tpot_mean_ms": 16}
    found = planned(slo=slo, constraints=constrained(EAGLE)).predicted["itl_ms"]
    assert found.percentiles["p50"] == 0.0
    assert found.percentiles["p99"] > found.value


# -- caches beyond the GPU -----------------------------------------------------------------

REUSED = {"isl": 6000, "osl": 100, "request_rate": 1.5, "prefix_hit_rate": 0.8, "prefix_tokens": 2e6}


def inventory(**stores: float) -> dict[str, Any]:
    return {"nodes": [{"gpu": "l40s", "gpus_per_node": 4, "usd_per_gpu_hour": 1.0, **stores}]}


def loaded(plan: Plan) -> dict[str, bool]:
    return {
        tier["tier"]: tier["loaded"]
        for replica in plan.replicas()
        for tier in (replica.kv_offload or {}).get("tiers", ())
    }


def test_without_a_stated_working_set_all_is_found() -> None:
    workload = {k: v for k, v in REUSED.items() if k != "prefix_tokens"}
    plan = planned(workload=workload, constraints=LIMITS, inventory=inventory(host_memory_gib=512))
    assert all(replica.kv_offload is None for replica in plan.replicas())
    assert "kv_offload" not in plan.replicas()[0].model_dump()


def test_host_memory_makes_prompts_shorter() -> None:
    bare = planned(workload=REUSED, constraints=LIMITS, inventory=inventory())
    roomy = planned(workload=REUSED, constraints=LIMITS, inventory=inventory(host_memory_gib=1024))
    (one, *_), (other, *_) = bare.replicas(), roomy.replicas()
    assert one.kv_offload is not None
    assert other.kv_offload is not None
    assert one.kv_offload["hit_rate"] < 0.2 < 0.7 < other.kv_offload["hit_rate"]
    assert other.kv_offload["load_ms"] > 0
    assert loaded(roomy) == {"gpu": True, "host": True}
    assert roomy.solver.value < bare.solver.value
    both = request(workload=REUSED, constraints=LIMITS, inventory=inventory(host_memory_gib=1024))
    assert check(roomy, table(), both) == []


def test_slow_drives_are_left_alone() -> None:
    """Below the break-even bandwidth a token is sooner computed than read."""
    stores = {"nvme_gib": 4000.0, "nvme_gbytes_s": 0.5}
    slow = planned(workload=REUSED, constraints=LIMITS, inventory=inventory(**stores))
    fast = planned(
        workload=REUSED, constraints=LIMITS, inventory=inventory(**{**stores, "nvme_gbytes_s": 50.0})
    )
    assert loaded(slow)["nvme"] is False
    assert loaded(fast)["nvme"] is True


def test_the_simulator_finds_the_same_time_to_first_token_with_loads() -> None:
    slo = {"ttft_mean_ms": 3000}
    search = Search(
        request(workload=REUSED, slo=slo, constraints=LIMITS, inventory=inventory(host_memory_gib=1024)),
        table(),
    )
    fleet = search.fleet()
    assert fleet is not None
    for verdict in Simulation().judge(search, fleet).verdicts:
        expected = 1e3 * float(verdict.items[0].state(search.traffic).ttft[0, 0])
        assert 1e3 * verdict.values["ttft_mean_ms"] == pytest.approx(expected, rel=0.3)
