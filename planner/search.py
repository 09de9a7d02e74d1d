"""The search: candidates -> what each can carry -> columns -> fleet.

Interpolated capacities of all candidates and limits come first; the undominated ones, and those
within 5 % of them, are evaluated again by the step model; the master problem sees only the latter.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from planc.cost_model.energy import watts
from planc.cost_model.step import StepModel
from planc.cost_model.table import CostTable
from planc.errors import InvalidField
from planc.planner import solve
from planc.planner.candidates import BATCH_LIMITS, Candidate, candidates
from planc.planner.evaluate import Bench, Engine, Limits, Precise, Room, token_budgets
from planc.planner.inventory import Group, groups
from planc.planner.request import Request, Slo
from planc.planner.steady_state import Steady
from planc.planner.traffic import Traffic, traffic

Progress = Callable[[str], None]
Models = dict[tuple[object, ...], StepModel]

_SAME = 1e-3  # capacities that differ by less count as equal when limits are chosen
_NEAR = 0.95  # candidates within this share of a better one are evaluated precisely too


@dataclass(frozen=True, slots=True)
class Deployed:
    """`count` identical engines, each carrying `load` (requests/s or users); `capacity` is what each
    could carry within the objectives."""

    engine: Engine
    limits: Limits
    count: int
    load: float
    capacity: float

    @property
    def candidate(self) -> Candidate:
        return self.engine.candidate

    def state(self, load: Traffic, scale: float = 1.0) -> Steady:
        return Precise(self.engine, self.limits, load).at(self.load, scale)


@dataclass(frozen=True, slots=True)
class Fleet:
    """The search's answer. `objective` names the unit of the solver's value."""

    items: tuple[Deployed, ...]
    solution: solve.Solution
    objective: str

    @property
    def gpus(self) -> int:
        return sum(item.count * item.candidate.shape.world for item in self.items)

    @property
    def usd(self) -> float:
        return sum(item.count * item.candidate.usd for item in self.items)

    @property
    def capacity(self) -> float:
        return sum(item.count * item.capacity for item in self.items)

    @property
    def watts(self) -> float:
        """Power of all GPUs when none is idle."""
        return sum(
            item.count * item.candidate.shape.world * float(watts(item.candidate.group.gpu, 1.0))
            for item in self.items
        )


@dataclass(frozen=True, slots=True)
class Offer:
    """What one candidate can do at best, by interpolation: with which limits, up to which load."""

    engine: Engine
    limits: Limits
    capacity: float


class Search:
    """One request against one cost table.

    models   step models, which may be shared between searches of the same table
    load     a workload that replaces the request's own
    bench    False: only list the candidates, evaluate nothing
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
                self.pruned["memory"] += 1
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
        found = []
        for number, engine in enumerate(self.bench.engines):
            rows = np.flatnonzero(self.bench.owner == number)
            best = float(capacity[rows].max(initial=0.0))
            if best <= 0:
                continue
            near = [r for r in rows if capacity[r] >= best * (1 - _SAME)]
            row = min(near, key=lambda r: (self.bench.limits[r].max_num_seqs, self.bench.limits[r].budget))
            found.append(Offer(engine, self.bench.limits[row], float(capacity[row])))
        return found

    def lightest(self, engines: Sequence[Engine]) -> list[tuple[str, float, float]]:
        """(objective, best value of any of these engines at next to no load, limit), ms."""
        chosen = {id(engine) for engine in engines}
        rows = [i for i, owner in enumerate(self.bench.owner) if id(self.bench.engines[owner]) in chosen]
        state = self.bench.steady(1e-3 * self.bench.seats)
        return [(slo.key, 1e3 * float(state.value(slo)[rows, 0].min()), 1e3 * slo.limit) for slo in self.slos]

    # -- the fleet -----------------------------------------------------------------------

    def fleet(self, time_limit: float | None = None) -> Fleet | None:
        """The best fleet; None when there is none."""
        objective = self.request.objective
        self.say("solving")
        if objective in ("min_latency", "min_energy"):
            return self._by_level(objective, time_limit)
        limits = self._limits(self.demand)
        by_price = objective == "min_cost" and self.demand is None
        offers, columns = self._columns(limits, prune=not by_price)
        if not offers and objective == "max_goodput" and self.demand is not None:
            limits = replace(limits, demand=None)
            offers, columns = self._columns(limits)
        if not offers:
            return None
        if by_price:
            return self._cheapest_token(offers, columns)
        solution = solve.solve(columns, limits, time_limit=time_limit)
        if solution is None and objective == "max_goodput":
            solution = solve.solve(columns, replace(limits, demand=None), time_limit=time_limit)
            return self._fleet(offers, solution, None, "requests_s") if solution else None
        if solution is None:
            return None
        if objective == "max_goodput":
            if self.demand is not None:
                solution = replace(solution, value=self.demand, bound=self.demand)
            return self._fleet(offers, solution, self.demand, "requests_s")
        return self._fleet(offers, solution, self.demand, "usd_per_hour")

    def _limits(self, demand: float | None) -> solve.Limits:
        allowed = self.request.constraints
        power = allowed.max_power_kw
        return solve.Limits(
            islands=tuple(group.islands for group in self.groups),
            demand=demand,
            max_gpus=allowed.max_gpus,
            max_replicas=allowed.max_replicas,
            max_watts=power * 1e3 if power is not None else None,
        )

    def _columns(self, limits: solve.Limits, prune: bool = True) -> tuple[list[Offer], list[solve.Column]]:
        """Precise columns of the offers that may matter, by two bounds: an offer that another of its
        family surely replaces, and a family that even with 5 % more capacity is worse than the best."""
        rough = [self._column(offer, offer.capacity) for offer in self.offers]
        hopeful = [replace(column, load=column.load / _NEAR) for column in rough]
        families: dict[str, list[int]] = {}
        for i, column in enumerate(rough):
            mine = [j for j, other in enumerate(rough) if other.family == column.family and j != i]
            if not any(solve.replaces(rough[j], hopeful[i]) for j in mine):
                families.setdefault(column.family, []).append(i)
        best_hope = {
            name: solve.solve([hopeful[i] for i in members], limits, first_only=True)
            for name, members in families.items()
        }
        sign = 1.0 if limits.demand is not None else -1.0
        order = sorted((sign * hope.value, name) for name, hope in best_hope.items() if hope is not None)
        offers: list[Offer] = []
        columns: list[solve.Column] = []
        best = math.inf
        for hope, name in order:
            if prune and hope > best + 1e-9 * abs(best):
                break
            members = [self._precise(self.offers[i]) for i in families[name]]
            made = [self._column(offer, offer.capacity) for offer in members]
            chosen = solve.undominated(made)
            offers += [members[i] for i in chosen]
            columns += [made[i] for i in chosen]
            found = solve.solve([made[i] for i in chosen], limits, first_only=True)
            if found is not None:
                best = min(best, sign * found.value)
        self.pruned["dominated"] = len(rough) - len(columns)
        return offers, columns

    def _precise(self, offer: Offer) -> Offer:
        found = Precise(offer.engine, offer.limits, self.traffic).capacity(self.slos)
        return replace(offer, capacity=found)

    def _column(self, offer: Offer, load: float, weight: float | None = None) -> solve.Column:
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
        solution = solve.solve([columns[best]], self._limits(None))
        if solution is None:
            return None
        tokens = (self.traffic.osl_mean or self.traffic.isl_mean) * self._rate(offers[best])
        price = columns[best].weight / 3600 / tokens * 1e6
        counts = tuple(solution.counts[0] if i == best else 0 for i in range(len(columns)))
        solution = solve.Solution(counts, solution.status, price, price)
        return self._fleet(offers, solution, None, "usd_per_million_tokens")

    def _rate(self, offer: Offer) -> float:
        if self.traffic.concurrency is None:
            return offer.capacity
        state = Precise(offer.engine, offer.limits, self.traffic).at(offer.capacity)
        return float(state.rate[0, 0]) * offer.engine.candidate.shape.dp

    def _by_level(self, objective: str, time_limit: float | None) -> Fleet | None:
        """Latency and energy depend on each engine's load: columns are engines at 1/n of the demand."""
        if self.demand is None:
            raise InvalidField(
                where="request",
                field="objective",
                value=objective,
                reason="needs a stated load, and the workload says 'max'",
                mend="Give request_rate or concurrency, or use max_goodput or min_cost.",
            )
        if not self.offers:
            return None
        most = min(sum(g.gpus for g in self.groups), self.request.constraints.max_replicas or 10**9)
        numbers = [n for n in range(1, most + 1) if n <= 16 or n & (n - 1) == 0]
        levels = np.array([[self.demand / n for n in numbers]])
        state = self.bench.at_load(levels)
        good = state.meets(self.slos)
        cost = state.e2e if objective == "min_latency" else self._watts(state)
        cost = np.where(good, cost, np.inf)
        offers, columns = [], []
        for number, engine in enumerate(self.bench.engines):
            rows = np.flatnonzero(self.bench.owner == number)
            fits = sum(i // engine.candidate.pieces[1] for i in engine.candidate.group.islands)
            for k, n in enumerate(numbers):
                row = rows[int(np.argmin(cost[rows, k]))]
                if not np.isfinite(cost[row, k]) or n > fits // engine.candidate.pieces[0]:
                    continue
                offer = Offer(engine, self.bench.limits[row], float(levels[0, k]))
                share = float(levels[0, k]) if objective == "min_latency" else engine.candidate.shape.world
                offers.append(offer)
                columns.append(self._column(offer, offer.capacity, float(cost[row, k]) * share))
        columns = self._levels_precisely(offers, columns, objective)
        chosen = solve.undominated(columns)
        self.pruned["dominated"] = len(columns) - len(chosen)
        solution = solve.solve([columns[i] for i in chosen], self._limits(self.demand), time_limit=time_limit)
        if solution is None:
            return None
        unit = "e2e_mean_ms" if objective == "min_latency" else "watts"
        if objective == "min_latency":
            solution = replace(
                solution, value=solution.value / self.demand * 1e3, bound=solution.bound / self.demand * 1e3
            )
        return self._fleet([offers[i] for i in chosen], solution, self.demand, unit)

    def _levels_precisely(
        self, offers: Sequence[Offer], columns: Sequence[solve.Column], objective: str
    ) -> list[solve.Column]:
        """The best few columns of each size and level by the step model; the others are dropped."""
        kinds: dict[tuple[object, ...], list[int]] = {}
        for i, column in enumerate(columns):
            kinds.setdefault((column.group, column.pieces, column.size, column.load), []).append(i)
        found = [replace(column, load=0.0) for column in columns]
        for members in kinds.values():
            best = min(columns[i].weight for i in members)
            for i in members:
                if columns[i].weight > best / _NEAR:
                    continue
                offer = offers[i]
                state = Precise(offer.engine, offer.limits, self.traffic).at(offer.capacity)
                if bool(state.meets(self.slos)[0, 0]):
                    value = state.e2e if objective == "min_latency" else self._watts(state, offer.engine)
                    world = offer.engine.candidate.shape.world
                    share = offer.capacity if objective == "min_latency" else world
                    found[i] = replace(columns[i], weight=float(np.ravel(value)[0]) * share)
        return found

    def _watts(
        self, state: Steady, engine: Engine | None = None
    ) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
        """Power of one GPU of each row, W."""
        busy = running_share(state)
        if engine is not None:
            return watts(engine.candidate.group.gpu, busy)
        out = np.empty_like(busy)
        for number, mine in enumerate(self.bench.engines):
            rows = self.bench.owner == number
            out[rows] = watts(mine.candidate.group.gpu, busy[rows])
        return out

    def _fleet(
        self, offers: Sequence[Offer], solution: solve.Solution, demand: float | None, objective: str
    ) -> Fleet:
        """Traffic is shared in proportion to what each engine can carry: all are equally loaded."""
        whole = sum(n * offer.capacity for n, offer in zip(solution.counts, offers, strict=True))
        load = 1.0 if demand is None else min(demand / whole, 1.0)
        by_level = self.request.objective in ("min_latency", "min_energy")
        items = []
        for count, offer in zip(solution.counts, offers, strict=True):
            if count:
                capacity = self._precise(offer).capacity if by_level else offer.capacity
                carried = offer.capacity * load
                items.append(Deployed(offer.engine, offer.limits, count, carried, max(capacity, carried)))
        items.sort(key=lambda item: item.candidate.key())
        return Fleet(tuple(items), solution, objective)


def running_share(state: Steady) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    """Share of time that an engine runs steps: all of it in a closed loop, else while anyone is there
    (a Poisson number in the system)."""
    if state.traffic.concurrency is not None:
        return np.ones_like(state.batch)
    busy: np.ndarray[tuple[int, ...], np.dtype[np.float64]] = -np.expm1(-np.maximum(state.batch, state.busy))
    return busy


def model_len(request: Request, table: CostTable, load: Traffic) -> int:
    """Longest sequence the engine must take: the stated one, else the next power of two above the
    workload's longest request. Raises InvalidField when that exceeds what the model was made for."""
    longest, most = load.longest, table.model.max_position
    stated = request.constraints.max_model_len
    if stated is not None and stated < longest:
        raise InvalidField(
            where="request",
            field="constraints.max_model_len",
            value=stated,
            reason=f"the workload has requests of {longest} tokens",
            mend=f"Give at least {longest}, or shorten isl and osl.",
        )
    if most and (stated or longest) > most:
        raise InvalidField(
            where="request",
            field="constraints.max_model_len" if stated else "workload",
            value=stated or longest,
            reason=f"longer than the model's {most} positions",
            mend=f"Keep isl + osl within {most} tokens.",
        )
    if stated is not None:
        return stated
    wanted = max(1 << math.ceil(math.log2(max(longest, 2))), 2048)
    return min(wanted, most) if most else wanted
