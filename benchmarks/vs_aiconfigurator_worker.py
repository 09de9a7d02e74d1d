"""Answers for `vs_aiconfigurator.py`, inside the environment that has aiconfigurator.

Writes one JSON line {"version"}, then reads one question a line from standard input and writes one answer:

    {"do": "estimate", "each": [keyword arguments of cli_estimate, ...]}
        -> [{"ttft_ms", "tpot_ms", "tokens_s", "prefill_s", "decode_s", "queues"} or {"error"}, ...]
           tokens/s of the configuration; requests/s of one prefill and one decode worker where it has them;
           `queues` is its own warning that the batch is larger than its cache
           with "task": times and throughput are those of its `Task.run_single_agg` or `run_single_disagg`,
           which its own search calls per configuration; that the engine fits is still cli_estimate's word
    {"do": "default", "task": keyword arguments of cli_default}
        -> {"seconds", "tokens_s", "ways": {"agg": row, "disagg": row}}
           tokens/s of the whole inventory, and the best row of each way of serving
    {"do": "shapes", "task": ...}
        -> {"agg", "prefill", "decode": [[tp, pp, dp, moe_tp, moe_ep], ...], "same_tp", "experts"}
           the shapes that its own search enumerates; whether both halves must have the same tp; the format of
           experts that it takes on this system ("" for dense models)

Its list of installed databases, which every call reads anew from hundreds of files, is kept; nothing else is
changed. Imports nothing of planc.
"""

from __future__ import annotations

import functools
import json
import logging
import sys
import time
import warnings
from importlib.metadata import version
from typing import Any

import yaml


def estimate(arguments: dict[str, Any]) -> dict[str, Any]:
    from aiconfigurator.cli.api import cli_estimate

    task = arguments.get("task")
    arguments = {name: value for name, value in arguments.items() if name != "task"}
    try:
        found = cli_estimate(**arguments)
        row = found.raw if task is None else single(arguments, task)
    except Exception as error:  # whatever it raises is the answer
        return {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"}
    return {
        "ttft_ms": float(row["ttft"]),
        "tpot_ms": float(row["tpot"]),
        "tokens_s": float(row["tokens/s"]),
        "prefill_s": float(row.get("(p)seq/s/worker", 0.0)),
        "decode_s": float(row.get("(d)seq/s/worker", 0.0)),
        "queues": bool(found.kv_cache_warning),
    }


def single(arguments: dict[str, Any], task: dict[str, Any]) -> dict[str, Any]:
    """One configuration as `cli_default`'s search prices it; TTFT under load, as it then takes it to be."""
    from aiconfigurator.sdk.sweep import _AUTOSCALE_TTFT_CORRECTION_FACTOR

    names = {"tp_size": "tp", "pp_size": "pp", "attention_dp_size": "dp"}
    names |= {"moe_tp_size": "moe_tp", "moe_ep_size": "moe_ep"}
    part = tasks(json.dumps(task))[arguments["mode"]]
    roles = ("",) if arguments["mode"] == "agg" else ("prefill_", "decode_")
    shape = {
        role + short: arguments[role + long]
        for role in roles
        for long, short in names.items()
        if role + long in arguments
    }
    rest = ("batch_size", "ctx_tokens") if arguments["mode"] == "agg" else ("batch_size", "num_workers")
    rest = tuple(role + name for role in roles for name in rest)
    settings = {name: arguments[name] for name in rest}
    if arguments["mode"] == "agg":
        return part.run_single_agg(**shape, **settings)
    row = part.run_single_disagg(**shape, **settings)
    return row | {"ttft": row["ttft"] * _AUTOSCALE_TTFT_CORRECTION_FACTOR}


@functools.cache
def tasks(task: str) -> dict[str, Any]:
    from aiconfigurator.cli.main import build_default_tasks

    return build_default_tasks(**json.loads(task))


def default(task: dict[str, Any]) -> dict[str, Any]:
    from aiconfigurator.cli.api import cli_default

    started = time.perf_counter()
    try:
        found = cli_default(**task)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    seconds = time.perf_counter() - started
    ways = {}
    for name, rows in found.best_configs.items():
        if len(rows):
            row = {k: v for k, v in rows.iloc[0].to_dict().items() if not k.startswith("_")}
            ways[name] = {k: v for k, v in row.items() if isinstance(v, (int, float, str))}
    best = max((row["tokens/s/gpu_cluster"] for row in ways.values()), default=0.0)
    return {"seconds": seconds, "tokens_s": best * task["total_gpus"], "ways": ways}


def shapes(task: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {"agg": [], "prefill": [], "decode": [], "same_tp": False, "experts": ""}
    for name, part in tasks(json.dumps(task)).items():
        for role in ("agg",) if name == "agg" else ("prefill", "decode"):
            plain = {tuple(shape[:5]) for shape in part.iter_parallel(role) if shape[5] == 1}
            found[role] = sorted(plain)
        if name == "agg" and part.is_moe:
            found["experts"] = getattr(part.moe_quant_mode, "name", part.moe_quant_mode)
        if name == "disagg":
            found["same_tp"] = part.prefill_backend_name == "sglang"
    return found


def main() -> None:
    yaml.SafeLoader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    out, sys.stdout = sys.stdout, sys.stderr
    from aiconfigurator_core.sdk import perf_database

    perf_database.get_supported_databases = functools.cache(perf_database.get_supported_databases)
    print(json.dumps({"version": version("aiconfigurator")}), file=out, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        answer: Any
        if asked["do"] == "estimate":
            answer = [estimate(arguments) for arguments in asked["each"]]
        else:
            answer = {"default": default, "shapes": shapes}[asked["do"]](asked["task"])
        print(json.dumps(answer), file=out, flush=True)


if __name__ == "__main__":
    main()
