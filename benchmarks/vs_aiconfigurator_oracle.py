"""What is asked of aiconfigurator, and aiconfigurator in its own process."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

WORKER = Path(__file__).with_name("vs_aiconfigurator_worker.py")
NODE = 8

Formats = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Task:
    """What to serve on what. `formats`: what else than the checkpoint's own may be used, by name."""

    model: str
    system: str
    gpus: int
    isl: int = 4000
    osl: int = 1000
    ttft_ms: float = 2000.0
    tpot_ms: float = 30.0
    backend: str = "trtllm"
    formats: Mapping[str, Formats] = field(default_factory=dict)

    @property
    def islands(self) -> tuple[int, ...]:
        """GPUs per node."""
        rest = self.gpus % NODE
        return (NODE,) * (self.gpus // NODE) + ((rest,) if rest else ())

    @property
    def asked(self) -> dict[str, Any]:
        """As `cli_default` takes it."""
        return {
            "model_path": self.model,
            "total_gpus": self.gpus,
            "system": self.system,
            "backend": self.backend,
            "isl": self.isl,
            "osl": self.osl,
            "ttft": self.ttft_ms,
            "tpot": self.tpot_ms,
        }

    @property
    def label(self) -> str:
        name = self.model.split("/")[-1].removeprefix("Meta-")
        return f"{name} {self.system.split('_')[0]} {self.backend}"


class Oracle:
    """aiconfigurator in its own process. Answers are kept with the seconds they took, so that a second run
    reports the times of the first.

    estimates, seconds   asked so far, and what they took when they were answered
    waited               seconds spent on answers in this run
    """

    def __init__(self, python: str, kept: dict[str, Any]) -> None:
        self.kept = kept
        self.worker = subprocess.Popen(
            [python, str(WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert self.worker.stdout is not None
        first = self.worker.stdout.readline()
        if not first:
            raise SystemExit(f"{python} cannot import aiconfigurator; name one with --python")
        self.version: str = json.loads(first)["version"]
        self.estimates, self.seconds, self.waited = 0, 0.0, 0.0

    def close(self) -> None:
        assert self.worker.stdin is not None
        self.worker.stdin.close()
        self.worker.wait()

    def _say(self, question: Mapping[str, Any]) -> tuple[Any, float]:
        assert self.worker.stdin is not None
        assert self.worker.stdout is not None
        started = time.perf_counter()
        self.worker.stdin.write(json.dumps(question) + "\n")
        self.worker.stdin.flush()
        answer = json.loads(self.worker.stdout.readline())
        seconds = time.perf_counter() - started
        self.waited += seconds
        return answer, seconds

    def ask(self, do: Literal["default", "shapes"], task: Task) -> dict[str, Any]:
        key = json.dumps([do, task.asked], sort_keys=True)
        if key not in self.kept:
            self.kept[key] = self._say({"do": do, "task": task.asked})[0]
        found: dict[str, Any] = self.kept[key]
        return found

    def estimate(self, each: Sequence[dict[str, Any]], *, anew: bool = False) -> list[dict[str, Any]]:
        """`cli_estimate` of each set of arguments. anew: even where the answer is kept."""
        keys = [json.dumps(arguments, sort_keys=True) for arguments in each]
        new = {k: a for k, a in zip(keys, each, strict=True) if anew or k not in self.kept}
        if new:
            answers, seconds = self._say({"do": "estimate", "each": list(new.values())})
            share = seconds / len(new)
            self.kept |= {k: answer | {"s": share} for k, answer in zip(new, answers, strict=True)}
        self.estimates += len(keys)
        self.seconds += sum(self.kept[key]["s"] for key in keys)
        return [self.kept[key] for key in keys]
