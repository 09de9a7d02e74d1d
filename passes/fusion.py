"""Fusion: fewer, larger calls with the same numbers. Which ones pay is the search's decision.

    graph = Fusion().apply(graph)                       all of them
    graph = Fusion(frozenset({"qkv_merge"})).apply(graph)
    offers(graph)                                       what each would save, per layer class

Merges change parameters; `weights_for` makes the new ones from the source model's. Quantize
after fusing: merged rows keep their own scales, so the two commute, but only unquantized products merge.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from planc.ir.graph import Graph
from planc.passes.fusion_offers import offers
from planc.passes.fusion_rewriter import weights_for
from planc.passes.fusion_rules import NAMES, RULES, FusionRule, fuse


@dataclass(frozen=True, slots=True)
class Fusion:
    """Applies the fusions of these names wherever they match; None: all of them.

    Raises UnknownName.
    """

    names: frozenset[str] | None = None
    name: ClassVar[str] = "fusion"

    def apply(self, graph: Graph) -> Graph:
        """A graph that gives the same numbers (merged products: up to the order of fp32 sums)."""
        return fuse(graph, NAMES if self.names is None else self.names)


__all__ = ["NAMES", "RULES", "Fusion", "FusionRule", "fuse", "offers", "weights_for"]
