"""ATen matrix products: linear, mm, bmm, convolution, grouped products, and fused attention."""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import torch

from planc.ir.opdef import Call, OpDef, ShardRule, amount, declare
from planc.ir.ops.aten import is_parameter
from planc.ir.work import Amount, Work

aten = torch.ops.aten

#: A bias of a row-divided product is added once, by one rank.
COLUMN = ShardRule("column", {"weight": 0, "bias": 0}, (-1,))
ROW = ShardRule("row", {"input": -1, "weight": 1, "bias": "partial"}, ("partial",))


def _linear(call: Call) -> Work:
    """x [..., k] times weight [n, k]: 2 k n FLOPs per row."""
    n, k = call.size("weight", 0), call.size("weight", 1)
    return Work(
        "gemm",
        flops=call.elements("input") * (2.0 * n),
        weights=n * k + (n if call.arg("bias") is not None else 0),
        reads=call.elements("input"),
        writes=call.out(),
        dims={"k": k, "n": n},
    )


def _product(left: str, right: str, bias: str | None = None) -> Callable[[Call], Work]:
    """[..., m, k] @ [..., k, n]; the right side is weights where it is a parameter, else activations."""

    def work(call: Call) -> Work:
        a, b = call.tensor(left), call.tensor(right)
        assert a is not None
        assert b is not None
        out = call.node.meta["val"]
        weights, reads = 0, call.elements(left)
        if is_parameter(call.arg(right)):
            weights += b.numel()
        else:
            reads = reads + call.elements(right)
        if bias is not None:
            reads = reads + call.elements(bias)
        k = a.shape[-1]
        flops = amount(2 * out.numel() * k, call.symbols)
        dims = {"k": k, "n": b.shape[-1]}
        return Work(
            "gemm",
            flops=flops,
            weights=weights,
            reads=reads,
            writes=call.out(),
            dims={name: size for name, size in dims.items() if isinstance(size, int)},
        )

    return work


def _convolution(call: Call) -> Work:
    """2 k FLOPs per result element, k = input channels per group times the kernel's taps."""
    weight = call.tensor("weight")
    assert weight is not None
    k = prod(int(size) for size in weight.shape[1:])
    bias = call.tensor("bias")
    return Work(
        "gemm",
        flops=call.out() * (2.0 * k),
        weights=weight.numel() + (0 if bias is None else bias.numel()),
        reads=call.elements("input"),
        writes=call.out(),
        dims={"k": k, "n": int(weight.shape[0])},
    )


def _grouped_mm(call: Call) -> Work:
    """x [rows, k] times one of E matrices [k, n] per group of rows; all E are counted as weights."""
    right = call.tensor("mat2")
    assert right is not None
    groups, k, n = (int(size) for size in right.shape)
    return Work(
        "grouped_gemm",
        flops=call.elements("self") * (2.0 * n),
        weights=right.numel(),
        reads=call.elements("self"),
        writes=call.out(),
        dims={"experts": groups, "top_k": 1, "k": k, "n": n, "matrices": 1},
    )


def _attention(call: Call) -> Work:
    """q [..., H, S, D], k [..., Hkv, K, D]: pairs are tokens where K is fixed, else the span's."""
    q, k, v = (call.tensor(name) for name in ("query", "key", "value"))
    assert q is not None
    assert k is not None
    assert v is not None
    heads, qk_dim, v_dim = (int(size) for size in (q.shape[-3], q.shape[-1], v.shape[-1]))
    per_pair = 2.0 * (qk_dim + v_dim)
    if call.arg("is_causal"):
        flops = Amount({"P:full": per_pair * heads})
    else:
        flops = amount(q.shape[:-1].numel() * k.shape[-2], call.symbols) * per_pair
    return Work(
        "attention",
        flops=flops,
        reads=call.elements("query") + call.elements("key") + call.elements("value"),
        writes=call.out(),
        dims={
            "q_heads": heads,
            "kv_heads": int(k.shape[-3]),
            "qk_dim": qk_dim,
            "v_dim": v_dim,
            "latent": 0,
        },
    )


declare(
    OpDef(
        aten.linear.default,
        work=_linear,
        shards=(COLUMN, ROW),
        quantizable={"weight": "weight", "input": "activation"},
    )
)
for _op, _left, _right, _bias in (
    (aten.mm.default, "self", "mat2", None),
    (aten.bmm.default, "self", "mat2", None),
    (aten.matmul.default, "self", "other", None),
    (aten.addmm.default, "mat1", "mat2", "self"),
    (aten.baddbmm.default, "batch1", "batch2", "self"),
):
    declare(OpDef(_op, work=_product(_left, _right, _bias)))
for _op in (
    aten.conv1d.default,
    aten.conv2d.default,
    aten.conv3d.default,
    aten.conv2d.padding,
    aten.convolution.default,
):
    declare(OpDef(_op, work=_convolution, quantizable={"weight": "weight"}))
declare(OpDef(aten._grouped_mm.default, work=_grouped_mm, quantizable={"mat2": "weight"}))
declare(
    OpDef(
        aten.scaled_dot_product_attention.default,
        work=_attention,
        shards=(ShardRule("heads", {"query": -3, "key": -3, "value": -3}, (-3,)),),
    )
)
