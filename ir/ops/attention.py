"""`planc.attention`: softmax attention over whole sequences, as it stands in a traced graph.

Key and value heads are not repeated for grouped queries. The phases pass turns it into
`planc.paged_attention`, which knows absolute positions; here every row starts at position 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from planc.ir.opdef import Call, OpDef, ShardRule, declare
from planc.ir.ops.paged import chosen, span, visible
from planc.ir.work import Amount, Work


@torch.library.custom_op("planc::attention", mutates_args=())
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    indices: Tensor | None,
    scale: float,
    causal: bool,
    window: int,
    chunk: int,
    softcap: float,
) -> Tensor:
    """q [B, Hq, S, D], k [B, Hkv, K, D], v [B, Hkv, K, Dv] -> [B, S, Hq, Dv]; Hkv divides Hq.

    The queries are the last S of the K positions.

    sinks    [Hq], a logit per head that takes part in the softmax and then contributes nothing
    indices  [B, S, k] positions that alone may be attended (negative ones: nothing)
    window   how many positions back a query sees, itself included; 0: all
    chunk    a query sees only its own chunk of so many positions (Llama 4); 0: all
    softcap  scores pass softcap * tanh(score / softcap); 0: they do not
    """
    batch, heads, queries, _ = q.shape
    kv_heads, keys = k.shape[1], k.shape[2]
    at = torch.arange(keys, device=q.device)
    seen = visible(at[keys - queries :, None], at[None], window, chunk) if causal else None
    grouped = q.float().reshape(batch, kv_heads, -1, q.shape[3])
    scores = (grouped @ k.float().transpose(2, 3)).view(batch, heads, queries, keys) * scale
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    if indices is not None:
        picked = chosen(indices, 0, keys)[:, None]
        seen = picked if seen is None else seen & picked
    if seen is not None:
        scores = scores.masked_fill(~seen, float("-inf"))
    if sinks is not None:
        column = sinks.float().view(1, heads, 1, 1).expand(batch, heads, queries, 1)
        scores = torch.cat([scores, column], -1)
    weights = torch.softmax(scores, -1)[..., :keys]
    mixed = weights.reshape(batch, kv_heads, -1, keys) @ v.float()
    return mixed.view(batch, heads, queries, v.shape[3]).transpose(1, 2).to(q.dtype).contiguous()


@attention.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    indices: Tensor | None,
    scale: float,
    causal: bool,
    window: int,
    chunk: int,
    softcap: float,
) -> Tensor:
    return q.new_empty((q.shape[0], q.shape[2], q.shape[1], v.shape[3]))


def _work(call: Call) -> Work:
    """Two multiply-adds per pair and element: scores, then values."""
    q_heads, qk_dim = call.size("q", 1), call.size("q", 3)
    kv_heads, v_dim = call.size("v", 1), call.size("v", 3)
    topk = call.size("indices", 2) if call.arg("indices") is not None else 0
    reaches = span(call.arg("window"), call.arg("chunk"), topk) if call.arg("causal") else "both"
    return Work(
        "attention",
        flops=Amount({f"P:{reaches}": 2.0 * q_heads * (qk_dim + v_dim)}),
        reads=call.elements("q") + call.elements("k") + call.elements("v") + call.elements("indices"),
        writes=call.out(),
        dims={"q_heads": q_heads, "kv_heads": kv_heads, "qk_dim": qk_dim, "v_dim": v_dim, "latent": 0},
    )


declare(
    OpDef(
        torch.ops.planc.attention.default,
        work=_work,
        shards=(ShardRule("heads", {"q": 1, "k": 1, "v": 1, "sinks": 0}, (2,)),),
    )
)
