"""The fusions, as data: a name, the op that a match ends in, and a function that rewrites or leaves it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from planc.errors import UnknownName
from planc.ir.graph import Graph
from planc.passes.fusion_merge import LINEAR, merge_gate_up, merge_projections
from planc.passes.fusion_rewriter import Observer, Rewriter
from planc.passes.fusion_vertical import add_rms_norm, qk_norm_rope, rope_kv_write

planc = torch.ops.planc


@dataclass(frozen=True, slots=True)
class FusionRule:
    """One rewrite. `rewrite` is called at each call of `anchors` and says whether it changed the graph."""

    name: str
    anchors: frozenset[Any]
    rewrite: Callable[[Rewriter, Node], bool]


def _rule(name: str, rewrite: Callable[[Rewriter, Node], bool], *anchors: Any) -> FusionRule:
    return FusionRule(name, frozenset(anchors), rewrite)


_ATTENTION, _PAGED, _ROPE = planc.attention.default, planc.paged_attention.default, planc.rope.default

#: In the order they are applied: merges first, then what feeds a norm, a rotation, a cache.
RULES: tuple[FusionRule, ...] = (
    _rule("gate_up_merge", merge_gate_up, planc.gated_activation.default),
    _rule("qkv_merge", merge_projections, LINEAR),
    _rule("residual_add_rms_norm", add_rms_norm, planc.rms_norm.default),
    _rule("qk_norm_rope", qk_norm_rope, _ROPE, _ATTENTION, _PAGED),
    _rule("rope_kv_write", rope_kv_write, _PAGED),
)
NAMES = frozenset(rule.name for rule in RULES)


def fuse(graph: Graph, names: frozenset[str], observe: Observer | None = None) -> Graph:
    """Applies the fusions of these names wherever they match.

    `observe` hears of every replacement before the old calls are erased. Raises UnknownName.
    """
    unknown = sorted(names - NAMES)
    if unknown:
        raise UnknownName(
            field="fusions", value=unknown[0], kind="fusion", mend=f"Known: {', '.join(sorted(NAMES))}."
        )
    rewriter = Rewriter(graph, observe)
    for rule in RULES:
        if rule.name in names:
            for node in rewriter.calls(rule.anchors):
                rule.rewrite(rewriter, node)
    return rewriter.finish("fusion")
