"""Pointwise and normalisation ops that do the work of two: what the vertical fusions put in.

Each reference is the sequence it replaces, so that a fused graph gives the same bits:

    planc.add_rms_norm                s = x + residual; rms_norm(s)
    planc.silu_mul, planc.gelu_mul,   gate, up = chunk(x, 2); gated_activation(gate, up)
    planc.gelu_tanh_mul, ...

`planc.ir.ops.fused_rope` has those around rotary embedding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from planc.ir.opdef import Call, OpDef, ShardRule, declare
from planc.ir.ops import activation, norms
from planc.ir.work import Work


@torch.library.custom_op("planc::add_rms_norm", mutates_args=())
def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, mode: str
) -> tuple[Tensor, Tensor]:
    """x, residual [..., D], weight [D] -> (rms_norm(x + residual), x + residual), both [..., D].

    The sum is rounded to x's type before it is normalised, as the two calls would. `mode` as in
    `planc.rms_norm`.
    """
    total = x + residual
    return torch.ops.planc.rms_norm(total, weight, eps, mode), total


@add_rms_norm.register_fake
def _add_fake(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, mode: str
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


def _add_work(call: Call) -> Work:
    """Both addends read once, the norm and the sum written once."""
    weight = call.tensor("weight")
    return Work(
        "elementwise",
        flops=call.elements("x") * (norms.FLOPS + 1.0),
        weights=0 if weight is None else weight.numel(),
        reads=call.elements("x") + call.elements("residual"),
        writes=call.out(0) + call.out(1),
    )


declare(OpDef(torch.ops.planc.add_rms_norm.default, work=_add_work))


def _packed_work(call: Call) -> Work:
    return Work(
        "elementwise",
        flops=call.out() * activation.FLOPS,
        reads=call.elements("gate_up"),
        writes=call.out(),
    )


def _packed_fake(gate_up: Tensor) -> Tensor:
    return gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2))


def _declare_packed(act: str) -> torch._ops.OpOverload:
    def packed(gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, -1)
        return activation.ACTIVATIONS[act](gate) * up

    packed.__doc__ = f"gate_up [..., 2I], gate then up -> {act}(gate) * up [..., I]."
    op = torch.library.custom_op(f"planc::{act}_mul", packed, mutates_args=())
    op.register_fake(_packed_fake)
    overload: torch._ops.OpOverload = getattr(torch.ops.planc, f"{act}_mul").default
    declare(
        OpDef(
            overload,
            work=_packed_work,
            shards=(ShardRule("column", {"gate_up": "halves:-1"}, (-1,)),),
        )
    )
    return overload


#: activation, as `planc.gated_activation` names it -> the op on gate and up side by side
PACKED = {act: _declare_packed(act) for act in activation.ACTIVATIONS}
