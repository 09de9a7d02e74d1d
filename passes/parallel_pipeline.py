"""Pipeline parallelism: the layers of one stage, as a graph from hidden states to hidden states.

    before      input_ids, position_ids, ... -> logits
    stage 0     input_ids, position_ids, ..., caches of its layers -> hidden
    stage 1     input_ids, position_ids, ..., hidden, caches of its layers -> logits

A cut runs between layers. What crosses it is computed once and handed on (`hidden`; in the models
planc knows one tensor, the residual stream; a second one would be `hidden_1`). What depends only on
positions and sizes, such as rotary tables, each stage computes for itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.graph import Graph as Nodes
from torch.fx.node import map_arg

from planc.cost_model.local import even_split
from planc.errors import InvalidField
from planc.ir.graph import HIDDEN, Graph, WeightStep
from planc.ir.layers import layer_of


@dataclass(frozen=True, slots=True)
class PipelineCut:
    """Stage `stage` of `stages`. Layers are dealt out evenly, as the cost model and vLLM do, or as `layers`
    says, one number per stage (a plan's `pipeline_layers`).

    Raises InvalidField where there are fewer layers than stages or the numbers do not add up.
    """

    stages: int
    stage: int
    layers: tuple[int, ...] = ()
    name: ClassVar[str] = "pipeline_cut"

    def apply(self, graph: Graph) -> Graph:
        depth = _depths(graph)
        start, stop = self._span(1 + max(depth.values(), default=-1))
        first, last = self.stage == 0, self.stage == self.stages - 1
        if first and last:
            return graph.after(self.name, graph.module)
        local = _local(graph)
        arriving = [] if first else _crossing(graph, depth, local, start)
        leaving = [] if last else _crossing(graph, depth, local, stop)
        return _stage(graph, self.name, arriving, leaving)

    def _span(self, count: int) -> tuple[int, int]:
        """The layers [start, stop) of this stage."""
        self._check("stages", self.stages, 1 <= self.stages <= max(count, 1), f"the model has {count} layers")
        self._check("stage", self.stage, 0 <= self.stage < self.stages, f"there are {self.stages} stages")
        sizes = self.layers or even_split(count, self.stages)
        fits = len(sizes) == self.stages and sum(sizes) == count and min(sizes) > 0
        self._check(
            "layers", sizes, fits, f"{self.stages} stages must hold {count} layers between them, none empty"
        )
        start = sum(sizes[: self.stage])
        return start, start + sizes[self.stage]

    @staticmethod
    def _check(field: str, value: object, fine: bool, reason: str) -> None:
        if not fine:
            raise InvalidField(
                where="pipeline parallelism",
                field=field,
                value=value,
                reason=reason,
                mend="Use at most one stage per layer.",
            )


def _depths(graph: Graph) -> dict[Node, int]:
    """The layer each call belongs to: its module's, or the last one it depends on; -1 before all layers."""
    depth: dict[Node, int] = {}
    for node in graph.module.graph.nodes:
        if node.op == "call_function":
            before = max((depth.get(used, -1) for used in node.all_input_nodes), default=-1)
            own = layer_of(node)
            depth[node] = before if own is None else max(own, before)
    return depth


def _local(graph: Graph) -> set[Node]:
    """Calls that no hidden state flows into: every stage can compute them from its inputs.

    Hidden states are what is computed from the values (not just the size) of the first input.
    """
    nodes = list(graph.module.graph.nodes)
    flows = {next(node for node in nodes if node.op == "placeholder")}
    for node in nodes:
        used = any(u in flows for u in node.all_input_nodes)
        if node.op == "call_function" and used and _is_tensor(node):
            flows.add(node)
    return {node for node in nodes if node.op == "call_function" and node not in flows}


def _is_tensor(node: Node) -> bool:
    val = node.meta.get("val")
    return isinstance(val, Tensor | list | tuple)


def _crossing(graph: Graph, depth: dict[Node, int], local: set[Node], cut: int) -> list[Node]:
    """Values made before layer `cut` that it or a later one reads, in order."""
    return [
        node
        for node in graph.module.graph.nodes
        if node in depth
        and depth[node] < cut
        and node not in local
        and any(depth.get(user, cut) >= cut for user in node.users)
    ]


def _stage(graph: Graph, name: str, arriving: list[Node], leaving: list[Node]) -> Graph:
    nodes = list(graph.module.graph.nodes)
    ends = leaving or [node for node in nodes if node.op == "output"]
    needed = _ancestors(ends, stop=set(arriving))
    caches = tuple(c for c in graph.caches if any(n.target == c.name and n in needed for n in nodes))
    listed = {cache.name for cache in graph.caches}
    kept = {cache.name for cache in caches}

    new, made, names = Nodes(), {}, set()
    inputs = [n for n in nodes if n.op == "placeholder"]
    for node in (n for n in inputs if n.target not in listed):
        made[node] = new.node_copy(node)
    for index, node in enumerate(arriving):
        label = HIDDEN if index == 0 else f"{HIDDEN}_{index}"
        made[node] = new.placeholder(label)
        made[node].meta = {"val": node.meta["val"]}
    for node in (n for n in inputs if n.target in kept):
        made[node] = new.node_copy(node)
    for node in nodes:
        if node.op in ("call_function", "get_attr") and node in needed and node not in made:
            made[node] = new.node_copy(node, made.__getitem__)
            if node.op == "get_attr":
                names.add(str(node.target))
    if leaving:
        out = tuple(made[node] for node in leaving)
        new.output(out[0] if len(out) == 1 else out)
    else:
        (end,) = ends
        new.output(map_arg(end.args[0], made.__getitem__))
    new.output_node().meta["val"] = map_arg(new.output_node().args[0], lambda n: n.meta["val"])
    module = GraphModule(graph.module, new, class_name=type(graph.module).__name__)
    steps = tuple(_needed_steps(graph.weight_steps, names))
    return graph.after(name, module, caches=caches, weight_steps=steps)


def _ancestors(ends: Iterable[Node], stop: set[Node]) -> set[Node]:
    """All nodes that `ends` need, not looking behind `stop`."""
    stack, seen = list(ends), set(stop)
    found: set[Node] = set(ends)
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        found.add(node)
        stack.extend(node.all_input_nodes)
    return found


def _needed_steps(steps: tuple[WeightStep, ...], names: set[str]) -> Iterator[WeightStep]:
    """The weight steps that lead to these parameters."""
    wanted, kept = set(names), []
    for step in reversed(steps):
        if wanted & set(step.makes):
            wanted |= set(step.reads)
            kept.append(step)
    return reversed(kept)
