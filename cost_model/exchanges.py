"""Collectives of one rank: sums and gathers of tensor parallelism, exchanges of tokens with experts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

from planc.cost_model import context_parallel
from planc.cost_model.formats import fmt
from planc.cost_model.local import activation_format, unquantized
from planc.cost_model.rank_ops import Collective, parts
from planc.cost_model.shape import EngineShape
from planc.cost_model.table import CostTable, Row
from planc.ir.work import Amount

_NORM = "planc::rms_norm"
_SQUARES = 4.0  # bytes of a row's sum of squares


def collectives(
    table: CostTable, shape: EngineShape, *, spread: bool = False, quantized: Sequence[str] = ()
) -> list[Collective]:
    """All collectives of a layer of each class, besides the hand-over between pipeline stages.

    `spread` says that the ranks which share the experts lie on several nodes, `quantized` in which formats
    inputs of experts are gathered instead of in the wide one. Products that are gathered to be normalized
    over their full width are not: engines add up the squares of the ranks' own columns instead, those of
    queries and keys in one all-reduce.
    """
    found: list[Collective] = []
    wide = fmt(unquantized(shape)).bytes
    rows = parts(table)
    normed = {id(one) for (_, one), (_, two) in pairwise(rows) if two.op == _NORM}
    summed: set[tuple[str, str]] = set()
    for part, row in rows:
        make = partial(Collective, row.layer_class, row.site, part, calls=float(row.calls))
        if row.shard.kind == "experts" and shape.dp > 1:
            found.extend(_exchange(make, row, shape, table.model.hidden, wide, spread, quantized))
        if row.work.family == "attention" and shape.cp > 1:
            found.extend(
                Collective(
                    row.layer_class, row.site, one.part, one.kind, float(row.calls), shape.cp, one.size
                )
                for one in context_parallel.exchanges(row, part, shape)
            )
        if not row.shard.collective or shape.tp == 1:
            continue
        if row.shard.collective == "all_gather" and id(row) in normed:
            block = row.layer_class, row.site.rpartition(".")[0]
            if block not in summed:
                found.append(make(kind="all_reduce", ranks=shape.tp, size=Amount({"T": 2.0 * _SQUARES})))
            summed.add(block)
        else:
            found.append(make(kind=row.shard.collective, ranks=shape.tp, size=row.shard.moved * wide))
    return found


def _exchange(
    make: Callable[..., Collective],
    row: Row,
    shape: EngineShape,
    width: int,
    wide: float,
    spread: bool,
    quantized: Sequence[str],
) -> list[Collective]:
    """Tokens of all dp ranks to the experts and sums back.

    In a node engines gather all tokens and scatter the sums unless told otherwise (vLLM's
    `allgather_reducescatter`, SGLang's `none`, TensorRT-LLM without an all-to-all). Over nodes whole experts
    want an all-to-all: a token goes once to each rank that has one of its top_k. Ranks that divide an
    expert's width all need its tokens, so they gather.
    """
    hidden, ranks = Amount({"T": float(width)}), shape.tp * shape.dp
    sent = activation_format(row, shape)
    if shape.ep == ranks > 1 and spread:
        copies = ranks * (1.0 - (1.0 - 1.0 / ranks) ** row.work.dims["top_k"]) / shape.tp
        return [
            make(kind="dispatch", ranks=ranks, size=hidden * (copies * fmt(sent).bytes)),
            make(kind="combine", ranks=ranks, size=hidden * (copies * wide)),
        ]
    gathered = fmt(sent).bytes if sent in quantized else wide
    return [
        make(kind="all_gather", ranks=shape.dp, size=hidden * (shape.dp * gathered)),
        make(kind="reduce_scatter", ranks=shape.dp, size=hidden * (shape.dp * wide)),
    ]
