"""Parallelism: the graph of one rank under tensor, expert or pipeline parallelism.

    TensorParallel(tp=2, rank=0).apply(graph)      rank 0's graph; collectives are ops in it
    PipelineCut(stages=2, stage=1).apply(graph)    the second half of the layers
    shard_rows(graph)                              how every op is divided, for any degree

Order in a pipeline: phases, then parallel passes, then fusion and quantization. A rank's graph is an
ordinary graph with smaller parameters, so whatever merges or packs them afterwards works on the
rank's own part. Cutting a merged or packed weight by sections would be a second way to do the same.

Tensor and pipeline parallelism compose in either order.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor
from torch.fx import Node

from planc.cost_model.table import Shard, ShardKind
from planc.ir.graph import Graph
from planc.ir.opdef import amount
from planc.ir.work import NONE
from planc.passes.parallel_layout import Layout, lay_out
from planc.passes.parallel_operands import operands
from planc.passes.parallel_pipeline import PipelineCut
from planc.passes.parallel_rank import RankGraph, check_rank
from planc.passes.parallel_state import PARTIAL, WHOLE, Axis
from planc.passes.parallel_views import LINEAR_VIEWS

__all__ = ["PipelineCut", "TensorParallel", "shard_rows", "shard_weights"]


@dataclass(frozen=True, slots=True)
class TensorParallel:
    """Rank `rank`'s graph among `tp` ranks.

    Column- and row-divided products with one all_reduce per pair, attention by whole heads, tables
    by vocabulary rows, logits gathered. Where there are fewer KV heads than ranks, ranks in a row
    hold the same KV head. Routed experts: each expert's width divided, or with `ep` whole experts.
    Before: linear(x, wq [512, 512]). After, tp=2: linear(x, wq [256, 512]).

    Raises InvalidField where tp does not divide heads, experts or columns. A vocabulary or output
    projection that tp does not divide stays whole.
    """

    tp: int
    rank: int
    ep: bool = False
    group: str = "tp"
    name: ClassVar[str] = "tensor_parallel"

    def apply(self, graph: Graph) -> Graph:
        check_rank(self.tp, self.rank)
        layout = self._layout(graph)
        module, caches, steps = RankGraph(graph, layout, self.tp, self.rank, self.group).build()
        return graph.after(self.name, module, caches=caches, weight_steps=(*graph.weight_steps, *steps))

    def _layout(self, graph: Graph) -> Layout:
        layout = lay_out(graph, ep=self.ep)
        whole = frozenset(seed for seed in layout.seeds if self._stays_whole(layout, seed))
        return lay_out(graph, ep=self.ep, undivided=whole) if whole else layout

    def _stays_whole(self, layout: Layout, seed: Node) -> bool:
        """Tables and heads that feed no row-divided product, and that tp does not divide."""
        summed = {layout.groups.find(group) for group in layout.summed}
        groups = {layout.groups.find(group) for group in _groups(layout, seed)}
        if layout.rules[seed].name not in ("vocab", "column") or groups & summed:
            return False
        return any(layout.groups.units(group) % self.tp for group in groups)


def _groups(layout: Layout, node: Node) -> set[int]:
    states = (*layout.wants[node].values(), *layout.states[node])
    return {section.group for state in states if isinstance(state, Axis) for section in state.sections}


def shard_weights(before: Graph, after: Graph, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The rank's weights from those of the graph that a parallel pass was applied to, by name."""
    out = dict(weights)
    for step in after.weight_steps[len(before.weight_steps) :]:
        made = step.apply(tuple(out[name] for name in step.reads))
        out.update(zip(step.makes, made, strict=True))
    held = {str(node.target) for node in after.module.graph.nodes if node.op == "get_attr"}
    return {name: tensor for name, tensor in out.items() if name in held}


def shard_rows(graph: Graph, *, ep: bool = False) -> dict[Node, Shard]:
    """How each call of a graph is divided, whatever the degree; the cost table's `Row.shard`.

    `units` is what a degree must divide: heads, columns, vocabulary rows, and for routed experts
    each one's columns, or (ep) their number. The collective stands at the op whose result it
    completes, `moved` elements of the whole result each.
    """
    layout = lay_out(graph, ep=ep)
    talk = _collectives(graph, layout)
    return {
        node: _shard(graph, layout, node, talk.get(node))
        for node in graph.module.graph.nodes
        if node.op == "call_function" and layout.states[node]
    }


def _collectives(graph: Graph, layout: Layout) -> dict[Node, Literal["all_reduce", "all_gather"]]:
    """What follows each op: its results are completed where some consumer wants more than it holds."""
    out: dict[Node, Literal["all_reduce", "all_gather"]] = dict.fromkeys(layout.completed, "all_reduce")
    for node in graph.module.graph.nodes:
        for operand in operands(node, layout.state):
            want = layout.wants[node][operand.path]
            if operand.state == PARTIAL and want != PARTIAL and operand.node.op == "call_function":
                out[_maker(operand.node)] = "all_reduce"
            elif isinstance(operand.state, Axis) and want == WHOLE and operand.node.op == "call_function":
                out[_maker(operand.node)] = "all_gather"
    return out


def _maker(node: Node) -> Node:
    """The op that computed a value, behind views that only show it in another shape."""
    while node.target in LINEAR_VIEWS:
        (source,) = (o.node for o in operands(node, lambda _: WHOLE))
        if source.op != "call_function" or source.meta["val"].numel() != node.meta["val"].numel():
            break
        node = source
    return node


def _shard(
    graph: Graph, layout: Layout, node: Node, collective: Literal["all_reduce", "all_gather"] | None
) -> Shard:
    axes = [s for s in (*layout.wants[node].values(), *layout.states[node]) if isinstance(s, Axis)]
    moved = amount(node.meta["val"].numel(), graph.symbols) if collective else NONE
    if not axes or node in layout.resliced:
        return Shard(collective=collective, moved=moved)
    return Shard(
        kind=_kind(layout, node),
        units=_units(layout, (a for a in axes)),
        kv_units=_kv_units(layout, node),
        collective=collective,
        moved=moved,
    )


def _kind(layout: Layout, node: Node) -> ShardKind:
    """The rule's own name; views and pointwise ops are divided as their results are."""
    rule = layout.rules.get(node)
    kinds: dict[str, ShardKind] = {
        "column": "column",
        "row": "row",
        "heads": "heads",
        "experts": "experts",
        "vocab": "vocab",
    }
    return kinds.get(rule.name, "column") if rule else "column"


def _units(layout: Layout, axes: Iterable[Axis]) -> int:
    """Pieces of what is divided; of two groups (queries and shared keys) those of the larger."""
    groups = {section.group for axis in axes for section in axis.sections}
    own = [g for g in groups if not layout.groups.shared(g)]
    return min(layout.groups.units(g) for g in (own or groups))


def _kv_units(layout: Layout, node: Node) -> int:
    """Pieces of the caches that an op reads or writes (0: they are not divided)."""
    units = [
        layout.groups.units(section.group)
        for operand in operands(node, layout.state)
        if operand.node.op == "placeholder" and isinstance(want := layout.wants[node][operand.path], Axis)
        for section in want.sections
    ]
    return min(units, default=0)
