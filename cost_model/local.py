"""One rank's share of the table: rows divided by a shape, stages, and unique kernels.

Formulas follow Megatron-style tensor parallelism (Shoeybi et al. 2019) for `column`, `row`,
`heads` and `vocab`, and, for experts, ep groups of tp*dp/ep ranks: groups hold whole experts, and
the ranks of a group divide each one's width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from planc.cost_model.formats import fmt
from planc.cost_model.shape import EngineShape
from planc.cost_model.table import CostTable, LayerClass, Row

#: classes of count one that are no layers
_ENDS = ("embedding", "head")


@dataclass(frozen=True, slots=True)
class Factors:
    """What one rank does of a row: multipliers on the whole row's amounts."""

    flops: float
    weights: float
    reads: float
    writes: float
    kv: float
    n: float = 1.0
    k: float = 1.0
    heads: float = 1.0
    tokens: float = 1.0


def factors(row: Row, shape: EngineShape) -> Factors:
    """How a row divides in this shape; experts see the tokens of all dp ranks."""
    tp, kind = shape.tp, row.shard.kind
    gemm = row.work.family == "gemm"
    if kind == "experts":
        ranks = shape.tp * shape.dp
        width = shape.ep / ranks
        slots = shape.slots(row.shard.units) * shape.ep / row.shard.units if row.shard.units else 1.0
        return Factors(1.0 / tp, slots / ranks, 1.0 / tp, 1.0 / tp, 1.0, n=width, tokens=float(shape.dp))
    if kind == "replicated" or tp == 1:
        return Factors(1.0, 1.0, 1.0, 1.0, 1.0)
    # shared KV heads: beyond their number ranks hold copies
    pieces = row.shard.units
    one = 1.0 / (pieces if 0 < pieces < tp and tp % pieces == 0 else tp)
    if kind in ("column", "vocab") and gemm:
        return Factors(one, one, 1.0, one, 1.0, n=one)
    if kind == "row" and gemm:
        return Factors(one, one, one, 1.0, 1.0, k=one)
    if kind == "vocab":
        return Factors(one, one, 1.0, 1.0, 1.0)
    held = row.shard.kv_units
    kv = 1.0 / min(tp, held) if held else 1.0
    return Factors(one, one, one, one, kv, n=one, heads=one)


def weight_format(row: Row, shape: EngineShape) -> str:
    """The format of a row's weights: what the shape means it to have where the row (tables, heads and routers
    keep their precision) and the format allow it, else bf16."""
    if "weight" not in row.quantizable:
        return unquantized(shape)
    wanted, _ = shape.scheme(row)
    return wanted if row.work.family in fmt(wanted).families else unquantized(shape)


def activation_format(row: Row, shape: EngineShape) -> str:
    """The format of a row's inputs: quantized only together with its weights."""
    if "activation" not in row.quantizable or weight_format(row, shape) == unquantized(shape):
        return unquantized(shape)
    return shape.scheme(row)[1]


def unquantized(shape: EngineShape) -> str:
    """The width of everything that is not quantized: bf16, or the wide format the shape asks for."""
    return shape.weights if shape.weights in ("fp32", "fp16") else "bf16"


@dataclass(frozen=True, slots=True)
class Stage:
    """A pipeline stage: how many layers of each class it holds, and whether it holds the ends."""

    layers: tuple[int, ...]
    counts: tuple[int, ...]
    first: bool
    last: bool


def stages(table: CostTable, shape: EngineShape) -> tuple[Stage, ...]:
    """The layers of each pipeline stage.

    The even split gives the remainder to the stages before the last, from the back (as vLLM does:
    the last one already holds the head). Classes without layer numbers go to the first stage when
    they come before the layers in the table, to the last one otherwise.
    """
    numbered = sorted({layer for cls in table.classes for layer in cls.layers if is_layer(cls)})
    split = shape.pipeline_layers or even_split(len(numbered), shape.pp)
    found, start = [], 0
    for stage, size in enumerate(split):
        mine = frozenset(numbered[start : start + size])
        start += size
        first, last = stage == 0, stage == len(split) - 1
        counts = tuple(_count(table.classes, i, mine, first, last) for i in range(len(table.classes)))
        found.append(Stage(tuple(sorted(mine)), counts, first, last))
    return tuple(found)


def even_split(layers: int, pp: int) -> tuple[int, ...]:
    """Layers per stage: equal, the remainder one each from the last but one stage backwards."""
    sizes = [layers // pp] * pp
    for extra in range(layers % pp):
        sizes[-(2 + extra) if pp > 1 else 0] += 1
    return tuple(sizes)


def is_layer(cls: LayerClass) -> bool:
    """Whether a class is numbered layers, which pipeline stages share out, or what lies at the ends."""
    return cls.name not in _ENDS and bool(cls.layers)


def _count(classes: Sequence[LayerClass], index: int, mine: frozenset[int], first: bool, last: bool) -> int:
    cls = classes[index]
    if is_layer(cls):
        return sum(layer in mine for layer in cls.layers)
    before = cls.name == "embedding" or (
        cls.name != "head" and any(is_layer(later) for later in classes[index + 1 :])
    )
    return cls.count if (first if before else last) else 0
