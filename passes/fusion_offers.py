"""What fusions would save, found by applying them: so search and code cannot drift apart."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from operator import getitem

from torch.fx import Node

from planc.cost_model.table import FusionOffer
from planc.ir.graph import Graph
from planc.ir.layers import layer_path, module_path, relative
from planc.ir.opdef import Call, declaration
from planc.ir.work import NONE, Amount, Work
from planc.passes.fold import fold
from planc.passes.fusion_rules import RULES, fuse


@dataclass(slots=True)
class _Saved:
    """Sums over the replacements of one fusion in one layer."""

    launches: int = 0
    reads: Amount = NONE
    writes: Amount = NONE
    sites: set[str] = field(default_factory=set)


def offers(graph: Graph) -> tuple[FusionOffer, ...]:
    """One offer per fusion and layer class that it matches in, each as if applied alone.

    A replacement belongs to the layer of its first call (of a residual addition and the next layer's
    norm: the layer that adds). Where layers of one class differ, because one of them borders on
    something else, the one that saves most launches speaks for the class.
    """
    member_of = {
        node.name: (group.name, index)
        for group in fold(graph)
        for index, member in enumerate(group.members)
        for node in member
    }
    classes = list(dict.fromkeys(name for name, _ in member_of.values()))
    found: list[FusionOffer] = []
    for rule in RULES:
        saved = _saved_by(rule.name, graph, member_of)
        for layer_class in classes:
            layers = [each for (name, _), each in saved.items() if name == layer_class]
            if layers:
                best = max(layers, key=lambda each: each.launches)
                sites = tuple(sorted(best.sites))
                found.append(
                    FusionOffer(rule.name, layer_class, sites, best.launches, best.reads, best.writes)
                )
    return tuple(found)


_Member = tuple[str, int]  # layer class, which of its layers


def _saved_by(name: str, graph: Graph, member_of: Mapping[str, _Member]) -> dict[_Member, _Saved]:
    """What one fusion saves in each layer; `member_of` is by name of the call."""
    saved: defaultdict[_Member, _Saved] = defaultdict(_Saved)
    places = dict(member_of)

    def observe(old: tuple[Node, ...], new: tuple[Node, ...]) -> None:
        place = places[old[0].name]
        places.update((node.name, place) for node in new)  # which a later step of the rule may replace
        _add(saved[place], old, new, graph.symbols)

    fuse(graph, frozenset({name}), observe)
    return saved


def _add(total: _Saved, old: tuple[Node, ...], new: tuple[Node, ...], symbols: Mapping[str, str]) -> None:
    for node, sign in [*((n, 1) for n in old), *((n, -1) for n in new)]:
        if node.target is getitem:
            continue  # names a result, computes nothing
        declared = declaration(node)
        assert declared is not None, f"fusions know {node.target}, so it is declared"
        work = declared.work(Call(node, symbols))
        total.launches += sign * launches(work)
        total.reads = total.reads + work.reads * sign
        total.writes = total.writes + work.writes * sign
        if sign > 0 and work.family != "view":
            total.sites.add(relative(module_path(node), layer_path(node)))


def launches(work: Work) -> int:
    """Kernels of one call: views have none; attention that also appends to its cache has two."""
    if work.family == "view":
        return 0
    return 2 if work.family == "attention" and work.kv_writes and work.kv_reads else 1
