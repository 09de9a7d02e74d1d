"""`planc.paged_mla`: multi-head latent attention over a cache of latents (DeepSeek-V2, arXiv 2405.04434).

One cache entry per token, shared by all heads: the compressed latent c_kv (rank R) and the rotary
key (Dr). Two forms, equal in exact arithmetic:

    expanded   K, V = kv_b(latent) for the whole context, then ordinary attention with Dn + Dr wide
               keys: fewer FLOPs per pair, so the form for prefill
    absorbed   kv_b's key half moves into the query, its value half behind the softmax, and all heads
               attend to the R + Dr wide latents directly: nothing is expanded, so the form for decode
               and for sparse attention
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from planc.ir.opdef import Call, OpDef, ShardRule, declare
from planc.ir.ops.paged import chosen, load, one_token_each, reachable, segments, span, store, visible
from planc.ir.ops.paged_attention import attend
from planc.ir.work import Amount, Work


@torch.library.custom_op("planc::paged_mla", mutates_args=("cache",))
def paged_mla(
    q: Tensor,
    c_kv: Tensor,
    k_rot: Tensor,
    kv_b: Tensor,
    cache: Tensor,
    query_starts: Tensor,
    context_lens: Tensor,
    block_table: Tensor,
    slots: Tensor,
    indices: Tensor | None,
    scale: float,
    nope_dim: int,
    v_dim: int,
    absorbed: bool,
    kv_scale: float = 1.0,
) -> Tensor:
    """q [1, H, T, Dn + Dr], c_kv [1, 1, T, R], k_rot [1, 1, T, Dr], kv_b [H * (Dn + Dv), R] -> [1, T, H, Dv].

    cache [blocks, block_size, R + Dr] is written at `slots` first. indices [1, T, k]: positions in the
    token's own sequence that alone may be attended (negative ones: nothing). A cache of 8 bits holds
    entry / kv_scale.
    """
    entries = torch.cat([c_kv, k_rot], -1)[0, 0]
    store(cache, slots, entries, kv_scale)
    picks = None if indices is None else indices[0]
    form = _absorbed if absorbed else _expanded
    if one_token_each(query_starts, q.shape[2]):
        latents = load(cache, block_table, q.dtype, kv_scale)  # [S, C, R + Dr]
        positions = torch.arange(latents.shape[1], device=q.device)
        seen = visible(context_lens[:, None].long() - 1, positions, 0, 0)
        if picks is not None:
            seen = seen & chosen(picks, 0, latents.shape[1])
        query = q[0].transpose(0, 1).unsqueeze(2)  # [S, H, 1, D]
        out = form(query, latents, kv_b, seen[:, None, None], scale, nope_dim, v_dim)
        return out.squeeze(2).unsqueeze(0).contiguous()
    rows = []
    for part in segments(query_starts, context_lens):
        blocks, positions = reachable(part, block_table, cache.shape[1])
        latents = load(cache, blocks, q.dtype, kv_scale)[: len(positions)]
        seen = visible(torch.arange(part.first, part.context, device=q.device)[:, None], positions, 0, 0)
        if picks is not None:
            seen = seen & chosen(picks[part.start : part.stop], 0, len(positions))
        query = q[:, :, part.start : part.stop]
        rows.append(form(query, latents[None], kv_b, seen[None, None], scale, nope_dim, v_dim))
    return torch.cat(rows, 2).transpose(1, 2).contiguous()


def _expanded(
    q: Tensor, latents: Tensor, kv_b: Tensor, seen: Tensor, scale: float, nope_dim: int, v_dim: int
) -> Tensor:
    """q [B, H, Q, Dn + Dr], latents [B, C, R + Dr] -> [B, H, Q, Dv]."""
    batch, heads, context, rank = q.shape[0], q.shape[1], latents.shape[1], kv_b.shape[1]
    c_kv, k_rot = latents.split([rank, latents.shape[2] - rank], -1)
    kv = F.linear(c_kv, kv_b).view(batch, context, heads, nope_dim + v_dim).transpose(1, 2)
    k_nope, v = kv.split([nope_dim, v_dim], -1)
    k = torch.cat([k_nope, k_rot[:, None].expand(-1, heads, -1, -1)], -1)
    return attend(q, k, v, seen, None, scale, 0.0)


def _absorbed(
    q: Tensor, latents: Tensor, kv_b: Tensor, seen: Tensor, scale: float, nope_dim: int, v_dim: int
) -> Tensor:
    """As `_expanded`, with the products reassociated: q_nope W_uk against latents, W_uv at the end."""
    heads, rank = q.shape[1], kv_b.shape[1]
    w_uk, w_uv = kv_b.view(heads, nope_dim + v_dim, rank).split([nope_dim, v_dim], 1)
    q_nope, q_rot = q.split([nope_dim, q.shape[3] - nope_dim], -1)
    query = torch.cat([q_nope @ w_uk, q_rot], -1)  # [B, H, Q, R + Dr]
    mixed = attend(query, latents[:, None], latents[:, None, :, :rank], seen, None, scale, 0.0)
    return torch.matmul(mixed, w_uv.transpose(1, 2))


@paged_mla.register_fake
def _fake(
    q: Tensor,
    c_kv: Tensor,
    k_rot: Tensor,
    kv_b: Tensor,
    cache: Tensor,
    query_starts: Tensor,
    context_lens: Tensor,
    block_table: Tensor,
    slots: Tensor,
    indices: Tensor | None,
    scale: float,
    nope_dim: int,
    v_dim: int,
    absorbed: bool,
    kv_scale: float = 1.0,
) -> Tensor:
    return q.new_empty((q.shape[0], q.shape[2], q.shape[1], v_dim))


def _work(call: Call) -> Work:
    """Absorbed: 2 H (Dn R + R Dv) per token and 2 H (2 R + Dr) per pair. Expanded: the latents of the
    context through kv_b once, then 2 H (Dn + Dr + Dv) per pair."""
    heads, qk_dim = call.size("q", 1), call.size("q", 3)
    nope, v_dim = int(call.arg("nope_dim")), int(call.arg("v_dim"))
    rank, rope = call.size("c_kv", 3), call.size("k_rot", 3)
    topk = call.size("indices", 2) if call.arg("indices") is not None else 0
    reaches = span(0, 0, topk)
    pairs, cached = f"P:{reaches}", f"K:{reaches}"
    expansion = 2.0 * heads * rank * (nope + v_dim)
    if call.arg("absorbed"):
        flops = Amount({"T": expansion, pairs: 2.0 * heads * (2 * rank + rope)})
    else:
        flops = Amount({cached: expansion, pairs: 2.0 * heads * (qk_dim + v_dim)})
    return Work(
        "attention",
        flops=flops,
        weights=heads * (nope + v_dim) * rank,
        reads=call.elements("q") + call.elements("c_kv") + call.elements("k_rot") + call.elements("indices"),
        writes=call.out(),
        kv_reads=Amount({cached: float(rank + rope)}),
        kv_writes=Amount({"T": float(rank + rope)}),
        dims={"q_heads": heads, "kv_heads": 1, "qk_dim": qk_dim, "v_dim": v_dim, "latent": 1},
    )


declare(
    OpDef(
        torch.ops.planc.paged_mla.default,
        work=_work,
        shards=(ShardRule("heads", operands={"q": 1, "kv_b": 0}, results=(2,)),),
        quantizable={"cache": "kv"},
    )
)
