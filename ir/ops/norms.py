"""`planc.rms_norm` and `planc.gated_rms_norm`: root-mean-square normalisation of the last dimension.

RMSNorm (Zhang & Sennrich, arXiv 1910.07467) comes in four roundings that matter in 16 bits:

    cast_mul   w * cast(x / rms)            Llama, Qwen3, Mixtral, DeepSeek, MiniMax
    mul_cast   cast(w * x / rms)            gpt-oss, Gemma 4
    one_plus   cast((1 + w) * x / rms)      Qwen3.5, Gemma 2 and 3
    none       cast(x / rms)                no weight
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from planc.ir.opdef import Call, OpDef, ShardRule, declare
from planc.ir.work import Work

MODES = ("cast_mul", "mul_cast", "one_plus", "none")

#: Square, sum, scale by 1 / rms, multiply by the weight: per element.
FLOPS = 4.0


@torch.library.custom_op("planc::rms_norm", mutates_args=())
def rms_norm(x: Tensor, weight: Tensor | None, eps: float, mode: str) -> Tensor:
    """x [..., D], weight [D] -> [..., D] in x's type; computed in fp32. `mode`: one of MODES."""
    normed = x.float()
    normed = normed * torch.rsqrt(normed.pow(2).mean(-1, keepdim=True) + eps)
    if mode == "none":
        return normed.to(x.dtype)
    assert weight is not None, f"rms_norm in mode {mode} needs a weight"
    if mode == "cast_mul":
        return weight * normed.to(x.dtype)
    if mode == "mul_cast":
        return (weight.float() * normed).to(x.dtype)
    assert mode == "one_plus", f"rms_norm knows no mode {mode}"
    return ((1.0 + weight.float()) * normed).to(x.dtype)


@rms_norm.register_fake
def _(x: Tensor, weight: Tensor | None, eps: float, mode: str) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("planc::gated_rms_norm", mutates_args=())
def gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x, gate [..., D], weight [D] -> silu(gate) * rms_norm(x) in x's type (Qwen3-Next, Qwen3.5)."""
    normed = x.float()
    normed = normed * torch.rsqrt(normed.pow(2).mean(-1, keepdim=True) + eps)
    return (weight * normed.to(x.dtype) * F.silu(gate.float())).to(x.dtype)


@gated_rms_norm.register_fake
def _gated_fake(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _work(call: Call) -> Work:
    weight = call.tensor("weight")
    return Work(
        "elementwise",
        flops=call.elements("x") * FLOPS,
        weights=0 if weight is None else weight.numel(),
        reads=call.elements("x"),
        writes=call.out(),
    )


def _heads_first(call: Call) -> bool:
    """Whether dimension 1 is not the one that is normalised: [B, heads, S, D]."""
    x = call.tensor("x")
    return x is not None and x.dim() > 2


def _gated_work(call: Call) -> Work:
    return Work(
        "elementwise",
        flops=call.elements("x") * (FLOPS + 5.0),
        weights=call.size("weight", 0),
        reads=call.elements("x") + call.elements("gate"),
        writes=call.out(),
    )


# A norm over a divided dimension would need the other ranks' sums, so only leading ones are divided.
declare(
    OpDef(
        torch.ops.planc.rms_norm.default,
        work=_work,
        shards=(ShardRule("heads", {"x": -2}, (-2,)), ShardRule("heads", {"x": 1}, (1,), _heads_first)),
    )
)
declare(
    OpDef(
        torch.ops.planc.gated_rms_norm.default,
        work=_gated_work,
        shards=(ShardRule("heads", {"x": -2, "gate": -2}, (-2,)),),
    )
)
