"""Quantized products against their definitions, torch's own fp8 product, and rounding theory."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import planc.ir.ops  # noqa: F401
from planc.ir.ops import quantized_formats as qf
from planc.ir.ops.quantized import LINEAR, ROUNDINGS
from planc.ir.ops.quantized_experts import EXPERTS

GROUP = 32


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def stored(weight: Tensor, fmt: str) -> tuple[Tensor, Tensor, Tensor | None]:
    parts = qf.WEIGHT_FORMATS[fmt].quantize(weight, GROUP)
    return parts[0], parts[1], parts[2] if len(parts) > 2 else None


def read(weight: Tensor, fmt: str) -> Tensor:
    spec = qf.WEIGHT_FORMATS[fmt]
    return spec.dequantize(spec.quantize(weight, GROUP), weight.shape[-1], GROUP)


def linear(x: Tensor, weight: Tensor, fmt: str, activations: str = "", bias: Tensor | None = None) -> Tensor:
    out = LINEAR[fmt](x, *stored(weight, fmt), bias, activations, GROUP)
    assert isinstance(out, Tensor)
    return out


def relative(found: Tensor, true: Tensor) -> float:
    return float((found - true).norm() / true.norm())


@pytest.mark.parametrize("fmt", LINEAR)
def test_weight_only_is_the_product_with_what_was_stored(fmt: str) -> None:
    x, w, b = normal(2, 7, 96), normal(40, 96, seed=1), normal(40, seed=2)
    torch.testing.assert_close(linear(x, w, fmt, bias=b), F.linear(x, read(w, fmt), b), rtol=1e-5, atol=1e-4)


def test_fp8_is_the_scaled_product_of_torch() -> None:
    x, w = normal(16, 64), normal(32, 64, seed=1)
    (xq, sx), (wq, sw) = qf.quantize_fp8_tokens(x), qf.quantize_fp8(w)
    oracle = torch._scaled_mm(xq, wq.t(), scale_a=sx, scale_b=sw.t(), out_dtype=torch.float32)
    torch.testing.assert_close(linear(x, w, "fp8", "fp8"), oracle, rtol=1e-5, atol=1e-5)


def test_int8_sums_are_exact() -> None:
    x, w = normal(4, 512), normal(8, 512, seed=1)
    (xq, sx), (wq, sw) = qf.quantize_int8_tokens(x), qf.quantize_int8(w)
    exact = xq.to(torch.int64) @ wq.to(torch.int64).t()
    assert torch.equal(linear(x, w, "int8", "int8"), exact.float() * sw.t() * sx)


@pytest.mark.parametrize("fmt", ["fp8", "int8", "mxfp8", "nvfp4"])
def test_a_tokens_rounding_does_not_depend_on_its_batch(fmt: str) -> None:
    """Dynamic scales are per token (or finer), so what a request gets does not depend on its neighbours."""
    x = normal(5, 64) * torch.tensor([1e-3, 1.0, 1e3, 0.0, 5.0])[:, None]
    values, scale = ROUNDINGS[fmt](x)
    for row in range(5):
        alone, one = ROUNDINGS[fmt](x[row : row + 1])
        assert torch.equal(values[row], alone[0])
        assert scale is None or (one is not None and torch.equal(scale[row], one[0]))


@pytest.mark.parametrize(("fmt", "activations"), [("int8", ""), ("w4a16", ""), ("int8", "int8")])
def test_integer_error_is_that_of_uniform_rounding(fmt: str, activations: str) -> None:
    """An error uniform in +-step/2 has variance step^2 / 12; the relative error of a product of random
    vectors is that of its operands, added in squares."""
    x, w = normal(64, 512), normal(128, 512, seed=1)
    parts = qf.WEIGHT_FORMATS[fmt].quantize(w, GROUP)
    step = parts[1] if fmt == "int8" else qf.spread(parts[1], GROUP, 512)
    variance = float((step.float() ** 2).mean()) / 12
    if activations:
        variance += float((qf.quantize_int8_tokens(x)[1] ** 2).mean()) / 12
    found = relative(linear(x, w, fmt, activations), F.linear(x, w))
    assert found == pytest.approx(math.sqrt(variance), rel=0.1)


@pytest.mark.parametrize(("activations", "expected"), [("", 0.0265), ("fp8", 0.0265 * math.sqrt(2))])
def test_e4m3_error_is_that_of_three_mantissa_bits(activations: str, expected: float) -> None:
    """With 3 bits the rounding error is uniform in +-2^-4 of the binade's base. Relative to values that are
    spread evenly over a binade that is 2^-4 / sqrt(3) * sqrt(mean 1/m^2 = 1/2) = 0.0255; a normal
    distribution lies close."""
    x, w = normal(64, 512), normal(128, 512, seed=1)
    found = relative(linear(x, w, "fp8", activations), F.linear(x, w))
    assert found == pytest.approx(expected, rel=0.08)


def test_finer_formats_lose_less() -> None:
    x, w = normal(64, 512), normal(128, 512, seed=1)
    loss = {fmt: relative(linear(x, w, fmt), F.linear(x, w)) for fmt in LINEAR}
    assert loss["int8"] < loss["fp8"] < loss["w4a16"] < loss["mxfp4"] < 0.15
    assert loss["fp8"] < loss["nvfp4"] < loss["mxfp4"]


@pytest.mark.parametrize("fmt", LINEAR)
def test_bf16_in_gives_bf16_out(fmt: str) -> None:
    x, w = normal(3, 64, dtype=torch.bfloat16), normal(16, 64, seed=1, dtype=torch.bfloat16)
    out = linear(x, w, fmt, bias=normal(16, seed=2, dtype=torch.bfloat16))
    assert out.dtype == torch.bfloat16
    assert out.shape == (3, 16)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("act", ["silu", "swigluoai"])
@pytest.mark.parametrize("fmt", EXPERTS)
def test_experts_are_the_plain_ones_with_what_was_stored(fmt: str, act: str, interleaved: bool) -> None:
    experts, hidden, inner, top_k = 3, 64, 32, 2
    x, weights = normal(9, hidden), torch.softmax(normal(9, top_k, seed=1), -1)
    ids = torch.stack(
        [torch.randperm(experts, generator=torch.Generator().manual_seed(i))[:top_k] for i in range(9)]
    )
    up, down = normal(experts, 2 * inner, hidden, seed=2), normal(experts, hidden, inner, seed=3)
    up_bias, down_bias = normal(experts, 2 * inner, seed=4), normal(experts, hidden, seed=5)
    rest = (interleaved, 1.702, 7.0, False)
    found = EXPERTS[fmt](
        x, ids, weights, *stored(up, fmt), up_bias, *stored(down, fmt), down_bias, act, *rest, "", GROUP
    )
    plain = torch.ops.planc.experts(
        x, ids, weights, read(up, fmt), up_bias, read(down, fmt), down_bias, act, False, *rest
    )
    torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-2)


def test_experts_of_another_rank_contribute_nothing() -> None:
    x, ids, weights = normal(4, 64), torch.tensor([[0], [1], [2], [3]]), torch.ones(4, 1)
    up, down = normal(2, 64, 64, seed=2), normal(2, 64, 32, seed=3)
    args = (*stored(up, "fp8"), None, *stored(down, "fp8"), None, "silu", False, 0.0, 0.0, False, "fp8", 0)
    out = EXPERTS["fp8"](x, ids, weights, *args, first=2)
    assert torch.equal(out[:2], torch.zeros(2, 64))
    assert torch.equal(out[2:], EXPERTS["fp8"](x[2:], ids[2:] - 2, weights[2:], *args))
