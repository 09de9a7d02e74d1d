"""The constraints of a request that can be turned: each with its value, its unit of change, and how the
request looks with another value or without it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Generic

from planc.cost_model import catalogue
from planc.planner.loosen import (
    LISTS,
    NEVER,
    NUMBERS,
    left_open,
    lifted,
    rounded_up,
    with_load,
    with_node_count,
    with_nodes,
    with_objective,
)
from planc.planner.plan import Plan
from planc.planner.resolving import F, V
from planc.planner.slo import Slo
from planc.planner.variations import Outcome, Resolver, Variation

#: an inventory without limit, as a multiple of the stated one
MANY_NODES = 8
#: relative accuracy that a budget of its own would allow where the request states none
_BUDGET = 0.01


@dataclass(frozen=True, slots=True)
class Knob(Generic[V, F]):
    """A constraint that can be turned.

    name, unit   as in the request; the unit of `stated`
    stated       its value; None where it is a list, which can only be left open
    step         one unit in the looser direction, signed; an integer where only whole values count
    at           the variation with another value
    without      the variation without the constraint; None where that has no meaning
    instead      what `without` has in its place
    reached      what a plan makes of it, in the same unit; None where that is not one number
    far          a value so loose that nothing looser gains; None: what the plan of `without` makes of it
    least        smallest value that can be asked for
    sure         whether a plan that reaches a value is a plan where that is asked for
    """

    name: str
    unit: str = ""
    stated: float | None = None
    step: float = 0.0
    at: Callable[[float], V] | None = None
    without: V | None = None
    instead: str = "left out"
    reached: Callable[[F], float] | None = None
    far: float | None = None
    least: float = 1e-9
    sure: bool = True

    @property
    def whole(self) -> bool:
        return isinstance(self.step, int)


#: a constraint of one request
Turned = Knob[Variation, Outcome]


def knobs(resolver: Resolver, base: Outcome) -> Iterator[Turned]:
    """Demand, objectives, inventory, memory, constraints: in this order."""
    yield from of_load(resolver, base)
    yield from of_inventory(resolver)
    for gpu in dict.fromkeys(replica.gpu for replica in base.plan.replicas()):
        yield of_memory(resolver, gpu)
    yield from of_constraints(resolver)


def of_load(resolver: Resolver, base: Outcome) -> Iterator[Turned]:
    """The load and the objectives."""
    yield from _demand(resolver.start, base)
    for slo in resolver.start.request.slos():
        yield _objective(resolver.start, slo)


def of_inventory(resolver: Resolver) -> Iterator[Turned]:
    """Nodes of each group, single GPUs of each type."""
    nodes = resolver.start.request.inventory.nodes
    for position in range(len(nodes)):
        yield _node_count(resolver.start, position)
    for gpu in dict.fromkeys(group.gpu for group in nodes):
        yield _gpu_count(resolver.start, gpu)


def of_constraints(resolver: Resolver) -> Iterator[Turned]:
    """What the request allows."""
    yield from _numbers(resolver.start)
    yield from _lists(resolver.start, resolver.table.model.native_format)


def _demand(start: Variation, base: Outcome) -> Iterator[Turned]:
    demand = base.search.demand
    if demand is None:
        return
    request, closed = start.request, base.search.traffic.concurrency is not None

    def at(load: float) -> Variation:
        return start.changed(workload=with_load(request.workload, load, closed))

    half = max(1.0, demand // 2) if closed else demand / 2
    yield Knob(
        "workload.concurrency" if closed else "workload.request_rate",
        "users" if closed else "requests/s",
        demand,
        -max(1, round(demand / 100)) if closed else -demand / 100,
        at,
        at(half) if request.objective != "max_goodput" else None,
        "half of it",
        lambda found: _capacity(found.plan),
        half,
    )


def _capacity(plan: Plan) -> float:
    """What a plan could carry within the objectives."""
    name = "capacity_users" if "capacity_users" in plan.predicted else "capacity_requests_s"
    return plan.predicted[name].value


def _objective(start: Variation, slo: Slo) -> Turned:
    """A latency objective, of the request or of one traffic class."""
    key = slo.key.rpartition(": ")[2]

    def at(limit: float) -> Variation:
        return replace(start, request=with_objective(start.request, key, limit, slo.traffic_class))

    return Knob(
        f"slo.{slo.key}", "ms", 1e3 * slo.limit, 1.0, at, at(NEVER), reached=lambda found: found.latency(slo)
    )


def _node_count(start: Variation, position: int) -> Turned:
    old = start.request.inventory.nodes
    mine = old[position]

    def at(count: float) -> Variation:
        return replace(start, request=with_node_count(start.request, position, round(count)))

    def reached(found: Outcome) -> float:
        return _used(found, {position}) / mine.gpus_per_node

    return Knob(
        f"inventory.nodes[{position}].count",
        f"nodes of {mine.gpus_per_node} {mine.gpu}",
        mine.count,
        1,
        at,
        at(mine.count * MANY_NODES) if start.request.objective != "max_goodput" else None,
        f"{MANY_NODES} times as many",
        reached,
        least=0 if len(old) > 1 else 1,
        sure=False,
    )


def _gpu_count(start: Variation, gpu: str) -> Turned:
    """Single GPUs of a type beside those that there are, each in a node of its own."""
    old = start.request.inventory.nodes
    mine = [nodes for nodes in old if nodes.gpu == gpu]
    whole = sum(nodes.count * nodes.gpus_per_node for nodes in mine)

    def at(count: float) -> Variation:
        lone = {"gpus_per_node": 1, "count": round(count) - whole, "name": None}
        return replace(start, request=with_nodes(start.request, [*old, mine[0].model_copy(update=lone)]))

    def reached(found: Outcome) -> float:
        return _used(found, {i for i, nodes in enumerate(old) if nodes.gpu == gpu})

    name = f"inventory: single {gpu}"
    return Knob(name, "GPUs", whole, 1, at, reached=reached, least=whole + 1)


def _used(found: Outcome, groups: set[int]) -> float:
    """GPUs that a fleet takes from some node groups."""
    return float(
        sum(
            item.count * item.candidate.shape.world
            for item in found.fleet.items
            if item.candidate.group.index in groups
        )
    )


def of_memory(resolver: Resolver, gpu: str) -> Turned:
    """Memory of each GPU of a type, for the engines as for the cache."""
    start, size = resolver.start, catalogue.gpu(gpu).memory_gib

    def at(gib: float) -> Variation:
        return Variation(start.request, {gpu: gib - size})

    def reached(found: Outcome) -> float:
        return max((r.memory.total_gib for r in found.plan.replicas() if r.gpu == gpu), default=0.0)

    return Knob(f"memory of each {gpu}", "GiB", size, 1.0, at, reached=reached, sure=False)


def _numbers(start: Variation) -> Iterator[Turned]:
    for name, (step, unit) in NUMBERS.items():
        stated = getattr(start.request.constraints, name, None)
        if stated is None:
            continue

        def at(value: float, name: str = name, whole: bool = isinstance(step, int)) -> Variation:
            return start.constrained(**{name: round(value) if whole else value})

        yield Knob(
            f"constraints.{name}",
            unit,
            stated,
            step,
            at,
            start.constrained(**{name: lifted(name)}),
            reached=_REACHED.get(name),
            far=None if name in _REACHED else 0.0 if step < 0 else 1.0,
        )


_REACHED: dict[str, Callable[[Outcome], float]] = {
    "max_gpus": lambda found: float(found.fleet.gpus),
    "max_replicas": lambda found: float(sum(item.count for item in found.fleet.items)),
    "max_power_kw": lambda found: rounded_up(found.fleet.watts / 1e3),
    "max_accuracy_drop": lambda found: max(item.candidate.drop for item in found.fleet.items),
}


def _lists(start: Variation, native: str) -> Iterator[Turned]:
    limits = start.request.constraints
    for name in LISTS:
        if getattr(limits, name) is not None:
            yield Knob(
                f"constraints.{name}",
                without=start.constrained(**{name: left_open(name)}),
                instead="anything",
            )
    if limits.weights is None and limits.max_accuracy_drop is None:
        kept = f"constraints.weights (left out: {native} is kept)"
        wider = start.constrained(max_accuracy_drop=_BUDGET)
        yield Knob(kept, without=wider, instead=f"max_accuracy_drop: {_BUDGET:g}")
