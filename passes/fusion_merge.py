"""Horizontal fusions: products of one input become one product with the weights end to end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from planc.ir.opdef import fake
from planc.ir.ops.fused import PACKED
from planc.passes.fusion_rewriter import Rewriter
from planc.passes.quantize_scope import keeps_precision

aten, planc = torch.ops.aten, torch.ops.planc
LINEAR = aten.linear.default


@dataclass(frozen=True, slots=True)
class Concat:
    """A weight step: rows of several matrices (or biases) end to end."""

    reads: tuple[str, ...]
    makes: tuple[str, ...]

    def apply(self, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (torch.cat(tensors, 0),)


def merge_gate_up(rewriter: Rewriter, gated: Node) -> bool:
    """Gate and up projection of a gated MLP.

    before   g = linear(x, gate_proj.weight)
             u = linear(x, up_proj.weight)
             y = planc.gated_activation(g, u, act)
    after    gu = linear(x, gate_up_proj.weight)      gate's rows, then up's
             y = planc.{act}_mul(gu)
    """
    gate, up, act = gated.args
    if not (isinstance(gate, Node) and isinstance(up, Node)) or gate is up or act not in PACKED:
        return False
    if not _mergeable([gate, up]) or set(gate.users) | set(up.users) != {gated}:
        return False
    merged = _merged(rewriter, [gate, up])
    assert isinstance(act, str)
    packed = rewriter.call(PACKED[act], (merged,), before=gated, like=gated)
    gated.replace_all_uses_with(packed)
    rewriter.replaced([*sorted([gate, up]), gated], [merged, packed])
    return True


def merge_projections(rewriter: Rewriter, first: Node) -> bool:
    """The projections of one input inside one attention (or other mixing) module.

    before   q = linear(x, q_proj.weight);  k = linear(x, k_proj.weight);  v = linear(x, v_proj.weight)
    after    q, k, v = split(linear(x, qkv_proj.weight), [nq, nk, nv])

    MLA's q_a and kv_a, and the input projections of linear attention, are the same pattern. Only
    modules with a common parent are merged, so that a router never ends up in an expert's product.
    """
    x = first.args[0]
    if not isinstance(x, Node):
        return False
    group = [
        node
        for node in sorted(x.users)
        if node.target is LINEAR and node.args[0] is x and _parent(node) == _parent(first)
    ]
    if len(group) < 2 or first is not group[0] or not _mergeable(group):
        return False
    if any(user.target is planc.gated_activation.default for node in group for user in node.users):
        return False  # a gate and up projection
    merged = _merged(rewriter, group)
    sizes = [int(fake(node).shape[-1]) for node in group]
    split = rewriter.call(aten.split_with_sizes.default, (merged, sizes, -1), before=first, like=first)
    for node, part in zip(group, rewriter.results(split, before=first), strict=True):
        node.replace_all_uses_with(part)
    rewriter.replaced(group, [merged])
    return True


def _merged(rewriter: Rewriter, linears: Sequence[Node]) -> Node:
    """One product in place of several, in front of the first of them."""
    modules = [_module(node) for node in linears]
    parent, name = modules[0].rpartition(".")[0], _joined([m.rpartition(".")[2] for m in modules])
    path = f"{parent}.{name}" if parent else name
    args: list[Node] = []
    for place, kind in ((1, "weight"), (2, "bias")):
        parts = [_argument(node, place) for node in linears]
        if parts[0] is not None:
            names = tuple(str(part.target) for part in parts if part is not None)
            args += rewriter.parameters(Concat(names, (f"{path}.{kind}",)))
    first = min(linears)
    return rewriter.call(LINEAR, (first.args[0], *args), before=first, like=first)


def _mergeable(linears: Sequence[Node]) -> bool:
    """Products of one input, each with parameters of its own that all may change precision alike."""
    first = linears[0]
    for node in linears:
        weight, bias = _argument(node, 1), _argument(node, 2)
        if node.target is not LINEAR or node.args[0] is not first.args[0] or not _own(weight):
            return False
        assert weight is not None
        if (bias is None) != (_argument(first, 2) is None) or (bias is not None and not _own(bias)):
            return False
        if keeps_precision(_module(node)) or fake(weight).dtype != fake(first.args[1]).dtype:
            return False
    return True


def _own(parameter: Node | None) -> bool:
    """A parameter that only one call reads."""
    return parameter is not None and parameter.op == "get_attr" and len(parameter.users) == 1


def _argument(node: Node, place: int) -> Node | None:
    found = node.args[place] if len(node.args) > place else None
    return found if isinstance(found, Node) else None


def _module(linear: Node) -> str:
    weight = _argument(linear, 1)
    return str(weight.target).rpartition(".")[0] if weight is not None else ""


def _parent(linear: Node) -> str:
    return _module(linear).rpartition(".")[0]


def _joined(names: Sequence[str]) -> str:
    """q_proj, k_proj, v_proj -> qkv_proj; gate_proj, up_proj -> gate_up_proj."""
    stems = [name.removesuffix("_proj") for name in names]
    glue = "" if all(len(stem) == 1 for stem in stems) else "_"
    return glue.join(stems) + ("_proj" if any(name.endswith("_proj") for name in names) else "")
