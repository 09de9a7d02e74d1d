"""Every rule of the verifier catches what it says it does, and names the user's line."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable

import pytest
import torch
from torch.fx import GraphModule, Node

from planc.errors import InvalidGraph
from planc.ir.graph import CacheSpec, Graph
from planc.ir.trace import trace
from planc.ir.verify import RERUN, RULES, verify

aten = torch.ops.aten


@pytest.fixture(scope="module")
def encoder() -> Graph:
    return trace("examples.modules.encoder:tiny")


def broken(graph: Graph, change: Callable[[GraphModule], None]) -> Graph:
    nodes = copy.deepcopy(graph.module.graph)
    module = GraphModule(graph.module, nodes)
    change(module)
    return graph.after("bad", module)


def first(module: GraphModule, target: object) -> Node:
    return next(node for node in module.graph.nodes if node.target == target)


def use_before_definition(module: GraphModule) -> None:
    gelu = first(module, aten.gelu.default)
    gelu.args[0].prepend(gelu)  # type: ignore[union-attr]


def foreign_op(module: GraphModule) -> None:
    first(module, aten.gelu.default).target = torch.ops.prims.cos.default


def python_function(module: GraphModule) -> None:
    first(module, aten.gelu.default).target = torch.relu


def method(module: GraphModule) -> None:
    gelu = first(module, aten.gelu.default)
    gelu.op, gelu.target = "call_method", "relu"


def no_value(module: GraphModule) -> None:
    del first(module, aten.gelu.default).meta["val"]


def dangling_weight(module: GraphModule) -> None:
    first(module, "layers.1.up.weight").target = "layers.1.down.bias"


def in_place(module: GraphModule) -> None:
    gelu = first(module, aten.gelu.default)
    gelu.target = aten.relu_.default


def collective(module: GraphModule) -> None:
    gelu = first(module, aten.gelu.default)
    gelu.target, gelu.args = torch.ops.planc.all_reduce.default, (gelu.args[0], "tp", 2)


def unknown_symbol(module: GraphModule) -> None:
    gelu = first(module, aten.gelu.default)
    value = gelu.meta["val"]
    symbol = value.fake_mode.shape_env.create_unbacked_symint()
    with value.fake_mode:
        gelu.meta["val"] = torch.empty(symbol, 2)


@pytest.mark.parametrize(
    ("rule", "change"),
    [
        ("order", use_before_definition),
        ("known-ops", foreign_op),
        ("known-ops", python_function),
        ("known-ops", method),
        ("values", no_value),
        ("attributes", dangling_weight),
        ("functional", in_place),
        ("collectives", collective),
        ("symbols", unknown_symbol),
    ],
)
def test_a_broken_graph_is_caught_by_its_rule(
    encoder: Graph, rule: str, change: Callable[[GraphModule], None]
) -> None:
    verify(encoder, "trace")
    with pytest.raises(InvalidGraph) as caught:
        verify(broken(encoder, change), "bad")
    assert caught.value.fields["rule"] == rule
    assert caught.value.fields["after"] == "bad"
    assert caught.value.exit_code == 1


def test_a_message_names_the_node_and_the_line_of_the_users_model(encoder: Graph) -> None:
    with pytest.raises(InvalidGraph) as caught:
        verify(broken(encoder, foreign_op), "bad")
    message = str(caught.value)
    assert "%gelu: f32[B, S, 128] = prims.cos(%linear_4)" in message
    assert "encoder.py:" in message
    assert "self.down(F.gelu(self.up(x)))" in message
    assert "module layers.0, EncoderLayer" in message


def test_a_shape_that_its_op_does_not_yield_is_found_on_demand(encoder: Graph) -> None:
    def swap(module: GraphModule) -> None:
        gelu = first(module, aten.gelu.default)
        gelu.meta["val"] = gelu.meta["val"].to(torch.float16)

    bad = broken(encoder, swap)
    verify(bad, "bad")
    with pytest.raises(InvalidGraph, match=r"float16.*float32"):
        verify(bad, "bad", rerun=True)


def test_phase_graphs_must_have_the_phase_inputs_and_their_caches(encoder: Graph) -> None:
    with pytest.raises(InvalidGraph, match="its inputs hold ids where a decode graph has input_ids"):
        verify(encoder.after("phases", encoder.module, stage="decode"), "phases")
    cache = CacheSpec("cache_0_k", 0, "paged", (2, 8), torch.float32)
    with pytest.raises(InvalidGraph, match="a traced graph has no caches"):
        verify(encoder.after("phases", encoder.module, caches=(cache,)), "phases")


def test_a_second_output_is_caught(encoder: Graph) -> None:
    def early(module: GraphModule) -> None:
        output = next(node for node in module.graph.nodes if node.op == "output")
        with module.graph.inserting_after(output):
            module.graph.call_function(operator.add, (1, 2)).meta["val"] = 3

    with pytest.raises(InvalidGraph, match="one-output"):
        verify(broken(encoder, early), "bad")


def test_rules_have_names_of_their_own_and_say_what_they_hold() -> None:
    names = [rule.name for rule in (*RULES, RERUN)]
    assert len(set(names)) == len(names)
    assert all(rule.says for rule in (*RULES, RERUN))
