"""Fused ops give the bits of the calls they stand for, in every mode and in 16 bits too."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import planc.ir.ops  # noqa: F401
from planc.ir.ops.activation import ACTIVATIONS
from planc.ir.ops.fused import PACKED
from planc.ir.ops.norms import MODES

ops = torch.ops.planc
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
def test_add_rms_norm(mode: str, dtype: torch.dtype) -> None:
    x, residual = normal(3, 5, 48, dtype=dtype), normal(3, 5, 48, seed=1, dtype=dtype)
    weight = None if mode == "none" else normal(48, seed=2, dtype=dtype)
    normed, total = ops.add_rms_norm(x, residual, weight, 1e-5, mode)
    assert torch.equal(total, x + residual)
    assert torch.equal(normed, ops.rms_norm(x + residual, weight, 1e-5, mode))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_packed_gates(act: str, dtype: torch.dtype) -> None:
    packed = normal(4, 7, 64, dtype=dtype)
    gate, up = packed.split(32, -1)
    assert torch.equal(PACKED[act](packed), ops.gated_activation(gate, up, act))


def _heads(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """q [1, 4, T, 16], k and v [1, 2, T, 16], transposed views as projections give them; tables [1, T, 8]."""
    q, k, v = (normal(1, 6, h, 16, seed=h, dtype=dtype).transpose(1, 2) for h in (4, 2, 3))
    angles = normal(1, 6, 4, seed=9).repeat(1, 1, 2)
    return q, k, v[:, :2], angles.cos().to(dtype), angles.sin().to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", [*MODES, ""])
def test_rope_kv_write(mode: str, dtype: torch.dtype) -> None:
    q, k, v, cos, sin = _heads(dtype)
    weights = (
        (None, None) if mode in ("", "none") else (normal(16, seed=5, dtype=dtype), normal(16, dtype=dtype))
    )
    slots = torch.tensor([4, 5, 6, 7, 1, 2])
    caches = [torch.zeros(3, 4, 2, 16, dtype=dtype) for _ in range(4)]
    before = [cache.clone() for cache in caches]
    found = ops.rope_kv_write(q, k, v, cos, sin, *caches[:2], slots, *weights, 1e-6, mode, "half")
    if mode:
        q, k = (
            ops.rms_norm(t.transpose(1, 2), w, 1e-6, mode).transpose(1, 2)
            for t, w in zip((q, k), weights, strict=True)
        )
    q, k = ops.rope(q, k, cos, sin, 1, "half")
    for cache, entries in zip(caches[2:], (k, v), strict=True):
        cache.view(-1, 2, 16)[slots] = entries[0].transpose(0, 1)
    assert torch.equal(found, q)
    assert torch.equal(caches[0], caches[2])
    assert torch.equal(caches[1], caches[3])
    assert torch.equal(caches[0].view(-1, 2, 16)[[0, 3, 8]], before[0].view(-1, 2, 16)[[0, 3, 8]])


@pytest.mark.parametrize("style", ["half", "pairs"])
def test_qk_norm_rope(style: str) -> None:
    q, k, _, cos, sin = _heads(torch.bfloat16)
    weights = normal(16, seed=5, dtype=torch.bfloat16), normal(16, dtype=torch.bfloat16)
    found = ops.qk_norm_rope(q, k, *weights, cos, sin, 1e-6, "cast_mul", style)
    normed = (
        ops.rms_norm(t.transpose(1, 2), w, 1e-6, "cast_mul").transpose(1, 2)
        for t, w in zip((q, k), weights, strict=True)
    )
    for one, other in zip(found, ops.rope(*normed, cos, sin, 1, style), strict=True):
        assert torch.equal(one, other)


def test_an_8_bit_cache_holds_scaled_entries() -> None:
    q, k, v, cos, sin = _heads(torch.float32)
    k_cache, v_cache = (torch.zeros(2, 4, 2, 16, dtype=torch.float8_e4m3fn) for _ in range(2))
    slots = torch.arange(6)
    ops.rope_kv_write(
        q, k, v * 1000, cos, sin, k_cache, v_cache, slots, None, None, 0.0, "", "half", 0.5, 4.0
    )
    rotated = ops.rope(q, k, cos, sin, 1, "half")[1][0].transpose(0, 1)
    stored = k_cache.view(-1, 2, 16)[:6].float()
    assert torch.equal(stored, (rotated / 0.5).to(torch.float8_e4m3fn).float())
    assert v_cache.float().abs().max() == 448  # saturated, not NaN


@pytest.mark.parametrize("window", [0, 3])
def test_attention_over_a_written_cache_is_attention_that_writes(window: int) -> None:
    q, k, v, _, _ = _heads(torch.float32)
    caches = [torch.zeros(4, 4, 2, 16) for _ in range(4)]
    starts, lens = torch.tensor([0, 4, 6], dtype=torch.int32), torch.tensor([4, 2], dtype=torch.int32)
    table, slots = torch.tensor([[1], [2]], dtype=torch.int32), torch.tensor([4, 5, 6, 7, 8, 9])
    rest = (None, None, 0.25, window, 0, 0.0)
    both = ops.paged_attention(q, k, v, *caches[:2], starts, lens, table, slots, *rest)
    for cache, entries in zip(caches[2:], (k, v), strict=True):
        cache.view(-1, 2, 16)[slots] = entries[0].transpose(0, 1)
    assert torch.equal(ops.paged_attention_cached(q, *caches[2:], starts, lens, table, *rest), both)
