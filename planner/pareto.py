"""`objective: pareto`: plans that no other beats in price, latency and energy at once.

Epsilon-constraint method (Haimes, Lasdon, Wismer 1971): one objective is solved to proof while a latency's
limit is lowered step by step, until nothing meets it. Ladders of single limits come first, then the ends
(least latency, least energy) for fleets as small, as large and as middling as those met so far, then limits
in pairs. Every plan is the optimum of a problem that its own `request` states; those that another beats are
left out, and what is left is played by the referee and checked as any plan is.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from planc.cost_model.table import CostTable
from planc.errors import CheckFailed
from planc.planner.check import check
from planc.planner.compile import assembled, never_accepted
from planc.planner.front import Axis, Front, Point, balanced, undominated
from planc.planner.observe import observe
from planc.planner.offers import Fleet
from planc.planner.predict import predicted
from planc.planner.referee import Judgement, Referee, accepted
from planc.planner.request import Objective, Request
from planc.planner.search import Progress, Search
from planc.planner.slo import Metric

_STEPS = 6  # rungs of a ladder
_PAIRED = 2  # rungs of a second limit under one of the first
_LEAST_STEP = 0.03  # a rung lowers its limit by this share at least
_DEAREST = 8.0  # times the least price: beyond, ladders end
_MOST = 24  # problems solved for one front


def front(
    request: Request,
    table: CostTable,
    *,
    time_limit: float | None = None,
    progress: Progress | None = None,
    referee: Referee | None = None,
) -> Front:
    """The front of a request; its `objective` is not looked at.

    time_limit   seconds for all of it: what was found until then is filtered and returned
    referee      as in `compile.plan`

    Raises Infeasible when no plan meets the request, InvalidField as `compile.plan` does.
    """
    sweep = _Sweep(request, table, time_limit, progress)
    sweep.run()
    found = undominated(sweep.met, sweep.axes)
    if referee is not None and table.model.kind == "causal_lm":
        found = undominated(sweep.played(found, referee), sweep.axes)
    plans = [assembled(met.search, met.fleet, 0.0, met.judgement) for met in found]
    wrong = [check(plan, table, request) for plan in plans]
    kept = [i for i, reasons in enumerate(wrong) if not reasons]
    if not kept:
        raise CheckFailed(what="the front", reason=wrong[0][0], mend="Please report the request.")
    points = tuple(Point(plans[i], found[i].values) for i in kept)
    chosen = balanced(points, sweep.axes)
    best, met = points[chosen].plan, found[kept[chosen]]
    best._evidence = observe(met.search, met.fleet, best)
    return Front(
        request=request.fingerprint(),
        axes=sweep.axes,
        points=points,
        chosen=chosen,
        problems=len(sweep.asked),
        complete=not sweep.late,
    )


def axes(request: Request, kind: str, demand: float | None) -> tuple[Axis, ...]:
    """Price first. A latency is taken as the request's own objectives state it, else as a mean."""
    metrics: tuple[Metric, ...] = ("tpot", "ttft") if kind == "causal_lm" else ("e2e",)
    latency = []
    for metric in metrics:
        stated = [slo.key for slo in request.slos() if slo.metric == metric and not slo.traffic_class]
        latency.append(stated[0] if stated else f"{metric}_mean_ms")
    if demand is None:
        names = ["usd_per_million_tokens", *latency, "joules_per_token", "output_tok_s"]
    else:
        names = ["usd_per_hour", *latency, "joules_per_token"]
    return tuple(Axis.of(name) for name in names)


@dataclass(frozen=True, slots=True, eq=False)
class _Met:
    """The answer to one problem; `values` in the order of the axes."""

    search: Search
    fleet: Fleet
    values: tuple[float, ...]
    judgement: Judgement | None = None


@dataclass
class _Sweep:
    """The problems of one front, solved one after another on one set of step times."""

    request: Request
    table: CostTable
    time_limit: float | None
    progress: Progress | None
    met: list[_Met] = field(default_factory=list)
    asked: dict[str, _Met | None] = field(default_factory=dict)
    late: bool = False

    def __post_init__(self) -> None:
        self.start = time.perf_counter()
        self.say = self.progress or (lambda message: None)
        self.request = self.request.changed(objective="min_cost")
        self.search = Search(self.request, self.table, progress=self.progress)
        self.axes = axes(self.request, self.table.model.kind, self.search.demand)
        self.latencies = [axis.key for axis in self.axes if axis.key.endswith("_ms")]

    def run(self) -> None:
        demand = self.search.demand
        # the best of one objective per latency limit; without a stated load also the most throughput
        objectives: list[Objective] = ["min_cost"] if demand is not None else ["min_cost", "max_goodput"]
        first = self.solve(self.request)
        if first is None:
            from planc.planner.relax import infeasible

            raise infeasible(self.search, self.time_limit)
        rungs = []
        for objective in objectives:
            for key in self.latencies:
                rungs += list(self.ladder(self.request.changed(objective=objective), key, _STEPS))
        if demand is not None:
            sizes = sorted({met.fleet.gpus for met in self.met})
            for objective in ("min_latency", "min_energy"):
                for size in sorted({sizes[0], sizes[len(sizes) // 2], sizes[-1]}):
                    limits = self.request.constraints.model_copy(update={"max_gpus": size})
                    self.solve(self.request.changed(objective=objective, constraints=limits))
        for asked in rungs[1:-1:2]:
            for key in self.latencies:
                if asked.slo.get(key) == self.request.slo.get(key):  # the other latency than the ladder's
                    list(self.ladder(asked, key, _PAIRED))

    def played(self, found: Sequence[_Met], referee: Referee) -> list[_Met]:
        """Those whose objectives hold when the workload is simulated, changed where that takes it. At least
        one is played, however late it is."""
        kept: list[_Met] = []
        for met in found:
            left = self.left()
            if kept and left is not None and left <= 0:
                self.late = True
                break
            judged = accepted(met.search, met.fleet, referee, left)
            if judged is not None and judged[2].accepted:
                kept.append(self.valued(*judged))
        if not kept:
            raise never_accepted(self.search)
        return kept

    def valued(self, search: Search, fleet: Fleet, judgement: Judgement | None = None) -> _Met:
        numbers = predicted(fleet.items, search.traffic, search.slos)
        return _Met(search, fleet, tuple(axis.value(numbers) for axis in self.axes), judgement)

    def left(self) -> float | None:
        """Seconds left; None without a limit."""
        return None if self.time_limit is None else self.time_limit - (time.perf_counter() - self.start)

    def ladder(self, request: Request, key: str, rungs: int) -> Iterator[Request]:
        """Problems with an ever lower limit of one latency, as long as they have a plan."""
        axis = [axis.key for axis in self.axes].index(key)
        met, share = self.solve(request), 1.0
        for number in range(rungs):
            if met is None or met.values[0] > _DEAREST * self.met[0].values[0]:
                return
            yield request
            value = met.values[axis]
            share = share if number else self._rung(request, key, value, rungs)
            for step in (share, math.sqrt(share)):
                request = request.changed(slo={**request.slo, key: _below(value * step)})
                met = self.solve(request)
                if met is not None:
                    break

    def _rung(self, request: Request, key: str, value: float, rungs: int) -> float:
        """The factor that leads from a value to the lowest that any engine reaches, in so many rungs."""
        lowered = self.search.with_slos(request.changed(slo={key: value}))
        least = min((best for _, best, _ in lowered.lightest(lowered.bench.engines)), default=value)
        whole = min(max(least / value, 1e-3), 1.0)
        return float(min(whole ** (1 / rungs), 1 - _LEAST_STEP))

    def solve(self, request: Request) -> _Met | None:
        """The best plan of one problem, remembered; None when there is none, or no time."""
        key = repr((request.objective, sorted(request.slo.items()), request.constraints.max_gpus))
        if key in self.asked:
            return self.asked[key]
        if len(self.asked) >= _MOST:
            return None
        left = self.left()
        if left is not None and left <= 0 and self.asked:
            self.late = True
            return None
        self.say(f"front: problem {len(self.asked) + 1}")
        search = self.search.with_slos(request)
        fleet = search.fleet(None if left is None else max(left, 1e-3))
        met = None
        if fleet is not None:
            met = self.valued(search, fleet)
            self.met.append(met)
        self.asked[key] = met
        return met


def _below(value: float) -> float:
    """The limit in three significant digits, not above the value."""
    digits = 10.0 ** (math.floor(math.log10(value)) - 2)
    return float(f"{math.floor(value / digits) * digits:.3g}")
