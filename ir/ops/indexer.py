"""`planc.dsa_indexer`: which keys sparse attention looks at (DeepSeek-V3.2, arXiv 2512.02556; GLM-5)."""

from __future__ import annotations

import torch
from torch import Tensor

from planc.ir.opdef import Call, OpDef, declare
from planc.ir.work import Amount, Work


@torch.library.custom_op("planc::dsa_indexer", mutates_args=())
def dsa_indexer(q: Tensor, k: Tensor, weights: Tensor, top_k: int, scale: float) -> Tensor:
    """The best `top_k` earlier positions of each query: q [B, S, H, D], k [B, S, D], weights [B, S, H]
    -> int32 [B, S, top_k].

    A key's score is sum over heads of weight * relu(scale * q.k), in fp32; keys after the query have
    none. Where fewer than `top_k` keys exist the rest of the row is -1.
    """
    return best_keys(index_scores(q, k, weights, scale), top_k)


def index_scores(q: Tensor, k: Tensor, weights: Tensor, scale: float) -> Tensor:
    """fp32 [B, S, S]; -inf where the key is after the query."""
    scores = torch.relu(torch.einsum("bshd,btd->bsht", q.float(), k.float()) * scale)
    mixed = torch.einsum("bsh,bsht->bst", weights.float(), scores)
    tokens = q.shape[1]
    future = torch.ones(tokens, tokens, dtype=torch.bool, device=q.device).triu(1)
    return mixed.masked_fill(future, float("-inf"))


def best_keys(scores: Tensor, top_k: int) -> Tensor:
    """Positions of the largest finite scores [..., K] -> int32 [..., top_k], padded with -1."""
    values, found = scores.topk(min(top_k, scores.shape[-1]), -1)
    found = found.masked_fill(values == float("-inf"), -1)
    return torch.nn.functional.pad(found, (0, top_k - found.shape[-1]), value=-1).to(torch.int32)


@dsa_indexer.register_fake
def _(q: Tensor, k: Tensor, weights: Tensor, top_k: int, scale: float) -> Tensor:
    return q.new_empty((q.shape[0], q.shape[1], top_k), dtype=torch.int32)


def _work(call: Call) -> Work:
    """One multiply-add per pair and element of every head; the selection is counted as one pass."""
    heads, dim = call.size("q", 2), call.size("q", 3)
    return Work(
        "attention",
        flops=Amount({"P:full": 2.0 * heads * dim + 3.0 * heads}),
        reads=call.elements("q") + call.elements("k") + call.elements("weights"),
        writes=call.out(),
        dims={"q_heads": heads, "kv_heads": 1, "qk_dim": dim, "v_dim": 0, "latent": 0},
    )


declare(OpDef(torch.ops.planc.dsa_indexer.default, work=_work))
