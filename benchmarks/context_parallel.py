"""What spreading caches over ranks does: DeepSeek-R1 on eight H200 under vLLM, in its checkpoint's formats.

    python benchmarks/context_parallel.py

First a decode step (ms) and the sequences that fit, by tokens in each cache, for tp 8 and ep 8. Then the most
that one node carries, with caches kept whole and spread: agents that come back with a long conversation, 90 %
of it known, for 4,000 tokens of answer, within a mean TPOT of 40 and 25 ms.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from planc import api
from planc.cost_model import catalogue
from planc.cost_model.collectives import Fabric
from planc.cost_model.memory import memory_map
from planc.cost_model.shape import EngineShape
from planc.cost_model.step import StepLoad, StepModel
from planc.planner.compile import plan
from planc.planner.request import make_request

MODEL = Path(__file__).resolve().parent.parent / "examples" / "models" / "deepseek-r1.json"
GPU, DEGREES = "h200_sxm", (1, 2, 4, 8)


def request(isl: int, tpot: float, **constraints: Any) -> dict[str, Any]:
    return {
        "model": str(MODEL),
        "inventory": {"nodes": [{"gpu": GPU, "gpus_per_node": 8}]},
        "workload": {"isl": isl, "osl": 4000, "rate": "max", "prefix_hit_rate": 0.9},
        "slo": {"ttft_p99_ms": 30_000, "tpot_mean_ms": tpot},
        "objective": "max_goodput",
        "constraints": {"weights": "fp8", **constraints},
    }


def steps() -> None:
    table, gpu, profile = (
        api.cost_table(make_request(request(4000, 40))),
        catalogue.gpu(GPU),
        catalogue.engine("vllm"),
    )
    print(f"{'context':>8} {'batch':>6}" + "".join(f"{f'cp {cp}, ms':>11}{'fit':>6}" for cp in DEGREES))
    models = {}
    for cp in DEGREES:
        shape = EngineShape("vllm", GPU, tp=8, ep=8, cp=cp, weights="fp8", activations="fp8")
        limits = {"max_num_seqs": 64, "max_num_batched_tokens": 8192, "max_model_len": 131_072}
        models[cp] = (
            StepModel(table, shape, gpu, Fabric(), profile),
            memory_map(table, shape, gpu, profile, **limits),
        )
    for context in (4_000, 16_000, 64_000, 128_000):
        for batch in (1, 16, 64):
            row = f"{context:8,} {batch:6}"
            for cp, (model, memory) in models.items():
                fit = int(float(memory.sequences(context)) * cp)
                row += f"{1e3 * float(model.seconds(StepLoad(batch, context))):11.1f}{fit:6}"
            print(row)


def plans() -> None:
    print(
        f"\n{'prompt':>8} {'TPOT ms':>8} {'caches':>7} {'requests/s':>11} {'candidates':>11} {'CPU s':>6}"
        "  engines"
    )
    for isl in (8_000, 32_000, 64_000, 120_000):
        for tpot in (40.0, 25.0):
            for name, limits in (("whole", {"cp": 1}), ("spread", {})):
                asked = make_request(request(isl, tpot, **limits))
                table, start = api.cost_table(asked), time.process_time()
                found = plan(asked, table)
                engines = "; ".join(
                    f"tp {r.tp} pp {r.pp} dp {r.dp} ep {r.ep} cp {r.cp}, {r.max_num_seqs} seats"
                    for r in found.replicas()
                )
                rate, seconds = found.predicted["requests_s"].value, time.process_time() - start
                print(
                    f"{isl:8,} {tpot:8.0f} {name:>7} {rate:11.4f} {found.solver.candidates:11} "
                    f"{seconds:6.1f}  {engines}",
                    flush=True,
                )


if __name__ == "__main__":
    steps()
    plans()
