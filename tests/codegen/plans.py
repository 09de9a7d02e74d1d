"""Plans made by hand, for tests that need one of a given shape."""

from __future__ import annotations

from typing import Any

from planc.planner.plan import (
    Coverage,
    Fingerprint,
    LayerDecisions,
    LayerPlan,
    Memory,
    ModelSummary,
    Plan,
    Pool,
    Predicted,
    Rejected,
    Replica,
    Solver,
)

FUSIONS = ("residual_add_rms_norm", "gate_up_merge", "rope_kv_write")


def memory(**changes: float) -> Memory:
    parts = {
        "weights_gib": 35.0,
        "kv_cache_gib": 80.0,
        "activations_gib": 2.0,
        "graphs_gib": 1.0,
        "overhead_gib": 2.0,
        "reserve_gib": 14.0,
        "total_gib": 120.0,
        "capacity_gib": 140.0,
    }
    return Memory(**(parts | changes))


def replica(**changes: Any) -> Replica:
    tp, pp, dp = (changes.get(name, 1) for name in ("tp", "pp", "dp"))
    settings: dict[str, Any] = {
        "engine": "vllm",
        "gpu": "h200_sxm",
        "gpus": [f"node0/{index}" for index in range(tp * pp * dp)],
        "tp": 1,
        "pp": 1,
        "dp": 1,
        "ep": 1,
        "cp": 1,
        "weights": "bf16",
        "activations": "bf16",
        "kv": "bf16",
        "max_num_seqs": 64,
        "max_num_batched_tokens": 4096,
        "max_model_len": 5120,
        "block_size": 16,
        "kv_blocks": 20000,
        "cuda_graph_sizes": [1, 2, 4, 8, 16, 32, 64],
        "gpu_memory_utilization": 0.9,
        "pipeline_layers": [],
        "traffic_share": 1.0,
        "memory": memory(),
    }
    return Replica(**(settings | changes))


def plan(*replicas: Replica, name: str = "llama-3.1-70b", source: str = "model.json", **changes: Any) -> Plan:
    held = list(replicas) or [replica()]
    parts: dict[str, Any] = {
        "fingerprint": Fingerprint(request="r" * 16, model="m" * 16, profile="p" * 16),
        "model": ModelSummary(
            name=name,
            source=source,
            architecture="LlamaForCausalLM",
            kind="causal_lm",
            parameters=70_553_706_496,
            active_parameters=70_553_706_496,
            kv_bytes_per_token=327_680,
        ),
        "request": {"model": source},
        "solver": Solver(
            status="optimal",
            objective="min_cost",
            value=1.9,
            bound=1.9,
            gap=0.0,
            candidates=420,
            pruned={"memory": 100},
        ),
        "predicted": {
            "ttft_ms": Predicted(
                value=410.0,
                low=330.0,
                high=560.0,
                source="roofline",
                percentiles={"p50": 390.0, "p99": 900.0},
            ),
            "tpot_ms": Predicted(value=21.0, low=17.0, high=27.0, source="roofline"),
        },
        "pools": [Pool(role="aggregated", replicas=held)],
        "layers": [
            LayerPlan(
                layer_class="decoder",
                count=80,
                decisions=LayerDecisions(
                    format="bf16",
                    sharding={"self_attn.q_proj": "column"},
                    fusions=list(FUSIONS),
                    kernel={"mlp.act": "silu_mul"},
                ),
            )
        ],
        "rejected": [Rejected(decision="tp=2", reason="memory: 150 GiB of 126", predicted={"tpot_ms": 30.0})],
        "coverage": Coverage(modelled=["steady-state batching"], not_modelled=["host overhead of sampling"]),
    }
    return Plan(**(parts | changes)).sealed()
