"""Price against latency: the Pareto front, or, for another objective, what the search saw."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from planc.codegen.report.draw import Line, Mark, Plot, Scale, number, placed
from planc.planner.evidence import Evidence, Seen
from planc.planner.front import Axis, Front
from planc.planner.plan import Plan

_PRICES = {"usd_per_hour": "price, USD per hour", "usd_per_million_tokens": "price, USD per million tokens"}
_LATENCIES = {"tpot_ms": "time per output token, ms", "e2e_ms": "end to end, ms"}
_LEAST = 3  # fewer points are no picture


@dataclass(frozen=True, slots=True)
class Table:
    """A front as rows: cells by axis, the plan's file and whether it is the chosen one."""

    columns: tuple[str, ...]
    rows: tuple[tuple[tuple[str, ...], str, bool], ...]


def words(plan: Plan) -> str:
    """A fleet in a few words: "2 x 4 h200_sxm TP4 fp8"."""
    kinds: dict[str, int] = {}
    for pool in plan.pools:
        for r in pool.replicas:
            layout = " ".join(
                f"{n.upper()}{getattr(r, n)}" for n in ("tp", "pp", "dp", "ep", "cp") if getattr(r, n) > 1
            )
            role = "" if pool.role in ("aggregated", "encoder") else f"{pool.role} "
            formats = r.weights if r.kv in ("bf16", r.weights) else f"{r.weights}, KV {r.kv}"
            name = " ".join(part for part in (f"{role}{r.gpu}", layout, formats) if part)
            kinds[name] = kinds.get(name, 0) + 1
    return " + ".join(f"{count} × {name}" for name, count in kinds.items())


def table(front: Front) -> Table:
    """Fleets that read alike are told apart by their batch limits."""
    columns = tuple(f"{axis.title}, {axis.unit}" for axis in front.axes)
    names = [words(plan) for plan in front.plans]
    names = [
        f"{name}, {_limits(plan)}" if names.count(name) > 1 else name
        for name, plan in zip(names, front.plans, strict=True)
    ]
    rows = tuple(
        (tuple(number(v) for v in point.values), name, position == front.chosen)
        for position, (point, name) in enumerate(zip(front.points, names, strict=True))
    )
    return Table(columns, rows)


def _limits(plan: Plan) -> str:
    found = dict.fromkeys(f"{r.max_num_seqs} seqs {r.max_num_batched_tokens} tokens" for r in plan.replicas())
    return " / ".join(found)


def of_front(front: Front) -> list[Plot]:
    """Price against each latency of the front. The line joins plans that no other beats in these two."""
    price = next(i for i, axis in enumerate(front.axes) if axis.title == "Price")
    found = []
    for position, axis in enumerate(front.axes):
        if axis.key.endswith("_ms") and len(front.points) > 1:
            points = [(p.values[position], p.values[price], words(p.plan)) for p in front.points]
            found.append(_plot(points, front.chosen, axis, front.axes[price]))
    return found


def _plot(points: Sequence[tuple[float, float, str]], chosen: int, latency: Axis, price: Axis) -> Plot:
    x = Scale.over([p[0] for p in points], log=True)
    y = Scale.over([p[1] for p in points], log=True)
    marks = [
        Mark(
            x.at(ms),
            y.at(cost),
            f"{name}: {number(ms)} ms, {number(cost)} {price.unit}",
            "vermilion" if i == chosen else "blue",
            "star" if i == chosen else "circle",
            9.0 if i == chosen else 5.5,
            label="this plan" if i == chosen else "",
            strong=i == chosen,
        )
        for i, (ms, cost, name) in enumerate(points)
    ]
    best = lower_left([(ms, cost) for ms, cost, _ in points])
    lines = [Line(tuple((x.at(ms), y.at(cost)) for ms, cost in best), "blue", dashed=True)]
    return Plot(
        about=f"{price.title} against {latency.title} of the plans of the front",
        x_title=f"{latency.title}, ms",
        y_title=f"price, {price.unit}",
        x_ticks=x.ticks(5),
        y_ticks=y.ticks(5),
        lines=lines,
        marks=sorted(marks, key=lambda mark: mark.strong),
        labels=placed(sorted(marks, key=lambda mark: not mark.strong)),
    )


def of_search(plan: Plan, evidence: Evidence) -> Plot | None:
    """Price against latency of the fleets that the search saw, with the plan among them."""
    latency = next((name for name in _LATENCIES if name in plan.predicted), None)
    stated = "workload" in plan.request and plan.request["workload"].get("rate") != "max"
    price = "usd_per_hour" if stated else "usd_per_million_tokens"
    seen = [one for one in evidence.seen if latency in one.values and price in one.values]
    if latency is None or price not in plan.predicted or len(seen) < _LEAST:
        return None
    mine = plan.predicted[latency].value, plan.predicted[price].value
    x = Scale.over([mine[0], *(one.values[latency] for one in seen)], log=True)
    y = Scale.over([mine[1], *(one.values[price] for one in seen)], log=True)
    good = [(one.values[latency], one.values[price]) for one in seen if one.meets]
    best = lower_left([*good, mine])
    marks = [_seen(one, latency, price, x, y, best) for one in seen]
    star = Mark(
        x.at(mine[0]),
        y.at(mine[1]),
        f"this plan: {number(mine[0])} ms, {number(mine[1])} {_PRICES[price].removeprefix('price, ')}",
        "vermilion",
        "star",
        9.0,
        label="this plan",
        strong=True,
    )
    return Plot(
        about="Price against latency of the fleets that the search saw",
        x_title=_LATENCIES[latency],
        y_title=_PRICES[price],
        x_ticks=x.ticks(5),
        y_ticks=y.ticks(5),
        lines=[Line(tuple((x.at(ms), y.at(cost)) for ms, cost in best), "blue", dashed=True)],
        marks=[*sorted(marks, key=lambda mark: mark.colour != "grey"), star],
        labels=placed([star]),
    )


def _seen(
    one: Seen, latency: str, price: str, x: Scale, y: Scale, best: Sequence[tuple[float, float]]
) -> Mark:
    ms, cost = one.values[latency], one.values[price]
    verdict = "" if one.meets else "; misses an objective"
    colour = "grey" if not one.meets else "blue"
    shape = "circle" if one.meets else "diamond"
    return Mark(
        x.at(ms),
        y.at(cost),
        f"{one.label}: {number(ms)} ms, {number(cost)} USD{verdict}",
        colour,
        shape,  # type: ignore[arg-type]
        5.5 if (ms, cost) in best else 4.0,
    )


def lower_left(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Points that no other beats in both coordinates, from left to right."""
    found: list[tuple[float, float]] = []
    for ms, cost in sorted(set(points)):
        if not found or cost < found[-1][1]:
            found.append((ms, cost))
    return found
