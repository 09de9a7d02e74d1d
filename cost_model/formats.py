"""Number formats: what an element weighs, and which arithmetic it runs on."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Literal

from planc.cost_model.catalogue import Entry, Precision, Provenance, read, unknown
from planc.ir.work import Family

Role = Literal["weight", "activation", "kv"]

#: from the coarsest arithmetic to the finest: a product runs in the finer of its operands'
_FINER: tuple[Precision, ...] = ("fp4", "fp8", "int8", "bf16", "fp16", "tf32", "fp32")


class Drop(Entry):
    """Relative loss of a published task average against bf16, and where it was read."""

    value: float
    source: Provenance
    note: str


class Format(Entry):
    """A number format.

    bits      per element, scales included
    families  op families whose weights may take it; others of the model stay in bf16
    group     elements of the inner dimension that share a scale and cannot be split over ranks; 0: any can
    """

    name: str
    bits: float
    precision: Precision
    roles: tuple[Role, ...]
    families: tuple[Family, ...] = ("gemm", "grouped_gemm", "gather", "elementwise")
    group: int = 0
    scale_note: str = ""
    accuracy_drop: Drop
    kv_accuracy_drop: Drop | None = None

    @property
    def bytes(self) -> float:
        """Bytes per element, scales included."""
        return self.bits / 8


@cache
def formats() -> Mapping[str, Format]:
    """All formats by name."""
    raw = read("formats.yaml")
    drops = raw["kv_accuracy_drop"]
    return {
        name: Format(name=name, kv_accuracy_drop=drops.get(name), **entry)
        for name, entry in raw["formats"].items()
    }


def fmt(name: str, field: str = "format") -> Format:
    """A format by name. Raises UnknownName."""
    known = formats()
    return known[name] if name in known else unknown(field, name, "number format", known)


def product_precision(weights: str, activations: str) -> Precision:
    """The arithmetic of a matrix product: the finer of the two operands' (W4A16 computes in bf16)."""
    pair = fmt(weights).precision, fmt(activations).precision
    return max(pair, key=_FINER.index)
