"""Re-solving a request that was changed a little: the one way in which explanations get their numbers.

A `Variation` is the request with something changed; a `Resolver` solves variations of one request with
shared step models, remembers their outcomes, and stops when its time is up.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Literal

from planc.cost_model import catalogue, overlay
from planc.cost_model.efficiency import efficiencies
from planc.cost_model.table import CostTable
from planc.errors import InvalidField
from planc.planner.inventory import groups
from planc.planner.offers import Fleet
from planc.planner.request import Request
from planc.planner.search import Search
from planc.planner.stream import Models

if TYPE_CHECKING:
    from planc.planner.plan import Plan

#: candidate engines up to which every variation is solved over all layouts, not the promising ones alone
ALL_LAYOUTS = 200
#: relative difference of objective values that counts as none
SAME = 1e-6

Layouts = frozenset[tuple[int, ...]]


class OutOfTime(Exception):
    """The time for re-solving is up; what was found so far stands."""


@dataclass(frozen=True, slots=True)
class Variation:
    """The request to solve, and what a request cannot say.

    memory_gib   GiB added to every GPU of a type
    fusions      names of the fusions in force; None: the engine's own
    layouts      the only layouts to consider (see `Candidate.layout`), or "all"; None: the resolver's choice
    """

    request: Request
    memory_gib: Mapping[str, float] = field(default_factory=dict)
    fusions: frozenset[str] | None = None
    layouts: Layouts | Literal["all"] | None = None

    def changed(self, **parts: object) -> Variation:
        """With parts of the request replaced (already validated)."""
        return replace(self, request=self.request.changed(**parts))

    def constrained(self, **limits: object) -> Variation:
        """With other constraints."""
        return self.changed(constraints=self.request.constraints.model_copy(update=limits))

    def key(self) -> tuple[object, ...]:
        fused = None if self.fusions is None else tuple(sorted(self.fusions))
        return self.request.model_dump_json(), tuple(sorted(self.memory_gib.items())), fused, self.layouts


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


class Resolver:
    """Solves variations of one request on one cost table.

    seconds   of wall-clock time after which `solve` raises OutOfTime; None: no end
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
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.table = table
        self._models: dict[frozenset[str] | None, Models] = {None: {}}
        self.say = progress or (lambda message: None)
        self.start = Variation(request)
        self._clock = clock
        self._end = None if seconds is None else clock() + seconds
        self._known: dict[tuple[object, ...], Outcome | None] = {}
        self.layouts: Layouts | None = None
        self.solved = 0
        self.base_search = Search(request, table, models=self._models[None], progress=progress)

    @cached_property
    def base(self) -> Outcome | None:
        """The request as it stands."""
        search = self.base_search
        fleet = search.fleet()
        if fleet is not None and search.considered > 0 and len(search.found) > ALL_LAYOUTS:
            promising = search.promising
            if promising is not None:
                self.layouts = promising | {item.candidate.layout for item in fleet.items}
        found = None if fleet is None else Outcome(self.start, search, fleet)
        self._known[self.start.key()] = found
        return found

    @property
    def restricted(self) -> bool:
        return self.layouts is not None

    def solve(self, variation: Variation) -> Outcome | None:
        """The best fleet; None when there is none or the variation contradicts itself. Raises OutOfTime."""
        key = variation.key()
        if key in self._known:
            return self._known[key]
        left = None if self._end is None else self._end - self._clock()
        if left is not None and left <= 0:
            raise OutOfTime
        self._known[key] = found = self._solve(variation, left)
        self.solved += 1
        return found

    def _solve(self, variation: Variation, left: float | None) -> Outcome | None:
        search = self.search(variation)
        if search is None:
            return None
        with hardware(variation):
            fleet = search.fleet(left)
        return None if fleet is None else Outcome(variation, search, fleet)

    def search(self, variation: Variation) -> Search | None:
        """The search of a variation, not solved yet; None when it contradicts itself."""
        layouts = self._layouts(variation)
        models = self._models.setdefault(variation.fusions, {})
        with hardware(variation):
            try:
                return Search(variation.request, self.table, models=models, layouts=layouts)
            except InvalidField:
                return None

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

    # -- comparing -------------------------------------------------------------------------

    @property
    def maximising(self) -> bool:
        return self.start.request.objective == "max_goodput"

    def gain(self, found: Outcome | None, than: Outcome) -> float | None:
        """By how much `found` is better, in the objective's unit; None where the two have no common unit
        or nothing was found."""
        if found is None or found.objective != than.objective:
            return None
        gain = found.value - than.value if self.maximising else than.value - found.value
        return 0.0 if abs(gain) <= SAME * abs(than.value) else gain
