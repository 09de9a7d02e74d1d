"""Speed of replays: a recorded hour of Azure's conversations, and a million made-up requests.

    PLANC_DATA=... python benchmarks/replay.py [--requests 1000000]

Both go the way of `planc replay`: file, configuration, simulation, report. The first needs PLANC_DATA.
"""

from __future__ import annotations

import argparse
import os
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

import planc

REQUEST: dict[str, Any] = {
    "model": str(Path(__file__).resolve().parents[1] / "examples/models/llama-3.1-70b.json"),
    "inventory": {"nodes": [{"gpu": "h200_sxm", "gpus_per_node": 8, "count": 1}]},
    "workload": {"isl": 1000, "osl": 200, "rate": "max"},
    "slo": {"ttft_p99_ms": 2000, "tpot_mean_ms": 30},
}
PLAN: dict[str, Any] = {"tp": 4, "replicas": 2, "weights": "fp8", "kv": "fp8"}


def made(file: Path, requests: int, rate: float = 9.0) -> None:
    """Poisson arrivals and log-normal lengths, 800 tokens in and 120 out on average, written in pieces."""
    draw, now = np.random.default_rng(1), 0.0
    with file.open("w") as out:
        for start in range(0, requests, 10_000):
            count = min(10_000, requests - start)
            at = now + np.cumsum(draw.exponential(1 / rate, count))
            prompt = np.clip(draw.lognormal(6.3, 0.9, count), 1, 8000).astype(int)
            output = np.clip(draw.lognormal(4.5, 0.8, count), 1, 2000).astype(int)
            now = float(at[-1])
            out.writelines(
                f'{{"arrival_time": {a:.6f}, "input_toks": {p}, "output_toks": {o}}}\n'
                for a, p, o in zip(at, prompt, output, strict=True)
            )


def timed(name: str, trace: Path, **settings: Any) -> None:
    from planc.planner.request import make_request

    start = time.process_time()
    body = planc.replay(make_request(REQUEST), trace, **settings).to_json()
    seconds = time.process_time() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        f"{name:34}{body['requests']['finished']:>10,} requests{seconds:8.1f} s of one core"
        f"{peak:8,.0f} MiB   TTFT {body['ttft_ms']['mean']:.0f} ms, TPOT {body['tpot_ms']['mean']:.1f} ms"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=1_000_000, help="of the made-up trace")
    options = parser.parse_args()
    timed(
        "examples/traces/chat.jsonl",
        Path(__file__).resolve().parents[1] / "examples/traces/chat.jsonl",
        **PLAN,
    )
    if "PLANC_DATA" in os.environ:
        azure = Path(os.environ["PLANC_DATA"]) / "traces" / "AzureLLMInferenceTrace_conv.csv"
        timed("Azure conversations, one replica", azure, **PLAN | {"replicas": 1})
        timed("Azure conversations, two replicas", azure, **PLAN)
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "made.jsonl"
        made(trace, options.requests)
        timed("made-up trace, two replicas", trace, **PLAN)


if __name__ == "__main__":
    main()
