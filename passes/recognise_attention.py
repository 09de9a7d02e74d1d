"""Rules for attention: `scaled_dot_product_attention`, or written out, with repeated KV heads or not.

    before   k8 = repeat_interleave(k, 8, 1)            after   y = transpose(planc.attention(
             y = scaled_dot_product_attention(                      q, k, v, causal=True, ...), 1, 2)
                 q, k8, v8, is_causal=True)

A mask is understood where it is causal by construction (tril, triu); with any other the cluster
stays ATen.
"""

from __future__ import annotations

import math
from typing import Any as Anything

import torch
from torch.fx import Node

from planc.passes.patterns import Any, Call, Caught, Either, Through, match
from planc.passes.recognise_rules import CASTS, Builder, Rule, is_number, is_tensor, same_size, tensor

aten = torch.ops.aten
planc = torch.ops.planc

#: What a mask may pass through on its way; not slices, which may move the diagonal.
_SPREAD = (aten.unsqueeze.default, aten.expand.default, aten.view.default, *CASTS)
_ONES = Either(
    (
        Call(aten.ones.default),
        Call(aten.ones_like.default),
        Call(aten.full.default, Any(), Either((1, True))),
        Call(aten.new_ones.default),
    )
)
_LOWER = Call(aten.tril.default, _ONES, 0)
_UPPER = Call(aten.triu.default, _ONES, 1)
_LOWEST = Any(where=lambda found: is_number(found) and found <= -1e4)

#: Masks that let a query see itself and what came before: True, or 0, where it may look.
_KEEPS = Through(_SPREAD, Either((_LOWER, Call(aten.logical_not.default, Through(_SPREAD, _UPPER)))))
_BARS = Through(
    _SPREAD,
    Either(
        (
            _UPPER,
            Call((aten.eq.Scalar, aten.eq.Tensor), Through(_SPREAD, _LOWER), 0),
            Call((aten.logical_not.default, aten.bitwise_not.default), Through(_SPREAD, _LOWER)),
        )
    ),
)
_ADDS = Through(
    _SPREAD,
    Either(
        (
            Call(aten.triu.default, Call(aten.full.default, Any(), _LOWEST), 1),
            Call(
                (aten.masked_fill.Scalar, aten.masked_fill.Tensor), Call(aten.zeros.default), _BARS, _LOWEST
            ),
        )
    ),
)

_Q, _K, _V = (Any(name, is_tensor) for name in ("q", "k", "v"))


def is_causal(mask: Anything) -> bool:
    """Whether a mask is causal: a boolean one by what it keeps, another by what it adds."""
    if not is_tensor(mask):
        return False
    return match(_KEEPS if tensor(mask).dtype == torch.bool else _ADDS, mask) is not None


def unrepeated(node: Node) -> Node:
    """Keys or values [B, H, S, D] before their heads were repeated; the node itself if they were not."""
    if node.target is aten.repeat_interleave.self_int and node.args[2] in (1, -3):
        source = node.args[0]
        return source if isinstance(source, Node) else node
    found = match(_REPEATED, node)
    if found is None:
        return node
    source = found["source"]
    before, after = tensor(source), tensor(node)
    whole = before.dim() == 4 and found["dim"] in (2, -3) and after.dim() == 4
    return source if whole and same_size(before.shape[2], after.shape[2]) else node


_REPEATED = Call(
    (aten.reshape.default, aten.view.default, aten.flatten.using_ints, aten._unsafe_view.default),
    Through(
        (aten.clone.default, aten.contiguous.default),
        Call(aten.expand.default, Call(aten.unsqueeze.default, Any("source", is_tensor), Any("dim"))),
    ),
)


def _sdpa(make: Builder, node: Node, caught: Caught) -> Node | None:
    mask, causal = caught["mask"], caught["causal"]
    if caught["dropout"] or (mask is not None and not is_causal(mask)):
        return None
    scale = node.kwargs.get("scale")
    if scale is not None and not isinstance(scale, int | float):
        return None
    return _attention(make, caught, scale, bool(causal) or mask is not None)


def _written_out(make: Builder, _node: Node, caught: Caught) -> Node | None:
    """softmax(q @ k.T * scale [+ mask]) @ v."""
    scale = caught.get("factor", 1.0)
    if "divisor" in caught:
        scale = 1.0 / caught["divisor"]
    mask = caught.get("bars", caught.get("adds"))
    if caught["dims"] not in (-1, 3) or (
        mask is not None and match(_BARS if "bars" in caught else _ADDS, mask) is None
    ):
        return None
    return _attention(make, caught, float(scale), mask is not None)


def _attention(make: Builder, caught: Caught, scale: float | None, causal: bool) -> Node | None:
    q, k, v = caught["q"], unrepeated(caught["k"]), unrepeated(caught["v"])
    query, key, value = tensor(q), tensor(k), tensor(v)
    if any(t.dim() != 4 or t.dtype not in _DTYPES for t in (query, key, value)):
        return None
    heads, kv_heads = query.shape[1], key.shape[1]
    if not isinstance(heads, int) or not isinstance(kv_heads, int):
        return None  # a dynamic size is no number of heads: the layout is another one
    grouped = same_size(kv_heads, value.shape[1]) and heads % kv_heads == 0
    if not grouped or (causal and not same_size(query.shape[2], key.shape[2])):
        return None
    if not all(same_size(query.shape[0], t.shape[0]) for t in (key, value)):
        return None
    factor = 1.0 / math.sqrt(query.shape[3]) if scale is None else float(scale)
    mixed = make.call(planc.attention.default, q, k, v, None, None, factor, causal, 0, 0, 0.0)
    return make.call(aten.transpose.int, mixed, 1, 2)


_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MATMUL = (aten.matmul.default,)
_KEYS_TRANSPOSED = Either(
    (
        Call(aten.transpose.int, _K, Either((-2, 2)), Either((-1, 3))),
        Call(aten.transpose.int, _K, Either((-1, 3)), Either((-2, 2))),
        Call(aten.permute.default, _K, Any(where=lambda order: list(order) == [0, 1, 3, 2])),
    )
)
_PRODUCT = Call(_MATMUL, _Q, _KEYS_TRANSPOSED)
_SCALED = Either(
    (
        Call((aten.mul.Tensor, aten.mul.Scalar), _PRODUCT, Any("factor", is_number)),
        Call((aten.div.Tensor, aten.div.Scalar), _PRODUCT, Any("divisor", is_number)),
        _PRODUCT,
    )
)
_MASKED = Either(
    (
        Call((aten.masked_fill.Scalar, aten.masked_fill.Tensor), _SCALED, Any("bars", is_tensor), _LOWEST),
        Call(aten.add.Tensor, _SCALED, Any("adds", is_tensor), commutes=True),
        _SCALED,
    )
)
_WEIGHTS = Through(
    CASTS, Call((aten.softmax.int, aten._softmax.default), Through(CASTS, _MASKED), Any("dims"))
)

ATTENTION: tuple[Rule, ...] = (
    Rule(
        "attention",
        Call(
            aten.scaled_dot_product_attention.default,
            *(_Q, _K, _V, Any("mask"), Any("dropout"), Any("causal")),
        ),
        _sdpa,
    ),
    Rule("attention written out", Call(_MATMUL, _WEIGHTS, _V), _written_out),
)
