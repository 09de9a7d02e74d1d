"""The graph of one rank: a layout made real for a degree and a rank.

Values are converted where their consumer wants them otherwise held: partial sums by all_reduce,
divided values by all_gather, whole ones by keeping a slice. Parameters and caches shrink to the
rank's part, size arguments of views with them, and fake values are recomputed where they changed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.fx.graph import Graph as Nodes
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from planc.errors import InvalidField
from planc.ir.graph import CacheSpec, Graph, WeightStep
from planc.ir.opdef import ShardRule
from planc.ir.ops import collectives
from planc.passes.parallel_fakes import Fakes
from planc.passes.parallel_layout import Layout
from planc.passes.parallel_operands import operands
from planc.passes.parallel_state import FREE, PARTIAL, WHOLE, Axis, Count, Section, State
from planc.passes.parallel_weights import TakePieces, Zero

_ops = torch.ops.planc


@dataclass(slots=True)
class RankGraph:
    """Builds the graph of `rank` among `tp` ranks of the process group called `group`."""

    graph: Graph
    layout: Layout
    tp: int
    rank: int
    group: str
    nodes: Nodes = field(default_factory=Nodes)
    attributes: dict[str, Any] = field(default_factory=dict)
    steps: dict[str, WeightStep] = field(default_factory=dict)
    caches: list[CacheSpec] = field(default_factory=list)
    _fakes: Fakes = field(init=False)
    _made: dict[Node, Node] = field(default_factory=dict)
    _converted: dict[tuple[Node, State], Node] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._fakes = Fakes(self.graph.module)

    def build(self) -> tuple[GraphModule, tuple[CacheSpec, ...], tuple[WeightStep, ...]]:
        specs = {cache.name: cache for cache in self.graph.caches}
        for node in self.graph.module.graph.nodes:
            match node.op:
                case "placeholder":
                    self._made[node] = self._placeholder(node, specs.get(str(node.target)))
                case "get_attr":
                    self._made[node] = self._parameter(node)
                case "output":
                    self._output(node)
                case _:
                    self._made[node] = self._call(node)
        module = GraphModule(_root(self.attributes), self.nodes, class_name=type(self.graph.module).__name__)
        return module, tuple(self.caches), tuple(self.steps.values())

    # -- what comes in -------------------------------------------------------------------

    def _placeholder(self, node: Node, cache: CacheSpec | None) -> Node:
        made = self.nodes.create_node("placeholder", node.target, node.args, {}, node.name, node.type)
        made.meta = dict(node.meta)
        if cache is None:
            return made
        state = self.layout.state(node)
        if isinstance(state, Axis):
            whole = node.meta["val"]
            shape = list(whole.shape)
            shape[state.dim] = self._length(state.sections)
            made.meta["val"] = self._fakes.empty(whole, tuple(shape))
            lead = len(shape) - len(cache.entry)
            entry = list(cache.entry)
            entry[state.dim - lead] = shape[state.dim]
            cache = replace(cache, entry=tuple(entry))
        self.caches.append(cache)
        return made

    def _parameter(self, node: Node) -> Node:
        name = str(node.target)
        found = _attribute(self.graph.module, name)
        made = self.nodes.create_node("get_attr", name, (), {}, node.name, node.type)
        made.meta = dict(node.meta)
        state = self.layout.state(node) if isinstance(found, Tensor) else WHOLE
        step: TakePieces | Zero | None = None
        if isinstance(state, Axis) and (pieces := self._pieces(state)) != ((0, state.size),):
            step, whole = TakePieces(name, state.dim, pieces), node.meta["val"]
            made.meta["val"] = self._fakes.empty(whole, step.shape(whole.shape))
        elif state == PARTIAL and self.rank > 0:
            step = Zero(name)
        if name not in self.attributes:
            self.attributes[name] = _held(found, step)
            if step is not None:
                self.steps[name] = step
        return made

    # -- calls ---------------------------------------------------------------------------

    def _call(self, node: Node) -> Node:
        args, kwargs = self._arguments(node)
        target = node.target
        rule = self.layout.rules.get(node)
        if rule is not None and rule.name in ("vocab", "experts"):
            target, args, kwargs = self._placed(node, rule, args, kwargs)
        made = self.nodes.create_node(node.op, target, args, kwargs, node.name, node.type)
        made.meta = dict(node.meta)
        self._propagate(made, changed=self._changed(node, args, kwargs) or target != node.target)
        if node in self.layout.completed:
            return self._insert(made, _ops.all_reduce.default, (made, self.group, self.tp))
        if node in self.layout.resliced:
            return self._slice(made, self.layout.resliced[node])
        return made

    def _arguments(self, node: Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
        wants = self.layout.wants.get(node, {})
        args = _rebuilt(node.args, (), lambda path, value: self._operand(value, wants.get(path)))
        kwargs = _rebuilt(node.kwargs, (), lambda path, value: self._operand(value, wants.get(path)))
        for path, sections in self.layout.resizes.get(node, ()):
            args = _resized(args, path, self._length(sections))
        return tuple(args), dict(kwargs)

    def _operand(self, value: Node, want: State | None) -> Node:
        made = self._made[value]
        if want is None or want == FREE or not isinstance(value.meta.get("val"), Tensor):
            return made
        return self._convert(value, made, want)

    def _placed(
        self, node: Node, rule: ShardRule, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
        """Tells an op which of the pieces it holds, in its own argument or through its twin's."""
        target = node.target
        assert isinstance(target, torch._ops.OpOverload)
        given = operands(node, self.layout.state)
        named = (o for o in given if isinstance(self.layout.wants[node][o.path], Axis))
        axis = self.layout.wants[node][next(named).path]
        assert isinstance(axis, Axis)
        start = self._pieces(axis)[0][0]
        if target in collectives.TWINS:
            twin, kept = collectives.TWINS[target]
            return twin, (*args[:kept], start), {}
        if not rule.first:
            return target, args, kwargs
        position = [a.name for a in target._schema.arguments].index(rule.first)
        if position < len(args):
            return target, (*args[:position], start, *args[position + 1 :]), kwargs
        return target, args, {**kwargs, rule.first: start}

    def _output(self, node: Node) -> None:
        args, _ = self._arguments(node)
        made = self.nodes.output(args[0])
        made.meta = dict(node.meta)
        if "val" in node.meta:
            made.meta["val"] = map_arg(args[0], lambda n: n.meta["val"])

    # -- conversions ---------------------------------------------------------------------

    def _convert(self, value: Node, made: Node, want: State) -> Node:
        state = self.layout.state(value)
        if self._alike(state, want):
            return made
        key = (value, want)
        if key not in self._converted:
            whole = made if state == WHOLE else self._whole_of(value, state, made)
            self._converted[key] = self._slice(whole, want) if isinstance(want, Axis) else whole
        return self._converted[key]

    def _whole_of(self, value: Node, state: State, made: Node) -> Node:
        key = (value, WHOLE)
        if key not in self._converted:
            if state == PARTIAL:
                whole = self._insert(made, _ops.all_reduce.default, (made, self.group, self.tp))
            else:
                assert isinstance(state, Axis)
                whole = self._gather(made, state)
            self._converted[key] = whole
        return self._converted[key]

    def _alike(self, one: State, other: State) -> bool:
        if isinstance(one, Axis) and isinstance(other, Axis):
            there = one.dim == other.dim and one.outer == other.outer
            return there and self._pieces(one) == self._pieces(other)
        if isinstance(one, Axis) or isinstance(other, Axis):
            axis = one if isinstance(one, Axis) else other
            assert isinstance(axis, Axis)
            whole = all(self._ways(section) == 1 for section in axis.sections)
            return whole and WHOLE in (one, other)
        return one == other

    def _slice(self, made: Node, axis: Axis) -> Node:
        """This rank's pieces of a whole value."""
        aten = torch.ops.aten
        kept = [
            self._insert(made, aten.slice.Tensor, (made, axis.dim, start, start + length))
            for start, length in self._pieces(axis)
        ]
        return kept[0] if len(kept) == 1 else self._insert(made, aten.cat.default, (kept, axis.dim))

    def _gather(self, made: Node, axis: Axis) -> Node:
        """Every section from all ranks; of copies (shared groups) one."""
        assert axis.outer == Count(), f"{made}: pieces of a merged dimension cannot be gathered"
        aten, parts, at = torch.ops.aten, [], 0
        for section in axis.sections:
            local, ways = self._length((section,)), self._ways(section)
            part = made
            if len(axis.sections) > 1:
                part = self._insert(made, aten.slice.Tensor, (made, axis.dim, at, at + local))
            at += local
            if ways > 1:
                part = self._insert(part, _ops.all_gather.default, (part, axis.dim, self.group, self.tp))
            if 1 < ways < self.tp:
                copies = self.tp // ways
                starts = [i * copies * local for i in range(ways)]
                once = [
                    self._insert(part, aten.slice.Tensor, (part, axis.dim, start, start + local))
                    for start in starts
                ]
                part = self._insert(part, aten.cat.default, (once, axis.dim))
            parts.append(part)
        return parts[0] if len(parts) == 1 else self._insert(made, aten.cat.default, (parts, axis.dim))

    def _insert(self, beside: Node, target: Callable[..., Any], args: tuple[Any, ...]) -> Node:
        made = self.nodes.call_function(target, args)
        made.meta = {k: v for k, v in beside.meta.items() if k in ("nn_module_stack", "stack_trace")}
        self._propagate(made, changed=True)
        return made

    # -- sizes ---------------------------------------------------------------------------

    def _ways(self, section: Section) -> int:
        return self.layout.groups.ways(section.group, self.tp)

    def _length(self, sections: tuple[Section, ...]) -> int:
        return sum(section.size // self._ways(section) for section in sections)

    def _pieces(self, axis: Axis) -> tuple[tuple[int, int], ...]:
        """(start, length) of what this rank holds, section by section; neighbours joined."""
        out: list[tuple[int, int]] = []
        offset = 0
        for section in axis.sections:
            ways = self._ways(section)
            length = section.size // ways
            start = offset + self.rank * ways // self.tp * length
            if out and sum(out[-1]) == start:
                out[-1] = (out[-1][0], out[-1][1] + length)
            else:
                out.append((start, length))
            offset += section.size
        return tuple(out)

    # -- fake values ---------------------------------------------------------------------

    def _changed(self, node: Node, args: object, kwargs: object) -> bool:
        """Whether any operand's fake value, or any size argument, is another than before."""
        mine = _nodes_in((args, kwargs))
        theirs = _nodes_in((node.args, node.kwargs))
        vals = [m.meta.get("val") is t.meta.get("val") for m, t in zip(mine, theirs, strict=False)]
        return not all(vals) or len(mine) != len(theirs) or bool(self.layout.resizes.get(node))

    def _propagate(self, made: Node, *, changed: bool) -> None:
        old = made.meta.get("val")
        sizes_only = old is not None and not any(isinstance(v, Tensor) for v in pytree.tree_leaves(old))
        if changed and not sizes_only:
            made.meta["val"] = self._fakes.value(made)


def _nodes_in(value: object) -> list[Node]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Node)]


def _held(found: Any, step: TakePieces | Zero | None) -> Any:
    """A rank's part of an attribute: on meta where the whole is, real where that is."""
    if step is None or (isinstance(step, Zero) and found.device.type == "meta"):
        return found
    if found.device.type != "meta":
        local = step.apply((found.detach(),))[0]
    else:
        assert isinstance(step, TakePieces)
        local = torch.empty(step.shape(found.shape), dtype=found.dtype, device="meta")
    return nn.Parameter(local, requires_grad=False) if isinstance(found, nn.Parameter) else local


def _attribute(module: nn.Module, name: str) -> Any:
    found: Any = module
    for part in name.split("."):
        found = getattr(found, part)
    return found


def _root(attributes: Mapping[str, Any]) -> nn.Module:
    """A module holding attributes under their dotted names: tensors as parameters or buffers."""
    root = nn.Module()
    for name, value in attributes.items():
        *path, last = name.split(".")
        owner = root
        for part in path:
            if not hasattr(owner, part):
                owner.add_module(part, nn.Module())
            owner = getattr(owner, part)
        if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
            owner.register_buffer(last, value)
        else:
            setattr(owner, last, value)
    return root


def _rebuilt(
    value: Any, path: tuple[str | int, ...], leaf: Callable[[tuple[str | int, ...], Node], Node]
) -> Any:
    """The same structure of lists, tuples and dicts, its nodes replaced."""
    if isinstance(value, Node):
        return leaf(path, value)
    if isinstance(value, list | tuple):
        return type(value)(_rebuilt(item, (*path, i), leaf) for i, item in enumerate(value))
    if isinstance(value, Mapping):
        return {key: _rebuilt(item, (*path, key), leaf) for key, item in value.items()}
    return value


def _resized(args: Any, path: tuple[int, ...], size: int) -> Any:
    """args with the int at `path` replaced, where there is a static one."""
    head, rest = path[0], path[1:]
    if head >= len(args):
        return args
    items = list(args)
    if rest:
        items[head] = _resized(items[head], rest, size)
    elif isinstance(items[head], int) and items[head] != -1:
        items[head] = size
    return tuple(items) if isinstance(args, tuple) else items


def check_rank(tp: int, rank: int) -> None:
    """InvalidField unless 0 <= rank < tp."""
    if tp < 1:
        raise InvalidField(
            where="tensor parallelism",
            field="tp",
            value=tp,
            reason="it is not positive",
            mend="Use 1 or more.",
        )
    if not 0 <= rank < tp:
        raise InvalidField(
            where="tensor parallelism",
            field="rank",
            value=rank,
            reason=f"there are {tp} ranks",
            mend=f"Ranks run from 0 to {tp - 1}.",
        )
