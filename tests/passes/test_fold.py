"""Repeated layers become classes with counts, named by what sets them apart; thin graphs keep them all."""

from __future__ import annotations

import time

import pytest
import torch
from torch import nn

from planc.ir.graph import Graph
from planc.ir.trace import trace
from planc.ir.trace.module import trace_module
from planc.ir.verify import verify
from planc.passes.fold import fold
from planc.passes.phases import Phases
from planc.passes.pipeline import FRONT, run
from planc.passes.thin import thin
from tests.families import tiny_graph
from tests.ir.blocks import Block


def classes(graph: Graph) -> dict[str, tuple[int, ...]]:
    return {group.name: group.layers for group in fold(graph)}


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("llama", {"embedding": (), "decoder": (0, 1), "head": ()}),
        ("deepseek_v3", {"embedding": (), "dense": (0,), "moe": (1, 2), "head": ()}),
        ("gpt_oss", {"embedding": (), "sliding": (0,), "full": (1,), "head": ()}),
    ],
)
def test_families_fold_to_the_classes_they_are_built_of(
    family: str, expected: dict[str, tuple[int, ...]]
) -> None:
    front = run(tiny_graph(family), FRONT)
    assert classes(front) == expected
    for phase in ("prefill", "decode"):
        assert classes(run(front, [Phases(phase)])) == expected  # type: ignore[arg-type]


def test_every_call_is_in_exactly_one_layer() -> None:
    graph = run(tiny_graph("deepseek_v3"), FRONT)
    members = [node for group in fold(graph) for member in group.members for node in member]
    calls = [
        node
        for node in graph.module.graph.nodes
        if node.op == "call_function" and not isinstance(node.meta["val"], int | torch.SymInt)
    ]
    assert len(members) == len(set(members)) == len(calls)


def test_encoders_and_networks_of_stages_fold_by_structure() -> None:
    assert classes(run(trace("examples.modules.encoder:tiny"), FRONT)) == {
        "embedding": (),
        "encoder": (0, 1, 2),
        "head": (),
    }
    found = fold(run(trace("examples.modules.convnet:tiny"), FRONT))
    blocks = [group for group in found if group.name.startswith("blocks")]
    assert [group.layers for group in blocks] == [(0,), (1,), (2,)], "no two of its blocks are equal"


def test_a_model_without_layers_is_one_class() -> None:
    (group,) = fold(trace_module(nn.Linear(4, 4), torch.randn(2, 4)))
    assert (group.name, group.count, group.layers) == ("model", 1, ())


def test_one_number_that_differs_makes_another_class() -> None:
    blocks = [Block(16) for _ in range(4)]
    blocks[2].second.eps = 1e-3
    graph = trace_module(nn.Sequential(*blocks), torch.randn(2, 6, 16))
    assert classes(graph) == {"layer": (0, 1, 3), "layer.1": (2,)}


def test_a_thin_graph_keeps_two_layers_of_each_class_and_their_order() -> None:
    blocks = [Block(16) for _ in range(7)]
    for place in (2, 4, 6):
        blocks[place].second.eps = 1e-3
    graph = trace_module(nn.Sequential(*blocks), torch.randn(2, 6, 16))
    shallow = thin(graph, fold(graph))
    verify(shallow, "thin", rerun=True)
    assert classes(shallow) == {"layer": (0, 1), "layer.1": (2, 4)}
    assert classes(graph) == {"layer": (0, 1, 3, 5), "layer.1": (2, 4, 6)}


def test_layers_that_are_no_chain_are_left_as_they_are() -> None:
    class Dense(nn.Module):
        """Every layer sees the results of all before it."""

        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(5))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen = [x]
            for layer in self.layers:
                seen.append(layer(torch.stack(seen).sum(0)))
            return seen[-1]

    graph = trace_module(Dense(), torch.randn(2, 4))
    verify(thin(graph, fold(graph)), "thin", rerun=True)


def test_forty_layers_fold_in_a_moment() -> None:
    blocks = [nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.SiLU()) for _ in range(40)]
    graph = trace_module(nn.Sequential(*blocks), torch.randn(2, 8))
    start = time.process_time()
    (group,) = fold(graph)
    assert time.process_time() - start < 1.0
    assert group.count == 40
