"""Routed experts whose weights are stored in 8 or 4 bits: `planc.experts_<format>`.

As `planc.experts`, with both products as in `planc.linear_<format>`: one scale (or row of block
scales) per expert and output feature. Whatever the layout of the source model's parameters, the
stored ones are `[E, n, k]`, so there is no `transposed` here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from planc.ir.opdef import Call, OpDef, ShardRule, declare
from planc.ir.ops import quantized_formats as qf
from planc.ir.ops.activation import FLOPS
from planc.ir.ops.experts import gated
from planc.ir.ops.quantized import finish, product
from planc.ir.work import Work


def _fake(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    gate_up_scale: Tensor,
    gate_up_scale_2: Tensor | None,
    gate_up_bias: Tensor | None,
    down: Tensor,
    down_scale: Tensor,
    down_scale_2: Tensor | None,
    down_bias: Tensor | None,
    act: str,
    interleaved: bool,
    alpha: float,
    limit: float,
    scale_input: bool,
    activations: str,
    group_size: int,
    first: int = 0,
) -> Tensor:
    return x.new_empty(x.shape)


def _work(call: Call) -> Work:
    """As `planc.experts`: per token and chosen expert 2 (2I H + I H) FLOPs and the gate's."""
    experts, width = call.size("gate_up", 0), call.size("gate_up", 1)
    hidden, top_k, inner = call.size("x", 1), call.size("ids", 1), width // 2
    routed = call.elements("ids")
    biases = (call.tensor(name) for name in ("gate_up_bias", "down_bias"))
    return Work(
        "grouped_gemm",
        flops=routed * (6.0 * inner * hidden + FLOPS * inner),
        weights=experts * 3 * inner * hidden + sum(b.numel() for b in biases if b is not None),
        reads=routed * float(2 * hidden + 3 * inner),
        writes=routed * float(hidden + 3 * inner) + call.out(),
        dims={"experts": experts, "top_k": top_k, "k": hidden, "n": width, "matrices": 2},
    )


def _width(spec: qf.WeightFormat, interleaved: bool) -> ShardRule:
    """Each expert's width divided: rows of gate and up, columns of down; a bias of down is added once."""
    rows = 1 if interleaved else "halves:1"
    return ShardRule(
        "experts",
        {
            "gate_up": rows,
            "gate_up_scale": rows,
            "gate_up_bias": rows,
            "down": 2,
            **({} if spec.per_row else {"down_scale": 2}),
            "down_bias": "partial",
        },
        ("partial",),
        lambda call: bool(call.arg("interleaved")) == interleaved,
    )


#: Whole experts per rank (expert parallel); `first` is the rank's own.
EXPERT_PARALLEL = ShardRule(
    "experts",
    {f"{matrix}{part}": 0 for matrix in ("gate_up", "down") for part in ("", "_scale", "_scale_2", "_bias")},
    ("partial",),
    first="first",
)


def _declare(fmt: str) -> torch._ops.OpOverload:
    def experts(
        x: Tensor,
        ids: Tensor,
        weights: Tensor,
        gate_up: Tensor,
        gate_up_scale: Tensor,
        gate_up_scale_2: Tensor | None,
        gate_up_bias: Tensor | None,
        down: Tensor,
        down_scale: Tensor,
        down_scale_2: Tensor | None,
        down_bias: Tensor | None,
        act: str,
        interleaved: bool,
        alpha: float,
        limit: float,
        scale_input: bool,
        activations: str,
        group_size: int,
        first: int = 0,
    ) -> Tensor:
        into = _present(gate_up, gate_up_scale, gate_up_scale_2)
        outof = _present(down, down_scale, down_scale_2)

        def times(inputs: Tensor, parts: tuple[Tensor, ...], bias: Tensor | None, at: int) -> Tensor:
            out = product(inputs, fmt, tuple(part[at] for part in parts), activations, group_size)
            return finish(out, None if bias is None else bias[at], x.dtype)

        out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        for expert in ids.unique().tolist():
            if not 0 <= (at := expert - first) < gate_up.shape[0]:
                continue
            token, choice = (ids == expert).nonzero(as_tuple=True)
            share, inputs = weights[token, choice, None], x[token]
            if scale_input:
                inputs = inputs * share.to(x.dtype)
            hidden = times(inputs, into, gate_up_bias, at)
            gate, up = (hidden[:, ::2], hidden[:, 1::2]) if interleaved else hidden.chunk(2, -1)
            result = times(gated(gate, up, act, alpha, limit), outof, down_bias, at)
            out.index_add_(0, token, (result if scale_input else result * share).float())
        return out.to(x.dtype)

    experts.__doc__ = f"As `planc.experts`, gate_up [E, 2I, H] and down [E, H, I] stored as {fmt}."
    op = torch.library.custom_op(f"planc::experts_{fmt}", experts, mutates_args=())
    op.register_fake(_fake)
    overload: torch._ops.OpOverload = getattr(torch.ops.planc, f"experts_{fmt}").default
    spec = qf.WEIGHT_FORMATS[fmt]
    declare(OpDef(overload, work=_work, shards=(EXPERT_PARALLEL, _width(spec, False), _width(spec, True))))
    return overload


def _present(*parts: Tensor | None) -> tuple[Tensor, ...]:
    return tuple(part for part in parts if part is not None)


#: weight format -> the op that multiplies with it
EXPERTS = {fmt: _declare(fmt) for fmt in qf.WEIGHT_FORMATS}
