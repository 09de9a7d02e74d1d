"""Stored number formats against their definitions: rounding bounds, packing, published layouts."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from planc.ir.ops import quantized_formats as qf

SHAPES = st.tuples(st.integers(1, 5), st.integers(1, 70))


def _matrix(n: int, k: int, seed: int, spread: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.logspace(-2, 2, n) if n > 1 else torch.ones(1)
    return torch.randn(n, k, generator=generator) * rows[:, None] * spread


@settings(max_examples=60, deadline=None)
@given(shape=SHAPES, seed=st.integers(0, 99), name=st.sampled_from(["int8", "w4a16"]))
def test_integers_are_off_by_half_a_step_at_most(shape: tuple[int, int], seed: int, name: str) -> None:
    n, k = shape
    w, group, fmt = _matrix(n, k, seed), 16, qf.WEIGHT_FORMATS[name]
    parts = fmt.quantize(w, group)
    step = parts[1] if name == "int8" else qf.spread(parts[1], group, k)
    error = (fmt.dequantize(parts, k, group) - w).abs()
    assert (error <= step * (0.5 + 5e-5)).all()
    assert (error > 0).any() or k == 1 or n * k < 4


@settings(max_examples=60, deadline=None)
@given(shape=SHAPES, seed=st.integers(0, 99))
def test_fp8_is_the_cast_of_torch_on_scaled_rows(shape: tuple[int, int], seed: int) -> None:
    w = _matrix(*shape, seed)
    stored, scale = qf.quantize_fp8(w)
    assert torch.equal(scale, w.abs().amax(-1, keepdim=True) / 448)
    assert torch.equal(stored.float(), (w / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float())
    # e4m3: half of 2^-3 relative for normal values, half of 2^-9 absolute (times scale) below
    error = (qf.dequantize_channel(stored, scale) - w).abs()
    assert (error <= torch.maximum(w.abs() * 2**-4, scale * 2**-10) * (1 + 1e-5)).all()


def test_fp8_saturates() -> None:
    assert qf.to_fp8(torch.tensor([1e4, -1e4])).float().tolist() == [448.0, -448.0]


def test_fp4_rounds_to_nearest_even() -> None:
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -5.0, 7.0, 0.26, -0.24])
    read = qf.from_fp4(qf.to_fp4(ties))
    assert read.tolist() == [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, -4.0, 6.0, 0.5, -0.0]


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 99), n=st.integers(1, 4), k=st.integers(1, 70))
def test_packing_is_undone(seed: int, n: int, k: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    ints = torch.randint(-8, 8, (n, k), generator=generator, dtype=torch.int32)
    assert torch.equal(qf.unpack_int4(qf.pack_int4(ints), k), ints)
    codes = torch.randint(0, 16, (n, k), generator=generator, dtype=torch.uint8)
    assert torch.equal(qf.unpack_fp4(qf.pack_fp4(codes), k), codes)


@settings(max_examples=40, deadline=None)
@given(shape=SHAPES, seed=st.integers(0, 99))
def test_mxfp4_scales_are_powers_of_two_and_bound_the_error(shape: tuple[int, int], seed: int) -> None:
    n, k = shape
    w = _matrix(n, k, seed)
    packed, scale = qf.quantize_mxfp4(w)
    step = qf.spread(torch.ldexp(torch.ones_like(scale, dtype=torch.float32), scale.int() - 127), 32, k)
    read = qf.dequantize_mxfp4(packed, scale, k)
    # max in [4, 8) steps: elements up to 6 are off by at most half of the widest gap (2), above 6
    # they saturate, by less than 2
    assert ((read - w).abs() <= torch.where(w.abs() / step > 6, 2.0, 1.0) * step).all()
    ratio = w.abs() / step
    assert (ratio < 8).all()
    assert (ratio >= 4).any(-1).all()


def test_mxfp4_reads_the_published_layout() -> None:
    """One block as gpt-oss stores it: byte 0 holds elements 0 (low) and 1 (high); scale 2^(e-127)."""
    packed = torch.zeros(1, 16, dtype=torch.uint8)
    packed[0, 0] = 0x7 | (0xA << 4)  # 6.0, -1.0
    read = qf.dequantize_mxfp4(packed, torch.tensor([[125]], dtype=torch.uint8), 32)
    assert read[0, :3].tolist() == [1.5, -0.25, 0.0]


@settings(max_examples=40, deadline=None)
@given(shape=SHAPES, seed=st.integers(0, 99))
def test_nvfp4_error_is_bounded_by_its_block(shape: tuple[int, int], seed: int) -> None:
    n, k = shape
    w = _matrix(n, k, seed)
    packed, scale, matrix = qf.quantize_nvfp4(w)
    step = qf.spread(scale.float() * matrix, 16, k)
    read = qf.dequantize_nvfp4(packed, scale, matrix, k)
    largest = qf.spread(qf._blocks(w, 16).abs().amax(-1), 16, k)
    # half of the widest gap, plus saturation where the block scale was rounded down, plus blocks
    # whose scale falls under e4m3's smallest subnormal
    assert ((read - w).abs() <= torch.maximum(step, largest * 2**-4) + matrix * 6 * 2**-10).all()


@pytest.mark.parametrize("name", sorted(qf.WEIGHT_FORMATS))
def test_meta_gives_the_shapes_and_rows_commute(name: str) -> None:
    fmt = qf.WEIGHT_FORMATS[name]
    w = torch.randn(3, 6, 96, dtype=torch.bfloat16)
    parts = fmt.quantize(w, 32)
    for part, planned in zip(parts, fmt.quantize(w.to("meta"), 32), strict=True):
        assert planned.device.type == "meta"
        assert (part.shape, part.dtype) == (planned.shape, planned.dtype)
    if name != "nvfp4":  # its matrix scale spans all rows
        top = fmt.dequantize(fmt.quantize(w[:, :2], 32), 96, 32)
        assert torch.equal(fmt.dequantize(parts, 96, 32)[:, :2], top)


@pytest.mark.parametrize("name", sorted(qf.WEIGHT_FORMATS))
def test_zero_rows_stay_zero(name: str) -> None:
    fmt = qf.WEIGHT_FORMATS[name]
    w = torch.zeros(2, 64)
    assert torch.equal(fmt.dequantize(fmt.quantize(w, 32), 64, 32), w)


@pytest.mark.parametrize("name", ["fp8", "mxfp4"])
def test_a_value_on_the_grid_stays_there(name: str) -> None:
    """The largest value of a row (or block) is on the float formats' grid, so their scale stays too."""
    fmt = qf.WEIGHT_FORMATS[name]
    w = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    once = fmt.dequantize(fmt.quantize(w, 32), 64, 32)
    torch.testing.assert_close(fmt.dequantize(fmt.quantize(once, 32), 64, 32), once, rtol=1e-6, atol=0)
