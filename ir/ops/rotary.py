"""`planc.rope` and `planc.rope_single`: rotary position embedding (Su et al., arXiv 2104.09864).

The tables cos and sin come from `position_ids` in the graph, so a row of several sequences laid end
to end is rotated rightly. Four layouts are in use:

    half         pairs (i, i + R/2); tables of width R. Llama, Qwen, Mixtral, Gemma, MiniMax
    split        the same with tables of width R/2. gpt-oss
    interleaved  pairs (2i, 2i + 1) in, halves out; tables of width R. DeepSeek, GLM-5
    pairs        pairs (2i, 2i + 1) in and out, in fp32; tables of width R/2. Llama 4

Only the first R elements of a head are rotated where R is less than the head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from planc.ir.opdef import Call, OpDef, ShardRule, declare
from planc.ir.work import Work

STYLES = ("half", "split", "interleaved", "pairs")


def rotate(x: Tensor, cos: Tensor, sin: Tensor, heads_dim: int, style: str) -> Tensor:
    """Any shape whose last dimension is the head, tables without the heads dimension."""
    cos, sin = cos.unsqueeze(heads_dim), sin.unsqueeze(heads_dim)
    if style == "half":
        width = cos.shape[-1]
        turned, rest = x[..., :width], x[..., width:]
        first, second = turned.chunk(2, -1)
        turned = turned * cos + torch.cat((-second, first), -1) * sin
        return torch.cat((turned, rest), -1) if rest.shape[-1] else turned
    if style == "split":
        first, second = x.chunk(2, -1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
    if style == "interleaved":
        cos, sin = cos[..., : cos.shape[-1] // 2], sin[..., : sin.shape[-1] // 2]
        even, odd = x[..., 0::2], x[..., 1::2]
        return torch.cat((even * cos - odd * sin, odd * cos + even * sin), -1)
    assert style == "pairs", f"rope knows no style {style}"
    even, odd = x.float()[..., 0::2], x.float()[..., 1::2]
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), -1).flatten(-2).to(x.dtype)


@torch.library.custom_op("planc::rope", mutates_args=())
def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, heads_dim: int, style: str) -> tuple[Tensor, Tensor]:
    """q and k rotated alike: [B, H, S, D] with heads_dim 1, or [B, S, H, D] with heads_dim 2.

    cos, sin [B, S, R] or [B, S, R / 2], see the styles above; k may have fewer heads than q.
    """
    rotated = (rotate(t, cos, sin, heads_dim, style).contiguous() for t in (q, k))
    return next(rotated), next(rotated)


@rope.register_fake
def _(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, heads_dim: int, style: str) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


@torch.library.custom_op("planc::rope_single", mutates_args=())
def rope_single(x: Tensor, cos: Tensor, sin: Tensor, heads_dim: int, style: str) -> Tensor:
    """One tensor rotated, as `planc.rope`."""
    return rotate(x, cos, sin, heads_dim, style).contiguous()


@rope_single.register_fake
def _single_fake(x: Tensor, cos: Tensor, sin: Tensor, heads_dim: int, style: str) -> Tensor:
    return x.new_empty(x.shape)


def _work(call: Call) -> Work:
    """Three operations per rotated element; the tables are read once."""
    moved = call.elements("q") + call.elements("k")
    return Work(
        "elementwise",
        flops=moved * 3.0,
        reads=moved + call.elements("cos") + call.elements("sin"),
        writes=moved,
    )


def _single_work(call: Call) -> Work:
    moved = call.elements("x")
    return Work(
        "elementwise",
        flops=moved * 3.0,
        reads=moved + call.elements("cos") + call.elements("sin"),
        writes=moved,
    )


def _heads_at(dim: int) -> tuple[ShardRule, ...]:
    def here(call: Call) -> bool:
        return bool(call.arg("heads_dim") == dim)

    # a key that all heads share (MLA) stays whole
    return (
        ShardRule("heads", {"q": dim, "k": dim}, (dim, dim), here),
        ShardRule("heads", {"q": dim}, (dim, "whole"), here),
    )


def _single_at(dim: int) -> ShardRule:
    return ShardRule("heads", {"x": dim}, (dim,), lambda call: bool(call.arg("heads_dim") == dim))


declare(OpDef(torch.ops.planc.rope.default, work=_work, shards=(*_heads_at(1), *_heads_at(2))))
declare(OpDef(torch.ops.planc.rope_single.default, work=_single_work, shards=(_single_at(1), _single_at(2))))
