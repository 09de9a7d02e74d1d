"""Distributions of latencies over requests, with the objectives that bear on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from planc.codegen.report import palette
from planc.codegen.report.draw import Line, Mark, Plot, Scale, Tick, number
from planc.codegen.report.objectives import slos, stat
from planc.planner.evidence import Curve, Evidence
from planc.planner.plan import Plan, Predicted
from planc.planner.slo import Metric, Slo

NAMES: dict[Metric, str] = {
    "ttft": "Time to first token",
    "tpot": "Time per output token",
    "e2e": "End to end",
}
_SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
_NAMED = (0.5, 0.9, 0.99)
_FAR = 4.0  # a limit this many times the highest value is not drawn


@dataclass(frozen=True, slots=True)
class Distribution:
    """told: the named percentiles; limits: the objectives; key: whose the lines are."""

    title: str
    plot: Plot
    told: str
    limits: str
    key: tuple[tuple[str, str], ...]


def distributions(plan: Plan, evidence: Evidence | None) -> list[Distribution]:
    """One plot per latency: all requests, and each traffic class where there are several."""
    metrics: tuple[Metric, ...] = ("ttft", "tpot", "e2e") if "tpot_ms" in plan.predicted else ("e2e",)
    found = []
    for metric in metrics:
        curves = [curve for curve in (evidence.latency if evidence else ()) if curve.metric == metric]
        if not curves:
            curves = _few(metric, "all requests", plan.predicted)
        for name, predicted in sorted(plan.predicted_by_class.items()):
            curves += _few(metric, name, predicted)
        if curves:
            found.append(_distribution(plan, metric, curves))
    return found


def _few(metric: Metric, of: str, predicted: dict[str, Predicted]) -> list[Curve]:
    """The curve through a plan's own percentiles."""
    stated = predicted.get(f"{metric}_ms")
    pairs = sorted((float(name[1:]) / 100, ms) for name, ms in (stated.percentiles if stated else {}).items())
    if len(pairs) < 2:
        return []
    return [Curve(metric=metric, of=of, levels=[q for q, _ in pairs], ms=[ms for _, ms in pairs])]


def _distribution(plan: Plan, metric: Metric, curves: Sequence[Curve]) -> Distribution:
    mine = [slo for slo in slos(plan) if slo.metric == metric]
    played = {name: ms for name, ms in plan.simulated.get(f"{metric}_ms", {}).items() if name != "mean"}
    values = [*(ms for curve in curves for ms in curve.ms), *played.values()]
    inside = [slo for slo in mine if 1e3 * slo.limit < _FAR * max(values)]
    x = Scale.over([0.0, *values, *(1e3 * slo.limit for slo in inside)], zero=True, room=0.05)
    hues = {curve.of: palette.CLASSES[i % len(palette.CLASSES)] for i, curve in enumerate(curves)}
    lines, marks = [], []
    for curve in curves:
        path = tuple((x.at(ms), 100.0 * q) for q, ms in zip(curve.levels, curve.ms, strict=True))
        lines.append(Line(path, hues[curve.of], title=f"{NAMES[metric]}, {curve.of}"))
        for level, ms in zip(curve.levels, curve.ms, strict=True):
            if level in _NAMED:
                title = f"{curve.of}, p{100 * level:g}: {number(ms)} ms"
                marks.append(Mark(x.at(ms), 100 * level, title, hues[curve.of], size=4.5))
    for slo in inside:
        at, title = x.at(1e3 * slo.limit), f"{slo.key}: at most {number(1e3 * slo.limit)} ms"
        lines.append(Line(((at, 0.0), (at, 100.0)), "vermilion", dashed=True, title=title))
    for name, ms in played.items():
        title = f"simulated {name}: {number(ms)} ms"
        marks.append(Mark(x.at(ms), float(name[1:]), title, "ink", "diamond", 4.5))
    first = curves[0]
    told = ", ".join(
        f"p{100 * q:g} {number(ms)} ms" for q, ms in zip(first.levels, first.ms, strict=True) if q in _NAMED
    )
    plot = Plot(
        about=f"Share of requests by {NAMES[metric].lower()}: {told}",
        x_title="ms",
        y_title="requests within",
        x_ticks=x.ticks(4),
        y_ticks=[Tick(100 * share, f"{100 * share:g} %") for share in _SHARES],
        lines=lines,
        marks=marks,
    )
    return Distribution(NAMES[metric], plot, told, ", ".join(map(_limit, mine)), tuple(hues.items()))


def _limit(slo: Slo) -> str:
    of = f"{slo.traffic_class}: " if slo.traffic_class else ""
    return f"{of}{stat(slo)} limit {number(1e3 * slo.limit)} ms"
