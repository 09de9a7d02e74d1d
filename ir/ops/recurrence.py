"""`planc.causal_conv1d` and `planc.gated_delta_rule`: what mixes tokens in a linear-attention layer.

Over whole sequences, from a zero state, as they stand in a traced graph. The phases pass turns them
into their paged forms, which keep a state per sequence.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from planc.ir.opdef import Call, OpDef, ShardRule, declare
from planc.ir.work import Amount, Work, total


@torch.library.custom_op("planc::causal_conv1d", mutates_args=())
def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """Depthwise convolution that looks back: x [B, C, S], weight [C, W] -> [B, C, S].

    activation: "silu" or "".
    """
    channels, width = weight.shape
    padded = F.pad(x.to(weight.dtype), (width - 1, 0))
    out = F.conv1d(padded, weight[:, None], bias, groups=channels)
    return (F.silu(out) if activation == "silu" else out).to(x.dtype)


@causal_conv1d.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("planc::gated_delta_rule", mutates_args=())
def gated_delta_rule(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, l2norm: bool) -> Tensor:
    """The gated delta rule (Yang et al., arXiv 2412.06464) along each sequence.

    q, k [B, S, Hk, Dk], v [B, S, Hv, Dv], g (log decay) and beta [B, S, Hv] -> [B, S, Hv, Dv]; Hk
    divides Hv. Per token: state = exp(g) state; state += k^T beta (v - k state);
    out = q state / sqrt(Dk). In fp32; `l2norm`: q and k are normalised first.
    """
    queries, keys = (_spread(t, v.shape[2], l2norm) for t in (q, k))
    queries = queries * q.shape[3] ** -0.5
    values, decay, rate = v.float(), g.float().exp(), beta.float()
    state = values.new_zeros(v.shape[0], v.shape[2], k.shape[3], v.shape[3])
    out = torch.empty_like(values, memory_format=torch.contiguous_format)
    for t in range(v.shape[1]):
        state = state * decay[:, t, :, None, None]
        error = values[:, t] - torch.einsum("bhk,bhkv->bhv", keys[:, t], state)
        state = state + torch.einsum("bhk,bhv->bhkv", keys[:, t], error * rate[:, t, :, None])
        out[:, t] = torch.einsum("bhk,bhkv->bhv", queries[:, t], state)
    return out.to(v.dtype)


def _spread(x: Tensor, heads: int, l2norm: bool) -> Tensor:
    """In fp32, normalised if asked, each head repeated for its group of value heads."""
    x = x.float()
    if l2norm:
        x = x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + 1e-6)
    return x.repeat_interleave(heads // x.shape[2], 2)


@gated_delta_rule.register_fake
def _delta_fake(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, l2norm: bool) -> Tensor:
    return v.new_empty(v.shape)


def _conv_work(call: Call) -> Work:
    channels, width = call.size("weight", 0), call.size("weight", 1)
    return Work(
        "recurrence",
        flops=call.elements("x") * (2.0 * width),
        weights=channels * width + (channels if call.arg("bias") is not None else 0),
        reads=call.elements("x"),
        writes=call.out(),
        dims={"heads": channels, "state_elements": channels * (width - 1)},
    )


def _delta_work(call: Call) -> Work:
    """Per token and head 7 Dk Dv: decay 1, read 2, update 2, output 2."""
    heads, v_dim = call.size("v", 2), call.size("v", 3)
    state = heads * call.size("k", 3) * v_dim
    return Work(
        "recurrence",
        flops=call.out() * (7.0 * state / (heads * v_dim)),
        reads=total(call.elements(name) for name in ("q", "k", "v", "g", "beta")),
        writes=call.out(),
        kv_reads=Amount(),
        dims={"heads": heads, "state_elements": state},
    )


declare(
    OpDef(
        torch.ops.planc.causal_conv1d.default,
        work=_conv_work,
        shards=(ShardRule("heads", {"x": 1, "weight": 0, "bias": 0}, (1,)),),
    )
)
declare(
    OpDef(
        torch.ops.planc.gated_delta_rule.default,
        work=_delta_work,
        shards=(ShardRule("heads", {"q": 2, "k": 2, "v": 2, "g": 2, "beta": 2}, (2,)),),
    )
)
