"""Writes docs/accuracy.md and its plots from the results of the accuracy runs.

    python docs/accuracy.py            renders what lies in out/accuracy
    python docs/accuracy.py --run [SECTION ...]   runs the commands of these sections (default: all) first
    python docs/accuracy.py --list     the sections and their commands

The runs read measured data from the folder that PLANC_DATA names; operator tables come with the extra
`planc[measured]`, or from the folder that PLANC_TABLES names. aiconfigurator needs an environment of its own,
named by AICONFIGURATOR_PYTHON. A section whose results are absent says so in the report.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import accuracy_sections as sections
import accuracy_serving
from accuracy_gaps import poor

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "out" / "accuracy"
#: results that are kept with the code, where out/accuracy has no newer one
KEPT = ROOT / "benchmarks" / "results"
POINTS = "$PLANC_DATA/serving/points.csv"
VALIDATE = f"planc validate {POINTS} --by model,gpu,engine,weights,mode --json"

Results = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Section:
    """One part of the report.

    runs     result file -> the command that writes it, as a user types it; FILE stands for its path
    write    from the results that are present (by file name, without suffix) to Markdown lines; it draws
             plots into the folder that it is given
    """

    name: str
    title: str
    runs: Mapping[str, str]
    write: Callable[[Results, Path], list[str]]


SECTIONS = (
    Section(
        "serving",
        "Serving points",
        {
            "blind.json": f"{VALIDATE} --leave-out-cells --out out/accuracy/predictions.csv > FILE",
            "few_shot.json": f"{VALIDATE} --calibrate-on 3 > FILE",
            "no_flags.json": f"{VALIDATE} --leave-out-cells --no-published-flags > FILE",
            "shipped.json": f"{VALIDATE} > FILE",
        },
        accuracy_serving.serving,
    ),
    Section(
        "rival",
        "Beside aiconfigurator",
        {
            "rival.json": f"python benchmarks/vs_aiconfigurator_accuracy.py {POINTS} "
            "--predictions out/accuracy/predictions.csv --answers out/accuracy/answers.json --json FILE"
        },
        sections.rival,
    ),
    Section(
        "offline",
        "Published maximum throughputs of TensorRT-LLM",
        {
            "offline.json": "python benchmarks/trtllm_throughput.py "
            "$PLANC_DATA/serving/trtllm_max_throughput.csv --json FILE"
        },
        sections.offline,
    ),
    Section(
        "operators",
        "Operators",
        {
            "operators.json": "python benchmarks/operators.py ${PLANC_TABLES:+--tables $PLANC_TABLES} "
            "--json FILE"
        },
        sections.operators,
    ),
    Section(
        "replay",
        "Replay of a recorded vLLM run",
        {"replay.json": "python benchmarks/replay_vllm.py --json FILE"},
        sections.replay,
    ),
    Section(
        "cpu",
        "The loop on a CPU",
        {"cpu_loop.json": "python benchmarks/cpu_loop.py --out FILE"},
        sections.cpu_loop,
    ),
    Section(
        "speed",
        "Speed of the simulator",
        {
            "simulator.txt": "python benchmarks/simulator.py "
            "--trace $PLANC_DATA/traces/AzureLLMInferenceTrace_conv.csv > FILE"
        },
        sections.speed,
    ),
)


def load(folder: Path) -> dict[str, Any]:
    """Every result that is present, by its file's stem. CSV files are lists of mappings."""
    found: dict[str, Any] = {}
    for path in sorted(folder.glob("[!.]*")):  # a run in progress writes to hidden ones
        if path.suffix == ".json":
            found[path.stem] = json.loads(path.read_text())
        elif path.suffix == ".txt":
            found[path.stem] = path.read_text()
        elif path.suffix == ".csv":
            found[path.stem] = sections.table(path)
    return found


def run(section: Section, folder: Path) -> None:
    """Runs a section's commands; a result stays as it was where its command fails."""
    folder.mkdir(parents=True, exist_ok=True)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    for name, command in section.runs.items():
        part = folder / f".{name}"
        text = command.replace("FILE", str(part))
        print(f"$ {text}", flush=True)
        done = subprocess.run(["bash", "-c", text], cwd=ROOT, env={**os.environ, "PATH": path}, check=False)
        if done.returncode == 0 and part.exists() and part.stat().st_size:
            part.replace(folder / name)
        else:
            part.unlink(missing_ok=True)
            print(f"! {name}: exit code {done.returncode}", file=sys.stderr)


def report(results: Results, plots: Path, today: str) -> str:
    """The whole page."""
    lines = [
        "# Accuracy",
        "",
        f"Written by `make accuracy` on {today}. Errors are predicted / measured - 1, in percent: median and "
        "mean of their size, and the median with its sign (bias). Measured data are public and were taken by "
        "others, except for the CPU's.",
        "",
    ]
    for section in SECTIONS:
        lines += [f"## {section.title}", ""]
        try:
            lines += section.write(results, plots)
        except KeyError as error:
            lines.append(f"Not run: the result {error} is absent.")
        shown = [command.replace("FILE", f"out/accuracy/{name}") for name, command in section.runs.items()]
        lines += ["", "```sh", *shown, "```", ""]
    lines += ["## What is poor, and why", "", *poor(results, accuracy_serving.points(results))]
    return "\n".join(lines).rstrip() + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--run", nargs="*", metavar="SECTION", choices=[s.name for s in SECTIONS])
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--out", type=Path, default=ROOT / "docs")
    given = parser.parse_args(arguments)
    if given.list:
        for section in SECTIONS:
            print(section.name, *section.runs.values(), sep="\n    ")
        return 0
    if given.run is not None:
        if "PLANC_DATA" not in os.environ:
            parser.error("set PLANC_DATA to the folder of measured data")
        for section in SECTIONS:
            if not given.run or section.name in given.run:
                run(section, given.results)
    plots = given.out / "accuracy"
    plots.mkdir(parents=True, exist_ok=True)
    results = {**load(KEPT), **load(given.results)}
    text = report(results, plots, datetime.now(UTC).date().isoformat())
    (given.out / "accuracy.md").write_text(text)
    print(f"{given.out / 'accuracy.md'}: {len(text.splitlines())} lines")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
