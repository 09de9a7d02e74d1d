"""Answers estimates for `vs_aiconfigurator_accuracy.py` inside the environment that has aiconfigurator.

Writes one JSON line that says what is installed, {"version", "models"}, then reads one question a line from
standard input, {"id", "attempts": [keyword arguments of cli_estimate, ...]}, and answers each with
{"id", "ttft_ms", "tpot_ms", "attempt", "queues"} of the first attempt that succeeds, or {"id", "error"} with
what the first one says. `queues` is its own warning that the batch is larger than its cache.
Imports nothing of planc.
"""

from __future__ import annotations

import json
import logging
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import aiconfigurator_core
import yaml


def answer(question: dict[str, Any]) -> dict[str, Any]:
    from aiconfigurator.cli.api import cli_estimate

    errors = []
    for number, arguments in enumerate(question["attempts"]):
        try:
            found = cli_estimate(**arguments)
        except Exception as error:  # whatever it raises is the answer
            errors.append(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
            continue
        return {
            "id": question["id"],
            "ttft_ms": float(found.ttft),
            "tpot_ms": float(found.tpot),
            "attempt": number,
            "queues": bool(found.kv_cache_warning),
        }
    return {"id": question["id"], "error": errors[0] if errors else "no attempt given"}


def models() -> list[str]:
    """The checkpoints whose configurations it ships, as it takes them: "owner/name"."""
    folder = Path(aiconfigurator_core.__file__).parent / "model_configs"
    names = {file.name.removesuffix("_config.json") for file in folder.glob("*_config.json")}
    return sorted(n.replace("--", "/") for n in names if not n.endswith("_hf_quant"))


def main() -> None:
    yaml.SafeLoader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # it reads its YAML anew for every call
    logging.disable(logging.CRITICAL)
    out, sys.stdout = sys.stdout, sys.stderr
    print(json.dumps({"version": version("aiconfigurator"), "models": models()}), file=out, flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), file=out, flush=True)


if __name__ == "__main__":
    main()
