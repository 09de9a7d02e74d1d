"""Rules for products, norms, gated activations and rotary embeddings.

RMSNorm is raised step by step: first the bare norm, then its weight, then the conversions around
it, so that every way of rounding it (see `planc.ir.ops.norms`) is met by a few small rules.
"""

from __future__ import annotations

import operator
import sys
from typing import Any as Anything

import torch
from torch.fx import Node

from planc.passes.patterns import Any, Call, Caught, Either
from planc.passes.recognise_rules import (
    CASTS,
    Builder,
    Rule,
    is_number,
    is_tensor,
    same_shape,
    same_size,
    tensor,
    without_casts,
)

aten = torch.ops.aten
planc = torch.ops.planc

X, WEIGHT = Any("x", is_tensor), Any("weight", is_tensor)

# -- products ----------------------------------------------------------------------------

_TRANSPOSED = Either(
    (
        Call(aten.t.default, WEIGHT),
        Call(aten.transpose.int, WEIGHT, Either((0, -2)), Either((1, -1))),
        Call(aten.transpose.int, WEIGHT, Either((1, -1)), Either((0, -2))),
        Call(aten.permute.default, WEIGHT, Any(where=lambda order: list(order) == [1, 0])),
    )
)


def _linear(make: Builder, _node: Node, caught: Caught) -> Node | None:
    """x @ w.T (+ b) is linear(x, w, b), for w a matrix."""
    if tensor(caught["weight"]).dim() != 2 or tensor(caught["x"]).dim() < 2:
        return None
    return make.call(aten.linear.default, caught["x"], caught["weight"], caught.get("bias"))


def _layer_norm(make: Builder, _node: Node, caught: Caught) -> Node:
    arguments = (caught[name] for name in ("x", "shape", "weight", "bias", "eps"))
    return make.call(aten.layer_norm.default, *arguments)


# -- norms -------------------------------------------------------------------------------

_SQUARE = Either(
    (
        Call(aten.pow.Tensor_Scalar, X, 2),
        Call(aten.square.default, X),
        Call(aten.mul.Tensor, X, X),
    )
)
_MEAN = Call(aten.mean.dim, _SQUARE, Any(where=lambda dims: list(dims) in ([-1],)), True)
_VARIANCE = Call(aten.add.Tensor, _MEAN, Any("eps", is_number))
_CORE = Either(
    (
        Call(aten.mul.Tensor, X, Call(aten.rsqrt.default, _VARIANCE), commutes=True),
        Call(aten.div.Tensor, X, Call(aten.sqrt.default, _VARIANCE)),
        Call(aten.mul.Tensor, X, Call(aten.pow.Tensor_Scalar, _VARIANCE, -0.5), commutes=True),
    )
)
_NORM = Call(planc.rms_norm.default, X, Any("norm_weight"), Any("eps"), Any("mode"))


def _bare_norm(make: Builder, _node: Node, caught: Caught) -> Node:
    return make.call(planc.rms_norm.default, caught["x"], None, float(caught["eps"]), "none")


def _weighted(mode: str) -> Anything:
    def build(make: Builder, _node: Node, caught: Caught) -> Node | None:
        """A norm without weight, times a vector as wide as it, takes the vector as its weight."""
        x, weight = tensor(caught["x"]), tensor(caught["weight"])
        fits = weight.dim() == 1 and same_size(weight.shape[0], x.shape[-1]) and weight.dtype == x.dtype
        if caught["mode"] != "none" or not fits:
            return None
        return make.call(planc.rms_norm.default, caught["x"], caught["weight"], caught["eps"], mode)

    return build


def _narrowed(make: Builder, node: Node, caught: Caught) -> Node | None:
    """A norm of a widened value, narrowed again, is the norm of the value: it computes in fp32 anyway."""
    source, weight, mode = without_casts(caught["x"]), caught["norm_weight"], caught["mode"]
    if tensor(caught["x"]).dtype != torch.float32 or tensor(source).dtype != tensor(node).dtype:
        return None
    if mode == "cast_mul":
        weight, mode = without_casts(weight), "mul_cast"
    elif mode == "one_plus":
        weight = without_casts(weight)
    return make.call(planc.rms_norm.default, source, weight, caught["eps"], mode)


def _whole_norm(make: Builder, _node: Node, caught: Caught) -> Node | None:
    """nn.RMSNorm; without an epsilon of its own it takes the machine's, of fp32."""
    x, weight, eps = caught["x"], caught["weight"], caught["eps"]
    if len(caught["shape"]) != 1 or (eps is None and tensor(x).dtype != torch.float32):
        return None
    eps = torch.finfo(torch.float32).eps if eps is None else float(eps)
    return make.call(planc.rms_norm.default, x, weight, eps, "none" if weight is None else "mul_cast")


# -- gated activations -------------------------------------------------------------------

_GATE, _UP = Any("gate", is_tensor), Any("up", is_tensor)
_ACTIVATION = Either(
    (
        Call(aten.silu.default, _GATE, name="act"),
        Call(aten.gelu.default, _GATE, name="act"),
        Call(aten.relu.default, _GATE, name="act"),
    )
)


def _silu(make: Builder, _node: Node, caught: Caught) -> Node:
    return make.call(aten.silu.default, caught["x"])


def _gated(make: Builder, _node: Node, caught: Caught) -> Node | None:
    gate, up = tensor(caught["gate"]), tensor(caught["up"])
    if not same_shape(gate, up) or gate.dtype != up.dtype:
        return None
    act = caught["act"]
    name = {aten.silu.default: "silu", aten.relu.default: "relu", aten.gelu.default: "gelu"}[act.target]
    if name == "gelu" and act.kwargs.get("approximate", "none") == "tanh":
        name = "gelu_tanh"
    return make.call(planc.gated_activation.default, caught["gate"], caught["up"], name)


# -- rotary embedding --------------------------------------------------------------------


def _turned(found: Anything) -> bool:
    """Whether a list is [-second half, first half] of one tensor."""
    return isinstance(found, list | tuple) and len(found) == 2


_ROTATED = Call(aten.cat.default, Any("halves", _turned), Any("dim"))
_ROTARY = Call(
    aten.add.Tensor,
    Call(aten.mul.Tensor, X, Any("cos", is_tensor), commutes=True),
    Call(aten.mul.Tensor, _ROTATED, Any("sin", is_tensor), commutes=True),
    commutes=True,
)


def _rotary(make: Builder, _node: Node, caught: Caught) -> Node | None:
    """x * cos + rotate_half(x) * sin, x [B, H, S, D] or [B, S, H, D], tables of the full width."""
    x, (second, first) = caught["x"], caught["halves"]
    value = tensor(x)
    if value.dim() != 4 or caught["dim"] not in (-1, 3) or not isinstance(second, Node):
        return None
    if (
        second.target is not aten.neg.default
        or not _is_half(second.args[0], x, False)
        or not _is_half(first, x, True)
    ):
        return None
    for heads in (1, 2):
        tables = [_table(make, caught[name], heads, value) for name in ("cos", "sin")]
        if all(table is not None for table in tables):
            return make.call(planc.rope_single.default, x, *tables, heads, "half")
    return None


def _is_half(found: Anything, x: Node, start: bool) -> bool:
    width = tensor(x).shape[-1]
    if not isinstance(found, Node) or not isinstance(width, int) or width % 2:
        return False
    if found.target is aten.slice.Tensor:
        source, dim, low, high = (*found.args, None, None)[:4]
        low, high = low or 0, sys.maxsize if high is None else high
        reach = (0, width // 2) if start else (width // 2, sys.maxsize)
        near = high == reach[1] or (not start and isinstance(high, int) and high >= width)
        return bool(source is x and dim in (-1, 3) and low == reach[0] and near)
    if found.target is operator.getitem and isinstance(found.args[0], Node):
        source, by = found.args[0], found.args[1]
        whole = source.target in (aten.chunk.default, aten.split.Tensor) and source.args[0] is x
        even = same_size(tensor(found).shape[-1], width // 2)
        return bool(whole and even and by == (0 if start else 1))
    return False


def _table(make: Builder, table: Node, heads: int, x: torch.Tensor) -> Node | None:
    """A cos or sin table without its heads dimension: [B or 1, S, D]."""
    value, tokens = tensor(table), 3 - heads
    if value.dtype != x.dtype or not same_size(value.shape[-1], x.shape[-1]):
        return None
    if value.dim() == 2 and heads == 1 and same_size(value.shape[0], x.shape[2]):
        return make.call(aten.unsqueeze.default, table, 0)
    if value.dim() == 3 and heads == 2 and value.shape[1] == 1:  # [S, 1, D]
        return make.call(aten.unsqueeze.default, make.call(aten.squeeze.dim, table, 1), 0)
    if value.dim() != 4 or value.shape[heads] != 1 or not same_size(value.shape[tokens], x.shape[tokens]):
        return None
    if table.target is aten.unsqueeze.default and table.args[1] in (heads, heads - 4):
        inner = table.args[0]
        return inner if isinstance(inner, Node) else None
    return make.call(aten.squeeze.dim, table, heads)


POINTWISE: tuple[Rule, ...] = (
    Rule("linear of addmm", Call(aten.addmm.default, Any("bias", is_tensor), X, _TRANSPOSED), _linear),
    Rule("linear of mm", Call((aten.mm.default, aten.matmul.default), X, _TRANSPOSED), _linear),
    Rule(
        "layer_norm",
        Call(
            operator.getitem,
            Call(aten.native_layer_norm.default, X, Any("shape"), Any("weight"), Any("bias"), Any("eps")),
            0,
        ),
        _layer_norm,
    ),
    Rule("rms_norm", _CORE, _bare_norm),
    Rule(
        "rms_norm 1 + weight",
        Call(
            aten.mul.Tensor,
            Either(
                (
                    Call((aten.add.Tensor, aten.add.Scalar), WEIGHT, 1),
                    Call(aten.add.Tensor, 1, WEIGHT),
                )
            ),
            _NORM,
            commutes=True,
        ),
        _weighted("one_plus"),
    ),
    Rule("rms_norm weight", Call(aten.mul.Tensor, WEIGHT, _NORM, commutes=True), _weighted("cast_mul")),
    Rule("rms_norm conversions", Call(CASTS, _NORM), _narrowed),
    Rule("nn.RMSNorm", Call(aten.rms_norm.default, X, Any("shape"), Any("weight"), Any("eps")), _whole_norm),
    Rule("silu", Call(aten.mul.Tensor, X, Call(aten.sigmoid.default, X), commutes=True), _silu),
    Rule("gated activation", Call(aten.mul.Tensor, _ACTIVATION, _UP, commutes=True), _gated),
    Rule("rotary", _ROTARY, _rotary),
)
