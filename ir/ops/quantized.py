"""Matrix products whose weights are stored in 8 or 4 bits: `planc.linear_*`.

Weight-only ops read the stored weight and multiply in the activations' own precision; the others
also round the activations, per token and dynamically, and multiply in 8 bits. The references do
what a kernel does, with an fp32 accumulator: scales that belong to a whole row of the weight (or
a token) are applied after the product; scales of blocks of k must be applied before it, so the
dequantized weight is rounded to the activations' type first.

    linear_w8a16    int8 weights              linear_w8a8    int8 weights and activations
    linear_w4a16    int4 weights in groups    linear_fp8     e4m3 weights and activations
    linear_f8a16    e4m3 weights
    linear_mxfp4    e2m1 weights in blocks of 32, power-of-two scales
    linear_nvfp4    e2m1 weights in blocks of 16, e4m3 scales

Layouts are those of `planc.ir.ops.quantized_formats`. x is `[..., k]`, the result `[..., n]` in
x's type, biases `[n]`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from planc.ir.opdef import Call, OpDef, ShardRule, declare
from planc.ir.ops import quantized_formats as qf
from planc.ir.work import Work


def weight_only(
    x: Tensor, fmt: str, parts: tuple[Tensor, ...], bias: Tensor | None, group: int = 0
) -> Tensor:
    """x `[..., k]` times a stored weight `[n, k]`, accumulated in fp32."""
    spec = qf.WEIGHT_FORMATS[fmt]
    if spec.per_row:
        product = F.linear(x.float(), parts[0].float()) * parts[1].float().squeeze(-1)
    else:
        weight = spec.dequantize(parts, x.shape[-1], group)
        product = F.linear(x.float(), weight.to(x.dtype).float())
    return finish(product, bias, x.dtype)


def finish(product: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The epilogue: bias in fp32, then the cast to the result's type."""
    return (product if bias is None else product + bias.float()).to(dtype)


@torch.library.custom_op("planc::linear_w8a16", mutates_args=())
def linear_w8a16(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """weight int8 `[n, k]`, scale fp32 `[n, 1]`."""
    return weight_only(x, "int8", (weight, scale), bias)


@torch.library.custom_op("planc::linear_f8a16", mutates_args=())
def linear_f8a16(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """weight float8_e4m3fn `[n, k]`, scale fp32 `[n, 1]`."""
    return weight_only(x, "fp8", (weight, scale), bias)


@torch.library.custom_op("planc::linear_w4a16", mutates_args=())
def linear_w4a16(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, group: int) -> Tensor:
    """weight int32 `[n, ceil(k / 8)]`, scale `[n, ceil(k / group)]`."""
    return weight_only(x, "w4a16", (weight, scale), bias, group)


@torch.library.custom_op("planc::linear_mxfp4", mutates_args=())
def linear_mxfp4(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """weight uint8 `[n, ceil(k / 2)]`, scale uint8 (e8m0) `[n, ceil(k / 32)]`."""
    return weight_only(x, "mxfp4", (weight, scale), bias)


@torch.library.custom_op("planc::linear_nvfp4", mutates_args=())
def linear_nvfp4(
    x: Tensor, weight: Tensor, scale: Tensor, scale_2: Tensor, bias: Tensor | None = None
) -> Tensor:
    """weight uint8 `[n, ceil(k / 2)]`, scale float8_e4m3fn `[n, ceil(k / 16)]`, scale_2 fp32 `[1, 1]`."""
    return weight_only(x, "nvfp4", (weight, scale, scale_2), bias)


@torch.library.custom_op("planc::linear_fp8", mutates_args=())
def linear_fp8(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """weight float8_e4m3fn `[n, k]`, scale fp32 `[n, 1]`; x is rounded to e4m3 with a scale per token."""
    return finish(times_fp8(x, weight, scale), bias, x.dtype)


@torch.library.custom_op("planc::linear_w8a8", mutates_args=())
def linear_w8a8(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """weight int8 `[n, k]`, scale fp32 `[n, 1]`; x is rounded to int8 with a scale per token."""
    return finish(times_int8(x, weight, scale), bias, x.dtype)


def times_fp8(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """fp32 product of x, rounded to e4m3 per token, with an e4m3 weight `[n, k]`."""
    rounded, per_token = qf.quantize_fp8_tokens(x)
    return F.linear(rounded.float(), weight.float()) * per_token * scale.float().squeeze(-1)


def times_int8(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """fp32 product of x, rounded to int8 per token, with an int8 weight `[n, k]`.

    The integer sum is exact: |sum| <= 2^14 k needs 53 bits only beyond k = 2^39, so fp64 holds it.
    """
    rounded, per_token = qf.quantize_int8_tokens(x)
    exact = F.linear(rounded.double(), weight.double())
    return exact.float() * per_token * scale.float().squeeze(-1)


def _result(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


for _op in (linear_w8a16, linear_f8a16, linear_mxfp4, linear_fp8, linear_w8a8):
    _op.register_fake(lambda x, weight, scale, bias=None: _result(x, weight))
linear_w4a16.register_fake(lambda x, weight, scale, bias, group: _result(x, weight))
linear_nvfp4.register_fake(lambda x, weight, scale, scale_2, bias=None: _result(x, weight))


def _work(call: Call) -> Work:
    """2 k n FLOPs per row of x; the stored weight is read once."""
    k, n = call.size("x", -1), call.size("weight", 0)
    return Work(
        "gemm",
        flops=call.elements("x") * (2.0 * n),
        weights=n * k,
        reads=call.elements("x"),
        writes=call.out(),
        dims={"k": k, "n": n},
    )


def _shards(k_scale: bool) -> tuple[ShardRule, ...]:
    """By rows of the weight, or along k: then the scales of blocks are cut with it, those of rows not."""
    along_k = {"x": -1, "weight": 1, **({"scale": 1} if k_scale else {})}
    return (
        ShardRule("column", operands={"weight": 0, "scale": 0, "bias": 0}, results=(-1,)),
        ShardRule("row", operands=along_k, results=("partial",)),
    )


for _name, _k_scale in (
    ("linear_w8a16", False),
    ("linear_f8a16", False),
    ("linear_w4a16", True),
    ("linear_mxfp4", True),
    ("linear_nvfp4", True),
    ("linear_fp8", False),
    ("linear_w8a8", False),
):
    declare(OpDef(getattr(torch.ops.planc, _name).default, work=_work, shards=_shards(_k_scale)))
