"""The sections of docs/accuracy.md: each turns the results of its runs into Markdown lines and plots.

A section takes all results by name and the folder for plots; a result that it needs and that is absent
raises KeyError. Numbers in the text come from the results alone.
"""

from __future__ import annotations

import csv
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import accuracy_plots as plot

Results = Mapping[str, Any]
Rows = list[dict[str, str]]

METRICS = {"tpot": "TPOT", "ttft": "TTFT", "throughput": "tokens/s and GPU"}


def table(path: Path) -> Rows:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def grid(head: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """A Markdown table; the first column is text, the others numbers."""
    line = lambda cells: "| " + " | ".join(str(cell) for cell in cells) + " |"  # noqa: E731
    return [line(head), line(["---", *["---:"] * (len(head) - 1)]), *map(line, rows), ""]


def figure(value: float | None, digits: int = 1, sign: bool = False) -> str:
    if value is None or not math.isfinite(value):
        return "-"
    return f"{value:+.{digits}f}" if sign else f"{value:.{digits}f}"


def share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.0f} %"


# -- others ------------------------------------------------------------------------------


def rival(results: Results, plots: Path) -> list[str]:
    found = results["rival"]
    names = {
        "all": "all points, each on those it predicts",
        "both": "points that both predict",
        "both_linted": "of those, that pass lint",
        "both_aggregated": "of those both predict, aggregated",
    }
    cells = [(label, found[key]) for key, label in names.items()] + list(found["cells"].items())

    def line(item: Mapping[str, Any], who: str, metric: str) -> str:
        one = item[who][metric]
        return f"{figure(one['median_ape'])} / {figure(one['mape'])}"

    lines = [
        f"aiconfigurator {found['version']} on the same points with the same repaired labels and harness; "
        f"planc's figures are blind. It answers {found['all']['rival']['tpot']['n']} of {found['points']} "
        f"points, planc {found['all']['planc']['tpot']['n']}. Median / mean errors:",
        "",
    ]
    head = [f"{label} {who}" for label in ("TPOT", "TTFT", "tokens/s") for who in ("planc", "aiconfigurator")]
    lines += grid(
        ["", "n", *head],
        (
            [
                label,
                item["rival"]["tpot"]["n"],
                *(line(item, who, metric) for metric in METRICS for who in ("planc", "rival")),
            ]
            for label, item in cells
        ),
    )
    within = [
        (who, found["both"][key]["tpot"]["within_20"])
        for who, key in (("planc", "planc"), ("aiconfigurator", "rival"))
    ]
    lines += [
        "TPOT within 20 %, on points that both predict: "
        + ", ".join(f"{w} {share(v)}" for w, v in within)
        + "."
    ]
    plot.duel(plots / "rival.svg", found["rows"])
    return [*lines, "", "![TPOT errors of both](accuracy/rival.svg)"]


def offline(results: Results, plots: Path) -> list[str]:
    found = results["offline"]
    total, whole, each = found["total"], found["choice_instance"], found["choice_per_gpu"]
    lines = [
        f"{total['n']} of {total['n'] + len(found['unpredicted'])} rows, nothing fitted to them; three round "
        "numbers were chosen with them in view, Grace's `host_slowdown`, TensorRT-LLM's `hidden_sequence_us` "
        "and the energy of fp4 products. "
        f"Throughput median {figure(total['median_ape'])} %, mean {figure(total['mape'])} %, bias "
        f"{figure(total['bias'], sign=True)} %. Among the parallel shapes that were measured for one model, "
        "GPU and pair of lengths, the one predicted best is the best or within 2 % of it in "
        f"{whole['right']} of {whole['groups']} groups by tokens/s of the instance "
        f"({share(whole['share'])}) and {each['right']} of {each['groups']} by tokens/s and GPU "
        f"({share(each['share'])}).",
        "",
    ]
    lines += grid(
        ["model", "GPU", "n", "median", "mean", "bias"],
        (
            [
                g["model"],
                g["gpu"],
                g["n"],
                figure(g["median_ape"]),
                figure(g["mape"]),
                figure(g["bias"], sign=True),
            ]
            for g in found["groups"]
        ),
    )
    pairs = [(row["gpu"], row["measured"], row["predicted"]) for row in found["rows"]]
    plot.scatter(plots / "offline.svg", pairs, "output tokens/s of an instance")
    return [*lines, "![Throughput, predicted and measured](accuracy/offline.svg)"]


def operators(results: Results, plots: Path) -> list[str]:
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = defaultdict(list)
    for item in results["operators"]:
        groups[item["family"], item["gpu"]].append(item)
    lines = [
        "Median errors on a tenth of the shapes of each table, held out of the fit (each tenth in turn where "
        "an attention table has under 300 rows): the median over a GPU's tables and the worst of them. "
        "Rows that the fits set aside are not scored (`cost_model/fitting`; of experts, deployments whose "
        "kernels were given all tokens on each rank are the most). "
        "Physics alone: with the whole GPU held out; of attention the decode "
        "rows that a benchmark's loop read from the L2 cache are left out, of links an engine's rows that "
        "take 1.75 times as long as NCCL's. What the PCIe bridges of L40S and RTX PRO 6000 hosts let through "
        "is no property of the GPU and not fitted: it stands in the catalogue, read off large messages on "
        "these very hosts.",
        "",
    ]
    rows = []
    for (family, gpu), items in sorted(groups.items()):
        tables = [item for item in items if item["table"] != "all"]
        held = [100 * item["held_out"] for item in tables]
        count = sum(item["rows"] for item in tables)
        rows.append(
            [family, gpu, len(tables), f"{count:,}", _mid(held), _worst(held), figure(physics(items))]
        )
    lines += grid(["family", "GPU", "tables", "rows", "held out", "worst table", "physics alone"], rows)
    by_family: dict[str, list[float]] = defaultdict(list)
    for item in results["operators"]:
        if math.isfinite(item["held_out"]):
            by_family[item["family"]].append(100 * item["held_out"])
    plot.spreads(plots / "operators.svg", {"held-out shapes": dict(by_family)}, "median error of a table, %")
    return [*lines, "![Held-out errors of operator tables](accuracy/operators.svg)"]


def physics(items: Sequence[Mapping[str, Any]]) -> float | None:
    """Error of one family on one GPU by physics, %: over all its rows where that is told, else the median
    over its tables."""
    whole = [item["physics"] for item in items if item["table"] == "all"]
    known = [value for value in whole or [item["physics"] for item in items] if math.isfinite(value)]
    return 100 * median(known) if known else None


def _mid(values: Sequence[float]) -> str:
    known = [value for value in values if math.isfinite(value)]
    return figure(median(known)) if known else "-"


def _worst(values: Sequence[float]) -> str:
    return figure(max((value for value in values if math.isfinite(value)), default=None))


def speed(results: Results, plots: Path) -> list[str]:
    return ["```", results["simulator"].rstrip(), "```"]


def replay(results: Results, plots: Path) -> list[str]:
    found = results["replay"]
    clocks = list(found["errors"])
    stats = list(next(iter(found["errors"].values())))
    lines = [f"{found['run']}. Errors in %:", ""]
    return lines + grid(
        ["", "measured", *(f"{name}" for name in clocks)],
        (
            [
                stat,
                figure(found["measured"][stat]),
                *(figure(100 * found["errors"][c][stat], sign=True) for c in clocks),
            ]
            for stat in stats
        ),
    )


def cpu_loop(results: Results, plots: Path) -> list[str]:
    found = results["cpu_loop"]
    labels = {"tpot_ms": "TPOT, ms", "throughput": "tokens/s", "ttft_ms": "TTFT, ms"}
    work, machine = found["workload"], found["machine"]
    lines = [
        "The machine at hand, calibrated, compiled for, served with vLLM on its CPU and loaded with "
        f"`vllm bench serve` ({work['isl']}/{work['osl']} tokens, {work['requests_per_client']} requests "
        "per client; "
        f"{', '.join(str(value) for value in machine.values() if isinstance(value, str))}):",
        "",
    ]
    rows = [
        [
            row["concurrency"],
            *(
                f"{figure(row['predicted'][key])} / {figure(row['measured'][key])} "
                f"({figure(100 * row['error'][key], sign=True)} %)"
                for key in labels
            ),
        ]
        for row in found["rows"]
    ]
    lines += grid(["clients", *(f"{label}, predicted / measured" for label in labels.values())], rows)
    plot.curves(plots / "cpu.svg", found["rows"], labels)
    return [*lines, "![The CPU loop](accuracy/cpu.svg)"]
