"""Re-solving a request that was changed a little: the one way in which explanations get their numbers.

A `Variation` is the request with something changed; a `Resolver` solves variations of one request with
shared step models, remembers their outcomes, and stops when its time is up. Each variation is compiled as the
request itself is: a referee, where there is one, judges what formulas propose for all of them.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Literal

from planc.cost_model import catalogue, overlay
from planc.cost_model.efficiency import efficiencies
from planc.cost_model.table import CostTable
from planc.errors import InvalidField
from planc.planner import solve
from planc.planner.inventory import groups
from planc.planner.offers import Fleet
from planc.planner.referee import Referee, proposed
from planc.planner.request import Request
from planc.planner.resolving import Resolving
from planc.planner.search import Search
from planc.planner.stream import Models
from planc.planner.traffic import Traffic, traffic

if TYPE_CHECKING:
    from planc.planner.plan import Plan
    from planc.planner.slo import Slo

#: candidate engines up to which every variation is solved over all layouts, not the promising ones alone
ALL_LAYOUTS = 200
#: units of what `Fleet.objective` names
UNITS = {
    "usd_per_hour": "USD/h",
    "usd_per_million_tokens": "USD per 1M tokens",
    "requests_s": "requests/s",
    "e2e_mean_ms": "ms",
    "watts": "W",
}
#: constraints of the fleet as a whole: no engine is the other for them
_FLEET_LIMITS = ("max_replicas", "max_power_kw", "spare_replicas", "max_spot_share")

Layouts = frozenset[tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Variation:
    """The request to solve, and what a request cannot say.

    memory_gib   GiB added to every GPU of a type
    fusions      names of the fusions in force; None: the engine's own
    isl, osl     factors on the lengths of the workload
    layouts      the only layouts to consider (see `Candidate.layout`), or "all"; None: the resolver's choice
    """

    request: Request
    memory_gib: Mapping[str, float] = field(default_factory=dict)
    fusions: frozenset[str] | None = None
    layouts: Layouts | Literal["all"] | None = None
    isl: float = 1.0
    osl: float = 1.0

    def changed(self, **parts: object) -> Variation:
        """With parts of the request replaced (already validated)."""
        return replace(self, request=self.request.changed(**parts))

    def constrained(self, **limits: object) -> Variation:
        """With other constraints."""
        return self.changed(constraints=self.request.constraints.model_copy(update=limits))

    def key(self) -> tuple[object, ...]:
        fused = None if self.fusions is None else tuple(sorted(self.fusions))
        gib, request = tuple(sorted(self.memory_gib.items())), self.request.model_dump_json()
        return request, gib, fused, self.layouts, self.isl, self.osl


@dataclass(frozen=True)
class Outcome:
    """The best fleet of a variation. `value` is the objective's, in the unit that `objective` names."""

    variation: Variation
    search: Search
    fleet: Fleet

    @property
    def value(self) -> float:
        return self.fleet.solution.value

    @property
    def objective(self) -> str:
        return self.fleet.objective

    @property
    def unit(self) -> str:
        return UNITS.get(self.objective, self.objective)

    def latency(self, slo: Slo) -> float:
        """What an objective is about, ms, as the plan predicts it."""
        numbers = self.plan.predicted_by_class.get(slo.traffic_class, self.plan.predicted)
        found = numbers[f"{slo.metric}_ms"]
        if slo.quantile is None:
            return found.value
        return found.percentiles.get(f"p{slo.quantile * 100:.10g}", math.inf)

    @cached_property
    def plan(self) -> Plan:
        from planc.planner.compile import assembled

        with hardware(self.variation):
            return assembled(self.search, self.fleet, 0.0)


@contextmanager
def hardware(variation: Variation) -> Iterator[None]:
    """The catalogue as the variation has it: GPUs with more memory, engines with other fusions."""
    if not variation.memory_gib and variation.fusions is None:
        yield
        return
    gpus, engines, base = dict(catalogue.gpus()), dict(catalogue.engines()), overlay.current()
    for name, more in variation.memory_gib.items():
        gpu = catalogue.gpu(name)
        gpus[gpu.name] = gpu.model_copy(update={"memory_gib": gpu.memory_gib + more})
    if variation.fusions is not None:
        names = tuple(sorted(variation.fusions))
        engines = {k: v.model_copy(update={"fusions": names}) for k, v in engines.items()}
    if base is None:
        base = overlay.Overlay("", gpus, engines, efficiencies(), {}, {}, "varied")
    with overlay.in_use(replace(base, gpus=gpus, engines=engines)):
        yield


class Resolver(Resolving[Variation, Outcome]):
    """Solves variations of one request on one cost table.

    seconds   of wall clock for variations, once `base` is found; then `solve` raises OutOfTime. None: no end
    referee   plays the workload against fleets, those of variations as of the request; None: formulas alone.
              Each starts from what was cut of engines that do the same under the same objectives
    clock     what tells the time

    Variations are solved over all layouts where there are few candidates, else over the promising ones
    of the request as it stands and those of its plan (`restricted`); a plan found there is a plan, but a
    better one may lie outside.
    """

    def __init__(
        self,
        request: Request,
        table: CostTable,
        *,
        seconds: float | None = None,
        progress: Callable[[str], None] | None = None,
        referee: Referee | None = None,
        clock: Callable[[], float] = time.monotonic,
        search: Search | None = None,
    ) -> None:
        super().__init__(seconds, progress, referee, clock)
        self.table, self.start = table, Variation(request)
        models: Models = {} if search is None else search.models
        self._models: dict[frozenset[str] | None, Models] = {None: models}
        self.layouts: Layouts | None = None
        self.base_search = search or Search(request, table, models=models, progress=progress)

    @classmethod
    def of(cls, search: Search, seconds: float | None = None) -> Resolver:
        """For variations of a request whose search has found no fleet."""
        self = cls(search.request, search.table, seconds=seconds, progress=search.say, search=search)
        self._restrict(())
        self.begin()
        return self

    def _restrict(self, taken: Iterable[tuple[int, ...]]) -> None:
        """Where there are many candidates, keeps the promising layouts and those that are taken."""
        promising = self.base_search.promising
        if promising is not None and len(self.base_search.found) > ALL_LAYOUTS:
            self.layouts = promising | set(taken)

    @cached_property
    def base(self) -> Outcome | None:
        """The request as it stands."""
        settled = self.settled((self.base_search,), proposed)
        found = None
        if settled is not None:
            found = self.settle(settled.searches[0], settled.proposal.fleets[0])
            self.missed = next((one.missed for one in settled.judgements if not one.accepted), "")
        self._known[self.start.key()] = found
        self.begin()
        return found

    def settle(self, search: Search, fleet: Fleet) -> Outcome:
        """Takes a search and its fleet for the request's own: variations start from its cuts and layouts."""
        self.base_search = search
        self._restrict(item.candidate.layout for item in fleet.items)
        return Outcome(self.start, search, fleet)

    @property
    def restricted(self) -> bool:
        return self.layouts is not None

    def _solve(self, variation: Variation) -> Outcome | None:
        search = self.search(variation)
        if search is None:
            return None
        with hardware(variation):
            found = self.settled((search,), proposed)
        return None if found is None else Outcome(variation, found.searches[0], found.proposal.fleets[0])

    def search(self, variation: Variation) -> Search | None:
        """The search of a variation, not solved yet; None when it contradicts itself."""
        if self._same_offers(variation):
            search = copy.copy(self.base_search)
            search.request, search.traffic = variation.request, self._traffic(variation)
            return search
        if self._same_engines(variation):
            search = self._unlimited.with_slos(variation.request)
            search.traffic = self._traffic(variation)
            return search
        layouts = self._layouts(variation)
        models = self._models.setdefault(variation.fusions, {})
        with hardware(variation):
            try:
                load = self._traffic(variation)
                return Search(
                    variation.request,
                    self.table,
                    models=models,
                    load=load,
                    layouts=layouts,
                    cuts=self.base_search.cuts if self._same_work(variation) else {},
                )
            except InvalidField:
                return None

    def _traffic(self, variation: Variation) -> Traffic:
        """The workload in numbers; that of the request is read once, as it may be a long trace."""
        same = variation.request.workload == self.start.request.workload
        load = self.base_search.traffic if same else traffic(variation.request, self.table.model.kind)
        return load.scaled(isl=variation.isl, osl=variation.osl)

    @cached_property
    def _unlimited(self) -> Search:
        """Every engine that the request allows, whatever its latency. Objectives, load and limits of the
        whole fleet leave engines and their step times as they are."""
        free = _without_objectives(self.start.request)
        layouts, models = self._layouts(self.start), self._models[None]
        cuts = self.base_search.cuts
        return Search(free, self.table, models=models, layouts=layouts, cuts=cuts)

    def _same_work(self, variation: Variation) -> bool:
        """Whether engines have the same requests to serve, in steps that take as long: cuts hold then."""
        mine, load = self.base_search.traffic, self._traffic(variation)
        alike = variation.fusions is None and not variation.memory_gib
        return alike and load.key() == mine.key()

    def _same_engines(self, variation: Variation) -> bool:
        """Whether a variation differs from the request in what `_unlimited` serves alone."""
        if replace(variation, request=self.start.request) != self.start:
            return False
        closed = self.base_search.traffic.concurrency is not None
        return _engines_key(variation.request, closed) == _engines_key(self.start.request, closed)

    def _same_offers(self, variation: Variation) -> bool:
        """Whether it differs in the load or in limits of the whole fleet alone: what each engine carries
        within the objectives is known then."""
        mine, other = self.start.request, variation.request
        rated = [(r.workload.rate is None, r.objective, r.slos()) for r in (mine, other)]
        return self.layouts is None and rated[0] == rated[1] and self._same_engines(variation)

    def why(self, variation: Variation) -> str:
        """Why a variation has no plan, in one sentence."""
        from planc.planner.relax import why

        search = self.search(variation)
        if search is None:
            return "the request contradicts itself then"
        with hardware(variation):
            return why(search)

    def _layouts(self, variation: Variation) -> Layouts | None:
        """The layouts to look at: of those that the resolver keeps, on every node group with their GPU."""
        if variation.layouts == "all" or (variation.layouts is None and self.layouts is None):
            return None
        if variation.layouts is not None:
            return variation.layouts
        own = self.base_search.groups
        return frozenset(
            (group.index, *rest)
            for group in groups(variation.request)
            for index, *rest in self.layouts or ()
            if own[index].gpu.name == group.gpu.name
        )

    @property
    def maximising(self) -> bool:
        return self.start.request.objective == "max_goodput"

    def marginal(self, base: Outcome, looser: Variation) -> float | None:
        """What a looser constraint would gain if engines could be bought in parts (interpolated capacities);
        None where the objective depends on how loaded engines are."""
        search = self.search(looser)
        if search is None or base.objective not in ("usd_per_hour", "requests_s"):
            return None
        with hardware(looser):
            bounds = _relaxed(base.search), _relaxed(search)
        if bounds[0] is None or bounds[1] is None:
            return None
        gain = bounds[1] - bounds[0] if self.maximising else bounds[0] - bounds[1]
        return max(gain, 0.0)


def _without_objectives(request: Request) -> Request:
    classes = [c.model_copy(update={"slo": {}}) for c in request.workload.classes]
    return request.changed(slo={}, workload=request.workload.model_copy(update={"classes": classes}))


def _engines_key(request: Request, closed: bool) -> str:
    """The parts of a request on which engines and their step times depend. In a closed loop the number of
    users is one of them; else rates are, up to a common factor."""
    workload = request.workload
    rates = [c.request_rate or c.weight for c in workload.classes]
    classes = [
        c.model_copy(update={"slo": {}, "request_rate": None, "weight": float(f"{rate / sum(rates):.9g}")})
        for c, rate in zip(workload.classes, rates, strict=True)
    ]
    bare = workload.model_copy(
        update={"classes": classes, **({} if closed else {"request_rate": None, "rate": None})}
    )
    limits = request.constraints.model_copy(update=dict.fromkeys(_FLEET_LIMITS))
    objective = "max_goodput" if request.objective == "min_cost" else request.objective
    return request.changed(slo={}, workload=bare, constraints=limits, objective=objective).model_dump_json()


def _relaxed(search: Search) -> float | None:
    """The best value that divisible engines reach; None when even they do not suffice, or where a stated load
    is the value."""
    if search.request.objective == "max_goodput" and search.demand is not None:
        return None
    families: dict[str, list[solve.Column]] = {}
    for _, column in search.rough():
        families.setdefault(column.family, []).append(column)
    limits = search.master_limits(search.demand)
    found = [solve.relaxation(columns, limits) for columns in families.values()]
    bounds = [one.bound for one in found if one is not None]
    if not bounds:
        return None
    return min(bounds) if limits.demand is not None else max(bounds)
