"""What a published checkpoint's own configuration says of its formats and its attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from planc.ir.trace.hf_config import text_part

_FULL = {"full_attention", "attention", "global", 1}


def native_format(config: Mapping[str, Any] | None) -> str:
    """Weight format of the checkpoint: "bf16" where the configuration names no quantization."""
    if not config:
        return "bf16"
    text = text_part(config)
    quantization = config.get("quantization_config") or text.get("quantization_config") or {}
    method = str(quantization.get("quant_method", "")).lower()
    if not method:
        kind = str(config.get("dtype") or config.get("torch_dtype") or text.get("dtype") or "bfloat16")
        return {"float32": "fp32", "float16": "fp16"}.get(kind.removeprefix("torch."), "bf16")
    if method in ("awq", "gptq"):
        return "w4a16" if int(quantization.get("bits", 4)) == 4 else "int8"
    if method == "compressed-tensors":
        return _compressed(quantization)
    return {"fp8": "fp8", "mxfp4": "mxfp4", "modelopt_fp4": "nvfp4", "modelopt": "fp8"}.get(method, method)


def _compressed(quantization: Mapping[str, Any]) -> str:
    """The widest group decides: compressed-tensors lists weights by group of layers."""
    groups = (quantization.get("config_groups") or {}).values()
    weights = [group.get("weights") or {} for group in groups]
    kinds = {(int(w.get("num_bits", 16)), str(w.get("type", "int"))) for w in weights}
    bits, kind = max(kinds, default=(16, "float"))
    return {(4, "int"): "w4a16", (4, "float"): "nvfp4", (8, "int"): "int8", (8, "float"): "fp8"}.get(
        (bits, kind), "bf16"
    )


def plain_cache(config: Mapping[str, Any] | None) -> bool:
    """Does every layer keep an ordinary cache of keys and values over the whole context?

    Not so with sliding windows, chunks, recurrent layers, latent caches (MLA) or sparse indexers: there
    an engine lays out and counts its blocks by rules of its own.
    """
    if not config:
        return False
    text = text_part(config)
    kinds = text.get("layer_types") or text.get("attn_type_list") or ()
    return (
        all(kind in _FULL for kind in kinds)
        and not text.get("kv_lora_rank")
        and not text.get("index_topk")
        and not text.get("attention_chunk_size")
        and not (text.get("sliding_window") and text.get("use_sliding_window", True))
    )


def multimodal(config: Mapping[str, Any] | None) -> bool:
    """Does the configuration describe towers besides the language model?"""
    return bool(config) and any(key in config for key in ("vision_config", "audio_config") if config)
