"""Tabulate: from a traced graph to the cost table, which is all that the search reads.

    traced --FRONT--> canonical --phases--> prefill, decode --fold--> one layer of each class
        --declared work, shardings, fusions--> rows

Encoders and plain modules have no phases: their rows are those of the traced graph, as "prefill".
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from planc.cost_model.table import CostTable, FusionOffer, LayerClass, Phase, Row, Shard
from planc.ir.trace import cache as entries
from planc.ir.trace import kind_of
from planc.ir.trace.fingerprint import fingerprint, text_fingerprint

if TYPE_CHECKING:
    from torch.fx import Node

    from planc.ir.graph import Graph
    from planc.passes.fold import LayerGroup

_LOG = logging.getLogger("planc")


def load_table(
    source: str | Path, *, trust_remote_code: bool = False, cache: Path | None = None
) -> CostTable:
    """The cost table of a model: from the cache, or traced and tabulated now and stored.

    On a hit nothing heavy is imported, torch least of all. Factories are code, whose identity
    planc cannot know, and are traced each time. `cache` as in `planc.ir.trace.cache.folder`.

    Raises what `planc.ir.trace.trace` raises.
    """
    if kind_of(source) == "factory":
        return _make(source, trust_remote_code, cache, None)
    name = f"{entries.key(source)}.table.json"
    text = entries.read(cache, name)
    if text is not None:
        try:
            return CostTable.from_json(text)
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            _LOG.warning("cache entry %s does not load (%s); it is made anew", name, error)
    table = _make(source, trust_remote_code, cache, fingerprint(source))
    entries.write(cache, name, table.to_json())
    return table


def tabulate(traced: Graph, *, model_fingerprint: str | None = None) -> CostTable:
    """The cost table of a traced graph (one that no pass has touched).

    Parameters count once however many names they have; a class's are those of one of its layers.
    Raises UnsupportedModel where a language model's phases cannot be derived.
    """
    from planc.ir.text import show
    from planc.passes.fold import fold
    from planc.passes.model_facts import facts
    from planc.passes.pipeline import FRONT, run
    from planc.passes.thin import thin

    front = run(traced, FRONT)
    groups = fold(front)
    graphs = _phases(thin(front, groups))
    folded = {phase: fold(graph) for phase, graph in graphs.items()}
    rows = {phase: tuple(_rows(graph, folded[phase])) for phase, graph in graphs.items()}
    last: Phase = "decode" if "decode" in graphs else "prefill"
    classes = tuple(_classes(graphs[last], folded[last], groups, rows[last]))
    return CostTable(
        model=facts(front, classes, rows[last]),
        fingerprint=model_fingerprint or text_fingerprint(show(traced)),
        classes=classes,
        rows=rows,
        fusions=_offers(graphs),
    )


def _make(source: str | Path, trust: bool, cache: Path | None, model_fingerprint: str | None) -> CostTable:
    from planc.ir.trace import trace

    graph = trace(source, trust_remote_code=trust, cache=cache)
    return tabulate(graph, model_fingerprint=model_fingerprint)


def _phases(front: Graph) -> dict[Phase, Graph]:
    """The graphs that rows are taken from, by phase."""
    from planc.passes.phases import Phases
    from planc.passes.pipeline import run

    if front.source.kind != "causal_lm":
        return {"prefill": front}
    return {"prefill": run(front, [Phases("prefill")]), "decode": run(front, [Phases("decode")])}


# -- rows --------------------------------------------------------------------------------


def _rows(graph: Graph, groups: tuple[LayerGroup, ...]) -> Iterator[Row]:
    """One row per distinct call of the first layer of each class; calls that move no byte have none."""
    from planc.passes.parallel import shard_rows

    shards = shard_rows(graph)
    for group in groups:
        counted: Counter[str] = Counter()
        first: dict[str, Row] = {}
        for node in group.nodes:
            row = _row(graph, group, node, shards.get(node, Shard()))
            if row is not None:
                counted[repr(row)] += 1
                first.setdefault(repr(row), row)
        for text, row in first.items():
            yield Row(row.layer_class, row.site, row.op, counted[text], row.work, row.shard, row.quantizable)


def _row(graph: Graph, group: LayerGroup, node: Node, shard: Shard) -> Row | None:
    from torch import Tensor
    from torch._ops import OpOverload

    from planc.ir.layers import module_path, relative
    from planc.ir.opdef import Call, declaration
    from planc.ir.ops.aten import moved
    from planc.ir.work import Work

    if not isinstance(node.target, OpOverload) or not isinstance(node.meta["val"], Tensor | tuple | list):
        return None
    call = Call(node, graph.symbols)
    declared = declaration(node)
    if declared is not None:
        work = declared.work(call)
        roles = tuple(
            sorted({role for name, role in declared.quantizable.items() if _takes(call, name, role)})
        )
    else:
        reads, weights, writes = moved(call)
        work, roles = Work("generic", weights=weights, reads=reads, writes=writes), ()
    if work.family == "view":
        return None
    site = relative(module_path(node), group.paths[0] or None)
    return Row(group.name, site, str(node.target.name()), 1, work, shard, roles)


def _takes(call: object, name: str, role: str) -> bool:
    """Whether an operand that may take another format is there; a weight must be a parameter that
    `Quantize` would take."""
    from torch.fx import Node

    from planc.ir.opdef import Call
    from planc.passes.quantize_scope import keeps_precision

    assert isinstance(call, Call)
    given = call.arg(name)
    if not isinstance(given, Node) or role != "weight":
        return isinstance(given, Node)
    return given.op == "get_attr" and not keeps_precision(str(given.target).rpartition(".")[0])


# -- classes -----------------------------------------------------------------------------


def _classes(
    graph: Graph, groups: tuple[LayerGroup, ...], deep: tuple[LayerGroup, ...], rows: tuple[Row, ...]
) -> Iterator[LayerClass]:
    """Layer classes with what they hold; a tied weight belongs to the class that first uses it.

    `groups` are those of the thin graph, `deep` of the whole model.
    """
    whole = {path: group for group in deep for path in group.paths if path}
    owned: set[str] = set()
    for group in groups:
        spread = {whole[path].paths: whole[path] for path in group.paths if path}
        mine = [row for row in rows if row.layer_class == group.name]
        cached = [row for row in mine if row.work.kv_writes]
        parameters = _parameters(graph, group.nodes)
        paged, state = _entries(graph, group.nodes)
        yield LayerClass(
            name=group.name,
            count=sum(each.count for each in spread.values()) or 1,
            layers=tuple(sorted(layer for each in spread.values() for layer in each.layers)),
            parameters=sum(size for name, size in parameters.items() if name not in owned),
            kv_elements=paged,
            kv_span=_span([row for row in mine if row.work.family == "attention"]) if paged else "",
            kv_units=min((row.shard.kv_units for row in cached), default=0),
            state_elements=state,
        )
        for member in group.members:
            owned.update(_parameters(graph, member))


def _parameters(graph: Graph, nodes: tuple[Node, ...]) -> Mapping[str, int]:
    """Elements of each parameter that these calls use; buffers are no parameters."""
    from torch.nn import Parameter

    found: dict[str, int] = {}
    for node in nodes:
        for used in node.all_input_nodes:
            if used.op == "get_attr":
                held = _attribute(graph, str(used.target))
                if isinstance(held, Parameter):
                    found[str(used.target)] = held.numel()
    return found


def _attribute(graph: Graph, name: str) -> object:
    from operator import attrgetter

    return attrgetter(name)(graph.module)


def _entries(graph: Graph, nodes: tuple[Node, ...]) -> tuple[int, int]:
    """Cache elements that a layer appends per token, and state elements that it keeps per sequence."""
    from math import prod

    used = {operand.name for node in nodes for operand in node.all_input_nodes if operand.op == "placeholder"}
    sizes = {"paged": 0, "state": 0}
    for cache in graph.caches:
        if cache.name in used:
            sizes[cache.kind] += prod(cache.entry)
    return sizes["paged"], sizes["state"]


def _span(rows: list[Row]) -> str:
    """How far back the layer must keep tokens: the span of the keys that its attention reads."""
    spans = {name[2:] for row in rows for name in row.work.kv_reads.features() if name.startswith("K:")}
    spans = spans or {name[2:] for row in rows for name in row.work.flops.features() if name.startswith("P:")}
    return "full" if len(spans) != 1 else spans.pop()


def _offers(graphs: Mapping[Phase, Graph]) -> tuple[FusionOffer, ...]:
    """The fusions of both phases; the same one of both is offered once."""
    from planc.passes.fusion import offers

    found: dict[tuple[str, str], FusionOffer] = {}
    for graph in graphs.values():
        for offer in offers(graph):
            found.setdefault((offer.name, offer.layer_class), offer)
    return tuple(found.values())
