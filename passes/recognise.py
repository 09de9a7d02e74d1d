"""Recognise: raise clusters of ATen ops to serving ops, for models that did not come with them.

    before   p = aten.pow(x, 2)                        after   y = planc.rms_norm(x, w, 1e-06, 'cast_mul')
             m = aten.mean(p, [-1], True)
             r = aten.rsqrt(aten.add(m, 1e-06))
             y = aten.mul(w, aten.mul(x, r))

A rule is a pattern and a function that builds the replacement, or refuses. Hugging Face models come
in with their ops raised and pass through unchanged. What no rule fits stays ATen, computes the same
and is costed as such; `coverage` says what that is. Never an error.
"""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph as Nodes
from torch.fx import GraphModule

from planc.ir.fakes import fake_mode
from planc.ir.graph import Graph
from planc.ir.opdef import declaration
from planc.ir.text import show_target
from planc.passes.canonicalise import simplify
from planc.passes.patterns import match
from planc.passes.recognise_attention import ATTENTION
from planc.passes.recognise_pointwise import POINTWISE
from planc.passes.recognise_rules import Builder, Rule

#: All rules, in the order they are tried at each node. Each sees the replacements of earlier nodes.
RULES: tuple[Rule, ...] = (*POINTWISE, *ATTENTION)


@dataclass(frozen=True, slots=True)
class Recognise:
    """Applies RULES wherever they fit, operands before users."""

    name: ClassVar[str] = "recognise"

    def apply(self, graph: Graph) -> Graph:
        """The graph with serving ops; equal up to rounding in the type the op computes in."""
        nodes = copy.deepcopy(graph.module.graph)
        rewrite(nodes, RULES, fake_mode(graph.module))
        module = GraphModule(graph.module, nodes, class_name=type(graph.module).__name__)
        return graph.after(self.name, module)


@dataclass(frozen=True, slots=True)
class Coverage:
    """How many calls of each op a graph holds: planc's, ATen ones with a declaration, and others."""

    raised: dict[str, int]
    declared: dict[str, int]
    generic: dict[str, int]


def coverage(graph: Graph) -> Coverage:
    """What a graph consists of; `generic` ops are costed by their bytes alone."""
    counts: dict[str, Counter[str]] = {"raised": Counter(), "declared": Counter(), "generic": Counter()}
    for node in graph.module.graph.nodes:
        if node.op != "call_function" or not hasattr(node.target, "namespace"):
            continue
        kind = "raised" if node.target.namespace == "planc" else "declared"
        counts["generic" if declaration(node) is None else kind][show_target(node)] += 1
    return Coverage(**{kind: dict(sorted(found.items())) for kind, found in counts.items()})


def rewrite(nodes: Nodes, rules: tuple[Rule, ...], mode: FakeTensorMode) -> Counter[str]:
    """Applies rules in place, and says how often each was; new nodes have values of the fake `mode`."""
    applied: Counter[str] = Counter()
    for node in list(nodes.nodes):
        for rule in rules if node.op == "call_function" else ():
            caught = match(rule.pattern, node)
            made = None if caught is None else rule.build(Builder(nodes, node, mode), node, caught)
            if made is not None:
                node.replace_all_uses_with(made)
                applied[rule.name] += 1
                break
    simplify(nodes)
    return applied
