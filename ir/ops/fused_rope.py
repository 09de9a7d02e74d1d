"""Rotary embedding together with what stands around it in an attention block.

    planc.qk_norm_rope            q and k normalised per head, then rotated
    planc.rope_kv_write           the same (norms are optional), and k and v written into the paged cache
    planc.paged_attention_cached  `planc.paged_attention` over caches that are already written

Engines run `rope_kv_write` as one kernel in front of attention, which then reads the cache alone.
References are the sequences they replace, so that a fused graph gives the same bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from planc.ir.opdef import Call, OpDef, ShardRule, declare
from planc.ir.ops import norms
from planc.ir.ops.paged import span, store
from planc.ir.ops.paged_attention import attend_paged
from planc.ir.ops.rotary import rotate
from planc.ir.work import Amount, Work


def _normed(x: Tensor, weight: Tensor | None, eps: float, mode: str) -> Tensor:
    """Heads-first x [B, H, S, D], normalised per head; mode "" leaves it as it is."""
    if not mode:
        return x
    normed: Tensor = torch.ops.planc.rms_norm(x.transpose(1, 2), weight, eps, mode)
    return normed.transpose(1, 2)


@torch.library.custom_op("planc::qk_norm_rope", mutates_args=())
def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    mode: str,
    style: str,
) -> tuple[Tensor, Tensor]:
    """q [B, Hq, S, D], k [B, Hkv, S, D], weights [D], tables [B, S, R] -> q, k in the same shapes.

    `mode` as in `planc.rms_norm`, `style` as in `planc.rope`.
    """
    q, k = _normed(q, q_weight, eps, mode), _normed(k, k_weight, eps, mode)
    return rotate(q, cos, sin, 1, style).contiguous(), rotate(k, cos, sin, 1, style).contiguous()


@qk_norm_rope.register_fake
def _qk_fake(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    mode: str,
    style: str,
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


@torch.library.custom_op("planc::rope_kv_write", mutates_args=("k_cache", "v_cache"))
def rope_kv_write(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    mode: str,
    style: str,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> Tensor:
    """q [1, Hq, T, D] rotated; k [1, Hkv, T, D] rotated and v [1, Hkv, T, Dv] written at slots [T].

    Caches are [blocks, block_size, Hkv, D] and [.., Dv], written in place; those of 8 bits hold
    k / k_scale and v / v_scale. With a `mode` (as in `planc.rms_norm`) q and k are normalised per head
    first; "" is without.
    """
    q, k = _normed(q, q_weight, eps, mode), _normed(k, k_weight, eps, mode)
    store(k_cache, slots, rotate(k, cos, sin, 1, style)[0].transpose(0, 1), k_scale)
    store(v_cache, slots, v[0].transpose(0, 1), v_scale)
    return rotate(q, cos, sin, 1, style).contiguous()


@rope_kv_write.register_fake
def _write_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    mode: str,
    style: str,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> Tensor:
    return q.new_empty(q.shape)


@torch.library.custom_op("planc::paged_attention_cached", mutates_args=())
def paged_attention_cached(
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
    """As `planc.paged_attention`, which see, for caches that hold this step's keys and values already."""
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


@paged_attention_cached.register_fake
def _cached_fake(
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
    return q.new_empty((q.shape[0], q.shape[2], q.shape[1], v_cache.shape[3]))


def _weights(call: Call) -> int:
    held = (call.tensor(name) for name in ("q_weight", "k_weight"))
    return sum(w.numel() for w in held if w is not None)


def _flops_per_element(call: Call) -> float:
    return 3.0 + (norms.FLOPS if call.arg("mode") else 0.0)


def _qk_work(call: Call) -> Work:
    moved = call.elements("q") + call.elements("k")
    return Work(
        "elementwise",
        flops=moved * _flops_per_element(call),
        weights=_weights(call),
        reads=moved + call.elements("cos") + call.elements("sin"),
        writes=moved,
    )


def _write_work(call: Call) -> Work:
    """q, k, v read once; rotated q goes to memory, k and v to the cache alone."""
    moved = call.elements("q") + call.elements("k")
    return Work(
        "elementwise",
        flops=moved * _flops_per_element(call),
        weights=_weights(call),
        reads=moved + call.elements("v") + call.elements("cos") + call.elements("sin"),
        writes=call.out(),
        kv_writes=call.elements("k") + call.elements("v"),
    )


def _cached_work(call: Call) -> Work:
    """Two multiply-adds per pair and element; each cached key and value read once."""
    q_heads, qk_dim = call.size("q", 1), call.size("q", 3)
    kv_heads, v_dim = call.size("v_cache", 2), call.size("v_cache", 3)
    topk = call.size("indices", 2) if call.arg("indices") is not None else 0
    reaches = span(call.arg("window"), call.arg("chunk"), topk)
    return Work(
        "attention",
        flops=Amount({f"P:{reaches}": 2.0 * q_heads * (qk_dim + v_dim)}),
        reads=call.elements("q") + call.elements("indices"),
        writes=call.out(),
        kv_reads=Amount({f"K:{reaches}": float(kv_heads * (qk_dim + v_dim))}),
        dims={"q_heads": q_heads, "kv_heads": kv_heads, "qk_dim": qk_dim, "v_dim": v_dim, "latent": 0},
    )


_CACHES = {"k_cache": "kv", "v_cache": "kv"}

declare(
    OpDef(
        torch.ops.planc.qk_norm_rope.default,
        work=_qk_work,
        shards=(ShardRule("heads", {"q": 1, "k": 1}, (1, 1)), ShardRule("heads", {"q": 1}, (1, "whole"))),
    )
)
declare(
    OpDef(
        torch.ops.planc.rope_kv_write.default,
        work=_write_work,
        shards=(ShardRule("heads", {"q": 1, "k": 1, "v": 1, "k_cache": 2, "v_cache": 2}, (1,)),),
        quantizable=_CACHES,
    )
)
declare(
    OpDef(
        torch.ops.planc.paged_attention_cached.default,
        work=_cached_work,
        shards=(ShardRule("heads", {"q": 1, "k_cache": 2, "v_cache": 2, "sinks": 0}, (2,)),),
        quantizable=_CACHES,
    )
)
