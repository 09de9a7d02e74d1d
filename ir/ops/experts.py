"""`planc.experts`: the routed experts of a mixture, both products and the gate between them."""

from __future__ import annotations

import torch
from torch import Tensor

from planc.ir.opdef import Call, OpDef, ShardRule, declare
from planc.ir.ops.activation import ACTIVATIONS, FLOPS
from planc.ir.work import Work


@torch.library.custom_op("planc::experts", mutates_args=())
def experts(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    gate_up_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    act: str,
    transposed: bool,
    interleaved: bool,
    alpha: float,
    limit: float,
    scale_input: bool,
    first: int = 0,
) -> Tensor:
    """Sum over each token's experts of weight * down(act(gate) * up): x [T, H] -> [T, H].

    ids, weights  [T, k] from a router
    gate_up       [E, 2I, H], or [E, H, 2I] if `transposed`; gate then up, or alternating if `interleaved`
    down          [E, H, I], or [E, I, H] if `transposed`
    act           one of ACTIVATIONS, or "swigluoai": gate at most `limit`, up within +-limit,
                  (up + 1) * gate * sigmoid(alpha * gate) (gpt-oss)
    scale_input   the weight multiplies the expert's input instead of its output (Llama 4)
    first         number of the first expert held here; tokens of others contribute zero (expert parallel)
    """
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for expert in torch.unique(ids).tolist():
        if not 0 <= (at := expert - first) < gate_up.shape[0]:
            continue
        token, choice = (ids == expert).nonzero(as_tuple=True)
        share = weights[token, choice, None]
        inputs = x[token]
        if scale_input:
            inputs = inputs * share.to(x.dtype)
        hidden = inputs @ (gate_up[at] if transposed else gate_up[at].T)
        if gate_up_bias is not None:
            hidden = hidden + gate_up_bias[at]
        gate, up = (hidden[:, ::2], hidden[:, 1::2]) if interleaved else hidden.chunk(2, -1)
        result = gated(gate, up, act, alpha, limit) @ (down[at] if transposed else down[at].T)
        if down_bias is not None:
            result = result + down_bias[at]
        out.index_add_(0, token, (result if scale_input else result * share).float())
    return out.to(x.dtype)


def gated(gate: Tensor, up: Tensor, act: str, alpha: float, limit: float) -> Tensor:
    """The middle of an expert: gate, up [..., I] -> [..., I]; see `experts` for the names."""
    if act == "swigluoai":
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        return (up + 1) * gate * torch.sigmoid(gate * alpha)
    return ACTIVATIONS[act](gate) * up


@experts.register_fake
def _(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    gate_up_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    act: str,
    transposed: bool,
    interleaved: bool,
    alpha: float,
    limit: float,
    scale_input: bool,
    first: int = 0,
) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _work(call: Call) -> Work:
    """As engines run it: tokens gathered per expert, two grouped products, the gate and the sum between
    them in memory. Per token and chosen expert 2 (2I H + I H) FLOPs and the gate's.
    """
    expert_count = call.size("gate_up", 0)
    hidden, top_k = call.size("x", 1), call.size("ids", 1)
    inner = call.size("down", 1 if call.arg("transposed") else 2)
    routed = call.elements("ids")  # T * k
    held = ("gate_up", "gate_up_bias", "down", "down_bias")
    return Work(
        "grouped_gemm",
        flops=routed * (6.0 * inner * hidden + FLOPS * inner),
        weights=sum(t.numel() for name in held if (t := call.tensor(name)) is not None),
        reads=routed * float(2 * hidden + 3 * inner),
        writes=routed * float(hidden + 3 * inner) + call.out(),
        dims={"experts": expert_count, "top_k": top_k, "k": hidden, "n": 2 * inner, "matrices": 2},
    )


def _layout(transposed: bool, interleaved: bool) -> ShardRule:
    """Each expert's width divided: rows of gate and up, columns of down; a bias of down is added once."""
    dim = 2 if transposed else 1
    return ShardRule(
        "experts",
        {
            "gate_up": dim if interleaved else f"halves:{dim}",
            "gate_up_bias": 1 if interleaved else "halves:1",
            "down": 1 if transposed else 2,
            "down_bias": "partial",
        },
        ("partial",),
        lambda call: (call.arg("transposed"), call.arg("interleaved")) == (transposed, interleaved),
    )


#: Whole experts per rank (expert parallel); `first` is the rank's own.
EXPERT_PARALLEL = ShardRule(
    "experts",
    {"gate_up": 0, "gate_up_bias": 0, "down": 0, "down_bias": 0},
    ("partial",),
    first="first",
)

declare(
    OpDef(
        torch.ops.planc.experts.default,
        work=_work,
        shards=(EXPERT_PARALLEL, *(_layout(t, i) for t in (False, True) for i in (False, True))),
        quantizable={"gate_up": "weight", "down": "weight", "x": "activation"},
    )
)
