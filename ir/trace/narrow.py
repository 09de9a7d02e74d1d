"""A narrow model: the same structure as a large one, small enough to run anywhere.

Every layer kind, routing rule, window, chunk, sink, latent and norm of the original is kept; widths,
depth, experts and vocabulary shrink. What a compiler pass does to the graph of the narrow model is
what it does to that of the large one, so running the narrow one is a proof that fits any machine.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from planc.ir.trace.hf_config import text_part

#: configuration key -> the largest value it keeps. Products that int4 groups of 128 divide stay so.
_CAPS: Mapping[str, int] = {
    "vocab_size": 1024,
    "hidden_size": 256,
    "intermediate_size": 512,
    "intermediate_size_mlp": 512,
    "moe_intermediate_size": 128,
    "shared_expert_intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_global_key_value_heads": 2,
    "head_dim": 64,
    "global_head_dim": 128,
    "sliding_window": 24,
    "attention_chunk_size": 24,
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "top_k_experts": 2,
    "n_group": 2,
    "topk_group": 1,
    "q_lora_rank": 128,
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
    "index_topk": 16,
    "index_n_heads": 4,
    "index_head_dim": 64,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "rotary_dim": 32,
    "num_nextn_predict_layers": 0,
}

#: lists with one entry per layer
_PER_LAYER = ("layer_types", "mlp_layer_types", "attn_type_list", "no_rope_layers", "indexer_types")
_MOST_LAYERS = 8


def narrow(config: Mapping[str, Any]) -> dict[str, Any]:
    """The narrow configuration of a model's (text) configuration, as its `config.json` holds it."""
    text = text_part(config)
    layers = _depth(text)
    small = {
        key: min(value, _CAPS[key]) if key in _CAPS and _counts(value) else value
        for key, value in text.items()
    }
    if "head_dim" not in small and _counts(text.get("hidden_size")) and "kv_lora_rank" not in small:
        small["head_dim"] = 64
    if text.get("num_key_value_heads") == text.get("num_attention_heads"):
        small["num_key_value_heads"] = small["num_attention_heads"]
    if "qk_head_dim" in small:
        small["qk_head_dim"] = small["qk_nope_head_dim"] + small["qk_rope_head_dim"]
    if "kv_lora_rank" in small:
        small["head_dim"] = small["qk_rope_head_dim"]
    small["num_hidden_layers"] = layers
    for key in _PER_LAYER:
        if isinstance(small.get(key), list):
            small[key] = small[key][:layers]
    if _counts(small.get("first_k_dense_replace")):
        small["first_k_dense_replace"] = min(small["first_k_dense_replace"], 1)
    small |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    small.pop("quantization_config", None)
    return small


def _depth(text: Mapping[str, Any]) -> int:
    """As few layers as hold every kind that the first layers show: periods of windows, chunks, experts."""
    whole = text.get("num_hidden_layers", 1)
    period = max(
        [
            2,
            *(_first_of_each(text[key]) for key in _PER_LAYER if isinstance(text.get(key), list)),
            2 if _counts(text.get("first_k_dense_replace")) else 1,
            text.get("full_attention_interval") or 1,
            2 * (text.get("interleave_moe_layer_step") or 1),
            4 if text.get("attention_chunk_size") else 1,
        ]
    )
    return int(min(whole, period, _MOST_LAYERS))


def _first_of_each(kinds: list[Any]) -> int:
    """Length of the shortest prefix with every kind in it."""
    return max((kinds.index(kind) + 1 for kind in kinds), default=1)


def _counts(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
