"""How the shipped profiles are made from measurements; needs the `measured` extra.

Each family's module has `fit(folder)`, which yields a `Profile` per GPU, and `score(folder)`, which
yields a `Score` per table.
"""

from __future__ import annotations

from dataclasses import dataclass

FAMILIES = ("gemm", "attention", "experts", "links", "pointwise")


@dataclass(frozen=True, slots=True)
class Score:
    """How well one table's rows are predicted; errors are medians of |predicted / measured - 1|.

    held_out   on a tenth of the shapes, by a profile fitted on the others
    physics    on all rows, by the roofline alone, its efficiencies fitted without this GPU
    """

    family: str
    gpu: str
    table: str
    rows: int
    held_out: float
    physics: float
