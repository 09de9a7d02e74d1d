"""The number format of a published checkpoint, as its own configuration says it. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from planc.ir.trace.hf_config import text_part

_DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
_METHODS = {"modelopt_fp4": "nvfp4"}


def native_format(config: Mapping[str, Any]) -> str:
    """The weight format, by the catalogue's name, from `quantization_config` or the dtype; "" where neither
    says. Of a checkpoint in several formats it is the widest."""
    settings = quantization(config)
    if settings:
        return _quantized(settings)
    text = text_part(config)
    for part in (text, config):
        dtype = part.get("dtype") or part.get("torch_dtype")
        if dtype:
            return _DTYPES.get(str(dtype).removeprefix("torch."), "")
    return ""


def block_scales(config: Mapping[str, Any]) -> bool:
    """Whether the checkpoint's fp8 weights have a scale per block (DeepSeek-V3's 128 x 128): such products
    run in other kernels, and need their inputs scaled per 128 elements."""
    return bool(quantization(config).get("weight_block_size"))


def quantization(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The `quantization_config` of the language model; empty without one."""
    found = text_part(config).get("quantization_config") or config.get("quantization_config")
    return found if isinstance(found, Mapping) else {}


def _quantized(settings: Mapping[str, Any]) -> str:
    method = str(settings.get("quant_method", "")).lower()
    if method == "compressed-tensors":
        groups = settings.get("config_groups")
        listed = list(groups.values()) if isinstance(groups, Mapping) else []
        kinds = [_weights(group.get("weights") or {}) for group in listed if isinstance(group, Mapping)]
        return max(kinds, default=(16, "bf16"))[1]
    if method in ("gptq", "awq"):
        return "w4a16" if int(settings.get("bits", 4)) == 4 else "int8"
    if method == "modelopt":
        return "nvfp4" if "FP4" in str(settings.get("quant_algo", "")).upper() else "fp8"
    return _METHODS.get(method, method)


def _weights(settings: Mapping[str, Any]) -> tuple[int, str]:
    """(bits, format) of a group's weights. Compressed-tensors' own defaults: 8 bits, integers."""
    kind, bits = str(settings.get("type", "int")), int(settings.get("num_bits", 8))
    names = {(4, "int"): "w4a16", (4, "float"): "nvfp4", (8, "int"): "int8", (8, "float"): "fp8"}
    return bits, names.get((bits, kind), "bf16")
