"""How a value is held by the ranks of a tensor-parallel group, before any degree is chosen.

A value is WHOLE (every rank has all of it), PARTIAL (the ranks' values add up to it), or divided
along an `Axis`. Parameters and caches start as FREE: each rank may load whatever part its consumer
wants, at no cost. An axis is a dimension made of sections laid end to end, each divided by itself
(q | k | v of a merged projection); most have one. Each section belongs to a *group*: everything
that must be divided in step. A group knows into how many whole pieces it can be divided
(`units`: heads, columns, vocabulary rows), the greatest common divisor of what was asked of it.

Grouped-query attention ties two groups: eight KV heads serve 64 query heads. The KV group is then
*shared* by the query group: at a degree above its units, ranks in a row hold the same piece.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Final, TypeAlias

import sympy
from torch import SymInt

from planc.errors import InvalidField

WHOLE: Final = "whole"
PARTIAL: Final = "partial"
FREE: Final = "free"


@dataclass(frozen=True, slots=True)
class Count:
    """A product of sizes: `number` times powers of size symbols. Exact, and cheap to divide."""

    number: int = 1
    symbols: tuple[tuple[str, int], ...] = ()

    def times(self, other: Count) -> Count:
        powers = Counter(dict(self.symbols))
        powers.update(dict(other.symbols))
        return Count(self.number * other.number, tuple(sorted(powers.items())))

    def over(self, other: Count) -> Count | None:
        """self / other; None where that is no product of sizes."""
        powers = Counter(dict(self.symbols))
        powers.subtract(dict(other.symbols))
        if other.number == 0 or self.number % other.number or min(powers.values(), default=0) < 0:
            return None
        return Count(self.number // other.number, tuple(sorted((s, p) for s, p in powers.items() if p)))


@dataclass(frozen=True, slots=True)
class Section:
    """A part of a divided dimension: its full size, and the group that divides it."""

    size: int
    group: int


@dataclass(frozen=True, slots=True)
class Axis:
    """A divided dimension (counted from the front).

    outer: what was merged into the dimension in front of the divided part: [B, S, heads, d] seen as
    [B S heads, d] is divided along dimension 0 with outer = B S. A rank's rows are then no block of
    the whole, so such an axis can be worked on row by row and unmerged again, but not be gathered.
    """

    dim: int
    sections: tuple[Section, ...]
    outer: Count = Count()

    @property
    def size(self) -> int:
        return sum(section.size for section in self.sections)

    def moved(self, dim: int) -> Axis:
        return Axis(dim, self.sections, self.outer)

    def scaled(self, numerator: int, denominator: int = 1) -> Axis | None:
        """Every section's size times numerator / denominator; None where that is not whole."""
        if any(section.size * numerator % denominator for section in self.sections):
            return None
        grown = (Section(s.size * numerator // denominator, s.group) for s in self.sections)
        return Axis(self.dim, tuple(grown), self.outer)


#: An axis, or one of WHOLE, PARTIAL, FREE.
State: TypeAlias = Axis | str
Size: TypeAlias = "int | SymInt"


class Groups:
    """Union-find over groups, each with its units and what it is shared by. One per analysis."""

    def __init__(self) -> None:
        self._parent: list[int] = []
        self._units: list[int] = []
        self._noun: list[str] = []
        self._shared_by: dict[int, int] = {}

    def new(self, units: int, noun: str) -> int:
        self._parent.append(len(self._parent))
        self._units.append(units)
        self._noun.append(noun)
        return len(self._parent) - 1

    def find(self, group: int) -> int:
        while self._parent[group] != group:
            group = self._parent[group]
        return group

    def unite(self, one: int, other: int) -> None:
        """Both are divided in step from now on."""
        a, b = self.find(one), self.find(other)
        if a == b:
            return
        self._parent[b] = a
        if self._units[b] < self._units[a]:  # the more telling word: "2 key heads", not "32 columns"
            self._noun[a] = self._noun[b]
        self._units[a] = math.gcd(self._units[a], self._units[b])
        if b in self._shared_by and a not in self._shared_by:
            self._shared_by[a] = self._shared_by[b]

    def limit(self, group: int, pieces: int, noun: str = "") -> None:
        """A dimension of `pieces` indivisible entries is divided by this group."""
        root = self.find(group)
        self._units[root] = math.gcd(self._units[root], pieces)
        if noun and self._noun[root] != noun and self._units[root] == pieces:
            self._noun[root] = noun

    def share(self, group: int, by: int) -> None:
        """Pieces of `group` may be held by several ranks that hold different pieces of `by`."""
        if self.find(group) != self.find(by):
            self._shared_by[self.find(group)] = by

    def keep(self, group: int) -> None:
        """Never divide this group: every rank holds all of it."""
        root = self.find(group)
        self._units[root] = 1
        self._shared_by[root] = root

    def kept(self, group: int) -> bool:
        return self.shared(group) and self.units(group) == 1

    def units(self, group: int) -> int:
        return self._units[self.find(group)]

    def shared(self, group: int) -> bool:
        return self.find(group) in self._shared_by

    def noun(self, group: int) -> str:
        return self._noun[self.find(group)]

    def ways(self, group: int, tp: int) -> int:
        """Distinct pieces among tp ranks: tp, or fewer where a shared group is replicated.

        Raises InvalidField where tp ranks cannot hold whole pieces.
        """
        units = self.units(group)
        if units % tp == 0:
            return tp
        if self.shared(group) and tp % units == 0:
            return units
        raise InvalidField(
            where="tensor parallelism",
            field="tp",
            value=tp,
            reason=f"it does not divide {units} {self.noun(group)}",
            mend=f"Use a degree that divides {units}"
            + (f", or a multiple of {units}." if self.shared(group) else "."),
        )


def count(sizes: Iterable[Size]) -> Count:
    """The product of sizes."""
    total = Count()
    for size in sizes:
        total = total.times(_count(size.node.expr) if isinstance(size, SymInt) else Count(int(size)))
    return total


@lru_cache(maxsize=4096)
def _count(size: sympy.Expr) -> Count:
    number, rest = size.as_coeff_Mul()
    powers: Counter[str] = Counter()
    if rest != 1:
        for factor in sympy.Mul.make_args(rest):
            base, exponent = factor.as_base_exp()
            whole = exponent.is_Integer and exponent > 0
            powers[str(base if whole else factor)] += int(exponent) if whole else 1
    return Count(int(number), tuple(sorted(powers.items())))
