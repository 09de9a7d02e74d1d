"""`plan(request, table)`: the whole search, from a request and a cost table to a plan."""

from __future__ import annotations

import time
from pathlib import Path

from planc.cost_model.formats import fmt
from planc.cost_model.parts import split
from planc.cost_model.table import CostTable
from planc.errors import CheckFailed, Infeasible
from planc.planner import assemble
from planc.planner.alternatives import rejected
from planc.planner.check import check, shape_of
from planc.planner.expert_load import expert_maps, with_expert_load
from planc.planner.observe import observe
from planc.planner.offers import Fleet
from planc.planner.plan import Fingerprint, ModelSummary, Plan, Predicted, Replica, Routing, Solver
from planc.planner.predict import by_class, predicted
from planc.planner.referee import Judgement, Referee, accepted
from planc.planner.request import Request
from planc.planner.routing import decided
from planc.planner.search import Progress, Search


def plan(
    request: Request,
    table: CostTable,
    *,
    time_limit: float | None = None,
    progress: Progress | None = None,
    referee: Referee | None = None,
) -> Plan:
    """The best plan for the request, sealed.

    time_limit   seconds for the integer programs and for proposals; a plan that is then not proved best, or
                 misses an objective when simulated, says so
    progress     called with a word on what is being done
    referee      plays the workload against proposals; None: what formulas say is taken

    For the objective `pareto` the balanced plan of the front, whose `front` holds the others.
    Raises Infeasible (with the smallest single relaxations that were found to help), InvalidField.
    """
    start = time.perf_counter()
    table = with_expert_load(request, table)
    if request.objective == "pareto":
        from planc.planner.pareto import front

        return front(request, table, time_limit=time_limit, progress=progress, referee=referee).balanced
    search = Search(request, table, progress=progress)
    fleet = search.fleet(time_limit)
    if fleet is None:
        from planc.planner.relax import infeasible

        raise infeasible(search, time_limit)
    judgement = None
    if referee is not None and table.model.kind == "causal_lm":
        rest = None if time_limit is None else max(time_limit - (time.perf_counter() - start), 0.0)
        judged = accepted(search, fleet, referee, rest)
        if judged is None:
            raise never_accepted(search)
        search, fleet, judgement = judged
    if progress:
        progress("checking the plan")
    route = decided(search, fleet, referee)
    found = assembled(search, fleet, time.perf_counter() - start, judgement, route=route)
    wrong = check(found, table, request)
    if wrong:
        raise CheckFailed(what="the plan", reason=wrong[0], mend="Please report the request.")
    found._evidence = observe(search, fleet, found)
    return found


def never_accepted(search: Search) -> Infeasible:
    """What to raise when a referee refused every fleet."""
    kept = f"{search.demand:g}" if search.demand else "any load"
    return Infeasible(
        reason=f"by formulas the inventory carries {kept}, but no fleet kept the objectives when its "
        "workload was simulated",
        relaxations="\nLoosen the tightest objective a little, or compile with --no-simulate to see the "
        "plan by formulas.",
        changes=[],
    )


def assembled(
    search: Search,
    fleet: Fleet,
    seconds: float,
    judgement: Judgement | None = None,
    homes: list[list[str]] | None = None,
    route: Routing | None = None,
) -> Plan:
    """The plan document of a fleet.

    judgement   what a referee found of it
    homes       GPUs of each replica, where others lie on the same inventory
    route       how requests are spread, where that was decided
    """
    table = search.table
    pools = assemble.pools(search, fleet, homes)
    numbers = predicted(fleet.items, search.traffic, search.slos)
    totals = [r.memory.total_gib for pool in pools for r in pool.replicas]
    numbers["memory_gib"] = Predicted(value=max(totals), low=max(totals), high=max(totals), source="assumed")
    return Plan(
        fingerprint=Fingerprint(
            request=search.request.fingerprint(),
            model=table.fingerprint,
            profile=assemble.profile_fingerprint(),
        ),
        model=summary(search.request, table, pools[0].replicas[0]),
        request=search.request.dump(),
        solver=Solver(
            status=fleet.solution.status,
            objective=fleet.objective,
            value=fleet.solution.value,
            bound=fleet.solution.bound,
            gap=fleet.solution.gap,
            seconds=seconds,
            candidates=search.considered,
            pruned=dict(sorted((k, v) for k, v in search.pruned.items() if v)),
        ),
        predicted=dict(sorted(numbers.items())),
        predicted_by_class=by_class(fleet.items, search.traffic, search.slos),
        simulated={k: dict(v) for k, v in judgement.latencies.items()} if judgement else {},
        pools=pools,
        routing=route or decided(search, fleet),
        layers=assemble.layers(table, fleet),
        experts=expert_maps(table, pools),
        rejected=rejected(search, fleet),
        coverage=assemble.coverage(search, judgement),
    ).sealed()


def summary(request: Request, table: CostTable, replica: Replica) -> ModelSummary:
    """What the plan is for; its cache in the formats of the plan's first replica."""
    facts, shape = table.model, shape_of(replica)
    classes = split(table, shape.formats).classes
    return ModelSummary(
        name=facts.name,
        source=_source(request),
        architecture=facts.architecture,
        kind=facts.kind,
        parameters=facts.parameters,
        active_parameters=facts.active_parameters,
        kv_bytes_per_token=round(
            sum(c.count * c.kv_elements * fmt(shape.kv_format(c.name)).bytes for c in classes)
        ),
    )


def _source(request: Request) -> str:
    """The model as the request names it; a folder of weights by where it lies, for whoever serves it."""
    place = Path(request.model_path())
    return str(place.resolve()) if place.is_dir() else request.model
