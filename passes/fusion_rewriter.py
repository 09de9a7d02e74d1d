"""A graph under rewriting: private copy, new calls with their fake values, new parameters, clean-up.

Passes that replace calls by other calls (fusion, quantization) work through a `Rewriter`, so that
the invariants of `planc.ir.graph` hold by construction: the given graph is untouched, every new node
has a fake value and its origin in the user's model, and every new parameter has a `WeightStep`
that makes it from the source model's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from operator import attrgetter, getitem
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from planc.errors import WeightsMismatch
from planc.ir.fakes import compute, fake_mode
from planc.ir.graph import Graph, WeightStep

_ORIGIN = ("nn_module_stack", "stack_trace", "source_fn_stack")

#: Told of each replacement before the old calls are erased: (old calls, new calls).
Observer = Callable[[tuple[Node, ...], tuple[Node, ...]], None]


class Rewriter:
    """A copy of a graph to rewrite. `finish` turns it into the next `Graph`."""

    def __init__(self, source: Graph, observe: Observer | None = None) -> None:
        self._source = source
        self._observe = observe
        self._made: dict[str, Tensor] = {}
        self._steps: list[WeightStep] = []
        self._mode = fake_mode(source.module)
        self.graph = _copied(source.module.graph)
        self._hoist_attributes()

    # -- reading ---------------------------------------------------------------------------

    def calls(self, targets: frozenset[Any]) -> Iterator[Node]:
        """Call nodes of these targets that are in the graph when their turn comes, in execution order."""
        for node in list(self.graph.nodes):
            if node.op == "call_function" and node.target in targets and not node._erased:
                yield node

    def tensor(self, name: str) -> Tensor:
        """A parameter or buffer, as stored (usually on meta)."""
        found = self._made[name] if name in self._made else attrgetter(name)(self._source.module)
        assert isinstance(found, Tensor)
        return found

    # -- writing ---------------------------------------------------------------------------

    def call(self, target: Callable[..., Any], args: Sequence[Any], *, before: Node, like: Node) -> Node:
        """A new call in front of `before`, with its fake value; `like` says where it comes from."""
        with self.graph.inserting_before(before):
            node = self.graph.create_node("call_function", target, tuple(args), name=_name(target))
        node.meta.update({key: like.meta[key] for key in _ORIGIN if key in like.meta})
        node.meta["val"] = compute(node, self._mode)
        return node

    def results(self, node: Node, *, before: Node) -> tuple[Node, ...]:
        """The results of a call that returns several tensors."""
        count = len(node.meta["val"])
        return tuple(self.call(getitem, (node, i), before=before, like=node) for i in range(count))

    def parameters(self, step: WeightStep) -> tuple[Node, ...]:
        """New parameters, made by `step` from existing ones (on meta: only their shapes)."""
        with torch.no_grad():
            tensors = step.apply(tuple(self.tensor(name).detach() for name in step.reads))
        self._steps.append(step)
        return tuple(self._attribute(name, t) for name, t in zip(step.makes, tensors, strict=True))

    def replaced(self, old: Sequence[Node], new: Sequence[Node]) -> None:
        """Takes calls out that nothing reads any more, given in execution order: `new` does their work."""
        if self._observe is not None:
            self._observe(tuple(old), tuple(new))
        for node in reversed(old):
            self.graph.erase_node(node)

    def finish(self, name: str, **changes: object) -> Graph:
        """The next graph: dead calls and parameters gone, checked, compiled."""
        self.graph.eliminate_dead_code(is_impure_node=_has_effect)
        names = [str(node.target) for node in self.graph.nodes if node.op == "get_attr"]
        assert len(names) == len(set(names)), "a parameter was replaced under its own name while still read"
        held = {name: self.tensor(name) for name in names}
        old = self._source.module
        module = GraphModule(held, self.graph, class_name=type(old).__name__)  # type: ignore[arg-type]
        module.meta.update(old.meta)
        module.graph.lint()
        steps = (*self._source.weight_steps, *self._steps)
        return self._source.after(name, module, weight_steps=steps, **changes)

    # -- inside ----------------------------------------------------------------------------

    def _attribute(self, name: str, tensor: Tensor) -> Node:
        with self.graph.inserting_before(self._first_call):
            node = self.graph.create_node("get_attr", name)
        self._made[name] = nn.Parameter(tensor, requires_grad=False)
        node.meta["val"] = self._mode.from_tensor(tensor, static_shapes=True)
        return node

    def _hoist_attributes(self) -> None:
        """Parameters first, so that any call may read any of them."""
        nodes = list(self.graph.nodes)
        self._first_call = next(n for n in nodes if n.op not in ("placeholder", "get_attr"))
        for node in nodes:
            if node.op == "get_attr":
                self._first_call.prepend(node)
                if "val" not in node.meta:
                    held = self.tensor(str(node.target))
                    node.meta["val"] = self._mode.from_tensor(held, static_shapes=True)


def weights_for(graph: Graph, weights: Mapping[str, Tensor], origin: str = "") -> dict[str, Tensor]:
    """The tensors that `graph` reads, from the source model's own, by the steps its passes recorded.

    Tensors that no step reads are handed on as they are. `origin`: where they came from, for the message.
    Raises WeightsMismatch where a tensor that a step needs is missing.
    """
    held = dict(weights)
    for step in graph.weight_steps:
        missing = [name for name in step.reads if name not in held]
        if missing:
            raise WeightsMismatch(
                path=origin or graph.source.name,
                reason=f"'{missing[0]}' is missing, which '{step.makes[0]}' is made of",
                mend="Give the weights of the model that was traced, under its own names.",
            )
        made = step.apply(tuple(held.pop(name) for name in step.reads))
        held.update(zip(step.makes, made, strict=True))
    return held


def _copied(graph: torch.fx.Graph) -> torch.fx.Graph:
    copy = torch.fx.Graph(tracer_cls=graph._tracer_cls)
    result = copy.graph_copy(graph, {})
    output = next(node for node in reversed(graph.nodes) if node.op == "output")
    copy.output(result).meta.update(output.meta)
    return copy


def _name(target: Callable[..., Any]) -> str:
    """`linear` for aten.linear.default: the graph makes it unique."""
    return target._opname if isinstance(target, torch._ops.OpOverload) else target.__name__


def _has_effect(node: Node) -> bool:
    """Inputs, outputs and calls that write one of their arguments (caches) stay even if unread."""
    if node.op in ("placeholder", "output"):
        return True
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable
