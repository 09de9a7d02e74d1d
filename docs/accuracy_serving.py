"""Serving points: errors of predictions, what the start of load tests adds, and plots of both."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

import accuracy_plots as plot
from accuracy_sections import METRICS, Results, Rows, figure, grid, share


def serving(results: Results, plots: Path) -> list[str]:
    blind, rows = results["blind"], predicted(results["blind"], results["predictions"])
    asked = blind["n"] + blind["n_unpredicted"]
    lines = [
        f"{blind['n']} of {asked} measured points are predicted ({100 * blind['n'] / asked:.1f} %), "
        f"aggregated and disaggregated; {blind['lint']['n_flagged']} break a lint rule "
        f"({100 * blind['lint']['share_passed']:.1f} % pass). Blind: everything that was fitted to serving "
        "points was fitted without the cell (model, GPU, engine, weights) that is scored.",
        "",
    ]
    kinds = [
        ("blind, all rows", blind),
        ("blind, rows that pass lint", blind["linted"]),
    ]
    if "few_shot" in results:
        kinds += [
            ("+ three points of the cell, all rows", results["few_shot"]),
            ("+ three points of the cell, lint passed", results["few_shot"]["linted"]),
        ]
    if "no_flags" in results:
        kinds.append(("blind, engine flags unknown, all rows", results["no_flags"]))
    if "shipped" in results:
        kinds.append(("shipped constants (not blind), all rows", results["shipped"]))
    lines += grid(
        ["", "n", *(f"{label} median / mean / bias" for label in METRICS.values()), "in band"],
        (
            [label, item["n"], *map(_errors, [item] * 3, METRICS), share(item["within_band"])]
            for label, item in kinds
        ),
    )
    lines += grid(
        ["choosing a shape, blind", "families", "Spearman", "picks meet TPOT <= 30 ms", "mean regret"],
        (
            [
                label,
                item["n_families"],
                figure(item["spearman"], 3),
                share(item["pick_meets_slo"]),
                figure(_percent(item["pick_regret"]), 1) + " %",
            ]
            for label, item in (("all rows", blind), ("rows that pass lint", blind["linted"]))
        ),
    )
    lines += ["By cell, blind, all rows:", ""]
    lines += grid(
        ["cell", "n", *(f"{label} median / mean / bias" for label in METRICS.values())],
        ([_name(group), group["n"], *map(_errors, [group] * 3, METRICS)] for group in blind["groups"]),
    )
    lines += _starts(rows)
    rules = ", ".join(f"{name} {count}" for name, count in blind["lint"]["rules"].items()) or "none"
    lines += [f"Lint rules and the rows that they flag: {rules}.", ""]
    if blind["unpredicted"]:
        reasons: dict[str, int] = defaultdict(int)
        for item in blind["unpredicted"]:
            reasons[item["reason"]] += 1
        lines += ["Not predicted:", ""]
        lines += [f"* {count}: {reason}" for reason, count in sorted(reasons.items())] + [""]
    for metric, unit in (("tpot", "ms"), ("ttft", "ms")):
        label = METRICS[metric]
        pairs = [(row["cell"], row[metric].measured, row[metric].value) for row in rows if metric in row]
        plot.scatter(plots / f"{metric}.svg", pairs, f"{label}, {unit}")
        lines.append(f"![{label}, predicted and measured](accuracy/{metric}.svg)")
    groups = {
        name: {key: [row["tpot"].error for row in rows if row[name] == key and "tpot" in row] for key in keys}
        for name, keys in ((n, sorted({row[n] for row in rows})) for n in ("gpu", "engine", "model"))
    }
    plot.spreads(plots / "groups.svg", groups, "TPOT error, %")
    lines.append("![TPOT error by GPU, engine and model](accuracy/groups.svg)")
    coverage = {
        label: [row[metric].inside for row in rows if metric in row] for metric, label in METRICS.items()
    }
    plot.coverage(plots / "bands.svg", {label: fmean(held) for label, held in coverage.items() if held})
    lines.append("![Share of measured values inside the bands](accuracy/bands.svg)")
    return lines


def _starts(rows: Rows) -> list[str]:
    """What the start of a load test adds to TTFT: medians over the points of a cell."""
    cells: dict[str, list[Any]] = defaultdict(list)
    for row in rows:
        if "ttft" in row:
            cells[row["cell"]].append((row["ttft"].measured, row["ttft"].value, row["ttft_steady"]))
    lines = [
        "All clients of most load tests send their first request at once, and the reported TTFT is the mean "
        "over these and the later ones. Predicted with that start and without it, blind, medians in ms:",
        "",
    ]
    return lines + grid(
        ["cell", "TTFT measured", "predicted", "of that without the start", "added by the start"],
        (
            [cell, *(f"{median(v):.0f}" for v in zip(*found, strict=True)), _added(found)]
            for cell, found in sorted(cells.items())
        ),
    )


def _added(found: Sequence[tuple[float, float, float]]) -> str:
    return f"{median(100 * (1 - steady / whole) for _, whole, steady in found):.0f} %"


class Value:
    """One metric of a point: predicted with its band, and measured."""

    def __init__(self, value: float, low: float, high: float, measured: float) -> None:
        self.value, self.measured = value, measured
        self.error = 100 * (value / measured - 1)
        self.inside = low <= measured <= high


def predicted(report: Mapping[str, Any], rows: Rows) -> list[dict[str, Any]]:
    """Points with a prediction: labels, and a Value per metric that was measured."""
    found = []
    for row in rows:
        if row.get("unpredicted"):
            continue
        item: dict[str, Any] = {name: row[name] for name in ("id", "model", "gpu", "engine", "weights")}
        item["cell"] = " ".join(row[name] for name in report["by"] if name != "mode" or row[name] != "agg")
        item |= {name: int(row[name]) for name in ("concurrency", "isl", "gpus")}
        item |= {"flagged": bool(row["lint"]), "ttft_steady": float(row["ttft_steady_ms"])}
        for metric, column in (("tpot", "tpot_ms"), ("ttft", "ttft_ms"), ("throughput", "throughput")):
            if row[f"{column}_measured"]:
                numbers = (row[f"{column}{end}"] for end in ("", "_low", "_high", "_measured"))
                item[metric] = Value(*map(float, numbers))
        found.append(item)
    return found


def _errors(item: Mapping[str, Any], metric: str) -> str:
    parts = (
        figure(item[f"{metric}_median_ape"]),
        figure(item[f"{metric}_mape"]),
        figure(item[f"{metric}_bias"], sign=True),
    )
    return " / ".join(parts)


def _name(group: Mapping[str, Any]) -> str:
    names = [group[name] for name in ("model", "gpu", "engine", "weights")]
    return " ".join([*names, *(["disagg"] if group.get("mode") == "disagg" else [])])


def _percent(value: float | None) -> float | None:
    return None if value is None else 100 * value


def points(results: Results) -> list[dict[str, Any]]:
    """The blind predictions, where they are present."""
    if "blind" not in results or "predictions" not in results:
        return []
    return predicted(results["blind"], results["predictions"])
