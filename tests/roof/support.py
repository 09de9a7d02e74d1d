"""Requests and results for the command-line tests."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]

REQUEST: dict[str, Any] = {
    "model": str(ROOT / "examples/models/qwen3-0.6b.json"),
    "inventory": {"nodes": [{"gpu": "l4", "gpus_per_node": 2, "count": 1}]},
    "workload": {"isl": 500, "osl": 100, "request_rate": 2},
    "slo": {"ttft_p99_ms": 2000, "tpot_mean_ms": 60},
}


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str

    def json(self) -> Any:
        return json.loads(self.out)


Planc = Callable[..., Result]


def write_request(folder: Path, **changes: Any) -> Path:
    """A request file; `changes` replace top-level keys (None removes one)."""
    body = {key: value for key, value in {**REQUEST, **changes}.items() if value is not None}
    file = folder / "request.yaml"
    file.write_text(yaml.safe_dump(body), encoding="utf-8")
    return file
