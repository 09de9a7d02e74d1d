"""Vertical fusions: a call and the ones that feed it become one, and what lay between stays out of memory."""

from __future__ import annotations

from operator import getitem
from typing import Any as Anything

import torch
from torch.fx import Node

from planc.ir.opdef import fake
from planc.passes.fusion_rewriter import Rewriter
from planc.passes.patterns import Any, Call, match

aten, planc = torch.ops.aten, torch.ops.planc


def _is_node(found: Anything) -> bool:
    return isinstance(found, Node)


SUM_NORMED = Call(
    planc.rms_norm.default,
    Call(aten.add.Tensor, Any("x", _is_node), Any("residual", _is_node), 1, name="sum"),
    Any("weight"),
    Any("eps"),
    Any("mode"),
)


def add_rms_norm(rewriter: Rewriter, norm: Node) -> bool:
    """Residual addition and the norm after it.

    before   s = add(x, residual)                       after   y, s = planc.add_rms_norm(x, residual, w)
             y = planc.rms_norm(s, w)

    The sum is a result too, for the next residual connection. Where several norms read one sum, the
    first takes it along.
    """
    caught = match(SUM_NORMED, norm)
    if caught is None:
        return False
    total, x, residual = caught["sum"], caught["x"], caught["residual"]
    if not all(
        fake(t).shape == fake(total).shape and fake(t).dtype == fake(total).dtype for t in (x, residual)
    ):
        return False  # a broadcast or a promotion, which the fused op does not do
    args = (x, residual, caught["weight"], caught["eps"], caught["mode"])
    fused = rewriter.call(planc.add_rms_norm.default, args, before=total, like=norm)
    normed, summed = rewriter.results(fused, before=total)
    norm.replace_all_uses_with(normed)
    total.replace_all_uses_with(summed)
    rewriter.replaced([total, norm], [fused])
    return True


def _normed_heads(name: str) -> Call:
    norm = Call(
        planc.rms_norm.default, Any(name), Any(f"{name}_weight"), Any("eps"), Any("mode"), name=f"{name}_norm"
    )
    return Call(aten.transpose.int, norm, 1, 2, name=f"{name}_heads")


NORMED_ROPE = Call(
    planc.rope.default, _normed_heads("q"), _normed_heads("k"), Any("cos"), Any("sin"), 1, Any("style")
)


def _turned(name: str) -> Call:
    turned = Call(
        planc.rope_single.default, Any(name), Any("cos"), Any("sin"), 2, Any("style"), name=f"{name}_rope"
    )
    return Call(aten.transpose.int, turned, 1, 2, name=f"{name}_heads")


#: Queries and keys rotated apart, in front of attention (Gemma 4)
APART = Call((planc.attention.default, planc.paged_attention.default), _turned("q"), _turned("k"))


def join_rotations(rewriter: Rewriter, attention: Node) -> Node | None:
    """The rotations of queries and keys as one call, from which the fusions around it go on.

    before   q = transpose(planc.rope_single(q, cos, sin, 2, style), 1, 2);  k = ...
    after    q, k = planc.rope(transpose(q, 1, 2), transpose(k, 1, 2), cos, sin, 1, style)
    """
    caught = match(APART, attention)
    if caught is None:
        return None
    inner = [caught[f"{t}_{part}"] for t in "qk" for part in ("rope", "heads")]
    if any(len(node.users) != 1 for node in inner):
        return None
    heads = [
        rewriter.call(aten.transpose.int, (caught[t], 1, 2), before=attention, like=attention) for t in "qk"
    ]
    args = (*heads, caught["cos"], caught["sin"], 1, caught["style"])
    rope = rewriter.call(planc.rope.default, args, before=attention, like=caught["q_rope"])
    results = rewriter.results(rope, before=attention)
    for old, new in zip((caught["q_heads"], caught["k_heads"]), results, strict=True):
        old.replace_all_uses_with(new)
    rewriter.replaced(sorted(inner), [*heads, rope])
    return rope


def qk_norm_rope(rewriter: Rewriter, node: Node) -> bool:
    """The norms of queries and keys, per head, and their rotation.

    before   q = transpose(planc.rms_norm(q, wq), 1, 2)
             k = transpose(planc.rms_norm(k, wk), 1, 2)
             q, k = planc.rope(q, k, cos, sin, 1, style)
    after    q, k = planc.qk_norm_rope(transpose(q, 1, 2), transpose(k, 1, 2), wq, wk, cos, sin, ...)

    Called at rotations, and at attention for those that are rotated apart.
    """
    rope = node if node.target is planc.rope.default else join_rotations(rewriter, node)
    caught = match(NORMED_ROPE, rope)
    if rope is None or caught is None:
        return rope is not node
    inner = [caught[f"{t}_{part}"] for t in "qk" for part in ("norm", "heads")]
    if any(len(node.users) != 1 for node in inner):
        return False
    heads = [rewriter.call(aten.transpose.int, (caught[t], 1, 2), before=rope, like=rope) for t in "qk"]
    args = (*heads, *(caught[n] for n in ("q_weight", "k_weight", "cos", "sin", "eps", "mode", "style")))
    fused = rewriter.call(planc.qk_norm_rope.default, args, before=rope, like=rope)
    rope.replace_all_uses_with(fused)
    rewriter.replaced([*sorted(inner), rope], [fused])
    return True


ROTATED_ATTENTION = Call(
    planc.paged_attention.default,
    Call(getitem, Any("rope"), 0, name="q"),
    Call(getitem, Any("rope"), 1, name="k"),
    *(
        Any(name)
        for name in ("v", "k_cache", "v_cache", "query_starts", "context_lens", "block_table", "slots")
    ),
    *(
        Any(name)
        for name in ("sinks", "indices", "scale", "window", "chunk", "softcap", "k_scale", "v_scale")
    ),
)
ROPE = Call(planc.rope.default, *(Any(n) for n in ("q", "k", "cos", "sin")), 1, Any("style"))
QK_NORM_ROPE = Call(
    planc.qk_norm_rope.default,
    *(Any(n) for n in ("q", "k", "q_weight", "k_weight", "cos", "sin", "eps", "mode", "style")),
)


def rope_kv_write(rewriter: Rewriter, attention: Node) -> bool:
    """Rotation of queries and keys and the write of keys and values into the paged cache (phase graphs).

    before   q, k = planc.rope(q, k, cos, sin, 1, style)              or planc.qk_norm_rope
             o = planc.paged_attention(q, k, v, k_cache, v_cache, ..., slots)
    after    q = planc.rope_kv_write(q, k, v, cos, sin, k_cache, v_cache, slots, ...)
             o = planc.paged_attention_cached(q, k_cache, v_cache, ...)

    The new calls stand where the attention stood, so reads and writes of caches keep their order.
    """
    join_rotations(rewriter, attention)
    caught = match(ROTATED_ATTENTION, attention)
    if caught is None:
        return False
    rope, q, k = caught["rope"], caught["q"], caught["k"]
    inputs = match(ROPE, rope) or match(QK_NORM_ROPE, rope)
    if inputs is None or set(q.users) | set(k.users) != {attention} or set(rope.users) != {q, k}:
        return False
    plain = {"q_weight": None, "k_weight": None, "eps": 0.0, "mode": ""}
    given = {**plain, **caught, **inputs}
    write = rewriter.call(
        planc.rope_kv_write.default,
        [given[argument.name] for argument in planc.rope_kv_write.default._schema.arguments],
        before=attention,
        like=rope,
    )
    cached = {**caught, "q": write}
    read = rewriter.call(
        planc.paged_attention_cached.default,
        [cached[argument.name] for argument in planc.paged_attention_cached.default._schema.arguments],
        before=attention,
        like=attention,
    )
    attention.replace_all_uses_with(read)
    rewriter.replaced([rope, *sorted([q, k]), attention], [write, read])
    return True
