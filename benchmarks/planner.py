"""How long planning takes, and how much memory: named cases, and inventories from 8 to 4,096 GPUs.

    python benchmarks/planner.py [case ...] [--out FILE]

Every case runs in a process of its own, from a cached trace (the first run traces). Prints wall and CPU
seconds, peak memory, what the plan takes and the gap that is left.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MODELS = ROOT / "examples" / "models"
LLAMA, R1 = "llama-3.1-70b", "deepseek-r1"
FP8: dict[str, Any] = {"weights": ["bf16", "fp8"], "kv": ["bf16", "fp8"]}
CLASSES = (
    {"name": "chat", "isl": 500, "osl": 300, "slo": {"ttft_p99_ms": 1000, "tpot_mean_ms": 40}},
    {"name": "code", "isl": 3000, "osl": 200, "slo": {"ttft_p99_ms": 2000, "tpot_mean_ms": 30}},
    {"name": "documents", "isl": 12000, "osl": 500, "slo": {"ttft_p99_ms": 8000, "tpot_mean_ms": 60}},
)
RATES = (900.0, 220.0, 45.0)  # what about 400 of 1,024 GPUs of four kinds carry
FOUR_KINDS = (("h200_sxm", 3.8), ("h100_sxm", 2.9), ("a100_sxm", 1.7), ("l40s", 0.9))


def _one_kind(model: str, gpus: int, rate: float | str, **slo: float) -> dict[str, Any]:
    nodes = [{"gpu": "h200_sxm", "gpus_per_node": 8, "count": gpus // 8, "usd_per_gpu_hour": 3.8}]
    load: dict[str, Any] = {"rate": rate} if isinstance(rate, str) else {"request_rate": rate}
    return {
        "model": str(MODELS / f"{model}.json"),
        "inventory": {"nodes": nodes},
        "workload": {"isl": 4000, "osl": 1000, **load},
        "slo": slo,
        "objective": "max_goodput" if rate == "max" else "min_cost",
        "constraints": FP8,
    }


def _four_kinds(gpus: int) -> dict[str, Any]:
    part = gpus / 1024
    return {
        "model": str(MODELS / f"{LLAMA}.json"),
        "inventory": {
            "nodes": [
                {"gpu": gpu, "gpus_per_node": 8, "count": gpus // 32, "usd_per_gpu_hour": usd}
                for gpu, usd in FOUR_KINDS
            ]
        },
        "workload": {
            "classes": [{**c, "request_rate": r * part} for c, r in zip(CLASSES, RATES, strict=True)]
        },
        "constraints": FP8,
    }


CASES: dict[str, dict[str, Any]] = {
    "70b-8": _one_kind(LLAMA, 8, 4.0, ttft_p99_ms=2000, tpot_mean_ms=30),
    "70b-32": _one_kind(LLAMA, 32, 14.0, ttft_p99_ms=2000, tpot_mean_ms=30),
    "r1-32": _one_kind(R1, 32, "max", ttft_p99_ms=4000, tpot_mean_ms=60),
    "four-kinds-1024": _four_kinds(1024),
    **{f"four-kinds-{gpus}": _four_kinds(gpus) for gpus in (32, 128, 512, 4096)},
}


def measure(name: str, simulate: bool) -> dict[str, Any]:
    """Plans one case in this process."""
    from planc import api
    from planc.planner.compile import plan
    from planc.planner.request import make_request
    from planc.runtime.referee import Simulation

    request = make_request(CASES[name])
    table = api.cost_table(request)
    wall, cpu = time.perf_counter(), time.process_time()
    found = plan(request, table, referee=Simulation() if simulate else None)
    replicas = found.replicas()
    return {
        "case": name,
        "simulated": simulate,
        "seconds": time.perf_counter() - wall,
        "cpu_seconds": time.process_time() - cpu,
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "status": found.solver.status,
        "gap": found.solver.gap,
        "value": found.solver.value,
        "objective": found.solver.objective,
        "candidates": found.solver.candidates,
        "replicas": len(replicas),
        "gpus": sum(len(replica.gpus) for replica in replicas),
        "pools": sorted({pool.role for pool in found.pools}),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("cases", nargs="*", choices=[[], *CASES], default=[], help="default: all")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    parser.add_argument("--no-simulate", action="store_true", help="take what formulas say")
    parser.add_argument("--one", choices=CASES, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.one:
        print(json.dumps(measure(chosen.one, not chosen.no_simulate)))
        return 0
    rows = []
    print(
        f"{'case':18} {'wall s':>8} {'CPU s':>8} {'GiB':>6} {'gap %':>7} {'GPUs':>6} {'replicas':>9}  status"
    )
    for name in chosen.cases or CASES:
        run = [sys.executable, __file__, "--one", name, *(["--no-simulate"] if chosen.no_simulate else [])]
        done = subprocess.run(run, capture_output=True, text=True, check=False)
        if done.returncode:
            print(f"{name:18} failed: {done.stderr.strip().splitlines()[-1]}")
            continue
        row = json.loads(done.stdout.splitlines()[-1])
        rows.append(row)
        print(
            f"{name:18} {row['seconds']:8.1f} {row['cpu_seconds']:8.1f} {row['peak_gib']:6.2f} "
            f"{100 * row['gap']:7.2f} {row['gpus']:6} {row['replicas']:9}  {row['status']}",
            flush=True,
        )
    if chosen.out:
        chosen.out.write_text(json.dumps(rows, indent=2) + "\n")
    return 0 if len(rows) == len(chosen.cases or CASES) else 1


if __name__ == "__main__":
    sys.exit(main())
