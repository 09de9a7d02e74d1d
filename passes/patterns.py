"""Patterns over graphs, as data: what a cluster of calls looks like, and what to catch of it.

    silu = Call(aten.silu.default, Any("gate"))
    swiglu = Call(aten.mul.Tensor, silu, Any("up"), commutes=True)
    match(swiglu, node)  ->  {"gate": ..., "up": ...} or None

A pattern is matched from its last call backwards. The same name twice must catch the same thing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any as Anything

import torch
from torch.fx import Node

Caught = Mapping[str, Anything]


@dataclass(frozen=True, slots=True)
class Any:
    """Anything, caught under a name ("" catches nothing); `where` may refuse it."""

    name: str = ""
    where: Callable[[Anything], bool] | None = None


@dataclass(frozen=True, slots=True, init=False)
class Call:
    """A call of one of `targets` with these arguments, by place; further arguments are `rest`'s affair.

    commutes   the first two arguments may stand either way
    name       catches the node itself
    where      may refuse the node (its keyword arguments, say)
    """

    targets: tuple[Anything, ...]
    arguments: tuple[Pattern, ...]
    commutes: bool
    name: str
    where: Callable[[Node], bool] | None

    def __init__(
        self,
        targets: Anything,
        *arguments: Pattern,
        commutes: bool = False,
        name: str = "",
        where: Callable[[Node], bool] | None = None,
    ) -> None:
        put = object.__setattr__
        put(self, "targets", tuple(targets) if isinstance(targets, tuple | list) else (targets,))
        put(self, "arguments", arguments)
        put(self, "commutes", commutes)
        put(self, "name", name)
        put(self, "where", where)


@dataclass(frozen=True, slots=True)
class Either:
    """The first of several patterns that fits."""

    patterns: tuple[Pattern, ...]


@dataclass(frozen=True, slots=True)
class Through:
    """A pattern seen through any number of calls of `targets` (casts, copies, views)."""

    targets: tuple[Anything, ...]
    pattern: Pattern


Pattern = Any | Call | Either | Through | int | float | str | bool | None


def match(pattern: Pattern, found: Anything) -> Caught | None:
    """What the pattern catches, or None where it does not fit."""
    return next(_matches(pattern, found, {}), None)


def _matches(pattern: Pattern, found: Anything, caught: Caught) -> Iterator[Caught]:
    match pattern:
        case Any(name, where):
            if (where is None or where(found)) and _agrees(caught, name, found):
                yield {**caught, name: found} if name else caught
        case Call():
            if isinstance(found, Node) and found.op == "call_function" and found.target in pattern.targets:
                yield from _call(pattern, found, caught)
        case Either(patterns):
            for one in patterns:
                yield from _matches(one, found, caught)
        case Through(targets, inner):
            yield from _matches(inner, found, caught)
            if isinstance(found, Node) and found.op == "call_function" and found.target in targets:
                yield from _matches(pattern, found.args[0], caught)
        case _:
            if (
                not isinstance(found, Node)
                and type(found) in (type(pattern), int, float)
                and found == pattern
            ):
                yield caught


def _call(pattern: Call, node: Node, caught: Caught) -> Iterator[Caught]:
    if pattern.where is not None and not pattern.where(node):
        return
    if not _agrees(caught, pattern.name, node):
        return
    start = {**caught, pattern.name: node} if pattern.name else caught
    given = _arguments(node)[: len(pattern.arguments)]
    if len(given) < len(pattern.arguments):
        return
    orders = [given, [given[1], given[0], *given[2:]]] if pattern.commutes else [given]
    for order in orders:
        yield from _all(pattern.arguments, order, start)


def _all(patterns: Sequence[Pattern], found: Sequence[Anything], caught: Caught) -> Iterator[Caught]:
    if not patterns:
        yield caught
        return
    for partial in _matches(patterns[0], found[0], caught):
        yield from _all(patterns[1:], found[1:], partial)


def _arguments(node: Node) -> list[Anything]:
    """All arguments by place, defaults filled in where the op has a schema."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return list(node.args)
    specs = node.target._schema.arguments
    return [
        node.args[place] if place < len(node.args) else node.kwargs.get(spec.name, spec.default_value)
        for place, spec in enumerate(specs)
    ]


def _agrees(caught: Caught, name: str, found: Anything) -> bool:
    return (
        name not in caught or caught[name] is found or (not isinstance(found, Node) and caught[name] == found)
    )
