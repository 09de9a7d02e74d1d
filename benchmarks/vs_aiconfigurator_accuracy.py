"""aiconfigurator and planc against the same measured serving points, with the same repaired labels.

    python benchmarks/vs_aiconfigurator_accuracy.py POINTS.csv [--predictions FILE] [--python PATH]
                                                    [--answers FILE] [--json FILE]

--predictions   planc's, as `planc validate POINTS.csv --leave-out-cells --out FILE` writes them; otherwise
            that is run first
--python    of an environment with `aiconfigurator==0.12.0` (default: this one, or AICONFIGURATOR_PYTHON)
--answers   keeps its answers; questions that the file already holds are not asked again
--json      writes the figures, and both predictions of every point

Labels are repaired and the harness is told by planc's rules, for both; aiconfigurator gets the mean of the
drawn lengths and, where a point leaves a kernel open, the attempt that serves it best (see
`aiconfigurator_questions.py`). planc's figures are blind: what was fitted for a point was fitted without its
whole (model, GPU, engine, weights) cell. Errors are predicted / measured - 1: median and mean of their size,
median with sign, and the share within 20 %.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from aiconfigurator_questions import Unaskable, attempts

from planc import api
from planc.runtime.validation.harness import harness
from planc.runtime.validation.points import Point, read_points
from planc.runtime.validation.validate import write_predictions

WORKER = Path(__file__).with_name("aiconfigurator_worker.py")
#: metric -> its column in files of predictions
COLUMNS = {"tpot": "tpot_ms", "ttft": "ttft_ms", "throughput": "throughput"}
METRICS = tuple(COLUMNS)


@dataclass(frozen=True, slots=True)
class Pair:
    """One point: measured, and as each tool predicts it (None where it cannot), per metric."""

    point: Point
    lint: tuple[str, ...]
    measured: Mapping[str, float]
    planc: Mapping[str, float] | None
    rival: Mapping[str, float] | None

    @property
    def cell(self) -> str:
        return " ".join(self.point.cell) + (" disagg" if self.point.mode == "disagg" else "")


def ask(points: Sequence[Point], python: str, known: dict[str, Any], say: Callable[[str], None]) -> str:
    """Fills `known` by point id with the worker's answers; returns the version that answered."""
    command = [python, str(WORKER)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as worker:
        assert worker.stdin is not None
        assert worker.stdout is not None
        first = worker.stdout.readline()
        if not first:
            raise SystemExit(f"{python} cannot import aiconfigurator; name one with --python")
        hello = json.loads(first)
        for number, point in enumerate(points):
            if number % 50 == 0:
                say(f"asking aiconfigurator: {number} of {len(points)}")
            try:
                asked = attempts(point, harness(point), hello["models"])
            except Unaskable as error:
                known[point.id] = {"id": point.id, "error": str(error)}
                continue
            if known.get(point.id, {}).get("asked") == asked:
                continue
            worker.stdin.write(json.dumps({"id": point.id, "attempts": asked}) + "\n")
            worker.stdin.flush()
            known[point.id] = json.loads(worker.stdout.readline()) | {"asked": asked}
        worker.stdin.close()
    return str(hello["version"])


def times(point: Point, ttft_ms: float, tpot_ms: float) -> dict[str, float]:
    """The three metrics; tokens/s and GPU by Little's law, as `planc validate` has them."""
    told = harness(point)
    answer = (told.length_low + told.length_high) / 2 * point.osl
    whole = (ttft_ms + max(answer - 1, 0.0) * tpot_ms) / 1e3
    return {
        "tpot": tpot_ms,
        "ttft": ttft_ms,
        "throughput": point.concurrency * answer / whole / point.gpus if whole > 0 else 0.0,
    }


def paired(
    points: Sequence[Point], predictions: Mapping[str, Mapping[str, str]], answers: Mapping[str, Any]
) -> list[Pair]:
    """Points by id with planc's line of predictions and aiconfigurator's answer."""
    found = []
    for point in points:
        line, said = predictions.get(point.id, {}), answers.get(point.id, {})
        metrics = {metric: line.get(column, "") for metric, column in COLUMNS.items()}
        measured = {metric: line.get(f"{column}_measured", "") for metric, column in COLUMNS.items()}
        found.append(
            Pair(
                point,
                tuple(line.get("lint", "").split()),
                {metric: float(text) for metric, text in measured.items() if text},
                {metric: float(text) for metric, text in metrics.items()} if all(metrics.values()) else None,
                times(point, said["ttft_ms"], said["tpot_ms"]) if "tpot_ms" in said else None,
            )
        )
    return found


def predicted(points: Path, file: Path | None, say: Callable[[str], None]) -> dict[str, dict[str, str]]:
    """planc's blind predictions by point, from a file or made now."""
    with tempfile.TemporaryDirectory() as folder:
        if file is None:
            say("planc validate --leave-out-cells")
            file = Path(folder) / "predictions.csv"
            write_predictions(api.validate(points, leave_out_cells=True), file)
        with file.open(newline="") as lines:
            return {line["id"]: line for line in csv.DictReader(lines)}


def errors(pairs: Sequence[Pair], who: str, metric: str) -> dict[str, float | int | None]:
    """Of one tool over the pairs that it predicts, in percent."""
    found = []
    for pair in pairs:
        said, true = getattr(pair, who), pair.measured.get(metric)
        if said is not None and true is not None:
            found.append(100 * (said[metric] / true - 1))
    if not found:
        return {"n": 0, "median_ape": None, "mape": None, "bias": None, "within_20": None}
    sizes = [abs(error) for error in found]
    return {
        "n": len(found),
        "median_ape": median(sizes),
        "mape": fmean(sizes),
        "bias": median(found),
        "within_20": sum(size <= 20 for size in sizes) / len(sizes),
    }


def compared(pairs: Sequence[Pair]) -> dict[str, Any]:
    return {who: {metric: errors(pairs, who, metric) for metric in METRICS} for who in ("planc", "rival")}


def figures(pairs: Sequence[Pair]) -> dict[str, Any]:
    """Totals on all points, on those that both predict, on those that pass lint; and by cell."""
    both = [pair for pair in pairs if pair.rival is not None and pair.planc is not None]
    cells = sorted({pair.cell for pair in pairs})
    return {
        "all": compared(pairs),
        "both": compared(both),
        "both_linted": compared([pair for pair in both if not pair.lint]),
        "both_aggregated": compared([pair for pair in both if pair.point.mode == "agg"]),
        "cells": {cell: compared([pair for pair in both if pair.cell == cell]) for cell in cells},
        "points_in_cell": {cell: sum(pair.cell == cell for pair in pairs) for cell in cells},
    }


def table(found: Mapping[str, Any]) -> str:
    head = f"{'':44} {'n':>4}  {'TPOT planc':>20} {'aiconfigurator':>20}  {'TTFT planc':>14} {'aiconf.':>14}"
    lines = [head + f"  {'tokens/s planc':>14} {'aiconf.':>14}"]
    names = {
        "all": "all points (each on what it predicts)",
        "both": "points that both predict",
        "both_linted": "  of those, that pass lint",
        "both_aggregated": "  of those, aggregated",
    }
    rows = [(label, found[key]) for key, label in names.items()] + list(found["cells"].items())
    for label, item in rows:
        n = item["rival"]["tpot"]["n"]
        parts = [f"{label[:44]:44} {n:4}"]
        for metric in METRICS:
            for who in ("planc", "rival"):
                parts.append(_cell(item[who][metric], wide=metric == "tpot"))
        lines.append(" ".join(parts))
    return "\n".join([*lines, "cells: median / mean error, and bias for TPOT, in %"])


def _cell(item: Mapping[str, Any], *, wide: bool) -> str:
    if not item["n"]:
        return f"{'-':>20}" if wide else f"{'-':>14}"
    text = f"{item['median_ape']:.1f} / {item['mape']:.1f}"
    return f"{text} / {item['bias']:+.1f}".rjust(20) if wide else text.rjust(14)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("points", type=Path)
    parser.add_argument("--predictions", type=Path)
    parser.add_argument("--python", default=os.environ.get("AICONFIGURATOR_PYTHON", sys.executable))
    parser.add_argument("--answers", type=Path)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args(arguments)
    say = lambda text: print(text, file=sys.stderr)  # noqa: E731

    points, _ = read_points(given.points)
    known: dict[str, Any] = {}
    if given.answers and given.answers.exists():
        known = json.loads(given.answers.read_text())
    version = ask(points, given.python, known, say)
    if given.answers:
        given.answers.write_text(json.dumps(known))
    pairs = paired(points, predicted(given.points, given.predictions, say), known)
    found = figures(pairs)
    refused: dict[str, int] = {}
    for answer in known.values():
        if "error" in answer:
            text = answer["error"].split(":")[0]
            refused[text] = refused.get(text, 0) + 1
    own = sum(pair.planc is not None for pair in pairs)
    print(f"aiconfigurator {version}; {len(points)} points, of which planc predicts {own}")
    print(table(found))
    for text, count in sorted(refused.items()):
        print(f"not predicted by aiconfigurator: {count} with {text}")
    if given.json:
        each = [
            {
                "id": pair.point.id,
                "cell": pair.cell,
                "lint": list(pair.lint),
                "measured": dict(pair.measured),
                "planc": dict(pair.planc) if pair.planc else None,
                "rival": dict(pair.rival) if pair.rival else None,
            }
            for pair in pairs
        ]
        document = {"version": version, "points": len(points), **found, "refused": refused, "rows": each}
        given.json.write_text(json.dumps(document, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
