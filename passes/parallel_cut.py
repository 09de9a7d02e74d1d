"""One application of a declared rule: which sections every dimension that it names is divided in."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.fx import Node

from planc.ir.opdef import ShardRule
from planc.passes.parallel_operands import Operand, held_dim, results
from planc.passes.parallel_state import FREE, PARTIAL, WHOLE, Axis, Groups, Section, State

NOUNS = {
    "column": "columns",
    "row": "rows",
    "heads": "heads",
    "experts": "columns of each expert",
    "vocab": "vocabulary rows",
}


@dataclass(frozen=True, slots=True)
class Cuts:
    """Sections that a weight is laid out in (q | k | v): their sizes, and those that stay whole."""

    sizes: tuple[int, ...]
    kept: frozenset[int] = frozenset()


class Cut:
    """One application of a rule: which sections every named dimension gets.

    Dimensions of one size are cut alike. In a rule by heads, activations with fewer heads than the
    most (keys and values of grouped-query attention) get a group of their own, shared by the large
    one; weights and caches follow whichever their size fits.
    """

    def __init__(
        self,
        groups: Groups,
        node: Node,
        rule: ShardRule,
        given: list[Operand],
        sections: Cuts | None,
    ) -> None:
        self.groups, self.node, self.rule = groups, node, rule
        self._sections: dict[int, tuple[Section, ...]] = {}
        for operand in given:
            if (
                isinstance(operand.state, Axis)
                and held_dim(rule.operands.get(operand.name), operand) is not None
            ):
                self._sections.setdefault(operand.state.size, operand.state.sections)
        self._base = self._base_size(given)
        self._noun = "experts" if rule.first else NOUNS.get(rule.name, "pieces")
        if self._base not in self._sections:
            cut = sections if sections and sum(sections.sizes) == self._base else Cuts((self._base,))
            self._sections[self._base] = tuple(self._section(i, cut) for i in range(len(cut.sizes)))
        if rule.name == "heads":
            self._share(given)

    def _section(self, index: int, cut: Cuts) -> Section:
        size = cut.sizes[index]
        group = self.groups.new(size, self._noun)
        if index in cut.kept:
            self.groups.keep(group)
        return Section(size, group)

    def _base_size(self, given: list[Operand]) -> int:
        active: list[int] = []
        weights: list[int] = []
        for operand, dim in self._named(given):
            (weights if _is_weight(operand) else active).append(int(operand.shape[dim]))
        active += [int(out.shape[held % out.dim()]) for held, out in self._divided_results()]
        return max(active or weights)

    def _named(self, given: list[Operand]) -> Iterator[tuple[Operand, int]]:
        for operand in given:
            dim = held_dim(self.rule.operands.get(operand.name), operand)
            if dim is not None and not self._in_halves(operand):
                yield operand, dim

    def _divided_results(self) -> Iterator[tuple[int, torch.Tensor]]:
        for held, out in zip(self.rule.results, results(self.node), strict=True):
            if isinstance(held, int):
                yield held, out

    def _share(self, given: list[Operand]) -> None:
        base = self._sections[self._base]
        for section in base:
            self.groups.limit(section.group, section.size, self._noun if len(base) == 1 else "")
        for operand, dim in self._named(given):
            size = int(operand.shape[dim])
            if _is_weight(operand) or size == 1 or size >= self._base:
                continue
            if size not in self._sections:
                self._sections[size] = (Section(size, self.groups.new(size, "KV heads")),)
            if len(base) == len(self._sections[size]) == 1:
                small = self._sections[size][0].group
                self.groups.share(small, by=base[0].group)
                self.groups.limit(small, size, "KV heads")

    def _in_halves(self, operand: Operand) -> bool:
        held = self.rule.operands.get(operand.name)
        return isinstance(held, str) and held.startswith("halves:")

    def want(self, operand: Operand) -> State:
        held = self.rule.operands.get(operand.name, WHOLE)
        dim = held_dim(held, operand)
        if dim is None:
            return PARTIAL if held == PARTIAL else WHOLE
        size = int(operand.shape[dim])
        if self._in_halves(operand):
            half = self._at(size // 2)
            return Axis(dim, half + half)
        return Axis(dim, self._at(size)) if size > 1 else WHOLE

    def results(self) -> tuple[State, ...]:
        out: list[State] = []
        for held, tensor in zip(self.rule.results, results(self.node), strict=True):
            if not isinstance(held, int):
                out.append(PARTIAL if held == PARTIAL else WHOLE)
                continue
            dim = held % tensor.dim()
            size = int(tensor.shape[dim])
            out.append(Axis(dim, self._at(size)) if size > 1 else WHOLE)
        return tuple(out)

    def _at(self, size: int) -> tuple[Section, ...]:
        if size in self._sections:
            return self._sections[size]
        base = self._sections[self._base]
        assert len(base) == 1 or size % self._base == 0, f"{self.node}: {size} in step with {self._base}"
        if len(base) == 1:
            return (Section(size, base[0].group),)
        return tuple(Section(s.size * size // self._base, s.group) for s in base)


def _is_weight(operand: Operand) -> bool:
    """FREE and without a symbolic size: a parameter, or what was made of one; caches have blocks."""
    return operand.state == FREE and all(isinstance(size, int) for size in operand.shape)
