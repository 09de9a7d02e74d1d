"""Search and code agree: what the cost table predicts of a rank is what the rank's graph holds."""

from __future__ import annotations

import pytest
import torch
from torch.fx import Node

from planc.cost_model.local import factors
from planc.cost_model.shape import EngineShape
from planc.cost_model.table import Row
from planc.ir.graph import Graph
from planc.ir.opdef import Call, declaration
from planc.ir.work import NONE, Amount, Work, total
from planc.passes.parallel import TensorParallel, shard_rows
from planc.passes.phases import Phases
from tests.families import FAMILIES, tiny_graph

TP = 2
WEIGHTED = ("gemm", "grouped_gemm", "attention", "recurrence")


def work_of(graph: Graph) -> dict[str, tuple[Node, Work]]:
    found = {}
    for node in graph.module.graph.nodes:
        declared = declaration(node)
        if declared is not None and isinstance(node.meta["val"], torch.Tensor | tuple | list):
            found[node.name] = (node, declared.work(Call(node, graph.symbols)))
    return found


def assert_amount(found: Amount, predicted: Amount, what: str) -> None:
    assert found.terms.keys() == predicted.terms.keys(), what
    for feature, value in predicted.terms.items():
        assert found.terms[feature] == pytest.approx(value, rel=1e-9), f"{what}: {feature}"


def assert_between(found: Amount, low: Amount, high: Amount, what: str) -> None:
    for feature, value in found.terms.items():
        assert 0.999 * low.terms[feature] <= value <= 1.001 * high.terms[feature], f"{what}: {feature}"


DENSE = ("llama", "qwen3")
CASES = [(family, ep) for family in FAMILIES for ep in (False, True) if not (ep and family in DENSE)]


@pytest.mark.parametrize(("family", "ep"), CASES)
def test_rank_rows_are_what_the_table_predicts(family: str, ep: bool) -> None:
    whole = Phases("decode").apply(tiny_graph(family))
    shards = shard_rows(whole, ep=ep)
    part = TensorParallel(TP, 0, ep).apply(whole)
    local = work_of(part)
    shape = EngineShape(engine="vllm", gpu="h100_sxm", tp=TP, ep=TP if ep else 1)

    divided = 0
    for name, (node, work) in work_of(whole).items():
        shard = shards[node]
        row = Row("layer", name, str(node.target), 1, work, shard)
        share, mine = factors(row, shape), local[name][1]
        label = f"{family} {name} {node.target} {shard.kind}"
        if work.family == "elementwise":  # a key that all heads share is rotated whole on every rank
            assert_between(mine.flops, work.flops * share.flops, work.flops, label)
        elif not (ep and shard.kind == "experts"):  # a rank cannot know how many tokens choose its experts
            assert_amount(mine.flops, work.flops * share.flops, label)
        assert_amount(mine.kv_writes, work.kv_writes * share.kv, label)
        if work.family in WEIGHTED and not _has_bias(node):
            assert mine.weights == pytest.approx(work.weights * share.weights), label
            divided += shard.kind != "replicated"
    assert divided

    for kind, held in (("all_reduce", "reads"), ("all_gather", "writes")):
        predicted = total(shard.moved for shard in shards.values() if shard.collective == kind)
        moved = [
            getattr(work, held)
            for node, work in local.values()
            if node.target == getattr(torch.ops.planc, kind).default
        ]
        assert_amount(total(moved), predicted, f"{family} {kind}")


def _has_bias(node: Node) -> bool:
    """The bias of a row-divided product lies whole on every rank; the table divides it with the rest."""
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    return any("bias" in name and Call(node, {}).arg(name) is not None for name in names)


def test_the_collectives_are_two_per_layer_the_embedding_and_the_logits() -> None:
    shards = shard_rows(Phases("decode").apply(tiny_graph("llama")))
    moved = [(s.collective, s.moved) for s in shards.values() if s.collective]
    assert [kind for kind, _ in moved] == ["all_reduce"] * 5 + ["all_gather"]
    assert moved[0][1] == Amount({"T": 64.0})
    assert moved[-1][1] == Amount({"T": 192.0})  # one per sequence: in decode those are the tokens
    assert NONE not in [amount for _, amount in moved]
