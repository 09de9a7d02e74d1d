"""A Pareto front: plans that no other beats along all of its axes, and the file that a bundle keeps of it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from planc.errors import InvalidBundle
from planc.planner.plan import Plan, Predicted, load_plan

#: how the balanced plan is picked. It does not depend on how far the front was followed at its ends.
RULE = "least price times latency (geometric mean): a percent of one is worth a percent of the other"

_TITLES: dict[str, tuple[str, str]] = {
    "usd_per_hour": ("Price", "USD/h"),
    "usd_per_million_tokens": ("Price", "USD per million tokens"),
    "joules_per_token": ("Energy", "J per token"),
    "output_tok_s": ("Throughput", "tokens/s"),
}


@dataclass(frozen=True, slots=True)
class Axis:
    """One thing that a front trades. `key` is a metric of a plan, or an objective like "ttft_p99_ms"."""

    key: str
    title: str
    unit: str
    more_is_better: bool = False

    @staticmethod
    def of(key: str) -> Axis:
        if key in _TITLES:
            return Axis(key, *_TITLES[key], more_is_better=key == "output_tok_s")
        metric, stat, unit = key.split("_")
        return Axis(key, f"{metric.upper()} {stat}", unit)

    def value(self, predicted: Mapping[str, Predicted]) -> float:
        if self.key in predicted:
            return predicted[self.key].value
        metric, stat, unit = self.key.split("_")
        found = predicted[f"{metric}_{unit}"]
        return found.value if stat == "mean" else found.percentiles[stat]

    def loss(self, value: float) -> float:
        """Smaller is better, and what prints alike is alike: four significant digits."""
        rounded = float(f"{value:.4g}")
        return -rounded if self.more_is_better else rounded


@dataclass(frozen=True, slots=True)
class Point:
    """A plan of the front; `values` in the order of the axes."""

    plan: Plan
    values: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Front:
    """Undominated plans, cheapest first.

    chosen     which of them is the balanced one (`RULE`)
    problems   how many optimisation problems were solved
    complete   False when the time limit came first: there may be more plans
    """

    request: str
    axes: tuple[Axis, ...]
    points: tuple[Point, ...]
    chosen: int
    problems: int
    complete: bool

    @property
    def plans(self) -> tuple[Plan, ...]:
        return tuple(point.plan for point in self.points)

    @property
    def balanced(self) -> Plan:
        """The chosen plan, which knows the front that it is from."""
        plan = self.points[self.chosen].plan.model_copy()
        plan._front = self
        return plan


class Valued(Protocol):
    """Something with a value for each axis."""

    @property
    def values(self) -> tuple[float, ...]: ...


T = TypeVar("T", bound=Valued)


def undominated(points: Sequence[T], along: Sequence[Axis]) -> list[T]:
    """Points that no other is at least as good as in every axis; of equal ones the first. Ordered by the
    axes' values, first axis first."""
    losses = [tuple(a.loss(v) for a, v in zip(along, p.values, strict=True)) for p in points]
    kept = []
    for i, mine in enumerate(losses):
        beaten = any(
            all(x <= y for x, y in zip(other, mine, strict=True)) and (other != mine or j < i)
            for j, other in enumerate(losses)
            if j != i
        )
        if not beaten:
            kept.append(i)
    return [points[i] for i in sorted(kept, key=lambda i: losses[i])]


def balanced(points: Sequence[Valued], along: Sequence[Axis]) -> int:
    """The number of the point that `RULE` picks; the first of equals."""
    price = next(i for i, axis in enumerate(along) if axis.title == "Price")
    latencies = [i for i, axis in enumerate(along) if axis.key.endswith("_ms")]

    def product(point: Valued) -> float:
        logs = [math.log(max(value, 1e-300)) for value in point.values]
        return logs[price] + sum(logs[i] for i in latencies) / len(latencies)

    return min(range(len(points)), key=lambda i: (round(product(points[i]), 9), i))


def document(found: Front) -> dict[str, Any]:
    """`front.json` of a bundle: the points with the files that hold their plans."""
    return {
        "schema_version": 1,
        "request": found.request,
        "axes": [
            {"key": a.key, "title": a.title, "unit": a.unit, "more_is_better": a.more_is_better}
            for a in found.axes
        ],
        "chosen": found.chosen,
        "rule": RULE,
        "problems": found.problems,
        "complete": found.complete,
        "points": [
            {
                "plan": file(found, number),
                "fingerprint": point.plan.fingerprint.plan,
                "values": {axis.key: value for axis, value in zip(found.axes, point.values, strict=True)},
            }
            for number, point in enumerate(found.points)
        ],
    }


def file(found: Front, number: int) -> str:
    """Where a point's plan lies in the bundle."""
    return "plan.json" if number == found.chosen else f"front/{number:03d}.plan.json"


def read(bundle: Path, plan: Plan) -> Front | None:
    """The front that a bundle's plan was chosen from; None where there is none. Raises InvalidBundle."""
    place = bundle / "front.json"
    if not place.is_file():
        return None
    try:
        raw = json.loads(place.read_text(encoding="utf-8"))
        along = tuple(Axis(**axis) for axis in raw["axes"])
        points = []
        for number, entry in enumerate(raw["points"]):
            mine = plan if number == raw["chosen"] else load_plan(bundle / entry["plan"])
            mine._model = plan._model
            points.append(Point(mine, tuple(float(entry["values"][axis.key]) for axis in along)))
        return Front(raw["request"], along, tuple(points), raw["chosen"], raw["problems"], raw["complete"])
    except (ValueError, KeyError, TypeError) as error:
        raise InvalidBundle(
            path=bundle, reason=f"front.json: {error}", mend="Compile the request again."
        ) from None
