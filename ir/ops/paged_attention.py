"""`planc.paged_attention`: append this step's keys and values to the paged cache, then attend to it.

What the phases pass makes of `planc.attention`. One op for prefill, chunked prefill and decode;
grouped heads are not repeated; sliding windows, Llama-4 chunks, sinks, soft-capping and chosen keys
(sparse attention) are arguments.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from planc.ir.opdef import Call, OpDef, ShardRule, declare
from planc.ir.ops.paged import chosen, load, one_token_each, reachable, segments, span, store, visible
from planc.ir.work import Amount, Work


@torch.library.custom_op("planc::paged_attention", mutates_args=("k_cache", "v_cache"))
def paged_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    query_starts: Tensor,
    context_lens: Tensor,
    block_table: Tensor,
    slots: Tensor,
    sinks: Tensor | None,
    indices: Tensor | None,
    scale: float,
    window: int,
    chunk: int,
    softcap: float,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> Tensor:
    """Causal attention of T new tokens over the paged cache of their sequences.

    q [1, Hq, T, D], k [1, Hkv, T, D], v [1, Hkv, T, Dv] -> [1, T, Hq, Dv]. k_cache
    [blocks, block_size, Hkv, D] and v_cache [.., Dv] are written at `slots` first, then read.
    window, chunk, softcap: 0 = none. sinks [Hq] join the softmax as one more logit without a value.
    indices [1, T, k] are positions in the token's own sequence that alone may be attended
    (negative ones: nothing). Caches of 8 bits hold k / k_scale and v / v_scale.
    """
    store(k_cache, slots, k[0].transpose(0, 1), k_scale)
    store(v_cache, slots, v[0].transpose(0, 1), v_scale)
    return attend_paged(
        q,
        k_cache,
        v_cache,
        query_starts,
        context_lens,
        block_table,
        sinks,
        indices,
        scale,
        window,
        chunk,
        softcap,
        k_scale,
        v_scale,
    )


def attend_paged(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    query_starts: Tensor,
    context_lens: Tensor,
    block_table: Tensor,
    sinks: Tensor | None,
    indices: Tensor | None,
    scale: float,
    window: int,
    chunk: int,
    softcap: float,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> Tensor:
    """As `paged_attention`, over caches that hold this step's keys and values already."""
    picks = None if indices is None else indices[0]
    if one_token_each(query_starts, q.shape[2]):
        keys = load(k_cache, block_table, q.dtype, k_scale).transpose(1, 2)  # [S, Hkv, C, D]
        values = load(v_cache, block_table, q.dtype, v_scale).transpose(1, 2)
        positions = torch.arange(keys.shape[2], device=q.device)
        seen = visible(context_lens[:, None].long() - 1, positions, window, chunk)
        if picks is not None:
            seen = seen & chosen(picks, 0, keys.shape[2])
        query = q[0].transpose(0, 1).unsqueeze(2)  # [S, Hq, 1, D]
        out = attend(query, keys, values, seen[:, None, None], sinks, scale, softcap)
        return out.squeeze(2).unsqueeze(0).contiguous()
    rows = []
    for part in segments(query_starts, context_lens):
        blocks, positions = reachable(part, block_table, k_cache.shape[1], window, chunk)
        keys = load(k_cache, blocks, q.dtype, k_scale)[: len(positions)].transpose(0, 1)
        values = load(v_cache, blocks, q.dtype, v_scale)[: len(positions)].transpose(0, 1)
        queries = torch.arange(part.first, part.context, device=q.device)[:, None]
        seen = visible(queries, positions, window, chunk)
        if picks is not None:
            seen = seen & chosen(picks[part.start : part.stop], int(positions[0]), len(positions))
        query = q[:, :, part.start : part.stop]
        rows.append(attend(query, keys[None], values[None], seen[None, None], sinks, scale, softcap))
    return torch.cat(rows, 2).transpose(1, 2).contiguous()


def attend(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor, sinks: Tensor | None, scale: float, softcap: float
) -> Tensor:
    """Softmax attention, grouped heads: q [B, Hq, Q, D], k [B, Hkv, K, D] -> [B, Hq, Q, Dv]."""
    if sinks is None and not softcap:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale, enable_gqa=True)
    batch, heads, queries, _ = q.shape
    groups = heads // k.shape[1]
    grouped = q.float().reshape(batch, k.shape[1], groups * queries, q.shape[3])
    scores = (grouped @ k.float().transpose(-1, -2)).view(batch, heads, queries, -1) * scale
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~seen, float("-inf"))
    if sinks is not None:
        column = sinks.float().view(1, heads, 1, 1).expand(batch, heads, queries, 1)
        scores = torch.cat([scores, column], -1)
    weights = torch.softmax(scores, -1)[..., : k.shape[2]]
    mixed = weights.reshape(batch, k.shape[1], groups * queries, -1) @ v.float()
    return mixed.view(batch, heads, queries, v.shape[3]).to(q.dtype)


@paged_attention.register_fake
def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    query_starts: Tensor,
    context_lens: Tensor,
    block_table: Tensor,
    slots: Tensor,
    sinks: Tensor | None,
    indices: Tensor | None,
    scale: float,
    window: int,
    chunk: int,
    softcap: float,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> Tensor:
    return q.new_empty((q.shape[0], q.shape[2], q.shape[1], v.shape[3]))


def _work(call: Call) -> Work:
    """Two multiply-adds per pair and element (scores, then values); each cached key and value read once."""
    q_heads, qk_dim = call.size("q", 1), call.size("q", 3)
    kv_heads, v_dim = call.size("v", 1), call.size("v", 3)
    topk = call.size("indices", 2) if call.arg("indices") is not None else 0
    reaches = span(call.arg("window"), call.arg("chunk"), topk)
    entry = kv_heads * (qk_dim + v_dim)
    return Work(
        "attention",
        flops=Amount({f"P:{reaches}": 2.0 * q_heads * (qk_dim + v_dim)}),
        reads=call.elements("q") + call.elements("k") + call.elements("v") + call.elements("indices"),
        writes=call.out(),
        kv_reads=Amount({f"K:{reaches}": float(entry)}),
        kv_writes=Amount({"T": float(entry)}),
        dims={"q_heads": q_heads, "kv_heads": kv_heads, "qk_dim": qk_dim, "v_dim": v_dim, "latent": 0},
    )


declare(
    OpDef(
        torch.ops.planc.paged_attention.default,
        work=_work,
        shards=(
            ShardRule(
                "heads",
                operands={"q": 1, "k": 1, "v": 1, "k_cache": 2, "v_cache": 2, "sinks": 0},
                results=(2,),
            ),
        ),
        quantizable={"k_cache": "kv", "v_cache": "kv"},
    )
)
