"""Quantized checkpoints as engines load them: the tensors (`quantize_config` has the words beside them).

Works on the published checkpoint, tensor by tensor, so that a model of any size streams through:

    config = checkpoint_config("fp8", ignore=left_alone(names))
    for name, tensor in shard:
        out |= pack(name, tensor, "fp8") if is_target(name, tensor) else {name: tensor}

The numbers are those of `planc.passes.quantize`: what a packed checkpoint holds, read back, is what
the quantized graph multiplies with (tests hold both to each other).

    checkpoint   format                                  weights                  activations
    fp8          compressed-tensors float-quantized      e4m3 per row             e4m3 per token, dynamic
    fp8_weights  compressed-tensors float-quantized      e4m3 per row             as they are
    int8         compressed-tensors pack-quantized       int8 per row             as they are
    w8a8         compressed-tensors int-quantized        int8 per row             int8 per token, dynamic
    w4a16        compressed-tensors pack-quantized       int4 in groups           as they are
    awq          AutoAWQ "gemm"                          int4 in groups           as they are
    gptq         GPTQ v1, symmetric, no act order        int4 in groups           as they are
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from planc.errors import InvalidField
from planc.ir.ops import quantized_formats as qf
from planc.passes.quantize_config import CHECKPOINTS, checkpoint_config, known
from planc.passes.quantize_scope import keeps_precision

#: Order of the eight columns in one AWQ word (AutoAWQ, `pack_intweight` of the gemm kernels).
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def is_target(name: str, tensor: Tensor) -> bool:
    """Whether a checkpoint tensor is a matrix that a weight format applies to."""
    return (
        name.endswith(".weight") and tensor.dim() == 2 and not keeps_precision(name.removesuffix(".weight"))
    )


def left_alone(tensors: Mapping[str, Tensor]) -> list[str]:
    """Modules whose matrices stay as they are, for the `ignore` list of a checkpoint's config."""
    return sorted(
        name.removesuffix(".weight")
        for name, tensor in tensors.items()
        if name.endswith(".weight") and tensor.dim() == 2 and not is_target(name, tensor)
    )


def pack_checkpoint(
    tensors: Mapping[str, Tensor], checkpoint: str, group: int = qf.INT4_GROUP
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A whole checkpoint in memory: its tensors, and the `quantization_config` for its config.json.

    Raises as `pack`.
    """
    packed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        packed |= pack(name, tensor, checkpoint, group) if is_target(name, tensor) else {name: tensor}
    return packed, checkpoint_config(checkpoint, left_alone(tensors), group)


def pack(name: str, weight: Tensor, checkpoint: str, group: int = qf.INT4_GROUP) -> dict[str, Tensor]:
    """The stored tensors of one matrix `[n, k]` called "<module>.weight".

    Raises UnknownName (no such checkpoint format) and InvalidField (the shape does not fit it).
    """
    return _PACKERS[known(checkpoint)](name.removesuffix(".weight"), weight, group)


def _fp8(module: str, weight: Tensor, group: int) -> dict[str, Tensor]:
    stored, scale = qf.quantize_fp8(weight)
    return {f"{module}.weight": stored, f"{module}.weight_scale": scale}


def _w8a8(module: str, weight: Tensor, group: int) -> dict[str, Tensor]:
    stored, scale = qf.quantize_int8(weight)
    return {f"{module}.weight": stored, f"{module}.weight_scale": scale}


def _int8(module: str, weight: Tensor, group: int) -> dict[str, Tensor]:
    _fits(module, weight, weight.shape[1], 4, "pack-quantized words hold 4 values of a row")
    stored, scale = qf.quantize_int8(weight)
    return {
        f"{module}.weight_packed": pack_words(stored.to(torch.int32) + 128, 8),
        f"{module}.weight_scale": scale,
        f"{module}.weight_shape": torch.tensor(weight.shape, dtype=torch.int64),
    }


def _int4(module: str, weight: Tensor, group: int) -> dict[str, Tensor]:
    _fits(module, weight, weight.shape[1], group, "every group of inputs must be full")
    packed, scale = qf.quantize_int4(weight, group)
    return {
        f"{module}.weight_packed": packed,
        f"{module}.weight_scale": scale,
        f"{module}.weight_shape": torch.tensor(weight.shape, dtype=torch.int64),
    }


def _awq(module: str, weight: Tensor, group: int) -> dict[str, Tensor]:
    """qweight int32 `[k, n / 8]`, columns in AWQ's order; zero points all 8."""
    columns, scale = _columns(module, weight, group)
    order = torch.tensor(AWQ_ORDER)
    interleaved = torch.unflatten(columns, -1, (-1, 8))[..., order].flatten(-2)
    zeros = torch.full_like(scale, 8, dtype=torch.int32)
    return {
        f"{module}.qweight": pack_words(interleaved, 4),
        f"{module}.qzeros": pack_words(zeros, 4),
        f"{module}.scales": scale,
    }


def _gptq(module: str, weight: Tensor, group: int) -> dict[str, Tensor]:
    """qweight int32 `[k / 8, n]`: words run down the inputs; zero points stored less one (v1)."""
    columns, scale = _columns(module, weight, group)
    return {
        f"{module}.qweight": pack_words(columns.t(), 4).t().contiguous(),
        f"{module}.qzeros": pack_words(torch.full_like(scale, 7, dtype=torch.int32), 4),
        f"{module}.scales": scale,
        f"{module}.g_idx": (torch.arange(weight.shape[1]) // group).to(torch.int32),
    }


def _columns(module: str, weight: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Values 0..15 `[k, n]` and fp16 scales `[k / group, n]`, as AWQ and GPTQ lay them out."""
    n, k = weight.shape
    _fits(module, weight, k, group, "every group of inputs must be full")
    _fits(module, weight, n, 8, "words hold 8 outputs")
    packed, scale = qf.quantize_int4(weight.half(), group)
    return (qf.unpack_int4(packed, k) + 8).t().contiguous(), scale.t().contiguous()


def pack_words(values: Tensor, bits: int) -> Tensor:
    """Unsigned int32 values `[..., m]` -> int32 words `[..., m * bits / 32]`, lowest bits first."""
    per_word = 32 // bits
    fields = torch.unflatten(values.to(torch.int64), -1, (-1, per_word))
    word = (fields << torch.arange(0, 32, bits)).sum(-1)
    return torch.where(word >= 2**31, word - 2**32, word).to(torch.int32)


_PACKERS: dict[str, Callable[[str, Tensor, int], dict[str, Tensor]]] = {
    "fp8": _fp8,
    "fp8_weights": _fp8,
    "w8a8": _w8a8,
    "int8": _int8,
    "w4a16": _int4,
    "awq": _awq,
    "gptq": _gptq,
}


def _fits(module: str, weight: Tensor, size: int, unit: int, why: str) -> None:
    if size % unit:
        raise InvalidField(
            where=module,
            field="weight",
            value=tuple(weight.shape),
            reason=f"{size} is no multiple of {unit}, and {why}",
            mend="Choose a smaller group, or another format for this matrix.",
        )


__all__ = [
    "AWQ_ORDER",
    "CHECKPOINTS",
    "checkpoint_config",
    "is_target",
    "left_alone",
    "pack",
    "pack_checkpoint",
    "pack_words",
]
