"""Filling in `meta["val"]`: what a node yields, computed on fake tensors with symbolic sizes.

Passes insert nodes without values and call `refill`, which computes the missing ones only, in the
fake mode (and so with the size symbols) that the trace was made in.
"""

from __future__ import annotations

from collections.abc import Iterator
from operator import attrgetter
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree


def refill(module: GraphModule) -> None:
    """Computes `meta["val"]` of every node that lacks it, in place, in the order of the graph."""
    mode = fake_mode(module)
    for node in module.graph.nodes:
        if node.op == "output" or "val" in node.meta:
            continue
        if node.op == "get_attr":
            held = attrgetter(str(node.target))(module)
            node.meta["val"] = mode.from_tensor(held, static_shapes=True)
        elif node.op == "call_function":
            node.meta["val"] = compute(node, mode)


def recompute(module: GraphModule) -> Iterator[tuple[Node, Any]]:
    """Each call with the value its op computes from the values its operands state."""
    mode = fake_mode(module)
    for node in module.graph.nodes:
        if node.op == "call_function":
            yield node, compute(node, mode)


def fake_mode(module: GraphModule) -> FakeTensorMode:
    """The fake mode of a graph's values; a new one where it has none."""
    for node in module.graph.nodes:
        for value in pytree.tree_leaves(node.meta.get("val")):
            if isinstance(value, FakeTensor):
                return value.fake_mode
    return FakeTensorMode(allow_non_fake_inputs=True)


def compute(node: Node, mode: FakeTensorMode) -> Any:
    """What one call yields on the fake values of its operands."""
    args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda used: used.meta["val"])
    assert callable(node.target)
    with mode, torch.no_grad():
        return node.target(*args, **kwargs)
