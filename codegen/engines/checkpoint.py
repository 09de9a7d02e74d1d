"""What a published checkpoint's own configuration says of its formats and its attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from planc.ir.trace.hf_config import text_part
from planc.passes.native_format import native_format as stated

_FULL = {"full_attention", "attention", "global", 1}


def native_format(config: Mapping[str, Any] | None) -> str:
    """Weight format of the checkpoint: "bf16" where the configuration names no format."""
    return (stated(config) if config else "") or "bf16"


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
