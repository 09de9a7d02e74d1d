"""Why a plan is as it is: what binds and what a unit of it would buy, what each decision bought, where the
time and the memory go; and why a named alternative lost.

The request of the plan is solved again, as it stands and varied. What is compared is found in the same way:
either a referee plays the workload against every fleet, as it does when a plan is compiled, or none is judged
by more than formulas.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from planc.cost_model.table import CostTable
from planc.errors import CheckFailed
from planc.planner.breakdown import bounds, replica_breakdown
from planc.planner.explain_ablation import Ablation, ablations, engine_words, fleet_words, metrics
from planc.planner.explain_prices import Price, prices
from planc.planner.explain_why_not import WhyNot, why_not
from planc.planner.plan import Plan
from planc.planner.referee import Referee
from planc.planner.request import Request, make_request
from planc.planner.resolving import OutOfTime
from planc.planner.routing import words as routed
from planc.planner.traffic import traffic
from planc.planner.variations import Outcome, Resolver

#: seconds of wall clock for re-solving when none are given
SECONDS = 300.0


@dataclass(frozen=True, slots=True)
class Engine:
    """One kind of engine of a plan: its typical steps op by op (as `planner.breakdown` has them), what bounds
    them, and what lies in the memory of one of its GPUs, GiB."""

    role: str
    label: str
    count: int
    steps: list[dict[str, Any]]
    bounds: Mapping[str, Mapping[str, float]]
    memory: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Explanation:
    """All of it. With an alternative named, `why_not` alone is filled.

    objective, value   what is optimised, in the unit that its name ends in, and what the plan reaches
    complete           False when time ran out before everything was tried
    solved             how many varied requests were solved
    simulated          whether fleets, the plan's as all others, were judged by playing the workload
    """

    model: str
    fleet: str
    objective: str
    value: float
    status: str
    metrics: Mapping[str, float]
    prices: tuple[Price, ...] = ()
    ablations: tuple[Ablation, ...] = ()
    engines: tuple[Engine, ...] = ()
    why_not: WhyNot | None = None
    notes: tuple[str, ...] = ()
    complete: bool = True
    solved: int = 0
    simulated: bool = False
    maximising: bool = field(default=False)

    def to_json(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "fleet": self.fleet,
            "objective": {"name": self.objective, "value": self.value, "maximised": self.maximising},
            "status": self.status,
            "metrics": dict(self.metrics),
            "constraints": [price.to_json() for price in self.prices],
            "decisions": [ablation.to_json() for ablation in self.ablations],
            "engines": [engine_json(engine) for engine in self.engines],
            "why_not": None if self.why_not is None else self.why_not.to_json(),
            "notes": list(self.notes),
            "complete": self.complete,
            "solved": self.solved,
            "simulated": self.simulated,
        }


def engine_json(engine: Engine) -> dict[str, Any]:
    return {
        "role": engine.role,
        "engine": engine.label,
        "count": engine.count,
        "steps": engine.steps,
        "bounds": {phase: dict(shares) for phase, shares in engine.bounds.items()},
        "memory": dict(engine.memory),
    }


def explain(
    plan: Plan,
    table: CostTable,
    *,
    request: Request | None = None,
    alternative: str | None = None,
    time_limit: float | None = None,
    progress: Callable[[str], None] | None = None,
    referee: Referee | None = None,
) -> Explanation:
    """Explains a plan, or why the alternative ("tp=8,weights=bf16") lost.

    request      that of the plan with its folder, where it names files
    time_limit   seconds of wall clock for varied requests, besides what the request itself takes; what they
                 do not allow is marked as not tried
    referee      as in `planner.compile.plan`, for every fleet that is compared; None: formulas alone

    Raises CheckFailed when the request has no plan with present numbers, InvalidField, UnknownField or
    UnknownName for an alternative that cannot be named.
    """
    request = request or make_request(plan.request)
    limit = SECONDS if time_limit is None else time_limit
    resolver = Resolver(request, table, seconds=limit, progress=progress, referee=referee)
    base = resolver.base
    if base is None:
        raise CheckFailed(
            what="the plan's request",
            reason="no plan meets it with present numbers",
            mend="Compile it again; that says what would help.",
        )
    found, asked = tuple[Price, ...](), None
    taken: tuple[Ablation, ...] = ()
    complete = True
    if alternative is None:
        with resolver.within(0.5):
            found = tuple(prices(resolver, base))
        taken = tuple(ablations(resolver, base))
        if any(price.verdict == "not tried" for price in found):
            found = tuple(prices(resolver, base))  # what was solved is remembered
        complete = all(p.verdict != "not tried" for p in found) and all(a.tried for a in taken)
    else:
        try:
            asked = why_not(resolver, base, alternative)
        except OutOfTime:
            complete = False
    return Explanation(
        model=plan.model.name,
        fleet=fleet_words(plan),
        objective=base.objective,
        value=base.value,
        status=plan.solver.status,
        metrics=metrics(plan),
        prices=found,
        ablations=taken,
        engines=() if alternative is not None else engines(plan, table, request),
        why_not=asked,
        notes=tuple(_notes(plan, base, resolver, taken, asked, complete)),
        complete=complete,
        solved=resolver.solved,
        simulated=referee is not None,
        maximising=resolver.maximising,
    )


def engines(plan: Plan, table: CostTable, request: Request) -> tuple[Engine, ...]:
    """Each kind of engine of a plan taken apart; prefill and decode pools by their own phase."""
    load = traffic(request, table.model.kind)
    found: dict[str, Engine] = {}
    counts: dict[str, int] = {}
    for pool in plan.pools:
        for replica in pool.replicas:
            key = pool.role + replica.model_dump_json(exclude={"gpus", "traffic_share"})
            counts[key] = counts.get(key, 0) + 1
            if key in found:
                continue
            rows = replica_breakdown(replica, plan, table, request, load)
            if pool.role in ("prefill", "decode"):
                rows = [row for row in rows if row["phase"] == pool.role]
            memory = replica.memory.model_dump()
            found[key] = Engine(pool.role, engine_words(replica), 0, rows, bounds(rows), memory)
    return tuple(
        Engine(e.role, e.label, counts[key], e.steps, e.bounds, e.memory) for key, e in found.items()
    )


def _notes(
    plan: Plan,
    base: Outcome,
    resolver: Resolver,
    taken: Sequence[Ablation],
    asked: WhyNot | None,
    complete: bool,
) -> list[str]:
    notes = []
    same = plan.solver.objective == base.objective
    if same and abs(plan.solver.value - base.value) > 1e-6 * abs(base.value):
        words = f"{base.value:.6g} {base.objective} ({fleet_words(base.plan)})"
        notes.append(
            f"solved again the best is {words}, not {plan.solver.value:.6g}: the plan was made with other "
            "numbers, or in less time. Gains and losses are against the former"
        )
    if resolver.missed:
        notes.append(f"the plan misses {resolver.missed}; so may what is compared with it")
    if asked is not None and "replicas" in asked.asked:
        notes.append("so many engines of one kind are evaluated by formulas alone")
    elif resolver.judges:
        words = "every fleet that is compared was judged by playing the workload"
        cuts = len(base.search.cuts)
        notes.append(words + (f"; that cut {cuts} engines" if cuts else ""))
    elif plan.simulated:
        notes.append("the plan was simulated; here both sides are compared by formulas alone")
    else:
        notes.append("both sides are compared by formulas alone, as the plan was made")
    if plan.routing is not None and plan.routing.compared:
        notes.append(f"routing {routed(plan.routing)}")
    better = [one for one in taken if one.loss is not None and one.loss < 0]
    if better:
        notes.append(
            f"without {better[0].decision} a better plan was found: what a simulation refuses is cut further "
            "than it proves"
        )
    if resolver.restricted:
        notes.append(
            f"solved among {len(resolver.layouts or ())} promising layouts: gains may be larger, and losses "
            "smaller, than stated"
        )
    if not complete:
        notes.append("time ran out before everything was tried (--time-limit)")
    return notes
