"""A stream: requests that one kind of pool serves, and what every candidate engine can carry of them.

A search has one stream per set of traffic classes and role. Interpolated capacities of all candidates
and limits come first; what the search then picks is evaluated again by the step model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from planc.cost_model.energy import watts
from planc.cost_model.step import StepModel
from planc.cost_model.table import CostTable
from planc.planner import solve
from planc.planner.candidates import BATCH_LIMITS, Candidate, candidates
from planc.planner.disaggregated import decoding
from planc.planner.evaluate import Bench, Engine, Limits, Memories, Precise, Room, token_budgets
from planc.planner.expert_load import with_copies
from planc.planner.formats import accuracy
from planc.planner.inventory import Group
from planc.planner.offers import HEADROOM, SAME, Offer
from planc.planner.operating_point import Array, Steady
from planc.planner.plan import Role
from planc.planner.request import Request
from planc.planner.slo import Slo
from planc.planner.stages import with_cuts
from planc.planner.traffic import Traffic

#: layouts kept per ranking while relaxations are looked for
_PROMISING = 10

Models = dict[tuple[object, ...], StepModel]
#: what a simulation allowed, as a share of the capacity by formulas: `Stream.key` -> share
Cuts = dict[tuple[object, ...], float]


class Stream:
    """Requests of some traffic classes, one role, and the engines that may serve them.

    traffic, slos   of these requests
    flow, split     of the master problem: index of the stream's flow, and which half it belongs with
    layouts         consider these only (see `Candidate.layout`)
    bench           False: only list the candidates, evaluate nothing
    offer           False: find step times only; `under` then makes streams with objectives of it
    """

    def __init__(
        self,
        request: Request,
        table: CostTable,
        groups: tuple[Group, ...],
        traffic: Traffic,
        slos: tuple[Slo, ...],
        *,
        role: Role = "aggregated",
        flow: int = 0,
        max_model_len: int,
        models: Models,
        memories: Memories,
        cuts: Cuts,
        bench: bool = True,
        offer: bool = True,
        layouts: frozenset[tuple[int, ...]] | None = None,
    ) -> None:
        self.request, self.table, self.groups = request, table, groups
        self.traffic, self.slos, self.role, self.flow = traffic, slos, role, flow
        self.models, self.cuts, self.max_model_len = models, cuts, max_model_len
        self.split, self.memories = 0, memories
        #: of a decode pool in a closed loop: seconds that a request spends before it, at least
        self.prompt_s: float | None = None
        self._states: dict[tuple[object, ...], Steady] = {}
        self._by_formulas: tuple[Array, Counter[str]] | None = None
        self._precise: dict[tuple[int, Limits], float] = {}
        self.found, self.pruned = candidates(
            table, groups, request.constraints, slos if bench else (), traffic, role, accuracy(request, table)
        )
        if bench:
            self.found = with_copies(self.found, table)
        if layouts is not None:
            self.found = [candidate for candidate in self.found if candidate.layout in layouts]
        self.considered = len(self.found) + sum(self.pruned.values())
        self.failing: Counter[str] = Counter()
        engines = self._engines() if bench else []
        self.bench = Bench(engines, traffic, role)
        self._unevaluated = Counter(self.pruned)
        if offer:
            self._offer()

    @property
    def classes(self) -> tuple[str, ...]:
        return self.traffic.names

    def under(
        self, request: Request, slos: tuple[Slo, ...], cuts: Cuts, flow: int | None = None, split: int = 0
    ) -> Stream:
        """The same stream under other objectives or cuts: candidates and step times are kept."""
        other = object.__new__(Stream)
        other.__dict__ = {k: v for k, v in self.__dict__.items() if k != "promising"}
        other.request, other.slos, other.cuts = request, slos, cuts
        other.flow = self.flow if flow is None else flow
        other.split = split
        if slos != self.slos:
            other._by_formulas = None
            other._precise = {}
        other._offer()
        return other

    # -- what candidates can do ----------------------------------------------------------

    def _engines(self) -> list[Engine]:
        allowed = self.request.constraints
        budgets = token_budgets(self.table, self.traffic, allowed)
        caps = tuple(allowed.max_num_seqs or BATCH_LIMITS)
        room = {one.key(): self.room(one).all(caps, budgets) for one in self.found}
        self.pruned["does not fit into memory"] += sum(not limits for limits in room.values())
        fitting = [one for one in self.found if room[one.key()]]
        found = []
        for candidate in with_cuts(fitting, self.traffic.of(self.role), self.model):
            limits = room.get(candidate.key()) or self.room(candidate).all(caps, budgets)
            if limits:
                found.append(self.room(candidate).engine(self.model(candidate), limits))
        return decoding(self.table, found, self.traffic) if self.role == "decode" else found

    def room(self, candidate: Candidate) -> Room:
        share = self.request.constraints.gpu_memory_utilization
        return Room(self.table, candidate, self.traffic, self.max_model_len, share, self.role, self.memories)

    def model(self, candidate: Candidate) -> StepModel:
        group = candidate.group
        where = group.gpu.name, group.fabric
        key = (candidate.shape, *where)
        if key not in self.models:
            lone = (replace(candidate.shape, pp=1, pipeline_layers=()), *where, "kernels")
            found = StepModel(
                self.table,
                candidate.shape,
                group.gpu,
                group.fabric,
                candidate.profile,
                like=self.models.get(lone),
            )
            self.models.setdefault(lone, found)
            self.models[key] = found
        return self.models[key]

    def _offer(self) -> None:
        """The best limits of each candidate that can meet the objectives: highest capacity, then the
        smallest batch cap, then the smallest budget."""
        if self._by_formulas is None:
            self._by_formulas = self.bench.capacities(self.slos)
        self.capacity, self.failing = self._by_formulas
        allowed = [self.allowed(engine) for engine in self.bench.engines]
        if self.cuts and allowed:
            self.capacity = self.capacity * np.array(allowed)[self.bench.owner]
        self.offers: list[Offer] = []
        for number, engine in enumerate(self.bench.engines):
            rows = np.flatnonzero(self.bench.owner == number)
            best = float(self.capacity[rows].max(initial=0.0))
            if best <= 0:
                continue
            row = self.smallest(rows, self.capacity, best * (1 - SAME))
            self.offers.append(Offer(engine, self.bench.limits[row], float(self.capacity[row]), self))
        self.pruned = Counter(self._unevaluated)
        dead = len(self.bench.engines) - len(self.offers)
        if dead:
            self.pruned["objectives missed at any load"] += dead

    def key(self, engine: Engine) -> tuple[object, ...]:
        """Names an engine of this stream in `Cuts`: those that do the same work alike, wherever they lie."""
        one = engine.candidate
        where = one.group.fabric, one.group.stores
        return one.shape, one.speculation, *where, self.role, self.classes, self.slos

    def allowed(self, engine: Engine) -> float:
        """Share of an engine's capacity that simulations left to it."""
        return self.cuts.get(self.key(engine), 1.0)

    def smallest(self, rows: NDArray[np.intp], capacity: Array, least: float) -> int:
        """The row with the smallest batch cap, then the smallest budget, that carries at least `least`."""
        enough = [int(r) for r in rows if capacity[r] >= least]
        return min(enough, key=lambda r: (self.bench.limits[r].max_num_seqs, self.bench.limits[r].budget))

    def trimmed(self, offer: Offer, load: float) -> Offer:
        """The same engine with limits no larger than its load needs, with headroom: smaller batch caps
        take less memory for graphs. Only where the precise evaluation agrees that it carries the load."""
        number = next(i for i, engine in enumerate(self.bench.engines) if engine is offer.engine)
        rows = np.flatnonzero(self.bench.owner == number)
        best = float(self.capacity[rows].max())
        row = self.smallest(rows, self.capacity, min(best * (1 - SAME), load * HEADROOM))
        if self.bench.limits[row] == offer.limits:
            return offer
        found = self.precise(replace(offer, limits=self.bench.limits[row], capacity=0.0))
        return found if found.capacity >= load else offer

    def precise(self, offer: Offer) -> Offer:
        """The offer with its capacity by the step model itself."""
        key = id(offer.engine), offer.limits
        if key not in self._precise:
            self._precise[key] = self.evaluator(offer.engine, offer.limits).capacity(self.slos)
        return replace(offer, capacity=self._precise[key] * self.allowed(offer.engine))

    def evaluator(self, engine: Engine, limits: Limits) -> Precise:
        """One of its engines, by the step model itself."""
        return Precise(engine, limits, self.traffic, self.role)

    def at(self, offer: Offer) -> Steady:
        """The steady state of an engine whose capacity is a load that is meant, by the step model."""
        key = id(offer.engine), offer.limits, offer.capacity
        if key not in self._states:
            self._states[key] = self.evaluator(offer.engine, offer.limits).at(offer.capacity)
        return self._states[key]

    def column(self, offer: Offer, load: float, weight: float | None = None) -> solve.Column:
        """The offer as the master problem sees it, carrying `load`."""
        candidate = offer.engine.candidate
        pieces, size = candidate.pieces
        return solve.Column(
            group=candidate.group.index,
            pieces=pieces,
            size=size,
            load=load,
            weight=candidate.usd if weight is None else weight,
            family=candidate.family,
            drop=candidate.drop,
            watts=candidate.shape.world * float(watts(candidate.group.gpu, 1.0)),
            flow=self.flow,
            firm=not candidate.group.spot,
            feed=offer.feed,
        )

    # -- what is said about a stream ------------------------------------------------------

    def lightest(self, engines: Sequence[Engine]) -> list[tuple[str, float, float]]:
        """(objective, best value of any of these engines at next to no load, limit), ms."""
        chosen = {id(engine) for engine in engines}
        rows = [i for i, owner in enumerate(self.bench.owner) if id(self.bench.engines[owner]) in chosen]
        state = self.bench.steady(1e-3 * self.bench.seats)
        return [(slo.key, 1e3 * float(state.value(slo)[rows, 0].min()), 1e3 * slo.limit) for slo in self.slos]

    @cached_property
    def promising(self) -> frozenset[tuple[int, ...]] | None:
        """Layouts worth trying when the request is changed a little: the best per GPU, with the objectives
        and without, and the fastest. None (all of them) when nothing could be evaluated."""
        if self.bench.times is None:
            return None
        free, _ = self.bench.capacities(())
        fast = self.bench.steady(1e-3 * self.bench.seats).e2e[:, 0]
        worlds = np.array([self.bench.engines[i].candidate.shape.world for i in self.bench.owner])
        found: set[tuple[int, ...]] = set()
        for rank in (-self.capacity / worlds, -free / worlds, fast):
            mine: dict[tuple[int, ...], None] = {}
            for row in np.argsort(rank, kind="stable"):
                mine[self.bench.engines[self.bench.owner[row]].candidate.layout] = None
                if len(mine) == _PROMISING:
                    break
            found |= set(mine)
        return frozenset(found)


def subsets(names: Sequence[str], most: int = 3) -> Iterable[tuple[str, ...]]:
    """Sets of traffic classes that a pool may serve: all together first, then each set of up to `most`
    classes in all, else every class by itself."""
    from itertools import combinations

    yield tuple(names)
    if len(names) == 1:
        return
    sizes = range(len(names) - 1, 0, -1) if len(names) <= most else (1,)
    for size in sizes:
        yield from combinations(names, size)
