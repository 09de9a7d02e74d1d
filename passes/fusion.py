"""Fusion: fewer, larger calls with the same numbers. Which ones pay is the search's decision.

    graph = Fusion().apply(graph)                       all of them
    graph = Fusion(frozenset({"qkv_merge"})).apply(graph)
    offers(graph)                                       what each would save, per layer class

Rules are data: a name, the ops that a match ends in, and a function that rewrites the match or
leaves it. Merges change parameters; `weights_for` makes the new ones from the source model's. Quantize
after fusing: merged rows keep their own scales, so the two commute, but only unquantized products merge.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import Node

from planc.errors import UnknownName
from planc.ir.graph import Graph
from planc.passes.fusion_merge import LINEAR, merge_gate_up, merge_projections
from planc.passes.fusion_rewriter import Observer, Rewriter, weights_for
from planc.passes.fusion_vertical import add_rms_norm, qk_norm_rope, rope_kv_write

planc = torch.ops.planc


@dataclass(frozen=True, slots=True)
class FusionRule:
    """One rewrite. `rewrite` is called at each call of `anchor` and says whether it changed the graph."""

    name: str
    anchor: Any
    rewrite: Callable[[Rewriter, Node], bool]


#: In the order they are applied: merges first, then what feeds a norm, a rotation, a cache.
RULES: tuple[FusionRule, ...] = (
    FusionRule("gate_up_merge", planc.gated_activation.default, merge_gate_up),
    FusionRule("qkv_merge", LINEAR, merge_projections),
    FusionRule("residual_add_rms_norm", planc.rms_norm.default, add_rms_norm),
    FusionRule("qk_norm_rope", planc.rope.default, qk_norm_rope),
    FusionRule("rope_kv_write", planc.paged_attention.default, rope_kv_write),
)
NAMES = frozenset(rule.name for rule in RULES)


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


def fuse(graph: Graph, names: frozenset[str], observe: Observer | None = None) -> Graph:
    """As `Fusion`; `observe` hears of every replacement before the old calls are erased."""
    unknown = sorted(names - NAMES)
    if unknown:
        raise UnknownName(
            field="fusions", value=unknown[0], kind="fusion", mend=f"Known: {', '.join(sorted(NAMES))}."
        )
    rewriter = Rewriter(graph, observe)
    for rule in RULES:
        if rule.name in names:
            for node in rewriter.calls(frozenset({rule.anchor})):
                rule.rewrite(rewriter, node)
    return rewriter.finish(Fusion.name)


__all__ = ["NAMES", "RULES", "Fusion", "FusionRule", "fuse", "weights_for"]
