"""Per-head RMS norm of q and k, rotary embedding, and the write of k and v into the paged cache.

After each head's own RMS norm, the pair (a, b) becomes (a cos - b sin, b cos + a sin).

A program handles one token and HEADS heads, either of q or of k and v. The cache is seen as a list of
slots (block * block_size + offset); a negative slot marks a padding token, whose k and v are dropped.
Everything is computed in float32 and cast at the store.

Written by planc from rope_kv.py.jinja; any change belongs there.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def kernel(
    q_ptr,  # [tokens, q_heads, HEAD_DIM], tokens q_stride apart, heads dense
    k_ptr,  # [tokens, kv_heads, HEAD_DIM], tokens k_stride apart, heads dense
    v_ptr,  # [tokens, kv_heads, HEAD_DIM], tokens v_stride apart, heads dense
    cos_ptr,  # [tokens, >= ROTARY / 2], tokens cos_stride apart, one value per rotated pair
    sin_ptr,
    slots_ptr,  # [tokens], int64
    q_weight_ptr,  # [HEAD_DIM]
    k_weight_ptr,  # [HEAD_DIM]
    out_ptr,  # out [tokens, q_heads, HEAD_DIM], dense: rotated q
    k_cache_ptr,  # in and out [slots, kv_heads, HEAD_DIM], dense
    v_cache_ptr,  # in and out [slots, kv_heads, HEAD_DIM], dense
    q_heads,
    kv_heads,
    q_stride,
    k_stride,
    v_stride,
    cos_stride,
    k_scale,  # the caches hold k / k_scale and v / v_scale
    v_scale,
    eps,
    weight_offset,  # added to the weights: 1.0 for models that store them as a difference from one
    HEAD_DIM: tl.constexpr,
    ROTARY: tl.constexpr,
    PAIRS_IN: tl.constexpr,  # pairs come side by side (2i, 2i + 1), else half a rotary width apart
    PAIRS_OUT: tl.constexpr,  # the same for what is stored
    HEADS: tl.constexpr,
    PAIRS: tl.constexpr,  # power of two, at least ROTARY / 2
    REST: tl.constexpr,  # power of two, at least HEAD_DIM - ROTARY
    WIDTH: tl.constexpr,  # power of two, at least HEAD_DIM
):
    token = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    q_groups = tl.cdiv(q_heads, HEADS)
    of_q = group < q_groups
    heads = tl.where(of_q, q_heads, kv_heads)
    head = tl.where(of_q, group, group - q_groups) * HEADS + tl.arange(0, HEADS)[:, None]
    slot = tl.load(slots_ptr + token)

    pair = tl.arange(0, PAIRS)[None, :]
    first = 2 * pair if PAIRS_IN else pair
    second = first + (1 if PAIRS_IN else ROTARY // 2)
    paired = (head < heads) & (pair < ROTARY // 2)
    rest = ROTARY + tl.arange(0, REST)[None, :]
    resting = (head < heads) & (rest < HEAD_DIM)

    # load
    source = tl.where(of_q, q_ptr + token * q_stride, k_ptr + token * k_stride) + head * HEAD_DIM
    a = tl.load(source + first, mask=paired, other=0.0).to(tl.float32)
    b = tl.load(source + second, mask=paired, other=0.0).to(tl.float32)
    c = tl.load(source + rest, mask=resting, other=0.0).to(tl.float32)
    square = tl.sum(a * a + b * b, axis=1) + tl.sum(c * c, axis=1)
    scale = tl.rsqrt(square[:, None] / HEAD_DIM + eps)
    weight = tl.where(of_q, q_weight_ptr, k_weight_ptr)
    w = tl.load(weight + first, mask=pair < ROTARY // 2, other=0.0).to(tl.float32)
    a = a * scale * (w + weight_offset)
    w = tl.load(weight + second, mask=pair < ROTARY // 2, other=0.0).to(tl.float32)
    b = b * scale * (w + weight_offset)
    w = tl.load(weight + rest, mask=rest < HEAD_DIM, other=0.0).to(tl.float32)
    c = c * scale * (w + weight_offset)

    # epilogue: rotate each pair
    cos = tl.load(cos_ptr + token * cos_stride + pair, mask=pair < ROTARY // 2, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + token * cos_stride + pair, mask=pair < ROTARY // 2, other=0.0).to(tl.float32)
    a, b = a * cos - b * sin, b * cos + a * sin

    # store
    first = 2 * pair if PAIRS_OUT else pair
    second = first + (1 if PAIRS_OUT else ROTARY // 2)
    if of_q:
        rotated = out_ptr + (token * q_heads + head) * HEAD_DIM
        tl.store(rotated + first, a.to(out_ptr.dtype.element_ty), mask=paired)
        tl.store(rotated + second, b.to(out_ptr.dtype.element_ty), mask=paired)
        tl.store(rotated + rest, c.to(out_ptr.dtype.element_ty), mask=resting)
    elif slot >= 0:
        cached = k_cache_ptr + (slot * kv_heads + head) * HEAD_DIM
        tl.store(cached + first, (a / k_scale).to(k_cache_ptr.dtype.element_ty), mask=paired)
        tl.store(cached + second, (b / k_scale).to(k_cache_ptr.dtype.element_ty), mask=paired)
        tl.store(cached + rest, (c / k_scale).to(k_cache_ptr.dtype.element_ty), mask=resting)
        column = tl.arange(0, WIDTH)[None, :]
        whole = (head < kv_heads) & (column < HEAD_DIM)
        v = tl.load(v_ptr + token * v_stride + head * HEAD_DIM + column, mask=whole, other=0.0).to(tl.float32)
        at = (slot * kv_heads + head) * HEAD_DIM + column
        tl.store(v_cache_ptr + at, (v / v_scale).to(v_cache_ptr.dtype.element_ty), mask=whole)


#: style of `planc.rope` -> are pairs side by side in what comes in, in what goes out
STYLES = {"half": (0, 0), "split": (0, 0), "interleaved": (1, 0), "pairs": (1, 1)}


def configure(head_dim: int, rotary: int, style: str = "half") -> dict[str, int]:
    """Compile-time constants and launch options for heads of head_dim, of which rotary are rotated."""
    return {
        "HEAD_DIM": head_dim,
        "ROTARY": rotary,
        "PAIRS_IN": STYLES[style][0],
        "PAIRS_OUT": STYLES[style][1],
        "HEADS": max(1, 1024 // triton.next_power_of_2(head_dim)),
        "PAIRS": triton.next_power_of_2(rotary // 2),
        "REST": triton.next_power_of_2(max(1, head_dim - rotary)),
        "WIDTH": triton.next_power_of_2(head_dim),
        "num_warps": 4,
    }


def grid(tokens: int, q_heads: int, kv_heads: int, head_dim: int, rotary: int) -> tuple[int, int]:
    """Programs to launch: tokens by groups of q heads, then of kv heads."""
    heads = configure(head_dim, rotary)["HEADS"]
    return tokens, triton.cdiv(q_heads, heads) + triton.cdiv(kv_heads, heads)


def launch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    slots: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    rotary: int,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    eps: float,
    weight_offset: float = 0.0,
    style: str = "half",
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> torch.Tensor:
    """Returns rotated q [tokens, q_heads, head_dim]; writes k and v into their caches in place.

    q [tokens, q_heads, head_dim], k and v [tokens, kv_heads, head_dim], heads dense, tokens evenly apart.
    cos, sin [tokens, rotary / 2 or more], float32; columns past rotary / 2 are not read. rotary is the
    number of rotated elements of a head; style is as in `planc.rope`. slots int64 [tokens]. k_cache and
    v_cache are [blocks, block_size, kv_heads, head_dim], dense; their dtype may differ from q's, and they
    hold k / k_scale and v / v_scale.
    """
    tokens, q_heads, head_dim = q.shape
    kv_heads = k.shape[1]
    out = torch.empty((tokens, q_heads, head_dim), dtype=q.dtype, device=q.device)
    if tokens:
        kernel[grid(tokens, q_heads, kv_heads, head_dim, rotary)](
            q,
            k,
            v,
            cos,
            sin,
            slots,
            q_weight,
            k_weight,
            out,
            k_cache,
            v_cache,
            q_heads,
            kv_heads,
            q.stride(0),
            k.stride(0),
            v.stride(0),
            cos.stride(0),
            k_scale,
            v_scale,
            eps,
            weight_offset,
            **configure(head_dim, rotary, style),
        )
    return out
