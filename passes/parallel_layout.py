"""Sharding propagation: how every value of a graph is held under tensor parallelism.

Driven by what ops declare (`planc.ir.opdef.ShardRule`), never by their names, and independent of
the degree: the cost table reads its shardings from the same layout that `TensorParallel` applies.

One pass over the graph in order starts optimistically: an op that can be divided by its weights
alone is (a projection by columns); what follows stays divided while a rule, a view or a pointwise
op carries the axis; a product over the divided axis leaves a partial sum, added up where a whole
value is next needed. Where a divided value would have to be gathered in the middle of a layer, the
projections that divided it were not worth dividing (a router, a latent projection): they are kept
whole, and the pass runs again. An op without any rule takes whole operands, which is always right.

    q = linear(x, wq)          column     q divided by heads
    o = attention(q, k, v)     heads      o divided by heads
    y = linear(o, wo)          row        y a partial sum
    h = x + y                             all_reduce(y) first
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch.fx import Node

from planc.ir.graph import Graph
from planc.ir.opdef import ShardRule
from planc.passes.parallel_cut import Cuts
from planc.passes.parallel_operands import Operand, alike, operands
from planc.passes.parallel_rules import Outcome, Rulebook
from planc.passes.parallel_state import FREE, PARTIAL, WHOLE, Axis, Count, Groups, State
from planc.passes.parallel_views import LINEAR_VIEWS, Resize

Path = tuple[str | int, ...]


@dataclass(slots=True)
class Layout:
    """states: how each result of a node is held. wants: how each tensor operand of a node must be.
    resliced: results computed whole of which each rank then keeps its piece. completed: results that
    are partial sums, added up at once. seeds: ops that begin an
    axis. summed: groups that a product adds up over, so that their ops come in column and row pairs."""

    groups: Groups = field(default_factory=Groups)
    states: dict[Node, tuple[State, ...]] = field(default_factory=dict)
    wants: dict[Node, dict[Path, State]] = field(default_factory=dict)
    resizes: dict[Node, tuple[Resize, ...]] = field(default_factory=dict)
    rules: dict[Node, ShardRule] = field(default_factory=dict)
    resliced: dict[Node, Axis] = field(default_factory=dict)
    completed: set[Node] = field(default_factory=set)
    seeds: set[Node] = field(default_factory=set)
    summed: set[int] = field(default_factory=set)

    def state(self, node: Node) -> State:
        """How a single-valued node is held."""
        return self.states[node][0]


@dataclass(slots=True)
class _Learned:
    """What earlier rounds found out: projections to keep whole, sections to lay weights out in, ops
    to gather for and slice after, partial sums to add up at once."""

    undivided: set[Node] = field(default_factory=set)
    sections: dict[Node, Cuts] = field(default_factory=dict)
    resliced: set[Node] = field(default_factory=set)
    completed: set[Node] = field(default_factory=set)

    def size(self) -> int:
        kept = sum(1 + len(cuts.kept) for cuts in self.sections.values())
        return len(self.undivided) + kept + len(self.resliced) + len(self.completed)


def lay_out(graph: Graph, *, ep: bool = False, undivided: frozenset[Node] = frozenset()) -> Layout:
    """The layout of a graph for any degree.

    ep: routed experts are divided as whole experts. undivided: ops that must not begin an axis.
    """
    learned = _Learned(set(undivided))
    while True:
        before = learned.size()
        round_ = _Round(graph, learned, ep)
        round_.run()
        if learned.size() == before:
            _settle(graph, round_.layout)
            return round_.layout


class _Round:
    """One pass over the graph."""

    def __init__(self, graph: Graph, learned: _Learned, ep: bool) -> None:
        self.graph = graph
        self.learned = learned
        self.layout = Layout()
        self.seeds: dict[Node, frozenset[Node]] = {}
        self.gathers: list[tuple[Node, Node]] = []  # (divided value, the op that wants it whole)
        self.slices: set[Node] = set()  # whole values of which ranks take pieces
        self.summed_whole: set[Node] = set()  # partial sums that some op wants added up
        self.summed_later: set[Node] = set()  # partial sums that some op takes as they are
        self.rulebook = Rulebook(self.layout.groups, ep)

    def run(self) -> None:
        caches = {cache.name for cache in self.graph.caches}
        for node in self.graph.module.graph.nodes:
            match node.op:
                case "get_attr":
                    self._set(node, Outcome((), (FREE,)))
                case "placeholder":
                    self._set(node, Outcome((), (FREE if node.target in caches else WHOLE,)))
                case "output":
                    ends = operands(node, self._state)
                    self.layout.wants[node] = {end.path: WHOLE for end in ends}
                    merged = (e.node for e in ends if isinstance(e.state, Axis) and e.state.outer != Count())
                    self.gathers.extend((value, node) for value in merged)
                case _:
                    self._call(node)
        for value, consumer in self.gathers:
            self._learn(value, consumer)
        self.learned.completed |= self.summed_whole & self.summed_later

    def _state(self, node: Node) -> State:
        return self.layout.states[node][0]

    def _call(self, node: Node) -> None:
        if node.target is operator.getitem:
            source, index = node.args
            assert isinstance(source, Node)
            assert isinstance(index, int)
            states = self.layout.states[source]
            self.layout.states[node] = (states[index] if len(states) > 1 else states[0],)
            self.layout.wants[node] = {}
            if source in self.seeds:
                self.seeds[node] = self.seeds[source]
            return
        given = operands(node, self._state)
        outcome = self.rulebook.outcome(
            node, given, divide=node not in self.learned.undivided, sections=self.learned.sections.get(node)
        )
        flowing = frozenset().union(
            *(self.seeds.get(o.node, frozenset()) for o in given if isinstance(o.state, Axis))
        )
        refined = bool(outcome.refine) and self._refine(flowing, outcome.refine)
        if node in self.learned.resliced:
            kept = next(o.state for o in given if isinstance(o.state, Axis))
            outcome = Outcome(outcome.wants, (kept,))
            self.layout.resliced[node] = kept
        if node in self.learned.completed and outcome.results == (PARTIAL,):
            self.layout.completed.add(node)
        seeds = flowing | {node} if outcome.seed else flowing
        if outcome.seed:
            self.layout.seeds.add(node)
        elif PARTIAL in outcome.results and outcome.rule is not None:
            axes = [want for want in outcome.wants if isinstance(want, Axis)]
            self.layout.summed |= {section.group for axis in axes for section in axis.sections}
        self._set(node, outcome, seeds)
        self.layout.wants[node] = {o.path: want for o, want in zip(given, outcome.wants, strict=True)}
        for operand, want in zip(given, outcome.wants, strict=True):
            if isinstance(operand.state, Axis) and not _same(self.layout.groups, operand.state, want):
                if not refined:
                    self.gathers.append((operand.node, node))
            elif operand.state == WHOLE and isinstance(want, Axis):
                self.slices.add(operand.node)
            elif operand.state == PARTIAL:
                (self.summed_later if want == PARTIAL else self.summed_whole).add(operand.node)

    def _set(self, node: Node, outcome: Outcome, seeds: frozenset[Node] = frozenset()) -> None:
        whole = node in self.layout.completed
        self.layout.states[node] = (WHOLE,) if whole else outcome.results
        self.layout.resizes[node] = outcome.resizes
        if outcome.rule is not None:
            self.layout.rules[node] = outcome.rule
        for state in outcome.results:
            if isinstance(state, Axis):
                self.seeds[node] = seeds
                for section in state.sections:
                    self.layout.groups.limit(section.group, section.size)

    def _refine(self, seeds: frozenset[Node], sizes: tuple[int, ...]) -> bool:
        """Lays out what these ops begin in sections of these sizes; False if that was tried or cannot be."""
        fresh = False
        for seed in seeds - self.learned.sections.keys():
            state = self.layout.states[seed][0]
            if isinstance(state, Axis) and state.size == sum(sizes):
                self.learned.sections[seed] = Cuts(sizes)
                fresh = True
        return fresh

    def _learn(self, value: Node, consumer: Node) -> None:
        """What to do about a value that was divided, yet is needed whole."""
        if consumer in self.learned.resliced:
            return
        state = self._state(value)
        gathers = isinstance(state, Axis) and state.outer == Count()
        single = gathers and not isinstance(consumer.meta.get("val"), list | tuple)
        if single and _shape(consumer) == _shape(value) and self._taken_in_pieces(consumer):
            self.learned.resliced.add(consumer)
            return
        for seed in self.seeds.get(value, frozenset()):
            self._keep(seed, state)

    def _keep(self, seed: Node, gathered: State) -> None:
        """Keeps whole what a gathered value came from: sections of a projection, or all of it."""
        begun = self.layout.states[seed][0]
        cuts = self.learned.sections.get(seed)
        if cuts is not None and isinstance(begun, Axis) and isinstance(gathered, Axis):
            find = self.layout.groups.find
            groups = {find(section.group) for section in gathered.sections}
            kept = cuts.kept | {i for i, s in enumerate(begun.sections) if find(s.group) in groups}
            if len(kept) < len(cuts.sizes):
                self.learned.sections[seed] = Cuts(cuts.sizes, kept)
                return
        self.learned.undivided.add(seed)

    def _taken_in_pieces(self, start: Node) -> bool:
        """Whether ranks take pieces of this whole value again, past views and pointwise ops only."""
        stack, seen = [start], {start}
        while stack:
            node = stack.pop()
            if node in self.slices:
                return True
            for user in node.users:
                val = user.meta.get("val")
                values = val if isinstance(val, list | tuple) else [val]
                same = any(isinstance(v, torch.Tensor) and v.numel() == _numel(start) for v in values)
                if user.op == "call_function" and user not in seen and same and user not in self.seeds:
                    seen.add(user)
                    stack.append(user)
        return False


def _shape(node: Node) -> torch.Size | None:
    val = node.meta.get("val")
    return val.shape if isinstance(val, torch.Tensor) else None


def _numel(node: Node) -> object:
    return node.meta["val"].numel()


def _same(groups: Groups, one: State, other: State) -> bool:
    if not isinstance(one, Axis) or not isinstance(other, Axis):
        return one == other
    pairs = zip(one.sections, other.sections, strict=False)
    return alike(one, other) and all(groups.find(a.group) == groups.find(b.group) for a, b in pairs)


def _settle(graph: Graph, layout: Layout) -> None:
    """Decides how ranks hold what is FREE: as all its consumers want it, else whole.

    Parameters that pass through a view or a cast on the way (`conv.weight.squeeze(1)`) are divided
    at the source, and the size arguments on the way shrink.
    """
    wanted: dict[object, list[State]] = {}
    for node in reversed(list(graph.module.graph.nodes)):
        for path, operand in _operand_nodes(node, layout):
            if layout.states[operand][0] == FREE and node not in layout.states:
                wanted.setdefault(_source(operand), []).append(WHOLE)  # the output
            elif layout.states[operand][0] == FREE and layout.states[node][:1] != (FREE,):
                want = layout.wants[node][path]
                if want != FREE:  # a size that is read off it
                    wanted.setdefault(_source(operand), []).append(want)
        if node.op == "call_function" and layout.states.get(node, ())[:1] == (FREE,):
            _settle_derived(node, layout, wanted)
    for node in graph.module.graph.nodes:
        if layout.states.get(node, ())[:1] == (FREE,):
            layout.states[node] = (_agreed(layout.groups, wanted.get(_source(node), [])),)


def _source(node: Node) -> object:
    return node.target if node.op == "get_attr" else node


def _operand_nodes(node: Node, layout: Layout) -> Iterator[tuple[Path, Node]]:
    for operand in operands(node, lambda n: layout.states[n][0]):
        yield operand.path, operand.node


def _settle_derived(node: Node, layout: Layout, wanted: dict[object, list[State]]) -> None:
    agreed = _agreed(layout.groups, wanted.get(node, []))
    (operand,) = operands(node, lambda n: layout.states[n][0])
    source: State = WHOLE
    if isinstance(agreed, Axis):
        back = _backwards(node, operand, agreed)
        agreed, source = (agreed, back[0]) if back else (WHOLE, WHOLE)
        layout.resizes[node] = back[1] if back else ()
    elif agreed == PARTIAL:
        agreed = source = PARTIAL if node.target in LINEAR_VIEWS else WHOLE
    layout.states[node] = (agreed,)
    layout.wants[node] = {operand.path: source}
    wanted.setdefault(_source(operand.node), []).append(source)


def _backwards(node: Node, operand: Operand, want: Axis) -> tuple[Axis, tuple[Resize, ...]] | None:
    """The axis of a view's operand that gives the wanted axis of its result."""
    follow = LINEAR_VIEWS.get(node.target)
    for dim, size in enumerate(operand.shape):
        if not isinstance(size, int) or size == 1:
            continue
        axis = want.moved(dim) if size == want.size else want.moved(dim).scaled(size, want.size)
        if axis is None or axis.size != size:
            continue
        if follow is None:  # pointwise, one operand
            if axis == want:
                return axis, ()
            continue
        found = follow(node, axis)
        if found is not None and found.results == (want,):
            return axis, found.resizes
    return None


def _agreed(groups: Groups, wants: list[State]) -> State:
    first = wants[0] if wants else WHOLE
    if not isinstance(first, Axis):
        return first if all(want == first for want in wants) else WHOLE
    for want in wants:
        if not isinstance(want, Axis) or not alike(first, want):
            return WHOLE
    for want in wants:
        assert isinstance(want, Axis)
        for mine, other in zip(first.sections, want.sections, strict=True):
            groups.unite(mine.group, other.group)
    return first
