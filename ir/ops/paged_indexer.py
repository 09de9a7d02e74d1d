"""`planc.paged_indexer`: which cached keys sparse attention looks at (DeepSeek-V3.2, GLM-5).

What the phases pass makes of `planc.dsa_indexer`. The indexer's keys are cached like any other;
what it returns are positions in the token's own sequence, so they mean the same to paged attention.
"""

from __future__ import annotations

import torch
from torch import Tensor

from planc.ir.opdef import Call, OpDef, declare
from planc.ir.ops.indexer import best_keys
from planc.ir.ops.paged import load, one_token_each, reachable, segments, store, visible
from planc.ir.work import Amount, Work


@torch.library.custom_op("planc::paged_indexer", mutates_args=("cache",))
def paged_indexer(
    q: Tensor,
    k: Tensor,
    weights: Tensor,
    cache: Tensor,
    query_starts: Tensor,
    context_lens: Tensor,
    block_table: Tensor,
    slots: Tensor,
    top_k: int,
    scale: float,
) -> Tensor:
    """q [1, T, H, D], k [1, T, D], weights [1, T, H] -> int32 [1, T, top_k] positions, padded with -1.

    cache [blocks, block_size, D] is written at `slots` first. A key's score is the sum over heads of
    weight * relu(scale * q.k), in fp32.
    """
    store(cache, slots, k[0])
    if one_token_each(query_starts, q.shape[1]):
        keys = load(cache, block_table, k.dtype)  # [S, C, D]
        positions = torch.arange(keys.shape[1], device=q.device)
        seen = visible(context_lens[:, None].long() - 1, positions, 0, 0)
        return best_keys(_scores(q[0][:, None], keys, weights[0][:, None], seen[:, None], scale), top_k)[
            None, :, 0
        ]
    rows = []
    for part in segments(query_starts, context_lens):
        blocks, positions = reachable(part, block_table, cache.shape[1])
        keys = load(cache, blocks, k.dtype)[: len(positions)]
        seen = visible(torch.arange(part.first, part.context, device=q.device)[:, None], positions, 0, 0)
        mine = slice(part.start, part.stop)
        rows.append(best_keys(_scores(q[:, mine], keys[None], weights[:, mine], seen[None], scale), top_k))
    return torch.cat(rows, 1)


def _scores(q: Tensor, keys: Tensor, weights: Tensor, seen: Tensor, scale: float) -> Tensor:
    """q [B, Q, H, D], keys [B, C, D], weights [B, Q, H], seen [B, Q, C] -> fp32 [B, Q, C]."""
    scores = torch.relu(torch.einsum("bqhd,bcd->bqhc", q.float(), keys.float()) * scale)
    mixed = torch.einsum("bqh,bqhc->bqc", weights.float(), scores)
    return mixed.masked_fill(~seen, float("-inf"))


@paged_indexer.register_fake
def _fake(
    q: Tensor,
    k: Tensor,
    weights: Tensor,
    cache: Tensor,
    query_starts: Tensor,
    context_lens: Tensor,
    block_table: Tensor,
    slots: Tensor,
    top_k: int,
    scale: float,
) -> Tensor:
    return q.new_empty((q.shape[0], q.shape[1], top_k), dtype=torch.int32)


def _work(call: Call) -> Work:
    """One multiply-add per pair, head and element, then relu, weight and sum; one cached key per token."""
    heads, dim = call.size("q", 2), call.size("q", 3)
    return Work(
        "attention",
        flops=Amount({"P:full": 2.0 * heads * dim + 3.0 * heads}),
        reads=call.elements("q") + call.elements("k") + call.elements("weights"),
        writes=call.out(),
        kv_reads=Amount({"K:full": float(dim)}),
        kv_writes=Amount({"T": float(dim)}),
        dims={"q_heads": heads, "kv_heads": 1, "qk_dim": dim, "v_dim": 0, "latent": 0},
    )


declare(OpDef(torch.ops.planc.paged_indexer.default, work=_work))
