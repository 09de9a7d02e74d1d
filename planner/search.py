"""The search: candidates -> what each can carry -> columns -> fleet.

Interpolated capacities of all candidates and limits come first; the undominated ones, and those
within 5 % of them, are evaluated again by the step model; the master problem sees only the latter.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from planc.cost_model.energy import watts
from planc.cost_model.step import StepModel
from planc.cost_model.table import CostTable
from planc.planner import solve
from planc.planner.candidates import BATCH_LIMITS, Candidate, candidates
from planc.planner.evaluate import Bench, Engine, Precise, Room, model_len, token_budgets
from planc.planner.inventory import Group, groups
from planc.planner.levels import by_level
from planc.planner.offers import HEADROOM, NEAR, SAME, Deployed, Fleet, Offer
from planc.planner.request import Request, Slo
from planc.planner.steady_state import Array
from planc.planner.traffic import Traffic, traffic

Progress = Callable[[str], None]
#: layouts kept per ranking while relaxations are looked for
_PROMISING = 10

Models = dict[tuple[object, ...], StepModel]


class Search:
    """One request against one cost table.

    models   step models, which may be shared between searches of the same table
    load     a workload that replaces the request's own
    bench    False: only list the candidates, evaluate nothing
    layouts  consider these only (see `Candidate.layout`)
    """

    def __init__(
        self,
        request: Request,
        table: CostTable,
        *,
        models: Models | None = None,
        load: Traffic | None = None,
        progress: Progress | None = None,
        bench: bool = True,
        layouts: frozenset[tuple[int, ...]] | None = None,
    ) -> None:
        self.request, self.table = request, table
        self.models: Models = {} if models is None else models
        self.say = progress or (lambda message: None)
        self.groups: tuple[Group, ...] = groups(request)
        self.traffic = load or traffic(request, table.model.kind)
        self.slos: tuple[Slo, ...] = request.slos()
        self.max_model_len = model_len(request, table, self.traffic)
        self.found, self.pruned = candidates(
            table, self.groups, request.constraints, self.slos if bench else (), self.traffic
        )
        if layouts is not None:
            self.found = [candidate for candidate in self.found if candidate.layout in layouts]
        self.considered = len(self.found) + sum(self.pruned.values())
        self.say(f"{len(self.found)} candidate engines")
        self.failing: Counter[str] = Counter()
        self.bench = Bench(self._engines() if bench else (), self.traffic)
        self.offers = self._offers(self.slos)
        dead = len(self.bench.engines) - len(self.offers)
        if dead:
            self.pruned["objectives missed at any load"] += dead

    def with_slos(self, request: Request) -> Search:
        """The same search under other objectives: candidates and step times are kept."""
        other = copy.copy(self)
        other.request, other.slos = request, request.slos()
        other.pruned = Counter(self.pruned)
        other.offers = other._offers(other.slos)
        return other

    @property
    def demand(self) -> float | None:
        users = self.traffic.concurrency
        return float(users) if users is not None else self.traffic.rate

    # -- what candidates can do ----------------------------------------------------------

    def _engines(self) -> list[Engine]:
        allowed = self.request.constraints
        budgets = token_budgets(self.table, self.traffic, allowed)
        caps = tuple(allowed.max_num_seqs or BATCH_LIMITS)
        found = []
        for candidate in self.found:
            limits = self.room(candidate).all(caps, budgets)
            if limits:
                found.append(Engine(candidate, self.model(candidate), limits))
            else:
                self.pruned["does not fit into memory"] += 1
        return found

    def room(self, candidate: Candidate) -> Room:
        share = self.request.constraints.gpu_memory_utilization
        return Room(self.table, candidate, self.traffic, self.max_model_len, share)

    def model(self, candidate: Candidate) -> StepModel:
        group = candidate.group
        key = (candidate.shape, group.gpu.name, group.fabric)
        if key not in self.models:
            self.models[key] = StepModel(
                self.table, candidate.shape, group.gpu, group.fabric, candidate.profile
            )
        return self.models[key]

    def _offers(self, slos: tuple[Slo, ...]) -> list[Offer]:
        """The best limits of each candidate that can meet the objectives: highest capacity, then the
        smallest batch cap, then the smallest budget."""
        capacity, self.failing = self.bench.capacities(slos)
        self.capacity = capacity
        found = []
        for number, engine in enumerate(self.bench.engines):
            rows = np.flatnonzero(self.bench.owner == number)
            best = float(capacity[rows].max(initial=0.0))
            if best <= 0:
                continue
            row = self.smallest(rows, capacity, best * (1 - SAME))
            found.append(Offer(engine, self.bench.limits[row], float(capacity[row])))
        return found

    def smallest(self, rows: NDArray[np.intp], capacity: Array, least: float) -> int:
        """The row with the smallest batch cap, then the smallest budget, that carries at least `least`."""
        enough = [int(r) for r in rows if capacity[r] >= least]
        return min(enough, key=lambda r: (self.bench.limits[r].max_num_seqs, self.bench.limits[r].budget))

    def _trimmed(self, offer: Offer, load: float) -> Offer:
        """The same engine with limits no larger than its load needs, with headroom: smaller batch caps
        take less memory for graphs. Only where the precise evaluation agrees that it carries the load."""
        number = next(i for i, engine in enumerate(self.bench.engines) if engine is offer.engine)
        rows = np.flatnonzero(self.bench.owner == number)
        best = float(self.capacity[rows].max())
        row = self.smallest(rows, self.capacity, min(best * (1 - SAME), load * HEADROOM))
        if self.bench.limits[row] == offer.limits:
            return offer
        found = self._precise(Offer(offer.engine, self.bench.limits[row], 0.0))
        return found if found.capacity >= load else offer

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

    # -- the fleet -----------------------------------------------------------------------

    def fleet(self, time_limit: float | None = None) -> Fleet | None:
        """The best fleet; None when there is none."""
        objective = self.request.objective
        self.say("solving")
        if objective in ("min_latency", "min_energy"):
            return by_level(self, objective, time_limit)
        limits = self.master_limits(self.demand)
        by_price = objective == "min_cost" and self.demand is None
        offers, columns = self._columns(limits, time_limit, prune=not by_price)
        if not offers and objective == "max_goodput" and self.demand is not None:
            limits = replace(limits, demand=None)
            offers, columns = self._columns(limits, time_limit)
        if not offers:
            return None
        if by_price:
            return self._cheapest_token(offers, columns)
        solution = solve.solve(columns, limits, time_limit=time_limit)
        if solution is None and objective == "max_goodput":
            solution = solve.solve(columns, replace(limits, demand=None), time_limit=time_limit)
            return self.deployed(offers, solution, None, "requests_s") if solution else None
        if solution is None:
            return None
        if objective == "max_goodput":
            if self.demand is not None:
                solution = replace(solution, value=self.demand, bound=self.demand)
            return self.deployed(offers, solution, self.demand, "requests_s")
        return self.deployed(offers, solution, self.demand, "usd_per_hour")

    def master_limits(self, demand: float | None) -> solve.Limits:
        allowed = self.request.constraints
        power = allowed.max_power_kw
        return solve.Limits(
            islands=tuple(group.islands for group in self.groups),
            demand=demand,
            max_gpus=allowed.max_gpus,
            max_replicas=allowed.max_replicas,
            max_watts=power * 1e3 if power is not None else None,
        )

    def _columns(
        self, limits: solve.Limits, time_limit: float | None, prune: bool = True
    ) -> tuple[list[Offer], list[solve.Column]]:
        """Precise columns of the offers that may matter, by two bounds: an offer that another of its
        family surely replaces, and a family that even with 5 % more capacity is worse than the best."""
        rough = [self.column(offer, offer.capacity) for offer in self.offers]
        hopeful = [replace(column, load=column.load / NEAR) for column in rough]
        families: dict[str, list[int]] = {}
        for i, column in enumerate(rough):
            mine = [j for j, other in enumerate(rough) if other.family == column.family and j != i]
            if not any(solve.replaces(rough[j], hopeful[i]) for j in mine):
                families.setdefault(column.family, []).append(i)
        best_hope = {
            name: solve.solve([hopeful[i] for i in members], limits, time_limit=time_limit, first_only=True)
            for name, members in families.items()
        }
        sign = 1.0 if limits.demand is not None else -1.0
        order = sorted((sign * hope.bound, name) for name, hope in best_hope.items() if hope is not None)
        offers: list[Offer] = []
        columns: list[solve.Column] = []
        best = math.inf
        for hope, name in order:
            if prune and hope > best + 1e-9 * abs(best):
                break
            members = [self._precise(self.offers[i]) for i in families[name]]
            made = [self.column(offer, offer.capacity) for offer in members]
            chosen = solve.undominated(made)
            offers += [members[i] for i in chosen]
            columns += [made[i] for i in chosen]
            found = solve.solve([made[i] for i in chosen], limits, time_limit=time_limit, first_only=True)
            if found is not None:
                best = min(best, sign * found.value)
        self.pruned["dominated"] = len(rough) - len(columns)
        return offers, columns

    def _precise(self, offer: Offer) -> Offer:
        found = Precise(offer.engine, offer.limits, self.traffic).capacity(self.slos)
        return replace(offer, capacity=found)

    def column(self, offer: Offer, load: float, weight: float | None = None) -> solve.Column:
        candidate = offer.engine.candidate
        pieces, size = candidate.pieces
        return solve.Column(
            group=candidate.group.index,
            pieces=pieces,
            size=size,
            load=load,
            weight=candidate.usd if weight is None else weight,
            family=f"{candidate.shape.weights}/{candidate.shape.kv}",
            drop=candidate.drop,
            watts=candidate.shape.world * float(watts(candidate.group.gpu, 1.0)),
        )

    def _cheapest_token(self, offers: list[Offer], columns: list[solve.Column]) -> Fleet | None:
        """No demand is stated: the engine with the lowest price per request, as many as there is room for.
        A fleet's price per request is a mean of its engines', so none is below the best engine's."""
        best = min(range(len(columns)), key=lambda i: (columns[i].weight / columns[i].load, i))
        solution = solve.solve([columns[best]], self.master_limits(None))
        if solution is None:
            return None
        tokens = (self.traffic.osl_mean or self.traffic.isl_mean) * self._rate(offers[best])
        price = columns[best].weight / 3600 / tokens * 1e6
        counts = tuple(solution.counts[0] if i == best else 0 for i in range(len(columns)))
        solution = solve.Solution(counts, solution.status, price, price)
        return self.deployed(offers, solution, None, "usd_per_million_tokens")

    def _rate(self, offer: Offer) -> float:
        if self.traffic.concurrency is None:
            return offer.capacity
        state = Precise(offer.engine, offer.limits, self.traffic).at(offer.capacity)
        return float(state.rate[0, 0]) * offer.engine.candidate.shape.dp

    def deployed(
        self, offers: Sequence[Offer], solution: solve.Solution, demand: float | None, objective: str
    ) -> Fleet:
        """Traffic is shared in proportion to what each engine can carry: all are equally loaded."""
        whole = sum(n * offer.capacity for n, offer in zip(solution.counts, offers, strict=True))
        load = 1.0 if demand is None else min(demand / whole, 1.0)
        by_level = self.request.objective in ("min_latency", "min_energy")
        items = []
        for count, offer in zip(solution.counts, offers, strict=True):
            if count:
                carried = offer.capacity * load
                chosen = self._precise(offer) if by_level else self._trimmed(offer, carried)
                capacity = max(chosen.capacity, carried)
                items.append(Deployed(chosen.engine, chosen.limits, count, carried, capacity))
        items.sort(key=lambda item: item.candidate.key())
        return Fleet(tuple(items), solution, objective)
