"""How vLLM comes to a plan's number formats: what it quantizes by itself, what a checkpoint must hold."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from planc.codegen.engines.checkpoint import cache_formats, layer_numbers, native_format, recipe
from planc.errors import CheckFailed
from planc.passes.native_format import quantization
from planc.passes.quantize_config import recipe_config
from planc.passes.quantize_scope import PATTERN
from planc.planner.plan import Plan, Replica

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
CACHES = {"bf16": "auto", "fp16": "auto", "fp32": "auto", "fp8": "fp8"}

#: file beside an engine's configuration: what the checkpoint's config.json says of its formats
QUANTIZATION_FILE = "quantization_config.json"


@dataclass(frozen=True, slots=True)
class Weights:
    """How vLLM comes to a plan's weight format.

    setting   value of `quantization`, None where the checkpoint itself says it
    exported  the weights must first be written in that format (`planc export --weights`)
    """

    setting: str | None
    exported: bool


def weights(replica: Replica, plan: Plan, config: Mapping[str, Any] | None) -> Weights:
    """vLLM quantizes bf16 checkpoints to fp8 while loading, and reads what a checkpoint already is. Formats
    that differ between parts it takes from a checkpoint that says so."""
    if recipe(plan, replica).rules:
        return Weights(None, exported="config_groups" not in quantization(config or {}))
    native = native_format(config)
    if replica.weights == native or (replica.weights in DTYPES and native in DTYPES):
        return Weights(None, exported=False)
    if replica.weights == "fp8" and native in DTYPES:
        return Weights("fp8", exported=False)
    return Weights(None, exported=True)


def caches(replica: Replica, plan: Plan) -> dict[str, Any]:
    """The options that say what caches are stored in. Raises CheckFailed for what vLLM has none for."""
    by_layer = {layer: CACHES.get(kv) for layer, kv in cache_formats(plan, replica).items()}
    usual = CACHES.get(replica.kv)
    layers = {layer: by_layer.get(layer, usual) for layer in layer_numbers(plan)} or {0: usual}
    if None in layers.values():
        raise CheckFailed(
            what="vLLM configuration",
            reason=f"vLLM has no KV cache format for kv={replica.kv}",
            mend="Take that out of the request's `constraints`.",
        )
    narrow = [kv for kv in layers.values() if kv != "auto"]
    if not narrow:
        return {"kv-cache-dtype": "auto"}
    wide = [str(layer) for layer, kv in layers.items() if kv == "auto"]
    skipped: dict[str, Any] = {"kv-cache-dtype-skip-layers": wide} if wide else {}
    return {"kv-cache-dtype": narrow[0], **skipped}


def quantization_file(replica: Replica, plan: Plan) -> str | None:
    """What the checkpoint's configuration says where formats differ between parts; None where none does."""
    found = recipe(plan, replica)
    if not found.rules:
        return None
    return json.dumps(recipe_config(found, [f"re:.*{PATTERN}"]), indent=2) + "\n"
