"""Several models on one inventory: one master problem over the engines of all of them, a plan for each.

A file of this kind has, in place of `model`, `workload` and `slo`, a list `models` of parts with a `name` and
these keys. The inventory is theirs together; the fleet of all is as cheap as can be.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from planc.cost_model.table import CostTable
from planc.errors import CheckFailed, Infeasible, InvalidBundle, InvalidField, PlancError
from planc.planner import assemble, solve
from planc.planner.check import check
from planc.planner.compile import assembled
from planc.planner.mistakes import translated
from planc.planner.offers import Fleet, Offer
from planc.planner.overrides import apply_overrides
from planc.planner.plan import Plan, load_plan
from planc.planner.promising import promising
from planc.planner.referee import Judgement, Proposal, Referee, agreed
from planc.planner.request import Inventory, Request, make_request, read_mapping
from planc.planner.search import Progress, Search
from planc.planner.workload import Part

_OWN = ("max_gpus", "max_replicas", "max_power_kw", "max_spot_share", "spare_replicas")


class Together(Part):
    """Limits of the whole fleet."""

    max_gpus: int | None = Field(default=None, ge=1)
    max_power_kw: float | None = Field(default=None, gt=0)


class Member(Part):
    """One model: keys as in a request, checked as such."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")
    model: str = Field(min_length=1)
    workload: Any
    slo: Any = Field(default_factory=dict)
    constraints: Any = Field(default_factory=dict)


class JointRequest(Part):
    """Several models that share an inventory."""

    inventory: Inventory
    models: list[Member] = Field(min_length=1)
    constraints: Together = Field(default_factory=Together)


@dataclass(frozen=True, slots=True)
class Joint:
    """Requests by name, in order, and the limits of the fleet that serves them all."""

    requests: Mapping[str, Request]
    limits: Together


@dataclass(frozen=True, slots=True)
class JointPlan:
    """A plan per model, and the limits of all; `solution` is that of the whole fleet, in USD per hour."""

    plans: Mapping[str, Plan]
    solution: solve.Solution
    limits: Together = field(default_factory=Together)

    @property
    def gpus(self) -> int:
        return sum(len(replica.gpus) for plan in self.plans.values() for replica in plan.replicas())

    @property
    def usd_per_hour(self) -> float:
        return sum(plan.predicted["usd_per_hour"].value for plan in self.plans.values())


def document(plan: JointPlan) -> dict[str, Any]:
    """`fleet.json`: what the models take together, and where each one's bundle lies."""
    return {
        "objective": "usd_per_hour",
        "value": plan.solution.value,
        "bound": plan.solution.bound,
        "gap": plan.solution.gap,
        "status": plan.solution.status,
        "gpus": plan.gpus,
        "constraints": plan.limits.model_dump(exclude_none=True),
        "models": {
            name: {
                "bundle": name,
                "plan": one.fingerprint.plan,
                "gpus": sum(len(replica.gpus) for replica in one.replicas()),
                "usd_per_hour": one.predicted["usd_per_hour"].value,
                "requests_s": one.predicted["requests_s"].value,
            }
            for name, one in plan.plans.items()
        },
    }


def load_fleet(folder: str | Path) -> JointPlan:
    """Reads what `planc compile` wrote of several models: `fleet.json` and their bundles.

    Raises InvalidBundle, and what `load_plan` raises.
    """
    try:
        raw = json.loads((Path(folder) / "fleet.json").read_text(encoding="utf-8"))
        limits = Together.model_validate(raw.get("constraints", {}))
        solution = solve.Solution((), raw["status"], float(raw["value"]), float(raw["bound"]))
        bundles = {name: Path(folder) / one["bundle"] for name, one in raw["models"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        words = f"{type(error).__name__}: {error}".splitlines()[0]
        raise InvalidBundle(
            path=folder, reason=f"fleet.json cannot be read ({words})", mend="Compile the request again."
        ) from None
    return JointPlan({name: load_plan(place) for name, place in bundles.items()}, solution, limits)


def is_fleet(folder: str | Path) -> bool:
    """Was a folder written for several models?"""
    return (Path(folder) / "fleet.json").is_file() and not (Path(folder) / "plan.json").exists()


def is_joint(path: str | Path) -> bool:
    """Does a request file list several models?"""
    try:
        return "models" in read_mapping(path)
    except PlancError:
        return False


def load_joint(path: str | Path, overrides: Iterable[str] = ()) -> Joint:
    """Reads a file with several models; paths in it are relative to it. Raises as `load_request` does."""
    raw = apply_overrides(read_mapping(path), overrides)
    where = f"request '{path}'"
    try:
        found = JointRequest.model_validate(raw)
    except ValidationError as error:
        raise translated(error, JointRequest, raw, where) from None
    requests: dict[str, Request] = {}
    for number, member in enumerate(found.models):
        inside = f"{where}, models[{number}]"
        if member.name in requests:
            raise InvalidField(
                where=inside,
                field="name",
                value=member.name,
                reason="two models have this name",
                mend="Give each a name of its own.",
            )
        own = {key: value for key, value in raw["models"][number].items() if key != "name"}
        request = make_request({**own, "inventory": raw["inventory"]}, inside)
        request._base = Path(path).parent
        requests[member.name] = _alone(request, inside)
    return Joint(requests, found.constraints)


def _alone(request: Request, where: str) -> Request:
    """A request that can be planned beside others: its load is a rate, its limits are the fleet's."""
    for key in _OWN:
        value = getattr(request.constraints, key)
        if value is not None:
            raise InvalidField(
                where=where,
                field=f"constraints.{key}",
                value=value,
                reason="several models share the inventory",
                mend="Give max_gpus and max_power_kw for all of them, at the top level.",
            )
    if request.objective != "min_cost" or request.workload.concurrency or request.workload.rate:
        raise InvalidField(
            where=where,
            field="workload" if request.objective == "min_cost" else "objective",
            value=request.objective,
            reason="several models are planned for the lowest price of stated request rates",
            mend="Give each workload a request_rate.",
        )
    return request


def plans(
    joint: Joint,
    tables: Mapping[str, CostTable],
    *,
    time_limit: float | None = None,
    progress: Progress | None = None,
    referee: Referee | None = None,
) -> JointPlan:
    """The cheapest fleet that serves all models, as one plan for each.

    Raises Infeasible when the inventory does not carry them together, and what `compile.plan` raises.
    """
    start = time.perf_counter()
    say: Callable[[str], None] = progress or (lambda message: None)
    searches = {
        name: Search(request, tables[name], progress=progress) for name, request in joint.requests.items()
    }
    names = tuple(searches)

    def propose(mine: Sequence[Search], seconds: float | None) -> Proposal | None:
        say("solving")
        return proposed(mine, joint.limits, seconds)

    found = propose(tuple(searches.values()), time_limit)
    if found is None:
        raise _infeasible(searches, cut=False)
    judged: dict[str, Judgement] = {}
    if referee is not None:
        spent = time.perf_counter() - start
        rest = None if time_limit is None else max(time_limit - spent, 0.0)
        settled = agreed(tuple(searches.values()), found, propose, referee, rest)
        if settled is None:
            raise _infeasible(searches, cut=True)
        found = settled.proposal
        searches = dict(zip(names, settled.searches, strict=True))
        judged = dict(zip(names, settled.judgements, strict=True))
    solution = found.solution
    fleets = {name: shared(fleet, solution) for name, fleet in zip(names, found.fleets, strict=True)}
    items = [item for fleet in fleets.values() for item in fleet.items for _ in range(item.count)]
    groups = next(iter(searches.values())).groups
    homes = assemble.placement(groups, [item.candidate for item in items])
    made: dict[str, Plan] = {}
    for name, fleet in fleets.items():
        count = sum(item.count for item in fleet.items)
        mine, homes = homes[:count], homes[count:]
        plan = assembled(searches[name], fleet, time.perf_counter() - start, judged.get(name), homes=mine)
        wrong = check(plan, tables[name], joint.requests[name])
        if wrong:
            raise CheckFailed(what=f"the plan of {name}", reason=wrong[0], mend="Please report the request.")
        made[name] = plan
    _apart(made)
    return JointPlan(made, solution, joint.limits)


def shared(fleet: Fleet, whole: solve.Solution) -> Fleet:
    """A model's fleet with its part of the bound of all, by price."""
    mine = fleet.solution
    alone = replace(mine, status=whole.status, bound=mine.value * whole.bound / whole.value)
    return replace(fleet, solution=alone)


def proposed(searches: Sequence[Search], limits: Together, time_limit: float | None) -> Proposal | None:
    """The cheapest fleets of several models, and the solution of the master problem over all of them."""
    total = sum(search.demand or 0.0 for search in searches)
    classes: list[float] = []
    flows: list[solve.Flow] = []
    rough: list[tuple[Offer, solve.Column]] = []
    count = sum(len(search.traffic.shares) for search in searches)
    for owner, search in enumerate(searches):
        first, before = len(flows), len(classes)
        part = (search.demand or 0.0) / total
        classes += [share * part for share in search.traffic.shares]
        for flow in search.flows:
            after = count - before - len(flow.shares)
            shares = (0.0,) * before + flow.shares + (0.0,) * after
            flows.append(replace(flow, shares=shares, split=flow.split + first if flow.split else 0))
        rough += [
            (offer, replace(column, flow=column.flow + first, owner=owner))
            for offer, column in search.rough()
        ]
    whole = replace(
        searches[0].master_limits(total),
        classes=tuple(classes),
        flows=tuple(flows),
        max_gpus=limits.max_gpus,
        max_watts=limits.max_power_kw * 1e3 if limits.max_power_kw is not None else None,
    )
    deadline = None if time_limit is None else time.perf_counter() + time_limit
    offers, columns = promising(rough, whole, deadline)
    if not columns:
        return None
    solution = solve.solve(columns, whole, time_limit=time_limit)
    if solution is None:
        return None
    fleets = []
    for owner, search in enumerate(searches):
        mine = [i for i, column in enumerate(columns) if column.owner == owner]
        own = [offers[i].column(offers[i].capacity) for i in mine]
        bought = tuple(solution.counts[i] for i in mine)
        usd = sum(n * column.weight for n, column in zip(bought, own, strict=True))
        alone = solve.Solution(bought, solution.status, usd, usd)
        fleet = search.deployed([offers[i] for i in mine], own, alone, search.demand, "usd_per_hour")
        fleets.append(fleet)
    return Proposal(tuple(fleets), solution)


def _infeasible(searches: Mapping[str, Search], *, cut: bool) -> Infeasible:
    """Why the models do not fit together: one does not fit alone, or all of them; or cuts left none."""
    if cut:
        reason = "no fleet kept the objectives of all models when their workloads were simulated"
    else:
        lone = [name for name, search in searches.items() if search.fleet() is None]
        reason = (
            f"{lone[0]} alone does not fit the inventory (compile it by itself to see what would help)"
            if lone
            else "each model fits the inventory, all of them together do not"
        )
    return Infeasible(
        reason=reason,
        relaxations="\nAdd nodes, lower a request_rate, or loosen an objective.",
        changes=["add nodes", "lower a request_rate", "loosen an objective"],
    )


def _apart(plans: Mapping[str, Plan]) -> None:
    """No GPU serves two models."""
    used: dict[str, str] = {}
    for name, plan in plans.items():
        for replica in plan.replicas():
            for gpu in replica.gpus:
                if gpu in used:
                    raise CheckFailed(
                        what="the fleet",
                        reason=f"{gpu} is planned for {used[gpu]} and {name}",
                        mend="Please report the request.",
                    )
                used[gpu] = name
