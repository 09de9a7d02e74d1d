"""Distributions of latencies over requests, with the objectives that bear on them."""

from __future__ import annotations

from dataclasses import dataclass

from planc.codegen.report.draw import Line, Mark, Plot, Scale, Tick, number
from planc.planner.evidence import Curve, Evidence
from planc.planner.plan import Plan

NAMES = {
    "ttft": "Time to first token",
    "tpot": "Time per output token",
    "itl": "Inter-token latency",
    "e2e": "End to end",
}
_SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True, slots=True)
class Distribution:
    title: str
    plot: Plot
    told: str
    limits: str


def distributions(plan: Plan, evidence: Evidence | None) -> list[Distribution]:
    """One plot per latency: curves at all levels where there is evidence, else the plan's own percentiles."""
    curves = list(evidence.latency) if evidence else []
    known = {curve.metric for curve in curves}
    shown = ("ttft", "tpot", "e2e") if "tpot_ms" in plan.predicted else ("e2e",)
    for metric in shown:
        found = plan.predicted.get(f"{metric}_ms")
        if metric not in known and found is not None and len(found.percentiles) > 1:
            pairs = sorted((float(name[1:]) / 100, ms) for name, ms in found.percentiles.items())
            levels, ms = [q for q, _ in pairs], [v for _, v in pairs]
            curves.append(Curve(metric=metric, of="all requests", levels=levels, ms=ms))  # type: ignore[arg-type]
    return [_distribution(plan, curve) for curve in curves]


def _distribution(plan: Plan, curve: Curve) -> Distribution:
    slos = _objectives(plan, curve.metric)
    inside = [limit for _, _, limit in slos if limit < 4 * max(curve.ms)]
    played = plan.simulated.get(f"{curve.metric}_ms", {}).values()
    x = Scale.over([0.0, *curve.ms, *inside, *played], zero=True, room=0.05)
    path = [(x.at(ms), 100.0 * q) for q, ms in zip(curve.levels, curve.ms, strict=True)]
    lines = [Line(tuple(path), "blue", title=f"{NAMES[curve.metric]}, {curve.of}")]
    for key, _, limit in slos:
        if limit in inside:
            at = x.at(limit)
            lines.append(Line(((at, 0.0), (at, 100.0)), "vermilion", dashed=True, title=f"{key} {limit:g}"))
    marks = []
    for level in (0.5, 0.9, 0.99):
        if level in curve.levels:
            ms = curve.ms[curve.levels.index(level)]
            marks.append(Mark(x.at(ms), 100 * level, f"p{100 * level:g}: {number(ms)} ms", "blue", size=4.5))
    told = ", ".join(mark.title for mark in marks)
    simulated = plan.simulated.get(f"{curve.metric}_ms", {})
    for name, ms in simulated.items():
        if name != "mean":
            title = f"simulated {name}: {number(ms)} ms"
            marks.append(Mark(x.at(ms), float(name[1:]), title, "orange", "diamond", 5.0))
    plot = Plot(
        about=f"Share of requests by {NAMES[curve.metric].lower()}: {told}",
        x_title="ms",
        y_title="requests within",
        x_ticks=x.ticks(4),
        y_ticks=[Tick(100 * share, f"{100 * share:g} %") for share in _SHARES],
        lines=lines,
        marks=marks,
    )
    limits = ", ".join(f"{_words(quantile)} limit {number(limit)} ms" for _, quantile, limit in slos)
    return Distribution(NAMES[curve.metric], plot, told, limits)


def _words(quantile: float | None) -> str:
    return "mean" if quantile is None else f"p{100 * quantile:g}"


def _objectives(plan: Plan, metric: str) -> list[tuple[str, float | None, float]]:
    """(key, quantile or None for the mean, limit in ms) of the request's objectives for a latency."""
    found = []
    for key, limit in sorted((plan.request.get("slo") or {}).items()):
        name, stat, _ = key.split("_")
        if name == metric:
            found.append((key, None if stat == "mean" else float(stat[1:]) / 100, float(limit)))
    return found
