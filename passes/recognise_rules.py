"""What a rule of `recognise` is, and the builder that its replacements are made with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph as Nodes
from torch.fx import Node

import planc.ir.ops  # noqa: F401  (rules name its ops)
from planc.ir.fakes import compute
from planc.passes.patterns import Caught, Pattern

aten = torch.ops.aten

#: Conversions of dtype alone, through which a pattern may look.
CASTS = (aten.to.dtype, aten._to_copy.default, aten.to.dtype_layout, aten.type_as.default)


class Builder:
    """Makes calls in front of `at`, with their values and the origin of `at`."""

    def __init__(self, nodes: Nodes, at: Node, mode: FakeTensorMode) -> None:
        self._nodes, self._at, self._mode = nodes, at, mode

    def call(self, target: Any, *args: Any) -> Node:
        with self._nodes.inserting_before(self._at):
            made = self._nodes.create_node("call_function", target, args, name=target.name().split("::")[1])
        for key in ("nn_module_stack", "stack_trace"):
            if key in self._at.meta:
                made.meta[key] = self._at.meta[key]
        made.meta["val"] = compute(made, self._mode)
        return made


@dataclass(frozen=True, slots=True)
class Rule:
    """One rewrite: where `pattern` fits a call, `build` makes what replaces it, or None to refuse."""

    name: str
    pattern: Pattern
    build: Callable[[Builder, Node, Caught], Node | None]


def tensor(node: Any) -> Tensor:
    """The fake tensor that a node yields."""
    value = node.meta["val"]
    assert isinstance(value, Tensor)
    return value


def is_tensor(found: Any) -> bool:
    return isinstance(found, Node) and isinstance(found.meta.get("val"), Tensor)


def is_number(found: Any) -> bool:
    return isinstance(found, int | float) and not isinstance(found, bool)


def same_size(a: Any, b: Any) -> bool:
    """Whether two sizes are equal for every value of their symbols; puts no guard on them."""
    left = a if isinstance(a, int) else a.node.expr
    right = b if isinstance(b, int) else b.node.expr
    return bool(left == right)


def same_shape(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have equal sizes, dimension by dimension."""
    return len(a.shape) == len(b.shape) and all(map(same_size, a.shape, b.shape))


def without_casts(node: Node) -> Node:
    """What a node is a conversion of."""
    while node.op == "call_function" and node.target in CASTS and isinstance(node.args[0], Node):
        node = node.args[0]
    return node
