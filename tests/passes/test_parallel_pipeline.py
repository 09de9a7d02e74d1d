"""Pipeline cuts: stages run one after the other give the whole model, and compose with other passes."""

from __future__ import annotations

import pytest
import torch

from planc.errors import InvalidField
from planc.ir.graph import Graph
from planc.ir.layers import layer_of
from planc.ir.verify import verify
from planc.passes.parallel import PipelineCut, TensorParallel
from planc.passes.phases import Phases
from tests.families import FAMILIES, tiny_graph
from tests.passes.running import family_weights, run, tokens


def layers_of(graph: Graph) -> set[int]:
    found = {layer_of(node) for node in graph.module.graph.nodes if node.op == "call_function"}
    return {layer for layer in found if layer is not None}


@pytest.mark.parametrize("family", FAMILIES)
def test_stages_in_turn_are_the_model(family: str) -> None:
    graph, weights, inputs = tiny_graph(family), family_weights(family), tokens()
    first, second = (PipelineCut(2, stage).apply(graph) for stage in range(2))
    for stage in (first, second):
        verify(stage, "pipeline_cut", rerun=True)
    hidden = run(first, weights, *inputs)
    assert isinstance(hidden, torch.Tensor), "one tensor crosses the cut"
    assert hidden.shape == (2, 13, 64)
    torch.testing.assert_close(
        run(second, weights, *inputs, hidden), run(graph, weights, *inputs), rtol=0, atol=0
    )


def test_stages_share_out_layers_caches_and_weights() -> None:
    decode = Phases("decode").apply(tiny_graph("llama4"))
    stages = [PipelineCut(3, stage, (1, 2, 1)).apply(decode) for stage in range(3)]
    assert [layers_of(stage) for stage in stages] == [{0}, {1, 2}, {3}]
    assert sum((stage.caches for stage in stages), ()) == decode.caches
    read = [{str(n.target) for n in s.module.graph.nodes if n.op == "get_attr"} for s in stages]
    assert "model.embed_tokens.weight" in read[0] - read[1] - read[2]
    assert "lm_head.weight" in read[2] - read[0] - read[1]
    for stage in stages:
        verify(stage, "pipeline_cut")


def test_the_even_split_is_the_cost_models() -> None:
    decode = Phases("decode").apply(tiny_graph("deepseek_v3"))  # three layers
    assert [len(layers_of(PipelineCut(2, stage).apply(decode))) for stage in range(2)] == [2, 1]


def test_cut_and_divide_commute() -> None:
    decode = Phases("decode").apply(tiny_graph("qwen3_moe"))
    one = PipelineCut(2, 1).apply(TensorParallel(2, 1).apply(decode))
    other = TensorParallel(2, 1).apply(PipelineCut(2, 1).apply(decode))
    assert one.caches == other.caches
    assert set(one.weight_steps) == set(other.weight_steps)
    calls = [[str(n.target) for n in g.module.graph.nodes if n.op == "call_function"] for g in (one, other)]
    assert calls[0] == calls[1]


@pytest.mark.parametrize(
    ("cut", "reason"),
    [
        (PipelineCut(3, 0), r"stages = 3.*the model has 2 layers"),
        (PipelineCut(2, 2), r"stage = 2.*there are 2 stages"),
        (PipelineCut(2, 0, (1, 2)), r"layers = \(1, 2\).*2 layers between them"),
        (PipelineCut(2, 0, (0, 2)), r"none empty"),
    ],
)
def test_cuts_that_do_not_fit_are_refused(cut: PipelineCut, reason: str) -> None:
    with pytest.raises(InvalidField, match=reason):
        cut.apply(tiny_graph("llama"))


def test_one_stage_is_the_graph() -> None:
    graph = tiny_graph("llama")
    assert PipelineCut(1, 0).apply(graph).module is graph.module
