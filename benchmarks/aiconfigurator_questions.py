"""How a measured serving point is asked of aiconfigurator: the arguments of its `cli_estimate`.

It sees what planc sees: the point with its labels repaired (model, GPU, engine, precision, parallel degrees,
concurrency) and its harness (cache format, whole experts on ranks, repeated prompts, mean of the drawn
lengths). Where a point leaves something open, such as the kernel of MXFP4 experts, the arguments come as
several attempts in order; the first that it can answer counts.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from planc.runtime.validation.harness import Harness
from planc.runtime.validation.names import architecture, model_name
from planc.runtime.validation.points import Point, PoolLabel

#: its names where they are not planc's
_SYSTEMS = {"rtx_pro_6000": "rtx_pro_6000_server"}
_CACHES = {"bf16": "bfloat16", "fp8": "fp8", "int8": "int8"}
_FORMATS: dict[str, dict[str, str]] = {
    "bf16": {"gemm_quant_mode": "bfloat16", "moe_quant_mode": "bfloat16"},
    "fp8": {"gemm_quant_mode": "fp8", "moe_quant_mode": "fp8"},
    "fp8_block": {"gemm_quant_mode": "fp8_block", "moe_quant_mode": "fp8_block"},
    "nvfp4": {"gemm_quant_mode": "nvfp4", "moe_quant_mode": "nvfp4"},
    "w4a16": {"gemm_quant_mode": "int4_wo", "moe_quant_mode": "int4_wo"},
    "mxfp4": {},
}
#: checkpoints that are published in FP8 by blocks: their own configuration says so
_BLOCKWISE = ("deepseek", "minimax", "glm", "kimi")
_BLACKWELL = ("b200", "gb200", "b300", "gb300")


class Unaskable(ValueError):
    """aiconfigurator has no argument for this."""


def attempts(point: Point, harness: Harness, models: Sequence[str]) -> list[dict[str, Any]]:
    """Arguments of `cli_estimate`, best first.

    models   the checkpoints that it knows, "owner/name"

    Raises Unaskable.
    """
    mean = (harness.length_low + harness.length_high) / 2
    common = {
        "model_path": checkpoint(point.model, point.weights, models),
        "system_name": _SYSTEMS.get(point.gpu, point.gpu),
        "backend_name": point.engine,
        "isl": round(mean * point.isl),
        "osl": round(mean * point.osl),
        **_prefix(point, harness, mean),
    }
    shape = _disaggregated(point) if point.mode == "disagg" else _aggregated(point, harness)
    cache = {"kvcache_quant_mode": _CACHES[harness.kv]} if harness.kv in _CACHES else {}
    kinds = [cache, {}] if cache else [{}]
    return [common | shape | formats | kind for formats in _formats(point) for kind in kinds]


def _prefix(point: Point, harness: Harness, mean: float) -> dict[str, int]:
    """Prompt tokens found in the cache, on average over the run, where its prompts repeat."""
    if harness.distinct_prompts is None:
        return {}
    requests = harness.requests_per_client * point.concurrency
    share = max(1 - harness.distinct_prompts / requests, 0.0)
    return {"prefix": round(share * (mean * point.isl - 1))}


def checkpoint(model: str, weights: str, models: Sequence[str]) -> str:
    """The known checkpoint that a point's model means, one in NVFP4 where those are its weights:
    "llama-3.1-70b" is "meta-llama/Meta-Llama-3.1-70B". Where it knows none in NVFP4, one of the same
    architecture: "nvidia/DeepSeek-V3.1-NVFP4" for DeepSeek-R1."""
    wanted = model_name(model)
    same = [name for name in models if model_name(name) == wanted]
    alike = [name for name in models if architecture(model_name(name)) == architecture(wanted)]
    four = [name for name in same if "NVFP4" in name] or [name for name in alike if "NVFP4" in name]
    full = [name for name in same if not re.search("nvfp4|fp8", name, re.IGNORECASE)]
    found = (four if weights == "nvfp4" and four else full) or same or alike
    if not found:
        raise Unaskable(f"no checkpoint for the model {model}")
    return min(found, key=len)


def _formats(point: Point) -> list[dict[str, str]]:
    named = _FORMATS.get(point.weights)
    if named is None:
        raise Unaskable(f"no precision for weights {point.weights}")
    if point.weights == "fp8" and point.model.startswith(_BLOCKWISE):
        return [{}]
    if point.weights == "nvfp4" and point.model.startswith(_BLOCKWISE):
        return [{}, named]  # its NVFP4 checkpoints keep attention in higher precision
    if point.weights == "mxfp4" and point.gpu.startswith(_BLACKWELL):
        return [{"moe_quant_mode": "w4a8_mxfp4_mxfp8"}, {}]  # what engines run there
    return [named]


def _aggregated(point: Point, harness: Harness) -> dict[str, Any]:
    moe_tp, moe_ep = point.moe_tp, point.moe_ep
    if harness.expert_parallel:
        moe_tp, moe_ep = 1, point.tp * point.attention_dp
    return {
        "mode": "agg",
        "batch_size": max(round(point.concurrency / point.attention_dp), 1),
        "tp_size": point.tp,
        "pp_size": point.pp,
        "attention_dp_size": point.attention_dp,
        "moe_tp_size": moe_tp,
        "moe_ep_size": moe_ep,
    }


def _disaggregated(point: Point) -> dict[str, Any]:
    """Prompts are prefilled one by one; all clients decode at once."""
    assert point.prefill is not None
    assert point.decode is not None
    clients = point.concurrency / (point.decode.workers * point.decode.dp)
    return {
        "mode": "disagg",
        "prefill_batch_size": 1,
        "decode_batch_size": max(round(clients), 1),
        **_pool("prefill", point.prefill),
        **_pool("decode", point.decode),
    }


def _pool(role: str, pool: PoolLabel) -> dict[str, int]:
    return {
        f"{role}_tp_size": pool.tp,
        f"{role}_attention_dp_size": pool.dp,
        f"{role}_moe_ep_size": pool.ep,
        f"{role}_moe_tp_size": max(pool.tp * pool.dp // pool.ep, 1),
        f"{role}_num_workers": pool.workers,
    }
