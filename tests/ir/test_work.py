"""What ops say of their work, summed over published models and compared with what is known of them."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from planc.ir.graph import Graph
from planc.ir.opdef import Call, OpDef, declaration
from planc.ir.trace.hf import build, trace_config
from planc.ir.trace.hf_config import read_config
from planc.ir.work import Amount, Work, total
from tests.families import FAMILIES, tiny_graph

MODELS = Path("examples/models")

#: Billions of parameters of the language model alone, from the model cards and reports (the towers of
#: Gemma 4, Llama 4, Qwen3.5 and Kimi-K2.5 and the multi-token-prediction layers are not part of it).
PARAMETERS = {
    "deepseek-r1": 671.03,
    "gemma-4-26b-a4b": 25.23,
    "glm-5": 743.9,
    "gpt-oss-120b": 116.83,
    "gpt-oss-20b": 20.91,
    "kimi-k2.5": 1026.4,
    "llama-3.1-405b": 405.85,
    "llama-3.1-70b": 70.55,
    "llama-3.1-8b": 8.03,
    "llama-4-maverick": 400.7,
    "llama-4-scout": 107.8,
    "minimax-m2.5": 228.7,
    "mixtral-8x7b": 46.70,
    "qwen3-0.6b": 0.596,
    "qwen3-235b-a22b": 235.09,
    "qwen3-30b-a3b": 30.53,
    "qwen3-32b": 32.76,
    "qwen3-8b": 8.19,
    "qwen3.5-397b-a17b": 396.3,
}


@cache
def works(name: str, layers: int = 0) -> tuple[tuple[OpDef, Work], ...]:
    config = read_config(MODELS / f"{name}.json")
    if layers:
        config["num_hidden_layers"] = layers
    return tuple(of(trace_config(config, name)))


def of(graph: Graph) -> Any:
    for node in graph.module.graph.nodes:
        found = declaration(node)
        if found is not None:
            yield found, found.work(Call(node, graph.symbols))


@pytest.mark.parametrize("name", sorted(PARAMETERS))
def test_published_models_are_built_with_their_number_of_parameters(name: str) -> None:
    model = build(read_config(MODELS / f"{name}.json"), dtype=torch.bfloat16, name=name)
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(PARAMETERS[name], rel=0.005)


@pytest.mark.parametrize(
    ("name", "active", "pairs"),
    [
        # 2 FLOPs per parameter but the input embedding's; 4 per pair, query head and head dimension
        ("llama-3.1-8b", 8.03e9 - 128256 * 4096, 32 * 4 * 32 * 128),
        ("qwen3-30b-a3b", 3.35e9 - 151936 * 2048, 48 * 4 * 32 * 128),
    ],
)
def test_flops_per_token(name: str, active: float, pairs: float) -> None:
    flops = total(work.flops for _, work in works(name))
    assert flops.terms["T"] == pytest.approx(2 * active, rel=0.03)
    assert flops.terms["P:full"] == pairs
    assert set(flops.terms) <= {"1", "T", "P:full"}


def test_flops_of_deepseek_r1() -> None:
    """Four layers: three dense and one of 256 experts, 8 of them active, and one shared expert."""
    hidden, heads, rank = 7168, 128, 512
    attention = hidden * 1536 + 1536 * heads * 192 + hidden * (rank + 64) + rank * heads * 256
    attention += heads * 128 * hidden
    dense, expert = 3 * hidden * 18432, 3 * hidden * 2048
    active = 4 * attention + 3 * dense + 9 * expert + hidden * 256 + hidden * 129280
    flops = total(work.flops for _, work in works("deepseek-r1", 4))
    assert flops.terms["T"] == pytest.approx(2 * active, rel=0.01)
    assert flops.terms["P:full"] == 4 * 2 * heads * (192 + 128)


def test_weights_are_read_once() -> None:
    read = sum(work.weights for _, work in works("llama-3.1-8b"))
    rotary = 64  # frequencies
    assert read == 8030261248 - 128256 * 4096 + rotary  # a token reads one row of the embedding only


def test_experts_say_how_many_they_are() -> None:
    found = [work for op, work in works("qwen3-30b-a3b") if op.name == "planc::experts"]
    assert len(found) == 48
    assert found[0].weights == 128 * 3 * 2048 * 768
    assert found[0].dims == {"experts": 128, "top_k": 8, "k": 2048, "n": 1536, "matrices": 2}


def test_spans_of_alternating_attention() -> None:
    flops = total(work.flops for _, work in of(tiny_graph("gpt_oss")))
    assert flops.terms["P:w5"] == flops.terms["P:full"] == 2 * 4 * (16 + 16)
    assert "P:c8" in total(work.flops for _, work in of(tiny_graph("llama4"))).terms
    assert "P:k6" in total(work.flops for _, work in of(tiny_graph("glm5"))).terms


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_op_is_declared(family: str) -> None:
    graph = tiny_graph(family)
    unknown = {
        str(node.target)
        for node in graph.module.graph.nodes
        if node.op == "call_function" and declaration(node) is None
    }
    assert unknown <= {"<built-in function getitem>", "<built-in function mul>"}, unknown
    for op, work in of(graph):
        amounts = (work.flops, work.reads, work.writes)
        assert all(isinstance(a, Amount) for a in amounts), op.name
        assert min([0.0, *(v for a in amounts for v in a.terms.values())]) >= 0.0, op.name


def test_no_operand_that_a_rule_names_is_missing() -> None:
    """Shard rules and quantizable operands name arguments of the op, and one result each."""
    from planc.ir import opdef

    for op in opdef._DECLARED.values():
        arguments = {argument.name for argument in op.target._schema.arguments}
        assert set(op.quantizable) <= arguments, op.name
        for rule in op.shards:
            assert set(rule.operands) <= arguments, (op.name, rule.name)
            assert len(rule.results) == len(op.target._schema.returns), (op.name, rule.name)
