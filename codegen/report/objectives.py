"""The request's objectives beside what the plan predicts for them."""

from __future__ import annotations

from dataclasses import dataclass

from planc.errors import PlancError
from planc.planner.plan import Plan
from planc.planner.request import make_request
from planc.planner.slo import Slo
from planc.planner.slo import objectives as parsed


@dataclass(frozen=True, slots=True)
class Objective:
    """An objective and the plan's value, ms; percentages of an axis from 0 to somewhat above the larger."""

    name: str
    value: float
    limit: float
    fill: float
    mark: float

    @property
    def met(self) -> bool:
        return self.value <= self.limit * (1 + 1e-6)


def slos(plan: Plan) -> tuple[Slo, ...]:
    """The objectives of the plan's request; of one that cannot be read (plans made by hand) its `slo`."""
    try:
        return make_request(plan.request).slos()
    except PlancError:
        return parsed(plan.request.get("slo") or {})


def stat(slo: Slo) -> str:
    """ "mean", "p99" ..."""
    return "mean" if slo.quantile is None else f"p{100 * slo.quantile:.10g}"


def objectives(plan: Plan) -> list[Objective]:
    """Every objective that the plan has a value for."""
    found = []
    for slo in slos(plan):
        predicted = plan.predicted_by_class.get(slo.traffic_class, plan.predicted).get(f"{slo.metric}_ms")
        if predicted is None:
            continue
        value = predicted.value if slo.quantile is None else predicted.percentiles.get(stat(slo))
        if value is not None:
            limit = 1e3 * slo.limit
            whole = 1.15 * max(value, limit)
            of = f"{slo.traffic_class}: " if slo.traffic_class else ""
            name = f"{of}{slo.metric.upper()} {stat(slo)}"
            fill, mark = round(100 * value / whole, 2), round(100 * limit / whole, 2)
            found.append(Objective(name, value, limit, fill, mark))
    return found
