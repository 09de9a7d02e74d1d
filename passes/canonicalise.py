"""Canonicalise: one spelling for one meaning, nothing that does nothing.

    before   d = aten.dropout(x, 0.1, False)         after   y = aten.relu(x)
             c = aten.contiguous(d)
             t = aten.to.dtype(c, f32)      (x is f32)
             y = aten.relu(t)

A rule says when a call yields the very value of one of its operands (same elements, dtype and
strides); users then take that operand. Guards of the trace and dead code go too. Nothing is
computed differently, so results are equal bit by bit.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import Graph as Nodes
from torch.fx import GraphModule, Node

from planc.ir.graph import Graph
from planc.ir.trace.program import is_guard

aten = torch.ops.aten

#: Given a call, the node whose value it merely repeats, or None.
Same = Callable[[Node], Node | None]


@dataclass(frozen=True, slots=True)
class Canonicalise:
    """Drops guards, dead code, and calls that repeat a value (see RULES)."""

    name: ClassVar[str] = "canonicalise"

    def apply(self, graph: Graph) -> Graph:
        """A smaller graph with equal results; the given one is left as it is."""
        nodes = copy.deepcopy(graph.module.graph)
        simplify(nodes)
        module = GraphModule(graph.module, nodes, class_name=type(graph.module).__name__)
        return graph.after(self.name, module)


def simplify(nodes: Nodes) -> None:
    """The rules, in place, in one walk: operands are simple before the calls that use them."""
    sizes: dict[tuple[Any, ...], Node] = {}
    for node in list(nodes.nodes):
        if is_guard(node):
            nodes.erase_node(node)
            continue
        if node.op != "call_function":
            continue
        found = _same_size(node, sizes)
        for rule in () if found is not None else RULES.get(node.target, ()):
            found = rule(node)
            if found is not None:
                break
        if found is not None:
            node.replace_all_uses_with(found)
    nodes.eliminate_dead_code(is_impure_node=_keeps)


# -- the rules ---------------------------------------------------------------------------


def _operand(node: Node) -> Node | None:
    """The first operand, where the result has its shape, strides, dtype and device."""
    source = node.args[0]
    return source if isinstance(source, Node) and alike(source, node) else None


def _not_training(node: Node) -> Node | None:
    """dropout(x, p, train=False), or with p = 0, is x."""
    probability, training = node.args[1], node.args[2]
    return _operand(node) if training is False or probability == 0 else None


def _neutral(number: float) -> Same:
    """add(x, 0), mul(x, 1), ... is x where it neither broadcasts nor promotes."""

    def rule(node: Node) -> Node | None:
        other = node.args[1]
        plain = isinstance(other, int | float) and not isinstance(other, bool) and other == number
        return _operand(node) if plain and not node.kwargs else None

    return rule


def _undone(node: Node) -> Node | None:
    """transpose(transpose(x, a, b), a, b) and permutations that cancel are x."""
    inner = node.args[0]
    if not isinstance(inner, Node) or inner.target is not node.target or not isinstance(inner.args[0], Node):
        return None
    source = inner.args[0]
    rank = _tensor(source).dim()
    before, after = _order(inner, rank), _order(node, rank)
    return source if [before[place] for place in after] == list(range(rank)) else None


def _order(node: Node, rank: int) -> list[int]:
    order = list(range(rank))
    if node.target is aten.permute.default:
        return [int(place) % rank for place in node.args[1]]  # type: ignore[union-attr,arg-type]
    a, b = (int(place) % rank for place in node.args[1:3])  # type: ignore[arg-type]
    order[a], order[b] = order[b], order[a]
    return order


def _only_item(node: Node) -> Node | None:
    """getitem([a, b], i) of a list built in the graph never comes up; of split(x) into one it is x."""
    source = node.args[0]
    if not isinstance(source, Node) or source.target not in (aten.split.Tensor, aten.chunk.default):
        return None
    values = source.meta.get("val")
    inner = source.args[0]
    if isinstance(values, tuple | list) and len(values) == 1 and isinstance(inner, Node):
        return inner if alike(inner, node) else None
    return None


_COPIES = (
    *(aten.detach.default, aten.alias.default, aten.lift_fresh_copy.default, aten.clone.default),
    *(
        aten.contiguous.default,
        aten.to.dtype,
        aten.to.device,
        aten.to.dtype_layout,
        aten._to_copy.default,
        aten.type_as.default,
    ),
)
_RESHAPES = (
    *(aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.expand.default),
    *(aten.flatten.using_ints, aten.slice.Tensor, aten.squeeze.dim, aten.squeeze.default),
)

#: Op -> the rules that may find it superfluous, in order.
RULES: Mapping[Any, tuple[Same, ...]] = {
    **dict.fromkeys(_COPIES, (_operand,)),
    **dict.fromkeys(_RESHAPES, (_operand,)),
    aten.dropout.default: (_not_training,),
    aten.add.Tensor: (_neutral(0),),
    aten.sub.Tensor: (_neutral(0),),
    aten.mul.Tensor: (_neutral(1),),
    aten.div.Tensor: (_neutral(1),),
    aten.transpose.int: (_undone,),
    aten.permute.default: (_undone,),
    operator.getitem: (_only_item,),
}


# -- what rules ask -----------------------------------------------------------------------


def alike(one: Node, other: Node) -> bool:
    """Whether two nodes hold tensors of equal shape, strides, dtype and device."""
    a, b = one.meta.get("val"), other.meta.get("val")
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return False
    return (
        a.dtype == b.dtype
        and a.device == b.device
        and len(a.shape) == len(b.shape)
        and all(_equal(x, y) for x, y in zip(a.shape, b.shape, strict=True))
        and all(_equal(x, y) for x, y in zip(a.stride(), b.stride(), strict=True))
    )


def _equal(a: int | torch.SymInt, b: int | torch.SymInt) -> bool:
    """Equal for every value of the symbols, decided without putting a guard on them."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    return bool(_expression(a) == _expression(b))


def _expression(size: int | torch.SymInt) -> Any:
    return size if isinstance(size, int) else size.node.expr


def _tensor(node: Node) -> Tensor:
    value = node.meta["val"]
    assert isinstance(value, Tensor)
    return value


def _same_size(node: Node, seen: dict[tuple[Any, ...], Node]) -> Node | None:
    """An earlier node that computes the same size; sizes are shared, tensors never are.

    Sharing tensors between layers would make equal layers look different.
    """
    if isinstance(node.meta.get("val"), Tensor | tuple | list) or node.kwargs:
        return None
    if any(isinstance(value, list | dict) for value in node.args):
        return None
    first = seen.setdefault((node.target, *node.args), node)
    return None if first is node else first


def _keeps(node: Node) -> bool:
    """What dead code elimination must leave: inputs, outputs and ops that write into caches."""
    if node.op in ("placeholder", "output"):
        return True
    return isinstance(node.target, torch._ops.OpOverload) and bool(node.target._schema.is_mutable)
