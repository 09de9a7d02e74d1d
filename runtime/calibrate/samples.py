"""Runs the worker and reads its answers: `Sample`s, one per case that could be measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from planc.errors import ToolFailed
from planc.runtime.calibrate.cases import Case, Grid, Kind

WORKER = Path(__file__).with_name("worker.py")
#: progress: (cases done, cases in all, what is being measured)
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, slots=True)
class Sample:
    """seconds  median of one call     spread  half the interquartile range over it     samples  taken"""

    case: Case
    seconds: float
    spread: float
    samples: int


@dataclass(frozen=True, slots=True)
class Run:
    """What a worker answered. `failed`: cases that it could not measure, with the reasons."""

    facts: Mapping[str, Any]
    samples: tuple[Sample, ...]
    failed: tuple[tuple[Case, str], ...]

    def of(self, op: str, **fields: Any) -> list[Sample]:
        """Samples of an op whose cases have these fields."""
        return [
            sample
            for sample in self.samples
            if sample.case["op"] == op and all(sample.case.get(k) == v for k, v in fields.items())
        ]


@dataclass(frozen=True, slots=True)
class Worker:
    """How to measure.

    python   the interpreter: planc's own, or that of an engine's environment
    engine   "torch", or an engine whose kernels are measured
    """

    device: Kind
    python: str = sys.executable
    engine: str = "torch"
    threads: int = 1
    budget_s: float = 600.0

    def run(self, grid: Grid, cases: Sequence[Case], progress: Progress | None = None) -> Run:
        """Measures the cases in order. Raises ToolFailed where the worker does not start or dies."""
        asked = {
            "device": self.device,
            "engine": self.engine,
            "threads": self.threads,
            "budget_s": self.budget_s,
            "cold_mib": grid.cold_mib,
            "slice_s": grid.slice_s,
            "samples": grid.samples,
            "passes": grid.passes,
            "cases": list(cases),
        }
        threads = str(self.threads)
        environment = {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
        environment |= {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
        with tempfile.TemporaryFile("w+") as log:
            try:
                process = subprocess.Popen(
                    [self.python, str(WORKER)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                    env=environment,
                )
            except OSError as error:
                raise self._failure(str(error)) from None
            try:
                found = self._read(process, asked, progress)
            finally:
                process.kill()
                process.wait()
            if found is None:
                log.seek(0)
                lines = log.read().strip().splitlines() or ["it said nothing"]
                raise self._failure(lines[-1])
            return found

    def _read(
        self, process: subprocess.Popen[str], asked: Mapping[str, Any], progress: Progress | None
    ) -> Run | None:
        assert process.stdin is not None
        assert process.stdout is not None
        cases: Sequence[Case] = asked["cases"]
        facts: Mapping[str, Any] | None = None
        found: dict[int, Mapping[str, Any]] = {}
        total = len(cases) * asked["passes"]
        try:
            json.dump(asked, process.stdin)
            process.stdin.close()
        except BrokenPipeError:
            return None
        for line in process.stdout:
            answer = json.loads(line)
            if "facts" in answer:
                facts = answer["facts"]
                continue
            found[answer["case"]] = answer
            if progress:
                progress(answer["pass"] * len(cases) + answer["case"] + 1, total, cases[answer["case"]]["op"])
        if facts is None or len(found) < len(cases):
            return None
        samples = [
            Sample(cases[number], answer["seconds"], answer["spread"], answer["samples"])
            for number, answer in found.items()
            if "error" not in answer
        ]
        failed = [(cases[n], answer["error"]) for n, answer in found.items() if "error" in answer]
        return Run(facts, tuple(samples), tuple(failed))

    def _failure(self, reason: str) -> ToolFailed:
        return ToolFailed(
            tool=f"the micro-benchmarks under {self.python}",
            reason=reason,
            mend="Check that this interpreter has torch"
            + (f" and {self.engine}." if self.engine != "torch" else "."),
        )
