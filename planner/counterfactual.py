"""What engines that no search chose would do: a configuration as given, by the analytic evaluator.

`Evaluator.outcome` prices pools of engines under a request's workload with the step model and the steady
state, as the planner does for its own plans, whether or not the inventory holds them. A configuration that
cannot be raises `Impossible` with the reason.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from planc.cost_model import catalogue
from planc.cost_model.shape import refusals
from planc.cost_model.step import StepModel
from planc.cost_model.table import CostTable
from planc.planner import techniques
from planc.planner.candidates import Candidate
from planc.planner.check import shape_of
from planc.planner.closed_loop import Pool, fullness
from planc.planner.disaggregated import splits, transfer_seconds
from planc.planner.evaluate import Engine, Limits, Precise, Room
from planc.planner.expert_load import with_expert_load
from planc.planner.inventory import Group
from planc.planner.offers import Deployed
from planc.planner.operating_point import Steady
from planc.planner.plan import Predicted, Replica, Role
from planc.planner.predict import by_class, predicted
from planc.planner.request import Request
from planc.planner.slo import Slo
from planc.planner.traffic import Traffic, traffic

GIB = 1024.0**3
_SLACK = 1e-6  # relative: plans keep nine digits
_HALVES = ("prefill", "decode")

#: a role and the traffic classes that it serves; () are all of them
Place = tuple[Role, tuple[str, ...]]


class Impossible(Exception):
    """Why a configuration cannot be: its shape is refused, it does not fit, or it cannot carry the load."""


@dataclass(frozen=True, slots=True)
class Engines:
    """`count` identical engines of the pool at `place`. `share` of all requests that each of them takes."""

    place: Place
    replica: Replica
    count: int
    share: float
    group: Group


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a configuration does: every figure of a plan's `predicted`, to nine digits as in a saved plan.
    Percentiles are "ttft_ms.p99", figures of one traffic class "chat: ttft_ms".

    meets   whether it keeps the request's objectives
    """

    metrics: Mapping[str, float]
    meets: bool


@dataclass(frozen=True, slots=True)
class _Ready:
    """Engines that can be evaluated, with the traffic that they take `share` of; `memory`: bytes taken."""

    item: Engines
    share: float
    served: Traffic
    slos: tuple[Slo, ...]
    engine: Engine
    limits: Limits
    memory: float

    @property
    def role(self) -> Role:
        return self.item.place[0]

    @property
    def all_share(self) -> float:
        return self.item.count * self.share

    @property
    def precise(self) -> Precise:
        return Precise(self.engine, self.limits, self.served, self.role)


@dataclass(frozen=True, slots=True)
class _Loaded(Deployed):
    """Deployed engines without bands: their state is that of undisturbed step times."""

    place: Place = ("aggregated", ())
    at: Steady | None = None

    @property
    def role(self) -> Role:
        return self.place[0] if self.place[0] in _HALVES else "aggregated"

    def state(self, load: Traffic, scale: float = 1.0) -> Steady:
        assert self.at is not None
        return self.at


class Evaluator:
    """Configurations of one model. Step models and traffic are kept between calls."""

    def __init__(self, table: CostTable) -> None:
        self.table = table
        self._tables: dict[str | None, CostTable] = {}
        self._models: dict[object, StepModel] = {}
        self._traffic: dict[tuple[str, ...], Traffic] = {}
        self._carried: dict[object, float] = {}

    def outcome(self, engines: Sequence[Engines], request: Request, full: bool = False) -> Outcome:
        """Evaluates a configuration under the request's load.

        full   the load is instead the most that the objectives allow, the engines of a pool equally full

        Raises Impossible.
        """
        load, slos = self._load(request), request.slos()
        demand = None if full else load.rate if load.concurrency is None else float(load.concurrency)
        ready = self._ready(engines, request)
        capacities = self._capacities(ready)
        if load.concurrency is not None and any(one.role in _HALVES for one in ready):
            demand = self._closed_loop(ready, load.concurrency)
        items: list[Deployed] = []
        meets = True
        for one, capacity, carried in zip(ready, capacities, _loads(ready, capacities, demand), strict=True):
            if carried > capacity * (1 + _SLACK):
                self._bears(one, carried)
                meets = False
            state = one.precise.at(carried)
            items.append(
                _Loaded(
                    one.engine,
                    one.limits,
                    one.item.count,
                    carried,
                    max(capacity, carried),
                    place=one.item.place,
                    at=state,
                )
            )
        found = flat(predicted(items, load, slos), by_class(items, load, slos))
        found["memory_gib"] = max(one.memory for one in ready) / GIB
        if not all(math.isfinite(value) for value in found.values()):
            raise Impossible("it has no steady state")
        return Outcome({name: float(f"{value:.9g}") for name, value in found.items()}, meets)

    def _load(self, request: Request, *classes: str) -> Traffic:
        """The requests of some traffic classes, of all where none is named."""
        key = request.workload.model_dump_json(), *classes
        if key not in self._traffic:
            every = self._load(request) if classes else traffic(request, self.table.model.kind)
            self._traffic[key] = every.only(*classes) if classes else every
        return self._traffic[key]

    def _table(self, request: Request) -> CostTable:
        """The table, priced for the routing statistics that the request names."""
        name = request.workload.expert_load
        if name not in self._tables:
            self._tables[name] = with_expert_load(request, self.table)
        return self._tables[name]

    # -- engines -------------------------------------------------------------------------

    def _ready(self, present: Sequence[Engines], request: Request) -> list[_Ready]:
        found = []
        for item, share in zip(present, _shares(present, self._load(request)), strict=True):
            served = self._load(request, *item.place[1])
            slos = tuple(slo for slo in request.slos() if slo.traffic_class in ("", *served.names))
            found.append(self._one(self._table(request), item, share, served, slos))
        return [replace(one, engine=self._reached(one, found)) for one in found]

    def _one(
        self, table: CostTable, item: Engines, share: float, served: Traffic, slos: tuple[Slo, ...]
    ) -> _Ready:
        """Raises Impossible where the engine would not start, or not take the requests."""
        replica = item.replica
        shape, gpu = shape_of(replica), item.group.gpu
        profile = catalogue.engine(replica.engine)
        for refusal in refusals(shape, table, gpu, profile):
            raise Impossible(refusal.reason)
        mine = served.of(item.place[0])
        if mine.longest > replica.max_model_len:
            raise Impossible(f"requests of {mine.longest} tokens exceed {replica.max_model_len}")
        if mine.decode_steps and replica.max_num_seqs > replica.max_num_batched_tokens:
            raise Impossible("more sequences than tokens in a step")
        if table.model.kind != "causal_lm" and float(mine.isl.max()) > replica.max_num_batched_tokens:
            raise Impossible("a prompt exceeds the tokens of a step")
        candidate = Candidate(item.group, profile, shape, 0.0, techniques.read(replica.speculative))
        usable = replica.gpu_memory_utilization
        room = Room(table, candidate, served, replica.max_model_len, usable, item.place[0])
        caps = replica.max_num_seqs, replica.max_num_batched_tokens
        seats = room.seats(*caps)
        if seats < 1:
            raise Impossible(f"{candidate.label()} does not fit into {gpu.memory_gib:g} GiB")
        limits = Limits(*caps, seats)
        key = id(table), shape, gpu.name, item.group.fabric
        if key not in self._models:
            self._models[key] = StepModel(table, shape, gpu, item.group.fabric, profile)
        engine = room.engine(self._models[key], (limits,))
        return _Ready(item, share, served, slos, engine, limits, room.memory(*caps).total)

    def _reached(self, one: _Ready, every: Sequence[_Ready]) -> Engine:
        """The engine with the time that caches take to reach it, from the worst of the prefill engines."""
        if one.role != "decode":
            return one.engine
        mine = one.engine.candidate
        partners = [p.engine.candidate for p in every if p.item.place == ("prefill", one.item.place[1])]
        if any(partner.shape.kv != mine.shape.kv for partner in partners):
            raise Impossible("caches of prefill and decode engines have different formats")
        tokens = one.served.isl_mean
        waits = (
            transfer_seconds(self.table, p.shape, mine.shape, tokens, p.group, mine.group) for p in partners
        )
        return replace(one.engine, transfer_s=max(waits, default=0.0))

    def _capacities(self, ready: Sequence[_Ready]) -> list[float]:
        """What one engine of each kind carries within the objectives. Prefill and decode pools divide theirs
        in the way that lets the pools carry most."""
        ways: list[list[float]] = []
        for way in range(max(len(self._ways(one)) for one in ready)):
            objectives = [self._ways(one)[min(way, len(self._ways(one)) - 1)] for one in ready]
            ways.append([self._capacity(o, slos) for o, slos in zip(ready, objectives, strict=True)])
        return max(ways, key=lambda way: _most(ready, way))

    def _capacity(self, one: _Ready, slos: tuple[Slo, ...]) -> float:
        """The most that one engine carries within some objectives."""
        engine = one.engine
        how = id(engine.model), engine.candidate.speculation, engine.transfer_s, engine.reuse, one.limits
        key = *how, id(one.served), one.role, slos
        if key not in self._carried:
            self._carried[key] = one.precise.capacity(slos)
        return self._carried[key]

    def _bears(self, one: _Ready, load: float) -> None:
        most = self._capacity(one, ())
        if load > most * (1 + _SLACK):
            raise Impossible(f"{one.engine.candidate.label()} carries {most:.4g}, not {load:.4g}")

    def _closed_loop(self, ready: Sequence[_Ready], users: float) -> float:
        """Requests/s of so many users, each with one request in the pools."""
        if any(one.role not in _HALVES for one in ready):
            raise Impossible(
                "a closed loop over pools of both kinds, with and without halves, is not evaluated"
            )
        most = min(self._capacity(one, ()) / one.share for one in ready) * (1 - _SLACK)
        pools = [Pool(one.item.count, one.precise, most * one.share) for one in ready]
        full = fullness(pools, users)
        if full == 1.0:
            raise Impossible(f"{users:g} users are more than the pools hold")
        return full * most

    def _ways(self, one: _Ready) -> list[tuple[Slo, ...]]:
        if one.role not in _HALVES:
            return [one.slos]
        found = splits(self.table, (), one.served, one.slos)
        return [split.prefill if one.role == "prefill" else split.decode for split in found] or [one.slos]


# -- loads -------------------------------------------------------------------------------


def _shares(present: Sequence[Engines], load: Traffic) -> list[float]:
    """Share of all requests of one engine of each kind. Where traffic classes have pools of their own, what
    these take follows the classes; else it is as given. Raises Impossible where requests are left out."""
    if not present:
        raise Impossible("no engine is left")
    places = {
        item.place: sum(i.count * i.share for i in present if i.place == item.place) for item in present
    }
    sets = {frozenset(classes or load.names) for _, classes in places}
    missing = frozenset().union(*sets) ^ frozenset(load.names)
    if missing:
        raise Impossible(f"traffic class {sorted(missing)[0]} has no pool or no requests")
    apart = sum(len(names) for names in sets) == len(load.names)
    factors: dict[Place, float] = {}
    for names in sets:
        wanted = sum(s for s, n in zip(load.shares, load.names, strict=True) if n in names)
        mine = {place: s for place, s in places.items() if frozenset(place[1] or load.names) == names}
        whole = sum(s for (role, _), s in mine.items() if role not in _HALVES)
        halves = [sum(s for (role, _), s in mine.items() if role == half) for half in _HALVES]
        if (halves[0] > 0) != (halves[1] > 0):
            raise Impossible("prefill engines without decode engines, or the other way round")
        scale = wanted / (whole + halves[0]) if apart else 1.0
        for place in mine:
            factors[place] = scale * (halves[0] / halves[1] if place[0] == "decode" else 1.0)
    return [item.share * factors[item.place] for item in present]


def _loads(ready: Sequence[_Ready], capacities: Sequence[float], demand: float | None) -> Iterator[float]:
    """What one engine of each kind carries."""
    most = _most(ready, capacities) if demand is None else demand
    if most <= 0:
        raise Impossible("an objective is missed at any load")
    for one, capacity in zip(ready, capacities, strict=True):
        if demand is None:
            share, pool = _pool(one.item.place, ready, capacities)
            yield capacity * most * share / pool
        else:
            yield demand * one.share


def _most(ready: Sequence[_Ready], capacities: Sequence[float]) -> float:
    """The load of the whole fleet at which its fullest pool is full."""
    pools = (_pool(place, ready, capacities) for place in {one.item.place for one in ready})
    return min(pool / share for share, pool in pools)


def _pool(place: Place, ready: Sequence[_Ready], capacities: Sequence[float]) -> tuple[float, float]:
    """(share of the requests, capacity) of one pool."""
    mine = [(o, c) for o, c in zip(ready, capacities, strict=True) if o.item.place == place]
    return sum(o.all_share for o, _ in mine), sum(o.item.count * c for o, c in mine)


def flat(
    numbers: Mapping[str, Predicted], classes: Mapping[str, Mapping[str, Predicted]] | None = None
) -> dict[str, float]:
    """Values and percentiles of a plan's predictions, by name."""
    found: dict[str, float] = {}
    for prefix, every in (("", numbers), *((f"{name}: ", part) for name, part in (classes or {}).items())):
        for name, one in every.items():
            found[prefix + name] = one.value
            found |= {f"{prefix}{name}.{q}": value for q, value in one.percentiles.items()}
    return found
