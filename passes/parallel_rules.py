"""What each op does to the way its operands are held: one `Outcome` per call.

Three sources of rules, in this order: the op's declared `ShardRule`s; views and ops along some
dimensions (`parallel_views`); pointwise ops, which carry any axis. Anything else: whole.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from planc.ir.opdef import Call, Held, OpDef, ShardRule, declaration
from planc.passes.parallel_cut import Cut, Cuts
from planc.passes.parallel_operands import Operand, alike, held_dim, results
from planc.passes.parallel_state import FREE, PARTIAL, WHOLE, Axis, Count, Groups, State
from planc.passes.parallel_views import ALONG, LINEAR_VIEWS, Followed, Resize

_aten = torch.ops.aten

#: Pointwise ops that keep sums in each operand (product: in one operand at a time).
_SUMS = frozenset({_aten.add.Tensor, _aten.sub.Tensor, _aten.neg.default})
_PRODUCTS = frozenset({_aten.mul.Tensor, _aten.mul.Scalar})
_QUOTIENTS = frozenset({_aten.div.Tensor, _aten.div.Scalar})


@dataclass(frozen=True, slots=True)
class Outcome:
    """wants: one state per operand. results: one state per result. seed: the axis begins here."""

    wants: tuple[State, ...]
    results: tuple[State, ...]
    resizes: tuple[Resize, ...] = ()
    rule: ShardRule | None = None
    seed: bool = False
    refine: tuple[int, ...] = ()


class Rulebook:
    """Applies rules within one propagation; `ep` prefers whole experts to slices of each."""

    def __init__(self, groups: Groups, ep: bool) -> None:
        self.groups = groups
        self.ep = ep

    def outcome(self, node: Node, given: list[Operand], *, divide: bool, sections: Cuts | None) -> Outcome:
        """How a call runs. divide: it may begin an axis. sections: how to lay out the one it begins."""
        if not results(node):  # sizes: read off any piece, since only whole dimensions are symbolic
            return Outcome(tuple(o.state for o in given), ())
        declared = declaration(node)
        if declared is not None and declared.shards:
            found = self._declared(node, declared, given, divide, sections)
        elif node.target in LINEAR_VIEWS or node.target in ALONG:
            found = self._view(node, given)
        elif _pointwise(node, declared):
            found = self._pointwise(node, given)
        elif node.target is _aten.cat.default:
            found = self._cat(node, given)
        else:
            found = None
        return found or self._whole(node, given)

    # -- ops without a rule --------------------------------------------------------------

    def _whole(self, node: Node, given: list[Operand]) -> Outcome:
        return Outcome((WHOLE,) * len(given), (WHOLE,) * len(results(node)))

    # -- views, copies, reductions ---------------------------------------------------------

    def _view(self, node: Node, given: list[Operand]) -> Outcome | None:
        follow = LINEAR_VIEWS.get(node.target) or ALONG[node.target]
        source, count = given[0], len(results(node))
        if len(given) > 1:
            return None
        match source.state:
            case Axis() as axis:
                found: Followed | None = follow(node, axis)
                if found is None:
                    return None
                if found.refine:
                    return Outcome((WHOLE,), (WHOLE,) * count, refine=found.refine)
                if found.in_step:
                    for section in axis.sections:
                        self.groups.unite(axis.sections[0].group, section.group)
                return Outcome((axis,), tuple(self._state(a) for a in found.results), found.resizes)
            case "free" if count == 1 and node.target in LINEAR_VIEWS:
                return Outcome((FREE,), (FREE,))
            case "partial" if node.target in LINEAR_VIEWS:
                return Outcome((PARTIAL,), (PARTIAL,) * count)
        return None

    def _state(self, axis: Axis) -> State:
        """An axis, or WHOLE where every rank holds all of its sections."""
        return WHOLE if all(self.groups.kept(section.group) for section in axis.sections) else axis

    # -- pointwise -------------------------------------------------------------------------

    def _pointwise(self, node: Node, given: list[Operand]) -> Outcome | None:
        if not given:
            return None
        out = results(node)[0].dim()
        axes = [_shifted(o.state, out - len(o.shape)) for o in given if isinstance(o.state, Axis)]
        if axes:
            axis = axes[0]
            wants = tuple(self._aligned(o, axis, out - len(o.shape)) for o in given)
            return Outcome(wants, (axis,))
        if len(given) == 1 and given[0].state == FREE:
            return Outcome((FREE,), (FREE,))
        partial = [o.state == PARTIAL for o in given]
        if any(partial) and _keeps_sums(node, partial):
            return Outcome(tuple(PARTIAL if p else WHOLE for p in partial), (PARTIAL,))
        return None

    def _aligned(self, operand: Operand, axis: Axis, shift: int) -> State:
        """How an operand must be held beside an axis of the result: cut alike, unless it is broadcast."""
        dim = axis.dim - shift
        if dim < 0 or operand.shape[dim] == 1:
            return WHOLE
        want = axis.moved(dim)
        if isinstance(operand.state, Axis):
            self.unite(operand.state, want)
        return want

    def unite(self, one: Axis, other: Axis) -> None:
        """Divides two axes in step from now on, if they are laid out alike."""
        if alike(one, other):
            for a, b in zip(one.sections, other.sections, strict=True):
                self.groups.unite(a.group, b.group)

    def _cat(self, node: Node, given: list[Operand]) -> Outcome | None:
        tensors = list(given)
        along = int(node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0))  # type: ignore[arg-type]
        along %= len(tensors[0].shape)
        axes = [o.state for o in tensors if isinstance(o.state, Axis)]
        if not axes:
            return None
        if axes[0].dim != along:
            return Outcome(tuple(self._aligned(o, axes[0], 0) for o in tensors), (axes[0],))
        if len(axes) != len(tensors) or any(a.dim != along or a.outer != Count() for a in axes):
            return None
        joined = tuple(section for axis in axes for section in axis.sections)
        return Outcome(tuple(axes), (Axis(along, joined),))

    # -- declared rules ----------------------------------------------------------------------

    def _declared(
        self,
        node: Node,
        declared: OpDef,
        given: list[Operand],
        divide: bool,
        sections: Cuts | None,
    ) -> Outcome | None:
        if any(isinstance(o.state, Axis) and o.state.outer != Count() for o in given):
            return self._by_rows(node, declared, given)
        rule = self._choose(node, declared, given, divide)
        if rule is None:
            return self._pointwise(node, given) if declared.pointwise else None
        begins = not any(isinstance(o.state, Axis) for o in given)
        cut = Cut(self.groups, node, rule, given, sections if begins else None)
        wants = tuple(cut.want(o) for o in given)
        for operand, want in zip(given, wants, strict=True):
            if isinstance(want, Axis):
                for section in want.sections:
                    self.groups.limit(section.group, section.size)
                if isinstance(operand.state, Axis):
                    self.unite(operand.state, want)
        return Outcome(wants, cut.results(), rule=rule, seed=begins)

    def _by_rows(self, node: Node, declared: OpDef, given: list[Operand]) -> Outcome | None:
        """Where heads are merged with tokens: a rule that divides every such operand as it is."""
        if declared.pointwise:
            return self._pointwise(node, given)
        for rule in declared.shards:
            held = [rule.operands.get(o.name, WHOLE) for o in given]
            fit = {_fit(o, h) for o, h in zip(given, held, strict=True)}
            if (rule.when is not None and not rule.when(Call(node, {}))) or not fit <= {"match", "same"}:
                continue
            axes = [o.state for o in given if isinstance(o.state, Axis)]
            if all(isinstance(r, int) for r in rule.results) and all(alike(a, axes[0]) for a in axes):
                for axis in axes:
                    self.unite(axes[0], axis)
                dims = zip(rule.results, results(node), strict=True)
                found = tuple(axes[0].moved(int(r) % out.dim()) for r, out in dims)
                wants = tuple(o.state if isinstance(o.state, Axis) else WHOLE for o in given)
                return Outcome(wants, found, rule=rule)
        return None

    def _choose(self, node: Node, declared: OpDef, given: list[Operand], divide: bool) -> ShardRule | None:
        """The first rule that takes the operands as they are, or else, where some operand is divided as a
        rule wants it, the rule that the fewest others have to be gathered for."""
        call = Call(node, {})
        active = any(isinstance(o.state, Axis) for o in given)
        nearest: tuple[int, ShardRule] | None = None
        for rule in declared.shards:
            if (rule.when is not None and not rule.when(call)) or self._unwanted(rule):
                continue
            fit = [_fit(o, rule.operands.get(o.name, WHOLE)) for o in given]
            if "never" in fit or not self._divisible(rule, given):
                continue
            gathers = fit.count("no")
            if active and "match" in fit and (nearest is None or gathers < nearest[0]):
                nearest = (gathers, rule)
            if active or not divide or rule.name == "replicated":
                continue
            if "slice" not in fit and "free" in fit:
                return rule
        return nearest[1] if nearest else None

    def _unwanted(self, rule: ShardRule) -> bool:
        """Of the two ways to divide experts, the one that was not asked for."""
        return rule.name == "experts" and bool(rule.first) != self.ep

    @staticmethod
    def _divisible(rule: ShardRule, given: Iterable[Operand]) -> bool:
        """Only static sizes of more than one can be divided."""
        sizes = [o.shape[dim] for o in given if (dim := held_dim(rule.operands.get(o.name), o)) is not None]
        return all(isinstance(size, int) for size in sizes) and any(size > 1 for size in sizes)


def _fit(operand: Operand, held: Held) -> str:
    """match: as it is. free: nothing to do. slice: ranks drop what they hold too much of. no: a gather.
    never: a whole value cannot become a partial sum."""
    dim = held_dim(held, operand)
    if dim is not None and operand.shape[dim] == 1:
        dim = None
        held = WHOLE
    match operand.state:
        case Axis() as axis:
            return "match" if axis.dim == dim else "no"
        case "free":
            return "free" if held != WHOLE else "same"
        case "partial" if held == PARTIAL:
            return "match"
        case _:
            return "never" if held == PARTIAL else ("slice" if dim is not None else "same")


def _shifted(axis: Axis, by: int) -> Axis:
    return axis.moved(axis.dim + by)


def _pointwise(node: Node, declared: OpDef | None) -> bool:
    if declared is not None and declared.pointwise:
        return True
    tags: Iterable[Any] = getattr(node.target, "tags", ())
    return torch.Tag.pointwise in tags


def _keeps_sums(node: Node, partial: list[bool]) -> bool:
    if node.target in _SUMS:
        return all(partial)
    if node.target in _PRODUCTS:
        return sum(partial) == 1
    return node.target in _QUOTIENTS and partial == [True, *[False] * (len(partial) - 1)]
