"""The rows and layer classes of a cost table, read off the phase graphs of a model.

Rows are taken from one layer of each class, in a thin graph that holds two of each; counts,
parameters and layer numbers are those of the whole model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from operator import attrgetter

from torch import nn
from torch._ops import OpOverload
from torch.fx import Node

from planc.cost_model.table import CostTable, FusionOffer, LayerClass, Phase, Row, Shard
from planc.ir.graph import Graph
from planc.ir.layers import module_path, relative
from planc.ir.opdef import Call, OpDef, declaration
from planc.ir.ops.aten import is_parameter, moved
from planc.ir.text import show
from planc.ir.trace.fingerprint import text_fingerprint
from planc.ir.work import Work
from planc.passes.fold import LayerGroup, fold
from planc.passes.fusion import offers
from planc.passes.model_facts import facts
from planc.passes.parallel import shard_rows
from planc.passes.phases import Phases
from planc.passes.pipeline import FRONT, run
from planc.passes.quantize_scope import keeps_precision
from planc.passes.thin import thin


def table_of(traced: Graph, fingerprint: str | None) -> CostTable:
    """The cost table of a traced graph; without a fingerprint, that of its text is taken."""
    front = run(traced, FRONT)
    deep = fold(front)
    graphs = _phases(thin(front, deep))
    groups = {phase: fold(graph) for phase, graph in graphs.items()}
    rows = {phase: tuple(_rows(graph, groups[phase])) for phase, graph in graphs.items()}
    last: Phase = "decode" if "decode" in graphs else "prefill"
    classes = tuple(_classes(graphs[last], groups[last], deep, rows[last]))
    return CostTable(
        model=facts(front, classes, rows[last]),
        fingerprint=fingerprint or text_fingerprint(show(traced)),
        classes=classes,
        rows=rows,
        fusions=_offers(graphs),
    )


def _phases(front: Graph) -> dict[Phase, Graph]:
    """The graphs that rows are taken from, by phase."""
    if front.source.kind != "causal_lm":
        return {"prefill": front}
    return {"prefill": run(front, [Phases("prefill")]), "decode": run(front, [Phases("decode")])}


def _offers(graphs: Mapping[Phase, Graph]) -> tuple[FusionOffer, ...]:
    """The fusions of both phases; the same one of both is offered once."""
    found: dict[tuple[str, str], FusionOffer] = {}
    for graph in graphs.values():
        for offer in offers(graph):
            found.setdefault((offer.name, offer.layer_class), offer)
    return tuple(found.values())


# -- rows --------------------------------------------------------------------------------


def _rows(graph: Graph, groups: Sequence[LayerGroup]) -> Iterator[Row]:
    """One row per distinct call of the first layer of each class; calls that move no byte have none."""
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
    if not isinstance(node.target, OpOverload):
        return None
    call = Call(node, graph.symbols)
    declared = declaration(node)
    if declared is None:
        reads, weights, writes = moved(call)
        work = Work("generic", weights=weights, reads=reads, writes=writes)
    else:
        work = declared.work(call)
    if work.family == "view":
        return None
    site = relative(module_path(node), group.paths[0] or None)
    return Row(group.name, site, str(node.target.name()), 1, work, shard, _quantizable(call, declared))


def _quantizable(call: Call, declared: OpDef | None) -> tuple[str, ...]:
    """The operands that may take another format: weights that are parameters and that `Quantize` would
    take, activations only beside such a weight, caches."""
    if declared is None:
        return ()
    given = {name: call.arg(name) for name in declared.quantizable}
    found = {role for name, role in declared.quantizable.items() if _takes(given[name], role)}
    if "weight" in declared.quantizable.values() and "weight" not in found:
        found.discard("activation")
    return tuple(sorted(found))


def _takes(given: object, role: str) -> bool:
    if not isinstance(given, Node) or role != "weight":
        return isinstance(given, Node)
    return is_parameter(given) and not keeps_precision(str(given.target).rpartition(".")[0])


# -- classes -----------------------------------------------------------------------------


def _classes(
    graph: Graph, groups: Sequence[LayerGroup], deep: Sequence[LayerGroup], rows: Sequence[Row]
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


def _parameters(graph: Graph, nodes: Sequence[Node]) -> Mapping[str, int]:
    """Elements of each parameter that these calls use; buffers are no parameters."""
    found: dict[str, int] = {}
    for node in nodes:
        for used in node.all_input_nodes:
            if is_parameter(used):
                held = attrgetter(str(used.target))(graph.module)
                if isinstance(held, nn.Parameter):
                    found[str(used.target)] = held.numel()
    return found


def _entries(graph: Graph, nodes: Sequence[Node]) -> tuple[int, int]:
    """Cache elements that a layer appends per token, and state elements that it keeps per sequence."""
    used = {operand.name for node in nodes for operand in node.all_input_nodes if operand.op == "placeholder"}
    sizes = {"paged": 0, "state": 0}
    for cache in graph.caches:
        if cache.name in used:
            sizes[cache.kind] += prod(cache.entry)
    return sizes["paged"], sizes["state"]


def _span(rows: Sequence[Row]) -> str:
    """How far back the layer must keep tokens: the span of the keys that its attention reads."""
    spans = {name[2:] for row in rows for name in row.work.kv_reads.features() if name.startswith("K:")}
    spans = spans or {name[2:] for row in rows for name in row.work.flops.features() if name.startswith("P:")}
    return "full" if len(spans) != 1 else spans.pop()
