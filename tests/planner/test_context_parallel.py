"""Caches over ranks and groups of experts as decisions of the search."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from planc.cost_model import exchanges, lower
from planc.cost_model.catalogue import engine
from planc.cost_model.kernels import GroupedGemm
from planc.cost_model.shape import EngineShape
from planc.planner.candidates import LONG_CONTEXT, candidates
from planc.planner.estimate import estimate
from planc.planner.inventory import groups
from planc.planner.plan import Plan
from planc.planner.request import Request
from planc.planner.traffic import traffic
from tests.planner.cases import planned, request, table

ONE_NODE = {"nodes": [{"gpu": "h200_sxm", "gpus_per_node": 8, "usd_per_gpu_hour": 3.8}]}
LIMITS: dict[str, Any] = {
    "weights": "fp8",
    "tp": 8,
    "pp": 1,
    "serving": "aggregated",
    "max_num_seqs": [8, 16, 32, 64],
    "max_num_batched_tokens": 8192,
}


def long(**constraints: Any) -> dict[str, Any]:
    """Agents that come back with 64,000 tokens, most of them known, and get 4,000 more."""
    return {
        "model": "deepseek-r1.json",
        "inventory": ONE_NODE,
        "workload": {"isl": 64_000, "osl": 4000, "rate": "max", "prefix_hit_rate": 0.9},
        "slo": {"ttft_p99_ms": 30_000, "tpot_mean_ms": 40},
        "objective": "max_goodput",
        "constraints": LIMITS | constraints,
    }


def offered(asked: Request, name: str) -> Counter[tuple[int, int, int]]:
    """(tp * dp, ep, cp) of all candidates."""
    load = traffic(asked, "causal_lm")
    found, _ = candidates(table(name), groups(asked), asked.constraints, (), load)
    return Counter((c.shape.tp * c.shape.dp, c.shape.ep, c.shape.cp) for c in found)


def test_long_contexts_are_spread_where_that_carries_more() -> None:
    """More sequences fit, and each step reads less of the cache: the plan says so and passes its check."""
    spread = planned("deepseek_v3", **long())
    alone = planned("deepseek_v3", **long(cp=1))

    def rate(plan: Plan) -> float:
        return plan.predicted["requests_s"].value

    (one,), (other,) = spread.replicas(), alone.replicas()
    assert one.cp > 1
    assert one.cp * one.kv_blocks > 1.5 * other.kv_blocks
    assert len(one.gpus) == one.tp
    assert rate(spread) > 1.2 * rate(alone)


def test_short_contexts_are_offered_no_such_engine() -> None:
    asked = request(**long() | {"workload": {"isl": 4000, "osl": 1000, "rate": "max"}})
    assert {cp for _, _, cp in offered(asked, "deepseek_v3")} == {1}
    assert 5000 < LONG_CONTEXT <= 66_000
    assert {cp for _, _, cp in offered(request(**long()), "deepseek_v3")} == {1, 2, 4, 8}
    listed = asked.changed(constraints=asked.constraints.model_copy(update={"cp": [4]}))
    assert {cp for _, _, cp in offered(listed, "deepseek_v3")} == {4}


def test_an_estimate_takes_a_degree_at_any_length() -> None:
    asked = request(
        **long() | {"workload": {"isl": 4000, "osl": 1000, "request_rate": 0.2}, "objective": "min_cost"}
    )
    fixed: dict[str, Any] = {"tp": 8, "ep": 8, "weights": "fp8", "max_num_seqs": 32}
    one, many = (estimate(asked, table("deepseek_v3"), **fixed, cp=cp) for cp in (1, 8))
    tpot = [found.predicted["tpot_ms"].value for found in (one, many)]
    assert tpot[0] < tpot[1] < 1.5 * tpot[0]


@pytest.mark.parametrize(("name", "degrees"), [("vllm", {1, 8}), ("trtllm", {1, 2, 4, 8})])
def test_experts_are_grouped_as_engines_can(name: str, degrees: set[int]) -> None:
    asked = request(**long(engines=name, tp=[2, 4], dp=[2, 4], cp=1))
    found = offered(asked, "deepseek_v3")
    assert {ep for ranks, ep, _ in found if ranks == 8} == degrees


def test_groups_of_experts_divide_width_and_whole_experts() -> None:
    """Four groups of two ranks: 64 of 256 experts, half as wide. Over nodes such ranks gather tokens, since
    all of a group need them."""
    found = {}
    for ep in (1, 4, 8):
        shape = EngineShape("trtllm", "h200_sxm", tp=1, dp=8, ep=ep)
        kernels = lower.kernels(table("deepseek_v3"), shape, engine("trtllm"), None)
        spec = next(k.spec for k in kernels if isinstance(k.spec, GroupedGemm))
        kinds = {
            c.kind for c in exchanges.collectives(table("deepseek_v3"), shape, spread=True) if c.ranks == 8
        }
        found[ep] = spec.experts, spec.inner, spec.elements, kinds
    whole, width = 256 * 3 * 7168 * 2048, found[8][1]
    assert found[1] == (256, width / 8, whole / 8, {"all_gather", "reduce_scatter"})
    assert found[4] == (64, width / 2, whole / 8, {"all_gather", "reduce_scatter"})
    assert found[8] == (32, width, whole / 8, {"dispatch", "combine"})
