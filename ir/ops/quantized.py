"""Matrix products whose weights are stored in 8 or 4 bits: `planc.linear_<format>`.

    planc.linear_int8   planc.linear_w4a16   planc.linear_fp8   planc.linear_mxfp4   planc.linear_nvfp4

The argument `activations` names what the activations are rounded to first, dynamically: "fp8" or
"int8" with a scale per token, "mxfp8" or "nvfp4" with a scale per block; "" leaves them as they are
(weight-only). The references do what a kernel does, with an fp32 accumulator: scales of a whole row
of the weight, and of a token, are applied after the product; scales of blocks of k must be applied
before it, so the dequantized weight is rounded to the activations' own type first.

Layouts are those of `planc.ir.ops.quantized_formats`; x is `[..., k]`, the result `[..., n]` in x's type.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from planc.ir.opdef import Call, Held, OpDef, ShardRule, declare
from planc.ir.ops import quantized_formats as qf
from planc.ir.work import Work

#: Activation format -> values on its grid (fp32) and the scale per token that is still to be applied.
ROUNDINGS: dict[str, Callable[[Tensor], tuple[Tensor, Tensor | None]]] = {
    "": lambda x: (x.float(), None),
    "fp8": lambda x: _as_float(*qf.quantize_fp8_tokens(x)),
    "int8": lambda x: _as_float(*qf.quantize_int8_tokens(x)),
    "mxfp8": lambda x: (qf.round_mxfp8(x), None),
    "nvfp4": lambda x: (qf.round_nvfp4_tokens(x), None),
}


def _as_float(stored: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    return stored.float(), scale


def product(x: Tensor, fmt: str, parts: tuple[Tensor, ...], activations: str, group_size: int) -> Tensor:
    """fp32 `[..., n]`: x `[..., k]` times a stored weight `[n, k]`, without bias."""
    rounded, per_token = ROUNDINGS[activations](x)
    spec = qf.WEIGHT_FORMATS[fmt]
    if spec.per_row:
        out = _dot(rounded, parts[0].float(), exact=(fmt, activations) == ("int8", "int8"))
        out = out * parts[1].float().squeeze(-1)
    else:
        weight = spec.dequantize(parts, x.shape[-1], group_size)
        out = F.linear(rounded, weight if activations else weight.to(x.dtype).float())
    return out if per_token is None else out * per_token


def _dot(x: Tensor, weight: Tensor, exact: bool) -> Tensor:
    """Integer products are summed exactly, as int32 accumulators do; fp64 holds any such sum."""
    return F.linear(x.double(), weight.double()).float() if exact else F.linear(x, weight)


def finish(out: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The epilogue: bias in fp32, then the cast to the result's type."""
    return (out if bias is None else out + bias.float()).to(dtype)


def _fake(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    scale_2: Tensor | None,
    bias: Tensor | None,
    activations: str,
    group_size: int,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _work(call: Call) -> Work:
    """2 k n FLOPs per row of x; the stored weight is read once."""
    k, n = call.size("x", -1), call.size("weight", 0)
    return Work(
        "gemm",
        flops=call.elements("x") * (2.0 * n),
        weights=n * k + (n if call.arg("bias") is not None else 0),
        reads=call.elements("x"),
        writes=call.out(),
        dims={"k": k, "n": n},
    )


def _shards(spec: qf.WeightFormat) -> tuple[ShardRule, ...]:
    """By rows of the weight, or along k: then the scales of blocks are cut with it, those of rows not."""
    along_k: dict[str, Held] = {"x": -1, "weight": 1, "bias": "partial"}
    if not spec.per_row:
        along_k["scale"] = 1
    return (
        ShardRule("column", {"weight": 0, "scale": 0, "bias": 0}, (-1,)),
        ShardRule("row", along_k, ("partial",)),
    )


def _declare(fmt: str) -> torch._ops.OpOverload:
    def linear(
        x: Tensor,
        weight: Tensor,
        scale: Tensor,
        scale_2: Tensor | None,
        bias: Tensor | None,
        activations: str,
        group_size: int,
    ) -> Tensor:
        parts = (weight, scale) if scale_2 is None else (weight, scale, scale_2)
        return finish(product(x, fmt, parts, activations, group_size), bias, x.dtype)

    linear.__doc__ = f"x [..., k] times a weight [n, k] stored as {fmt} -> [..., n]; bias [n]."
    op = torch.library.custom_op(f"planc::linear_{fmt}", linear, mutates_args=())
    op.register_fake(_fake)
    overload: torch._ops.OpOverload = getattr(torch.ops.planc, f"linear_{fmt}").default
    declare(OpDef(overload, work=_work, shards=_shards(qf.WEIGHT_FORMATS[fmt])))
    return overload


#: weight format -> the op that multiplies with it
LINEAR = {fmt: _declare(fmt) for fmt in qf.WEIGHT_FORMATS}
