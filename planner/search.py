"""The search: streams of requests -> what each engine can carry of them -> columns -> fleet.

A `Stream` prices all candidates by interpolated curves; the offers that may matter are evaluated again by
the step model (`planner.promising`); the master problem sees only the latter.
"""

from __future__ import annotations

import copy
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from planc.cost_model.step import StepModel
from planc.cost_model.table import CostTable
from planc.planner import closed_loop, disaggregated, ratio, solve
from planc.planner.candidates import Candidate
from planc.planner.evaluate import Bench, Engine, Memories, Room, model_len
from planc.planner.inventory import Group, groups
from planc.planner.levels import by_level
from planc.planner.offers import Deployed, Fleet, Offer
from planc.planner.plan import Role
from planc.planner.promising import Carrying, Goal, left, promising
from planc.planner.request import Request
from planc.planner.shares import loads
from planc.planner.slo import Slo
from planc.planner.stream import Cuts, Models, Stream, subsets
from planc.planner.traffic import Traffic, traffic

Progress = Callable[[str], None]

#: inventories from so many GPUs on, and searches of more flows than this, stop at a gap or after some nodes
#: of branch and bound (a count is the same for every run, unlike seconds); others prove the last dollar
_LARGE, _MANY = 256, 8
_GAP, _NODES, _NODES_LARGE = 4e-3, 12_000, 2_000


class Search:
    """One request against one cost table.

    models   step models, which may be shared between searches of the same table
    load     a workload that replaces the request's own
    bench    False: only list the candidates, evaluate nothing
    layouts  consider these only (see `Candidate.layout`)
    cuts     highest loads that a simulation allowed
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
        cuts: Cuts | None = None,
    ) -> None:
        self.request, self.table = request, table
        self.models: Models = {} if models is None else models
        self.cuts: Cuts = {} if cuts is None else cuts
        self.say = progress or (lambda message: None)
        self.groups: tuple[Group, ...] = groups(request)
        self.traffic = load or traffic(request, table.model.kind)
        self.slos: tuple[Slo, ...] = request.slos()
        self.max_model_len = model_len(request, table, self.traffic)
        self._layouts = layouts
        self._memories = Memories()
        self._known: dict[tuple[tuple[str, ...], Role], Stream] = {}
        self.main = self._stream(self.traffic, self.slos, bench=bench)
        self.streams: list[Stream] = [self.main]
        if bench:
            self._more_streams()
        self.considered = sum(stream.considered for stream in self.streams)
        self.pruned: Counter[str] = sum((stream.pruned for stream in self.streams), Counter())
        self.say(f"{sum(len(stream.found) for stream in self.streams)} candidate engines")

    def with_slos(self, request: Request) -> Search:
        """The same search under other objectives: candidates and step times are kept."""
        other = copy.copy(self)
        other.request, other.slos = request, request.slos()
        other.streams = [self.main.under(request, other.slos, self.cuts)]
        other.main = other.streams[0]
        other._more_streams()
        return other._counted()

    #: by how much longer, and to how much smaller a gap, large integer programs are solved
    patience = 1

    def with_cuts(self, cuts: Cuts, patience: int = 1) -> Search:
        """The same search where simulations left less to some engines."""
        other = copy.copy(self)
        other.cuts, other.patience = cuts, patience
        other.streams = [s.under(self.request, s.slos, cuts, s.flow, s.split) for s in self.streams]
        return other._counted()

    def _counted(self) -> Search:
        self.main = self.streams[0]
        self.pruned = sum((stream.pruned for stream in self.streams), Counter())
        return self

    def _stream(self, load: Traffic, slos: tuple[Slo, ...], **how: Any) -> Stream:
        return Stream(
            self.request,
            self.table,
            self.groups,
            load,
            slos,
            max_model_len=self.max_model_len,
            models=self.models,
            memories=self._memories,
            cuts=self.cuts,
            layouts=self._layouts,
            **how,
        )

    def _priced(self, load: Traffic, slos: tuple[Slo, ...], role: Role) -> Stream:
        """A stream of these requests without offers: its step times, found once."""
        key = (load.names, role)
        if key not in self._known:
            self._known[key] = self._stream(load, slos, role=role, offer=False)
        return self._known[key]

    def _add(self, flow: solve.Flow, base: Stream, slos: tuple[Slo, ...]) -> None:
        self.flows.append(flow)
        self.streams.append(base.under(self.request, slos, self.cuts, len(self.flows) - 1, flow.split))

    # -- streams ---------------------------------------------------------------------------

    def _more_streams(self) -> None:
        """Pools for some of the traffic classes, and prefill and decode pools. Users of a closed loop ask
        for all classes in turn: a pool for some of them has no number of users of its own."""
        self.flows: list[solve.Flow] = [solve.Flow(self.traffic.shares)]
        if self.traffic.concurrency is not None:
            if self.request.objective in ("min_cost", "max_goodput"):
                self._halves(self.traffic, self.slos, self.traffic.shares)
            return
        names = self.traffic.names
        for chosen in subsets(names):
            load = self.traffic.only(*chosen)
            slos = tuple(s for s in self.slos if not s.traffic_class or s.traffic_class in chosen)
            shares = tuple(
                share / sum(s for s, n in zip(self.traffic.shares, names, strict=True) if n in chosen)
                if name in chosen
                else 0.0
                for name, share in zip(names, self.traffic.shares, strict=True)
            )
            if chosen != tuple(names):
                self._add(solve.Flow(shares), self._priced(load, slos, "aggregated"), slos)
            if len(chosen) in (1, len(names)):
                self._halves(load, slos, shares)

    def _halves(self, load: Traffic, slos: tuple[Slo, ...], shares: tuple[float, ...]) -> None:
        """Prefill and decode pools of a stream, one pair for each way to split its objectives."""
        allowed = self.request.constraints.serving
        if allowed is not None and "disaggregated" not in allowed:
            return
        steps = tuple(slo for slo in slos if slo.metric in ("tpot", "itl"))
        for split in disaggregated.splits(self.table, self.groups, load, slos):
            number = len(self.flows)
            self._add(solve.Flow(shares, "prefill", number), self._priced(load, (), "prefill"), split.prefill)
            self._add(solve.Flow(shares, "decode", number), self._priced(load, steps, "decode"), split.decode)
            if load.concurrency is not None:
                self.streams[-1].prompt_s = closed_loop.prompt_seconds(self.streams[-2])

    @property
    def demand(self) -> float | None:
        users = self.traffic.concurrency
        return float(users) if users is not None else self.traffic.rate

    # -- the main stream's own -------------------------------------------------------------

    @property
    def found(self) -> list[Candidate]:
        return self.main.found

    @property
    def bench(self) -> Bench:
        return self.main.bench

    @property
    def offers(self) -> list[Offer]:
        return self.main.offers

    @property
    def failing(self) -> Counter[str]:
        return self.main.failing

    @property
    def promising(self) -> frozenset[tuple[int, ...]] | None:
        return self.main.promising

    def room(self, candidate: Candidate) -> Room:
        return self.main.room(candidate)

    def model(self, candidate: Candidate) -> StepModel:
        return self.main.model(candidate)

    def lightest(self, engines: Sequence[Engine]) -> list[tuple[str, float, float]]:
        """(objective, best value of any of these engines at next to no load, limit), ms."""
        return self.main.lightest(engines)

    # -- the fleet -----------------------------------------------------------------------

    def fleet(self, time_limit: float | None = None) -> Fleet | None:
        """The best fleet; None when there is none.

        time_limit   seconds for the integer programs

        Raises ToolFailed when time runs out before any fleet was found.
        """
        objective = self.request.objective
        deadline = None if time_limit is None else time.perf_counter() + time_limit
        self.say("solving")
        if objective in ("min_latency", "min_energy"):
            return by_level(self, objective, deadline)
        limits = self.master_limits(self.demand)
        if objective == "min_cost" and self.demand is None:
            return self._cheapest_token(limits, deadline)
        goal = Carrying(limits, deadline)
        offers, columns = self._columns(limits, deadline, goal)
        if not offers and objective == "max_goodput" and self.demand is not None:
            limits = replace(limits, demand=None)
            goal = Carrying(limits, deadline)
            offers, columns = self._columns(limits, deadline, goal)
        if not offers:
            return None
        solution = goal.solution(columns)
        if solution is None and objective == "max_goodput":
            limits = replace(limits, demand=None)
            solution = solve.solve(columns, limits, time_limit=left(deadline))
            return self.deployed(offers, columns, solution, None, "requests_s") if solution else None
        if solution is None:
            return None
        if objective == "max_goodput":
            if limits.demand is not None:
                solution = replace(solution, value=limits.demand, bound=limits.demand)
            return self.deployed(offers, columns, solution, limits.demand, "requests_s")
        return self.deployed(offers, columns, solution, self.demand, "usd_per_hour")

    def master_limits(self, demand: float | None) -> solve.Limits:
        allowed = self.request.constraints
        power = allowed.max_power_kw
        spot = allowed.max_spot_share
        large = sum(group.gpus for group in self.groups) >= _LARGE
        many = large or len(self.flows) > _MANY
        return solve.Limits(
            islands=tuple(group.islands for group in self.groups),
            demand=demand,
            max_gpus=allowed.max_gpus,
            max_replicas=allowed.max_replicas,
            max_watts=power * 1e3 if power is not None else None,
            classes=self.traffic.shares,
            flows=tuple(self.flows),
            spare=allowed.spare_replicas or 0,
            firm_share=1 - spot if spot is not None else 0.0,
            gap=_GAP / self.patience if many else 0.0,
            nodes=self.patience * (_NODES_LARGE if large else _NODES) if many else None,
        )

    def _columns(
        self, limits: solve.Limits, deadline: float | None, goal: Goal | None = None
    ) -> tuple[list[Offer], list[solve.Column]]:
        """Precise columns of the offers that may matter."""
        rough = self.rough()
        found = promising(rough, limits, deadline, goal)
        self.pruned["dominated"] = len(rough) - len(found[1])
        return found

    def rough(self) -> list[tuple[Offer, solve.Column]]:
        """All offers that may be used, with columns of their interpolated capacities."""
        found: list[tuple[Offer, solve.Column]] = []
        for stream in self.serving:
            for offer in stream.offers:
                at = [offer] if stream.prompt_s is None else closed_loop.at_levels(offer)
                found += [(one, one.column(one.load)) for one in at]
        return found

    @property
    def serving(self) -> list[Stream]:
        """The streams whose engines may be used."""
        allowed = self.request.constraints.serving
        aggregated = not allowed or "aggregated" in allowed
        return [stream for stream in self.streams if aggregated or stream.role != "aggregated"]

    def _cheapest_token(self, limits: solve.Limits, deadline: float | None) -> Fleet | None:
        """No demand is stated: the fleet with the lowest price per token."""
        goal = ratio.PerLoad(limits, deadline)
        offers, columns = self._columns(limits, deadline, goal)
        solution = ratio.cheapest(columns, limits, time_limit=left(deadline)) if columns else None
        if solution is None:
            return None
        tokens = self.traffic.osl_mean or self.traffic.isl_mean
        price, bound = (usd / 3600 / tokens * 1e6 for usd in (solution.value, solution.bound))
        solution = replace(solution, value=price, bound=bound)
        return self.deployed(offers, columns, solution, None, "usd_per_million_tokens")

    def deployed(
        self,
        offers: Sequence[Offer],
        columns: Sequence[solve.Column],
        solution: solve.Solution,
        demand: float | None,
        objective: str,
    ) -> Fleet:
        """The fleet of a solution, its traffic shared so that the fullest engine is as empty as can be."""
        by_level = self.request.objective in ("min_latency", "min_energy")
        carried = loads(columns, solution.counts, self.master_limits(demand))
        if self.traffic.concurrency is not None:
            carried = closed_loop.rates(offers, solution.counts, carried)
        items = []
        for count, offer, load in zip(solution.counts, offers, carried, strict=True):
            if count and load > 0:
                held = by_level or offer.stream.prompt_s is not None
                chosen = offer.precise() if held else offer.trimmed(load)
                items.append(
                    Deployed(
                        chosen.engine,
                        chosen.limits,
                        count,
                        load,
                        max(chosen.capacity, load),
                        stream=offer.stream,
                    )
                )
        items.sort(key=lambda item: (item.stream.flow if item.stream else 0, item.candidate.key()))
        return Fleet(tuple(items), solution, objective)
