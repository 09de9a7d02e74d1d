"""Canonicalise drops what does nothing, and nothing else: results are equal bit by bit."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor, nn

from planc.ir.graph import Graph
from planc.ir.trace import trace
from planc.ir.trace.module import trace_module
from planc.ir.verify import verify
from planc.passes.canonicalise import Canonicalise
from planc.passes.pipeline import FRONT, Step, run


def ops(graph: Graph) -> Counter[str]:
    nodes = graph.module.graph.nodes
    return Counter(str(n.target).removeprefix("aten.") for n in nodes if n.op == "call_function")


class Idle(nn.Module):
    """Full of calls that do nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.dropout(x).contiguous().detach().clone()
        y = y.to(torch.float32) + 0
        y = (y * 1.0).expand(-1, 6, 4)[:, :, :]
        y = y.transpose(1, 2).transpose(2, 1).permute(0, 2, 1).permute(0, 2, 1)
        return y.reshape(y.shape[0], 6, 4).relu()


class Busy(nn.Module):
    """The same calls where each of them does something."""

    def forward(self, x: Tensor) -> Tensor:
        y = x.transpose(1, 2).contiguous().view(-1, 24)
        y = y.to(torch.float64) + 0
        y = (y + 1)[:, 1:].expand(2, -1, -1)
        return y.permute(1, 2, 0).permute(1, 2, 0)


def test_what_does_nothing_is_dropped() -> None:
    graph = trace_module(Idle(), torch.randn(2, 6, 4))
    after = run(graph, [Canonicalise()])
    assert ops(after) == {"relu.default": 1}
    given = torch.randn(3, 6, 4)
    assert torch.equal(after.module(given), graph.module(given))


def test_what_does_something_is_kept() -> None:
    graph = trace_module(Busy(), torch.randn(2, 6, 4))
    after = run(graph, [Canonicalise()], check_shapes=True)
    before, left = ops(graph), ops(after)
    for op in ("contiguous.default", "to.dtype", "expand.default", "permute.default"):
        assert left[op] == before[op] > 0, op
    assert (before["slice.Tensor"], left["slice.Tensor"]) == (2, 1), "of [:, 1:] only the first is idle"
    given = torch.randn(3, 6, 4)
    assert torch.equal(after.module(given), graph.module(given))


def test_the_given_graph_is_left_as_it_is() -> None:
    graph = trace_module(Idle(), torch.randn(2, 6, 4))
    names = [node.name for node in graph.module.graph.nodes]
    Canonicalise().apply(graph)
    assert [node.name for node in graph.module.graph.nodes] == names
    verify(graph, "trace")


def test_canonicalising_twice_changes_nothing_more() -> None:
    once = run(trace("examples.modules.encoder:tiny"), [Canonicalise()])
    twice = run(once, [Canonicalise()])
    assert ops(once) == ops(twice)


def test_the_pipeline_shows_each_pass_and_times_it() -> None:
    steps: list[Step] = []
    graph = trace("examples.modules.encoder:tiny")
    after = run(graph, FRONT, observe=steps.append)
    assert [step.pass_.name for step in steps] == ["canonicalise", "recognise"] == list(after.history)
    assert steps[0].before is graph
    assert steps[0].after is steps[1].before
    assert steps[1].after is after
    assert all(step.seconds > 0 for step in steps)


def test_a_pass_that_breaks_a_rule_is_named() -> None:
    class Careless:
        name = "careless"

        def apply(self, graph: Graph) -> Graph:
            after = Canonicalise().apply(graph)
            next(n for n in after.module.graph.nodes if n.op == "call_function").meta.pop("val")
            return after

    from planc.errors import InvalidGraph

    with pytest.raises(InvalidGraph, match="after pass 'careless'"):
        run(trace("examples.modules.encoder:tiny"), [Careless()])
