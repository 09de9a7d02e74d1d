"""Routers: which experts each token goes to, and with what weights, from the router's logits.

The logits themselves are an ordinary `aten.linear`. Ids are not sorted by expert. Weights come in
fp32 unless `cast` asks for the type of the logits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from planc.ir.opdef import Call, OpDef, declare
from planc.ir.work import Work


@torch.library.custom_op("planc::route_softmax", mutates_args=())
def route_softmax(
    logits: Tensor, expert_scale: Tensor | None, top_k: int, normalize: bool, cast: bool
) -> tuple[Tensor, Tensor]:
    """Softmax over all experts, then the largest k. Mixtral, Qwen3-MoE, Qwen3.5, Gemma 4.

    logits [T, E], expert_scale [E] -> weights [T, k], ids int64 [T, k]. `normalize`: the k weights
    are made to sum to one; then each is multiplied by its expert's scale.
    """
    weights, ids = torch.softmax(logits.float(), -1).topk(top_k, -1)
    if normalize:
        weights = weights / weights.sum(-1, keepdim=True)
    if expert_scale is not None:
        weights = weights * expert_scale[ids]
    return (weights.to(logits.dtype) if cast else weights), ids


@route_softmax.register_fake
def _(
    logits: Tensor, expert_scale: Tensor | None, top_k: int, normalize: bool, cast: bool
) -> tuple[Tensor, Tensor]:
    return _routed(logits, top_k, cast)


@torch.library.custom_op("planc::route_topk", mutates_args=())
def route_topk(logits: Tensor, top_k: int, score: str, cast: bool) -> tuple[Tensor, Tensor]:
    """The largest k logits, then their scores: "softmax" over the k (gpt-oss) or "sigmoid" (Llama 4).

    logits [T, E] -> weights [T, k], ids int64 [T, k].
    """
    best, ids = logits.topk(top_k, -1)
    if score == "softmax":
        weights = torch.softmax(best.float(), -1)
    else:
        assert score == "sigmoid", f"route_topk knows no score {score}"
        weights = torch.sigmoid(best.float())
    return (weights.to(logits.dtype) if cast else weights), ids


@route_topk.register_fake
def _topk_fake(logits: Tensor, top_k: int, score: str, cast: bool) -> tuple[Tensor, Tensor]:
    return _routed(logits, top_k, cast)


@torch.library.custom_op("planc::route_grouped", mutates_args=())
def route_grouped(
    logits: Tensor,
    bias: Tensor | None,
    top_k: int,
    groups: int,
    top_groups: int,
    normalize: bool,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    """Sigmoid scores, chosen with a correction bias inside the best groups (DeepSeek-V3, arXiv 2412.19437).

    logits [T, E], bias [E] -> weights fp32 [T, k], ids int64 [T, k]. A group's rank is the sum of its
    two best biased scores; the weights are the unbiased scores, normalised if asked, times `scaling`.
    """
    scores = logits.float().sigmoid()
    choice = scores if bias is None else scores + bias
    if groups > 1:
        grouped = choice.view(choice.shape[0], groups, -1)
        ranks = grouped.topk(2, -1)[0].sum(-1)
        kept = ranks.topk(top_groups, -1, sorted=False)[1]
        mask = torch.zeros_like(ranks, dtype=torch.bool).scatter_(1, kept, True)
        choice = grouped.masked_fill(~mask.unsqueeze(-1), float("-inf")).flatten(1)
    ids = choice.topk(top_k, -1, sorted=False)[1]
    weights = scores.gather(1, ids)
    if normalize:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return weights * scaling, ids


@route_grouped.register_fake
def _grouped_fake(
    logits: Tensor,
    bias: Tensor | None,
    top_k: int,
    groups: int,
    top_groups: int,
    normalize: bool,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    return _routed(logits, top_k, cast=False)


def _routed(logits: Tensor, top_k: int, cast: bool) -> tuple[Tensor, Tensor]:
    shape = (logits.shape[0], top_k)
    dtype = logits.dtype if cast else torch.float32
    return logits.new_empty(shape, dtype=dtype), logits.new_empty(shape, dtype=torch.int64)


def _work(call: Call) -> Work:
    """A score and a few comparisons per expert; small beside the experts themselves."""
    return Work(
        "elementwise",
        flops=call.elements("logits") * 8.0,
        reads=call.elements("logits"),
        writes=call.out(0) + call.out(1),
    )


for _name in ("route_softmax", "route_topk", "route_grouped"):
    declare(OpDef(getattr(torch.ops.planc, _name).default, work=_work))
