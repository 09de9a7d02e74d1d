"""The last section of docs/accuracy.md: where the results are poor, and what in them points at the cause.

What is listed is found by rule; the sentences about causes are those that the same results support (how an
error moves with concurrency, lengths, tensor parallelism, or with flags unknown).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean, median
from typing import Any

from accuracy_sections import physics

Results = Mapping[str, Any]
#: medians beyond which a group is named, %
TPOT, TTFT, OFFLINE, HELD_OUT, PHYSICS = 7.0, 28.0, 15.0, 5.0, 20.0
#: difference of two signed medians that counts as a trend, %
TREND = 8.0
BAND = (0.7, 0.9)
#: tokens of the longest prompts of offline runs
_LONG = 20_000


def poor(results: Results, points: Sequence[Mapping[str, Any]]) -> list[str]:
    """Bullet points; `points` are the blind predictions, as `accuracy_sections` reads them."""
    lines = [*_cells(points), *_flags(results), *_bands(results), *_offline(results), *_operators(results)]
    lines += [*_lint(results), *_rival(results)]
    return lines or ["No result is present."]


def _cells(points: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = []
    cells: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for point in points:
        cells[point["cell"]].append(point)
    for metric, limit, label in (("tpot", TPOT, "TPOT"), ("ttft", TTFT, "TTFT")):
        for cell, mine in sorted(cells.items()):
            known = [point for point in mine if metric in point]
            if not known or median(abs(point[metric].error) for point in known) <= limit:
                continue
            size = median(abs(point[metric].error) for point in known)
            bias = median(point[metric].error for point in known)
            lines.append(
                f"* {label} of **{cell}**: median {size:.1f} % over {len(known)} points, bias {bias:+.1f} %"
                f"{_trends(known, metric, bias)}."
            )
    return lines


def _trends(points: Sequence[Mapping[str, Any]], metric: str, bias: float) -> str:
    """What the signed error moves with."""
    found = []
    splits: tuple[tuple[str, str, Callable[[Mapping[str, Any]], float]], ...] = (
        ("below the middle concurrency", "above it", lambda p: p["concurrency"]),
        ("with short prompts", "with long ones", lambda p: p["isl"]),
        ("on few GPUs", "on many", lambda p: p["gpus"]),
    )
    for low, high, of in splits:
        middle = median(of(point) for point in points)
        few = [p[metric].error for p in points if of(p) < middle]
        many = [p[metric].error for p in points if of(p) > middle] or [
            p[metric].error for p in points if of(p) >= middle
        ]
        if len(few) > 2 and len(many) > 2 and abs(median(few) - median(many)) > TREND:
            found.append(f"{median(few):+.0f} % {low} and {median(many):+.0f} % {high}")
    flagged = [point[metric].error for point in points if point["flagged"]]
    if len(flagged) > 0.3 * len(points):
        found.append(f"lint flags {len(flagged)} of its points")
    if not found:
        same = sum((point[metric].error > 0) == (bias > 0) for point in points) / len(points)
        found = [
            f"the same sign in {100 * same:.0f} % of its points whatever the load, as where a kernel served "
            "differs from the one in the tables"
            if same > 0.8
            else "without a trend"
        ]
    return ": " + ", ".join(found)


def _flags(results: Results) -> list[str]:
    if "no_flags" not in results or "blind" not in results:
        return []
    known, unknown = results["blind"]["ttft_median_ape"], results["no_flags"]["ttft_median_ape"]
    return [
        f"* TTFT needs the engine's flags: median {unknown:.1f} % where stream and receive intervals, "
        f"budgets and cache formats are not taken from published launch scripts, {known:.1f} % where they "
        "are."
    ]


def _bands(results: Results) -> list[str]:
    lines = []
    for group in results.get("blind", {}).get("groups", []):
        held = group["within_band"]
        if held is not None and group["n"] >= 10 and not BAND[0] <= held <= BAND[1]:
            name = " ".join(str(group[key]) for key in results["blind"]["by"])
            word = "narrow" if held < BAND[0] else "wide"
            lines.append(
                f"* Bands too {word} for {name}: {100 * held:.0f} % of measured values inside, meant 80 %."
            )
    return lines


def _offline(results: Results) -> list[str]:
    if "offline" not in results:
        return []
    rows = results["offline"]["rows"]
    lines = []
    for group in results["offline"]["groups"]:
        if group["median_ape"] > OFFLINE:
            word = "over" if group["bias"] > 0 else "under"
            seats = [r["batch"] for r in rows if (r["model"], r["gpu"]) == (group["model"], group["gpu"])]
            lines.append(
                f"* Offline throughput of {group['model']} on {group['gpu']}: median "
                f"{group['median_ape']:.1f} %, {word}-predicted by {abs(group['bias']):.0f} % (a scheduler "
                f"seats {min(seats)} to {max(seats)})."
            )
    off = [100 * (r["predicted"] / r["measured"] - 1) for r in rows]
    bins = (("under 100", 0, 100), ("100 to 1000", 100, 1000), ("1000 and more", 1000, math.inf))
    moved = []
    for name, low, high in bins:
        errors = [error for r, error in zip(rows, off, strict=True) if low <= r["batch"] < high]
        if errors:
            moved.append(f"{median(errors):+.0f} % with {name} seats ({len(errors)} rows)")
    lines.append(
        f"* Offline errors by batch: {', '.join(moved)}. Few seats mean that the room in the cache decides, "
        "many that what the host takes per sequence beside kernels may."
    )
    ranks = [(r["isl"], error) for r, error in zip(rows, off, strict=True) if " dp1 " not in r["shape"]]
    long = [error for isl, error in ranks if isl >= _LONG]
    if long:
        mean = fmean(abs(error) for _, error in ranks)
        lines.append(
            f"* Offline runs over attention ranks: {mean:.1f} % in the mean of {len(ranks)} rows, "
            f"{median(long):+.0f} % in the median with prompts of {_LONG:,} tokens: ranks are simulated as "
            "if they always began prompts together."
        )
    return lines


def _operators(results: Results) -> list[str]:
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = defaultdict(list)
    for item in results.get("operators", []):
        groups[item["family"], item["gpu"]].append(item)
    lines, weak = [], []
    for (family, gpu), items in sorted(groups.items()):
        ranked = sorted(items, key=lambda item: -item["held_out"])
        bad = [f"{i['table']} {100 * i['held_out']:.1f} %" for i in ranked if 100 * i["held_out"] > HELD_OUT]
        if bad:
            more = f" and {len(bad) - 4} more" if len(bad) > 4 else ""
            lines.append(f"* Held-out {family} shapes on {gpu}: {', '.join(bad[:4])}{more}.")
        alone = physics(items)
        if alone is not None and alone > PHYSICS:
            weak.append(f"{family} on {gpu} {alone:.0f} %")
    if weak:
        lines.append(f"* Physics alone, as for GPUs without measurements: {', '.join(weak)}.")
    return lines


def _lint(results: Results) -> list[str]:
    if "blind" not in results:
        return []
    every, clean = results["blind"], results["blind"]["linted"]
    return [
        f"* Means suffer from few rows: TPOT {every['tpot_mape']:.1f} % on all rows, "
        f"{clean['tpot_mape']:.1f} % on the {clean['n']} that pass lint; TTFT {every['ttft_mape']:.1f} % and "
        f"{clean['ttft_mape']:.1f} %."
    ]


def _rival(results: Results) -> list[str]:
    worse = []
    for cell, item in results.get("rival", {}).get("cells", {}).items():
        own, other = item["planc"]["tpot"]["median_ape"], item["rival"]["tpot"]["median_ape"]
        if own is not None and other is not None and own > other + 1:
            worse.append(f"{cell} ({own:.1f} against {other:.1f} %)")
    return (
        [f"* aiconfigurator's TPOT is better by more than a point on: {', '.join(worse)}."] if worse else []
    )
