"""Kernels and collectives of one rank: what they do per call, as amounts over a step's features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from planc.cost_model.collectives import Kind as CollectiveKind
from planc.cost_model.kernels import Attention, Gemm, GroupedGemm, Part
from planc.cost_model.table import CostTable, Phase, Row
from planc.ir.work import Amount, Family

_BY_PART: tuple[Family, ...] = ("attention", "recurrence")


@dataclass(frozen=True, slots=True)
class Kernel:
    """One kernel of one rank: what it does per call, in elements, as amounts over features.

    spec       what the family's cost function needs besides amounts
    rows       m of a GEMM; routed tokens of a grouped one
    launches   kernels per call; 0 when another kernel does this work
    traffic    activation elements per token moved by all ranks together, which is what offers count in
    """

    layer_class: str
    sites: tuple[str, ...]
    op: str
    family: Family
    part: Part
    calls: float
    launches: float
    spec: Gemm | GroupedGemm | Attention | None
    rows: Amount
    flops: Amount
    nbytes: Amount
    kv: Amount
    reads: Amount
    writes: Amount
    traffic: float
    overlapped: bool = False


@dataclass(frozen=True, slots=True)
class Collective:
    """One collective after an op: `size` in bytes, as `collectives.seconds` wants it."""

    layer_class: str
    site: str
    part: Part
    kind: CollectiveKind
    calls: float
    ranks: int
    size: Amount


def parts(table: CostTable) -> list[tuple[Part, Row]]:
    """Each row once, with the tokens it sees in a step that mixes phases.

    Ops that both phases have run once over all tokens; attention and what only one phase has
    (an absorbed projection, say) run over that phase's tokens. Rows of classes that the table does not
    count are left out: one phase may single out a layer (the last one of a prompt hands on its last
    token only) that is already counted among its like.
    """
    counted = {cls.name for cls in table.classes}
    phases: Sequence[Phase] = ("prefill", "decode")
    keys = {phase: {_key(row) for row in table.rows.get(phase, ())} for phase in phases}
    shared = keys["prefill"] & keys["decode"]
    found: list[tuple[Part, Row]] = []
    for phase in phases:
        for row in table.rows.get(phase, ()):
            if row.work.family in ("view", "link") or row.layer_class not in counted:
                continue
            if _key(row) in shared and row.work.family not in _BY_PART:
                if phase == "prefill":
                    found.append(("step", row))
            else:
                found.append((phase, row))
    return found


def _key(row: Row) -> tuple[str, str, str, int]:
    return row.layer_class, row.site, row.op, row.calls


def unique(items: Sequence[Kernel]) -> tuple[list[Kernel], list[int]]:
    """Kernels that differ in cost, and for each input the index of the one that stands for it."""
    kept: list[Kernel] = []
    seen: dict[object, int] = {}
    index = []
    for item in items:
        key = (item.family, item.part, item.spec, item.launches, item.overlapped, *_frozen(item))
        if key not in seen:
            seen[key] = len(kept)
            kept.append(item)
        index.append(seen[key])
    return kept, index


def _frozen(item: Kernel) -> list[tuple[tuple[str, float], ...]]:
    amounts: Sequence[Amount] = (item.rows, item.flops, item.nbytes, item.kv, item.reads, item.writes)
    return [terms(amount) for amount in amounts]


def terms(amount: Amount) -> tuple[tuple[str, float], ...]:
    return tuple(sorted(amount.terms.items()))


def feature_names(amounts: Sequence[Amount]) -> list[str]:
    """All features that the amounts are written in, besides the constant."""
    names: Mapping[str, None] = {name: None for amount in amounts for name in sorted(amount.features())}
    return list(names)


def per_token(amount: Amount) -> float:
    return sum(value for name, value in amount.terms.items() if name in ("T", "S"))
