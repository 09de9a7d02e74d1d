"""`planc.paged_conv1d` and `planc.paged_delta_rule`: linear-attention layers with one state per sequence.

What the phases pass makes of `planc.causal_conv1d` and `planc.gated_delta_rule`. States lie in a
cache [slots, *entry]; `state_slots[s]` is the row of sequence s. A sequence whose first token is in
this step starts from a zero state, whatever its row holds, so rows need no clearing.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from planc.ir.opdef import Call, OpDef, ShardRule, declare
from planc.ir.ops.paged import segments
from planc.ir.work import Amount, Work


@torch.library.custom_op("planc::paged_conv1d", mutates_args=("state",))
def paged_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor,
    query_starts: Tensor,
    context_lens: Tensor,
    state_slots: Tensor,
    activation: str,
) -> Tensor:
    """Causal depthwise convolution along each sequence: x [1, C, T], weight [C, W] -> [1, C, T].

    state [slots, C, W - 1] holds the last W - 1 inputs of each sequence and is updated in place.
    activation: "silu" or "".
    """
    channels, width = weight.shape
    rows = []
    for part in segments(query_starts, context_lens):
        slot = int(state_slots[part.row])
        tokens = x[0, :, part.start : part.stop].to(weight.dtype)
        before = state[slot] if part.first else torch.zeros_like(state[slot])
        line = torch.cat([before.to(weight.dtype), tokens], -1)
        state[slot] = line[:, line.shape[1] - (width - 1) :].to(state.dtype)
        rows.append(F.conv1d(line[None], weight[:, None], bias, groups=channels))
    out = torch.cat(rows, -1)
    return (F.silu(out) if activation == "silu" else out).to(x.dtype)


@paged_conv1d.register_fake
def _conv1d_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor,
    query_starts: Tensor,
    context_lens: Tensor,
    state_slots: Tensor,
    activation: str,
) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _conv1d_work(call: Call) -> Work:
    """W multiply-adds per channel and token; the state goes in and out once per sequence."""
    channels, width = call.size("weight", 0), call.size("weight", 1)
    held = Amount({"S": float(channels * (width - 1))})
    return Work(
        "recurrence",
        flops=2.0 * width * call.elements("x"),
        weights=channels * width + (channels if call.arg("bias") is not None else 0),
        reads=call.elements("x"),
        writes=call.out(),
        kv_reads=held,
        kv_writes=held,
        dims={"heads": channels, "state_elements": channels * (width - 1)},
    )


@torch.library.custom_op("planc::paged_delta_rule", mutates_args=("state",))
def paged_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor,
    query_starts: Tensor,
    context_lens: Tensor,
    state_slots: Tensor,
    l2norm: bool,
) -> Tensor:
    """The gated delta rule (arXiv 2412.06464) along each sequence.

    q, k [1, T, Hk, Dk], v [1, T, Hv, Dv], g (log decay) and beta [1, T, Hv] -> [1, T, Hv, Dv];
    Hk divides Hv. state [slots, Hv, Dk, Dv], fp32, is updated in place. Per token:
    state = exp(g) state; state += k^T beta (v - k state); out = q state / sqrt(Dk).
    """
    queries, keys = (_spread(t, v.shape[2], l2norm) for t in (q, k))
    queries = queries * q.shape[-1] ** -0.5
    values, decay, rate = v.float(), g.float().exp(), beta.float()
    out = torch.empty_like(values)
    parts = list(segments(query_starts, context_lens))
    held = state[state_slots.long()].float()
    for part in parts:
        if not part.first:
            held[part.row] = 0.0
    for step in range(max((part.queries for part in parts), default=0)):
        live = [part for part in parts if part.queries > step]
        rows = torch.tensor([part.row for part in live], device=q.device)
        at = torch.tensor([part.start + step for part in live], device=q.device)
        now = held[rows] * decay[0, at, :, None, None]
        key = keys[0, at]
        error = values[0, at] - torch.einsum("shk,shkv->shv", key, now)
        now = now + torch.einsum("shk,shv->shkv", key, error * rate[0, at, :, None])
        out[0, at] = torch.einsum("shk,shkv->shv", queries[0, at], now)
        held[rows] = now
    state[state_slots.long()] = held.to(state.dtype)
    return out.to(v.dtype)


def _spread(x: Tensor, heads: int, l2norm: bool) -> Tensor:
    """Query or key heads in fp32, normalised if asked, each repeated for its group of value heads."""
    x = x.float()
    if l2norm:
        x = x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + 1e-6)
    return x.repeat_interleave(heads // x.shape[2], 2)


@paged_delta_rule.register_fake
def _delta_rule_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor,
    query_starts: Tensor,
    context_lens: Tensor,
    state_slots: Tensor,
    l2norm: bool,
) -> Tensor:
    return torch.empty_like(v, memory_format=torch.contiguous_format)


def _delta_rule_work(call: Call) -> Work:
    """Per token and head 7 Dk Dv: decay 1, read 2, update 2, output 2; the state in and out once."""
    heads, v_dim = call.size("v", 2), call.size("v", 3)
    entry = heads * call.size("k", 3) * v_dim
    held = Amount({"S": float(entry)})
    inputs = (call.elements(name) for name in ("q", "k", "v", "g", "beta"))
    return Work(
        "recurrence",
        flops=Amount({"T": 7.0 * entry}),
        reads=sum(inputs, Amount()),
        writes=call.out(),
        kv_reads=held,
        kv_writes=held,
        dims={"heads": heads, "state_elements": entry},
    )


declare(
    OpDef(
        torch.ops.planc.paged_conv1d.default,
        work=_conv1d_work,
        shards=(ShardRule("heads", operands={"x": 1, "weight": 0, "bias": 0, "state": 1}, results=(1,)),),
    )
)
declare(
    OpDef(
        torch.ops.planc.paged_delta_rule.default,
        work=_delta_rule_work,
        shards=(
            ShardRule(
                "heads", operands={"q": 2, "k": 2, "v": 2, "g": 2, "beta": 2, "state": 1}, results=(2,)
            ),
        ),
    )
)
