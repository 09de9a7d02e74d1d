"""planc's search against aiconfigurator's, on aiconfigurator's own numbers.

    python benchmarks/vs_aiconfigurator.py [--python PATH] [--answers FILE] [--only TEXT] [--json FILE]

--python    of an environment with `aiconfigurator==0.12.0` (default: this one, or AICONFIGURATOR_PYTHON)
--answers   keeps its answers, with the seconds that each took
--only      tasks whose label contains this
--json      writes the figures and the chosen fleets

For each task, tokens/s per GPU of the whole inventory within the objectives:

theirs      best of `cli_default` (the larger of what it reports and what `cli_estimate` says of its choice)
mixed       planc, engines of unlike shapes in one fleet and any ratio of prefill to decode workers; the
            checkpoint's formats, whole prompts per step
chunks      and prompts cut at any multiple of 512 tokens
ours        and other formats, where the task allows them

One engine's throughput and times are those of `cli_estimate` 0.12.0. Where that prices cli_default's choice
unlike cli_default (it gives aggregated engines no DeepEP kernels), they are those of `Task.run_single_agg`
and `run_single_disagg`, of which cli_default's search is made, for both. Shapes are those that
aiconfigurator's own search enumerates; its memory checks, its loss of prefill and decode workers to
imbalance (0.9, 0.92) and its TTFT under load (1.8 times a prefill worker's own, in `cli_estimate` too) hold
for both. Every chosen engine is priced a second time and the fleet added up without the solver. Seconds:
theirs is `cli_default`, ours is pricing, and all else.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from vs_aiconfigurator_oracle import Oracle, Task
from vs_aiconfigurator_search import Menu, confirmed, repriced

import planc

_FP8 = {"gemm_quant_mode": "fp8", "kvcache_quant_mode": "fp8", "fmha_quant_mode": "fp8"}
#: other formats that a task may use
FP8 = {"fp8, dynamic scales": _FP8, "fp8, static scales": {**_FP8, "gemm_quant_mode": "fp8_static"}}

LLAMA8, LLAMA70 = "meta-llama/Meta-Llama-3.1-8B", "meta-llama/Meta-Llama-3.1-70B"
QWEN32 = "Qwen/Qwen3-32B-FP8"

TASKS = (
    Task(QWEN32, "h200_sxm", 7, tpot_ms=15),
    Task(LLAMA70, "h200_sxm", 16, formats=FP8),
    Task("nvidia/Llama-3.1-70B-Instruct-FP8", "h200_sxm", 16),
    Task(LLAMA70, "h100_sxm", 12, isl=2000, osl=500, tpot_ms=40),
    Task(LLAMA70, "b200_sxm", 5, isl=8000, osl=1000, ttft_ms=3000),
    Task(LLAMA8, "l40s", 7, isl=1500, osl=300, tpot_ms=40),
    Task(LLAMA8, "a100_sxm", 8, isl=3000, osl=250),
    Task(LLAMA8, "h100_sxm", 3, isl=1000, osl=1000, ttft_ms=500, tpot_ms=10, backend="vllm"),
    Task("Qwen/Qwen3-32B", "h100_sxm", 11, isl=4000, osl=500, backend="sglang"),
    Task("Qwen/Qwen3-32B", "b200_sxm", 7, isl=6000, osl=1500, tpot_ms=20),
    Task(QWEN32, "h200_sxm", 24, isl=8000, osl=400, ttft_ms=4000, tpot_ms=25, backend="vllm"),
    Task("Qwen/Qwen3-30B-A3B", "h100_sxm", 5, isl=2000, osl=1000, tpot_ms=15),
    Task("Qwen/Qwen3-235B-A22B-FP8", "h200_sxm", 12, tpot_ms=40),
    Task("openai/gpt-oss-120b", "h100_sxm", 7, tpot_ms=20),
    Task("openai/gpt-oss-120b", "b200_sxm", 3, isl=1000, osl=2000, ttft_ms=1000, tpot_ms=10),
    Task("deepseek-ai/DeepSeek-R1", "h200_sxm", 16, ttft_ms=5000, tpot_ms=50),
    Task("deepseek-ai/DeepSeek-V3", "b200_sxm", 12, isl=2000, osl=1000, tpot_ms=40),
    Task("meta-llama/Meta-Llama-3.1-405B", "h200_sxm", 24, isl=2000, osl=500, ttft_ms=4000, tpot_ms=60),
)


#: rounding of what `cli_default` reports
_SAME = 1e-3


def compare(task: Task, oracle: Oracle) -> dict[str, Any]:
    """One line of the table; tokens/s of the whole inventory."""
    theirs = oracle.ask("default", task)
    way, row, again = "", {}, 0.0
    menu = Menu(task, oracle)
    if theirs.get("ways"):
        way, row = max(theirs["ways"].items(), key=lambda item: item[1]["tokens/s/gpu_cluster"])
        again = repriced(menu, row)
        if abs(again / theirs["tokens_s"] - 1) > _SAME:
            menu = Menu(task, oracle, by_task=True)
    started, asked, priced = time.perf_counter(), oracle.estimates, oracle.seconds
    waited = oracle.waited
    menu.priced()
    fleets = {
        "mixed": menu.fleet(chunks=False, formats=False),
        "chunks": menu.fleet(chunks=True, formats=False),
        "ours": menu.fleet(chunks=True, formats=True),
    }
    rest = time.perf_counter() - started - (oracle.waited - waited)
    found: dict[str, Any] = {
        "task": task.label,
        "asked": task.asked,
        "formats": sorted(task.formats),
        "theirs": 0.0,
        "their_seconds": theirs.get("seconds", 0.0),
        "their_error": theirs.get("error"),
        "our_seconds": {"pricing": oracle.seconds - priced, "rest": rest},
        "estimates": oracle.estimates - asked,
        "priced_by": "Task" if "task" in menu.common else "cli_estimate",
    }
    if row:
        asked_again = repriced(menu, row)
        found |= {
            "theirs": max(theirs["tokens_s"], asked_again),
            "their_reported": theirs["tokens_s"],
            "their_repriced": asked_again,
            "their_cli_estimate": again,
            "their_way": way,
            "their_choice": row.get("(d)parallel", row.get("parallel")),
            "their_gpus": int(row["num_total_gpus"]),
        }
    for name, fleet in fleets.items():
        found[name] = confirmed(menu, fleet) if fleet else 0.0
        found[f"{name}_fleet"] = fleet.label if fleet else "none meets the objectives"
        if fleet and abs(found[name] / fleet.tokens_s - 1) > 1e-4:
            raise SystemExit(f"{task.label}: the fleet's {fleet.tokens_s} is {found[name]} when added up")
    return found


def ratio(found: dict[str, Any], name: str = "ours") -> float:
    return found[name] / found["theirs"] if found["theirs"] else float("inf") if found[name] else 1.0


def line(found: dict[str, Any]) -> str:
    asked = found["asked"]
    gpus = asked["total_gpus"]
    limits = f"{asked['isl']}/{asked['osl']} {asked['ttft']:g}/{asked['tpot']:g}"
    figures = " ".join(f"{found[name] / gpus:8.1f}" for name in ("theirs", "mixed", "chunks", "ours"))
    seconds = found["our_seconds"]
    return (
        f"{found['task'][:38]:38} {gpus:4} {limits:18} {figures}  {100 * (ratio(found) - 1):+7.1f} %"
        f" {found['their_seconds']:7.1f} {seconds['pricing']:7.1f} {seconds['rest']:6.2f}"
        f" {found['estimates']:6}\n    theirs {found.get('their_way', '-')} {found.get('their_choice', '')}"
        f" on {found.get('their_gpus', 0)} GPUs each"
        f"{'' if found['priced_by'] == 'cli_estimate' else '; all priced by its Task'}"
        f"\n    ours   {found['ours_fleet']}"
    )


HEAD = (
    f"{'':38} {'GPUs':>4} {'ISL/OSL TTFT/TPOT':18} {'theirs':>8} {'mixed':>8} {'chunks':>8} {'ours':>8}"
    f"  {'gain':>9} {'their s':>7} {'our s':>7} {'solve':>6} {'asked':>6}"
)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--python", default=os.environ.get("AICONFIGURATOR_PYTHON", sys.executable))
    parser.add_argument("--answers", type=Path)
    parser.add_argument("--only", default="")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args(arguments)
    kept: dict[str, Any] = {}
    if given.answers and given.answers.exists():
        kept = json.loads(given.answers.read_text())
    oracle = Oracle(given.python, kept)
    if given.answers and kept.setdefault("version", oracle.version) != oracle.version:
        raise SystemExit(f"{given.answers} holds answers of aiconfigurator {kept['version']}")
    print(f"aiconfigurator {oracle.version}, planc {planc.__version__}; tokens/s per GPU\n{HEAD}")
    rows = []
    for task in TASKS:
        if given.only.lower() not in task.label.lower():
            continue
        rows.append(compare(task, oracle))
        print(line(rows[-1]), flush=True)
        if given.answers:
            given.answers.parent.mkdir(parents=True, exist_ok=True)
            given.answers.write_text(json.dumps(kept))
    oracle.close()
    worst = min((ratio(row) for row in rows), default=1.0)
    print(f"{len(rows)} tasks; worst {100 * (worst - 1):+.2f} %")
    if given.json:
        document = {
            "date": datetime.now(UTC).date().isoformat(),
            "aiconfigurator": oracle.version,
            "planc": planc.__version__,
            "python": platform.python_version(),
            "cores": os.cpu_count(),
            "tasks": rows,
        }
        given.json.write_text(json.dumps(document, indent=1) + "\n")
    return 0 if worst >= 1 - 1e-9 else 1


if __name__ == "__main__":
    raise SystemExit(main())
