"""A replica's settings in vLLM's words: exactly the ones that were evaluated.

Keys are vLLM's command-line options without the dashes, as `vllm serve --config` reads them. Checked
against vLLM 0.32 (`make test-engines`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from planc.codegen.engines.checkpoint import multimodal, plain_cache
from planc.codegen.engines.vllm_formats import DTYPES, caches, weights
from planc.errors import CheckFailed
from planc.planner.plan import Plan, Replica, Role

_CPU_BLOCK = 32  # vLLM's CPU attention takes blocks of a multiple of this many tokens
#: what a plan states of speculation for its own figures
_OURS = ("acceptance_rate", "draft_parameters")
#: host memory through which caches pass to drives where the plan keeps none there
_STAGING_GIB = 4

#: role of an engine's pool -> what vLLM calls an engine that gives caches away, or fetches them
_TRANSFER = {"prefill": "kv_producer", "decode": "kv_consumer"}


def settings(
    replica: Replica, plan: Plan, config: Mapping[str, Any] | None, role: Role = "aggregated"
) -> dict[str, Any]:
    """Everything that goes into `config.yaml`. Raises CheckFailed for what vLLM has no setting for."""
    on_cpu = replica.gpu == "cpu"
    _expressible(replica, on_cpu)
    world = replica.tp * replica.pp
    out: dict[str, Any] = {
        "served-model-name": plan.model.name.lstrip("-") or "model",  # a leading dash would be an option
        "dtype": DTYPES.get(replica.weights) or DTYPES.get(replica.activations, "bfloat16"),
        "tensor-parallel-size": replica.tp,
        "pipeline-parallel-size": replica.pp,
        "data-parallel-size": replica.dp,
    }
    if replica.cp > 1:
        out["decode-context-parallel-size"] = replica.cp
    if replica.ep > 1:
        out["enable-expert-parallel"] = True
        if any(experts.ranks == replica.ep for experts in plan.experts):
            out["enable-eplb"] = True  # vLLM finds the placement by the load it sees; it reads none
            if replica.expert_copies:
                out["eplb-config"] = {"num_redundant_experts": replica.expert_copies * replica.ep}
    if world > 1:
        out["distributed-executor-backend"] = "mp"
    out |= {
        "max-num-seqs": replica.max_num_seqs,
        "max-num-batched-tokens": replica.max_num_batched_tokens,
        "max-model-len": replica.max_model_len,
        "block-size": replica.block_size,
        **caches(replica, plan),
        _switch("enable-chunked-prefill", replica.chunked_prefill): True,
        _switch("enable-prefix-caching", replica.prefix_caching): True,
    }
    if (method := weights(replica, plan, config).setting) is not None:
        out["quantization"] = method
    if replica.weights == "fp8" and replica.activations in DTYPES and not replica.formats:
        out |= {"linear-backend": "marlin", "moe-backend": "marlin"}  # fp8 weights, wider products
    if plain_cache(config) and "kv-cache-dtype-skip-layers" not in out:
        out["num-gpu-blocks-override"] = replica.kv_blocks
    if not on_cpu:
        out["gpu-memory-utilization"] = replica.gpu_memory_utilization
        sizes = sorted(replica.cuda_graph_sizes)
        out["compilation-config"] = (
            {"cudagraph_capture_sizes": sizes} if sizes else {"cudagraph_mode": "NONE"}
        )
    if role in _TRANSFER:
        out["kv-transfer-config"] = {"kv_connector": "NixlConnector", "kv_role": _TRANSFER[role]}
    if role == "aggregated" and (outside := offload(replica)):
        out["kv-transfer-config"] = outside
    if replica.speculative:
        out["speculative-config"] = {k: v for k, v in replica.speculative.items() if k not in _OURS}
    if multimodal(config):
        out["language-model-only"] = True  # the plan is for text; the towers would take memory
    if plan.model.kind == "encoder":
        out["runner"] = "pooling"
    return out


def offload(replica: Replica) -> dict[str, Any] | None:
    """The connector that keeps caches outside the GPU; None where the plan loads none from there.

    Host memory comes first and holds whatever drives and stores do, so it is there for either. Drives and a
    store on the network are folders: `root_dir` is to be mounted.
    """
    tiers = [tier for tier in (replica.kv_offload or {}).get("tiers", ()) if "gib" in tier]
    used = [tier for tier in tiers if tier["loaded"]]
    if not used:
        return None
    host = next((tier["gib"] for tier in tiers if tier["tier"] == "host"), _STAGING_GIB)
    extra: dict[str, Any] = {"cpu_bytes_to_use": int(host * 2**30)}
    folders = [tier["tier"] for tier in used if tier["tier"] != "host"]
    if folders:
        extra["spec_name"] = "TieringOffloadingSpec"
        extra["secondary_tiers"] = [{"type": "fs", "root_dir": f"/mnt/kv-{name}"} for name in folders]
    return {
        "kv_connector": "OffloadingConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": extra,
    }


def _switch(option: str, on: bool) -> str:
    """The option that turns something on or off.

    `vllm serve --config` silently drops `option: false` (0.32: it looks for `--no-<option>` among the
    options of the command above `serve`), so what is off is written as `no-<option>: true`.
    """
    return option if on else f"no-{option}"


def environment(replica: Replica) -> dict[str, str]:
    """Variables that vLLM reads no option for."""
    out: dict[str, str] = {}
    if replica.pp > 1 and replica.pipeline_layers:
        out["VLLM_PP_LAYER_PARTITION"] = ",".join(str(layers) for layers in replica.pipeline_layers)
    if replica.gpu == "cpu":
        # whole GiB only; num-gpu-blocks-override then takes what the plan says of it
        out["VLLM_CPU_KVCACHE_SPACE"] = str(max(1, math.ceil(replica.memory.kv_cache_gib)))
        if replica.tp * replica.pp * replica.dp > 1:
            out["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"  # else it wants a NUMA node per process
    return out


def _expressible(replica: Replica, on_cpu: bool) -> None:
    """Raises for what vLLM, or its CPU build, cannot be told or does not survive."""
    reason = None
    if replica.ep not in (1, replica.tp * replica.dp):
        reason = (
            f"vLLM spreads experts over all tp * dp = {replica.tp * replica.dp} ranks, not ep={replica.ep}"
        )
    elif on_cpu and replica.weights == "fp8":
        reason = "vLLM's CPU build has no fp8 weights"
    elif on_cpu and replica.ep > 1:
        reason = "vLLM's CPU build cannot run experts in parallel (it dies at the first request)"
    elif on_cpu and replica.block_size % _CPU_BLOCK:
        reason = f"vLLM's CPU attention has blocks of multiples of {_CPU_BLOCK}, not {replica.block_size}"
    if reason is not None:
        raise CheckFailed(
            what="vLLM configuration", reason=reason, mend="Take that out of the request's `constraints`."
        )
