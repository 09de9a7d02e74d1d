"""What a rank runs of a layer: kernels that ride in others, collectives that engines join."""

from __future__ import annotations

from dataclasses import replace

import pytest

from planc.cost_model import catalogue, lower
from planc.cost_model.exchanges import collectives
from planc.cost_model.kernels import GroupedGemm
from planc.cost_model.routing import ExpertLoad, usual
from planc.cost_model.shape import EngineShape
from planc.cost_model.table import CostTable
from tests.sample_tables import linear, llama8b, pointwise, qwen235b


def with_routers(table: CostTable, op: str = "planc::route_softmax") -> CostTable:
    """With an operator that chooses the experts after each gate."""
    rows = {
        phase: tuple(
            made
            for row in found
            for made in (
                (row, pointwise(row.site, row.layer_class, 128, 16, op))
                if row.site.endswith("mlp.gate")
                else (row,)
            )
        )
        for phase, found in table.rows.items()
    }
    return replace(table, rows=rows)


@pytest.mark.parametrize(
    ("engine", "gpu", "apart"), [("trtllm", "h200_sxm", 0), ("vllm", "b200_sxm", 0), ("vllm", "h200_sxm", 1)]
)
def test_experts_that_were_timed_from_logits_on_choose_experts_themselves(
    engine: str, gpu: str, apart: int
) -> None:
    table, shape = with_routers(qwen235b()), EngineShape(engine, gpu, tp=8)
    found = lower.kernels(table, shape, catalogue.engine(engine), None)
    assert sum(kernel.op == "planc::route_softmax" for kernel in found) == apart
    single = lower.kernels(table, shape, catalogue.engine(engine), frozenset())
    assert any(kernel.op == "planc::route_softmax" for kernel in single), "stated fusions: all else is apart"


@pytest.mark.parametrize(
    ("op", "load"),
    [("planc::route_softmax", usual(128)), ("planc::route_grouped", usual(128, balanced=True))],
)
def test_routers_with_a_bias_balance_experts(op: str, load: ExpertLoad) -> None:
    table = with_routers(qwen235b(), op)
    found = lower.kernels(table, EngineShape("vllm", "h200_sxm", tp=8), catalogue.engine("vllm"), None)
    specs = [kernel.spec for kernel in found if isinstance(kernel.spec, GroupedGemm)]
    assert specs
    assert all(spec.load is load for spec in specs)


def test_squares_of_queries_and_keys_are_summed_at_once() -> None:
    table = llama8b()
    layer = next(row.layer_class for row in table.rows["decode"] if row.site.endswith("q_proj"))
    normed = [
        made
        for part in ("q", "k")
        for made in (
            linear(f"self_attn.{part}_proj", layer, 4096, 1024, kind="column", units=8, after="all_gather"),
            pointwise(f"self_attn.{part}_norm", layer, 1024, 1024, "planc::rms_norm"),
        )
    ]
    rows = {phase: tuple(normed) for phase in ("prefill", "decode")}
    found = collectives(replace(table, rows=rows), EngineShape("vllm", "h200_sxm", tp=4))
    (one,) = [item for item in found if item.kind == "all_reduce"]
    assert one.size.terms == {"T": 8.0}
    assert not [item for item in found if item.kind == "all_gather"]
