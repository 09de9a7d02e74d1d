"""What a published checkpoint's own configuration says of its formats and its attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from planc.cost_model.parts import KV, Part, numbers, parse, scheme
from planc.ir.trace.hf_config import text_part
from planc.passes.native_format import native_format as stated
from planc.passes.quantize_config import Recipe, Rule
from planc.planner.plan import Plan, Replica

_FULL = {"full_attention", "attention", "global", 1}


def native_format(config: Mapping[str, Any] | None) -> str:
    """Weight format of the checkpoint: "bf16" where the configuration names no format."""
    return (stated(config) if config else "") or "bf16"


def recipe(plan: Plan, replica: Replica) -> Recipe:
    """A replica's formats as a checkpoint sees them."""
    rules = [
        Rule(part.module, layers, scheme(taken))
        for part, layers, taken in _exceptions(plan, replica)
        if part.module != KV
    ]
    return Recipe((replica.weights, replica.activations), tuple(rules))


def cache_formats(plan: Plan, replica: Replica) -> dict[int, str]:
    """Layer -> cache format, of the layers whose cache has another format than `replica.kv`."""
    return {
        layer: taken
        for part, layers, taken in _exceptions(plan, replica)
        if part.module == KV
        for layer in layers
    }


def layer_numbers(plan: Plan) -> tuple[int, ...]:
    """All layers that the plan's classes name; () where formats differ between none."""
    return tuple(sorted(layer for entry in plan.layers for layer in numbers(entry.layers)))


def _exceptions(plan: Plan, replica: Replica) -> list[tuple[Part, tuple[int, ...], str]]:
    """(part, its layers, what it takes) of a replica; those that name layers first."""
    layers: dict[str, list[int]] = {}
    for entry in plan.layers:
        band = parse(f"{entry.layer_class}:")
        if band is not None:
            layers.setdefault(band.layer_class, []).extend(numbers(entry.layers))
    found = []
    for text, taken in replica.formats.items():
        part = parse(text)
        assert part is not None, "the request and the plan's checks refuse other names"
        found.append((part, part.layers or tuple(sorted(layers.get(part.layer_class, ()))), taken))
    return sorted(found, key=lambda one: not one[0].layers)


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
