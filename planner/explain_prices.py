"""What binds, and what a unit of each constraint is worth.

The problem is an integer one, so its constraints have no dual prices: a millisecond more may buy nothing
and three may save a GPU. Each price is the difference of two optima: the request solved again with the
constraint one unit looser, one unit tighter, at the nearest value that pays (found by bisection; the optimum
is monotone in every constraint), and without it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from planc.cost_model import catalogue
from planc.cost_model.formats import fmt, formats
from planc.planner.relax import rounded_down, rounded_up, with_load
from planc.planner.request import Nodes, Slo
from planc.planner.variations import Outcome, OutOfTime, Resolver, Variation

_BISECTIONS = 7
_MANY_NODES = 8

Verdict = Literal["binds", "limits", "slack", "not tried"]

#: fields of `Constraints` that are numbers: one unit in the looser direction, and its name
NUMBERS: dict[str, tuple[float, str]] = {
    "max_gpus": (1, "GPU"),
    "max_replicas": (1, "replica"),
    "max_power_kw": (1.0, "kW"),
    "max_accuracy_drop": (0.001, "of the score"),
    "gpu_memory_utilization": (0.01, "of the memory"),
    "spare_replicas": (-1, "replica"),
    "max_spot_share": (0.01, "of the traffic"),
}
#: fields that list what may be used
LISTS = (
    "weights",
    "activations",
    "kv",
    "engines",
    "gpus",
    "tp",
    "pp",
    "dp",
    "ep",
    "cp",
    "max_num_seqs",
    "max_num_batched_tokens",
    "serving",
)
#: lists of formats, and what they are formats of
ROLES = {"weights": "weight", "activations": "activation", "kv": "kv"}


@dataclass(frozen=True, slots=True)
class Knob:
    """A constraint that can be turned.

    name, unit   as in the request; the unit of `stated`
    stated       its value; None where it is a list, which can only be left open
    step         one unit in the looser direction, signed
    at           the variation with another value
    without      the variation without the constraint; None where that has no meaning
    reached      what the plan makes of it, in the same unit; None where that is not one number
    far          the value that the optimum of `without` needs; beyond it nothing is gained
    least        smallest value that can be asked for
    """

    name: str
    unit: str
    stated: float | None
    step: float = 0.0
    at: Callable[[float], Variation] | None = None
    without: Variation | None = None
    reached: float | None = None
    far: Callable[[Outcome], float] | None = None
    least: float = 1e-9

    @property
    def whole(self) -> bool:
        return isinstance(self.step, int)


@dataclass(frozen=True, slots=True)
class Price:
    """What a constraint costs. Gains are in the objective's unit, never below 0; None: not known.

    verdict            binds: one unit looser is better already; limits: some looser value is; slack: none is
    looser, tighter    the objective's gain from one unit looser, and its loss from one unit tighter
    tighter_fails      one unit tighter is infeasible
    pays_at, pays      the nearest looser value that gains anything, and what it gains
    without            gain from leaving the constraint out
    """

    name: str
    unit: str
    stated: float | None
    step: float
    reached: float | None = None
    verdict: Verdict = "not tried"
    looser: float | None = None
    tighter: float | None = None
    tighter_fails: bool = False
    pays_at: float | None = None
    pays: float | None = None
    without: float | None = None

    def to_json(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__}


def prices(resolver: Resolver, base: Outcome) -> Iterator[Price]:
    """One price per constraint that the request states, and per thing it could have more of. Those that
    time did not allow are "not tried"."""
    late = False
    for knob in knobs(resolver, base):
        blank = Price(knob.name, knob.unit, knob.stated, knob.step, knob.reached)
        if not late:
            resolver.say(f"pricing {knob.name}")
            try:
                yield _price(resolver, base, knob)
                continue
            except OutOfTime:
                late = True
        yield blank


def _price(resolver: Resolver, base: Outcome, knob: Knob) -> Price:
    free = None if knob.without is None else resolver.solve(knob.without)
    without = resolver.gain(free, base)
    looser = tighter = pays_at = pays = None
    fails = False
    if knob.at is not None and knob.stated is not None:
        # where leaving it out gains nothing, no looser value does
        looser = (
            0.0 if without == 0.0 else resolver.gain(resolver.solve(knob.at(knob.stated + knob.step)), base)
        )
        back = knob.stated - knob.step
        if back >= knob.least:
            found = resolver.solve(knob.at(back))
            fails = found is None
            loss = resolver.gain(found, base)
            tighter = None if loss is None else abs(loss)
        if looser:
            pays_at, pays = knob.stated + knob.step, looser
        elif without and free is not None and knob.far is not None:
            pays_at, pays = _nearest(resolver, base, knob, knob.far(free)) or (None, None)
    verdict: Verdict = "binds" if looser else "limits" if without else "slack"
    return Price(
        knob.name,
        knob.unit,
        knob.stated,
        knob.step,
        knob.reached,
        verdict,
        looser,
        tighter,
        fails,
        pays_at,
        pays,
        without,
    )


def _nearest(resolver: Resolver, base: Outcome, knob: Knob, far: float) -> tuple[float, float] | None:
    """(the value nearest to the stated one that gains, its gain); None when not even `far` does."""
    assert knob.at is not None
    assert knob.stated is not None
    up = knob.step > 0
    tidy: Callable[[float], float] = (
        (lambda x: float(round(x))) if knob.whole else (rounded_up if up else rounded_down)
    )
    gain = lambda value: resolver.gain(resolver.solve(knob.at(value)), base)  # type: ignore[misc] # noqa: E731
    low, high = knob.stated, tidy(far)
    best = gain(high)
    if not best:
        return None
    for _ in range(_BISECTIONS):
        middle = tidy(math.sqrt(low * high) if low > 0 and high > 0 else (low + high) / 2)
        if not min(low, high) < middle < max(low, high):
            break
        found = gain(middle)
        if found:
            high, best = middle, found
        else:
            low = middle
    return high, best


# -- what can be turned --------------------------------------------------------------------


def knobs(resolver: Resolver, base: Outcome) -> Iterator[Knob]:
    """Demand, objectives, inventory, memory, constraints: in this order."""
    start = resolver.start
    yield from _demand(start, base)
    for slo in start.request.slos():
        yield _objective(start, slo, base)
    yield from _inventory(start, base)
    yield from _memory(start, base)
    yield from _constraints(start, base, resolver.table.model.native_format)


def _demand(start: Variation, base: Outcome) -> Iterator[Knob]:
    demand = base.search.demand
    if demand is None:
        return
    request, closed = start.request, base.search.traffic.concurrency is not None

    def at(load: float) -> Variation:
        return start.changed(workload=with_load(request.workload, load, closed))

    step = -max(1, round(demand / 100)) if closed else -demand / 100
    less = start.request.objective != "max_goodput"
    yield Knob(
        "workload.concurrency" if closed else "workload.request_rate",
        "users" if closed else "requests/s",
        demand,
        step,
        at,
        at(max(1.0, demand // 2) if closed else demand / 2) if less else None,
        base.fleet.capacity,
        lambda _: max(1.0, demand // 2) if closed else demand / 2,
    )


def _objective(start: Variation, slo: Slo, base: Outcome) -> Knob:
    """A latency objective, of the request or of one traffic class."""
    request = start.request
    owner = getattr(slo, "of", "")

    def having(value: float | None) -> Variation:
        if owner and slo.key in (own := next(c.slo for c in request.workload.classes if c.name == owner)):
            limits = {k: v for k, v in own.items() if k != slo.key} | ({slo.key: value} if value else {})
            classes = [
                c.model_copy(update={"slo": limits}) if c.name == owner else c
                for c in request.workload.classes
            ]
            return start.changed(workload=request.workload.model_copy(update={"classes": classes}))
        limits = {k: v for k, v in request.slo.items() if k != slo.key} | ({slo.key: value} if value else {})
        return start.changed(slo=limits)

    def reached(found: Outcome) -> float:
        return 1e3 * max(float(i.state(found.search.traffic).value(slo)[0, 0]) for i in found.fleet.items)

    name = f"slo.{slo.key}" + (f" of {owner}" if owner else "")
    limit = 1e3 * slo.limit
    return Knob(
        name,
        "ms",
        limit,
        1.0,
        having,
        having(None),
        reached(base),
        lambda free: max(reached(free), limit + 1),
    )


def _inventory(start: Variation, base: Outcome) -> Iterator[Knob]:
    request = start.request
    used = [0] * len(base.search.groups)
    for item in base.fleet.items:
        used[item.candidate.group.index] += item.count * item.candidate.shape.world
    for position, nodes in enumerate(request.inventory.nodes):

        def having(count: float, position: int = position) -> Variation:
            return _nodes(start, position, round(count))

        yield Knob(
            f"inventory.nodes[{position}].count",
            f"nodes of {nodes.gpus_per_node} {nodes.gpu}",
            nodes.count,
            1,
            having,
            having(nodes.count * _MANY_NODES) if request.objective != "max_goodput" else None,
            used[position] / nodes.gpus_per_node,
            lambda free, position=position, per=nodes.gpus_per_node: math.ceil(
                sum(
                    i.count * i.candidate.shape.world
                    for i in free.fleet.items
                    if i.candidate.group.index == position
                )
                / per
            ),
            least=0 if len(request.inventory.nodes) > 1 else 1,
        )
    for gpu in dict.fromkeys(nodes.gpu for nodes in request.inventory.nodes):
        first = next(nodes for nodes in request.inventory.nodes if nodes.gpu == gpu)

        def more(count: float, first: Nodes = first) -> Variation:
            lone = first.model_copy(update={"gpus_per_node": 1, "count": round(count), "name": None})
            return _inventory_of(start, [*request.inventory.nodes, lone])

        whole = sum(n.count * n.gpus_per_node for n in request.inventory.nodes if n.gpu == gpu)
        taken = sum(u for u, n in zip(used, request.inventory.nodes, strict=True) if n.gpu == gpu)
        yield Knob(
            f"{gpu} GPUs, each a node of its own",
            "GPUs",
            whole,
            1,
            partial(_beyond, more, whole),
            reached=float(taken),
            least=whole + 1,
        )


def _beyond(more: Callable[[float], Variation], whole: int, total: float) -> Variation:
    return more(total - whole)


def _nodes(start: Variation, position: int, count: int) -> Variation:
    old = start.request.inventory.nodes
    if count < 1:
        return _inventory_of(start, [n for i, n in enumerate(old) if i != position])
    return _inventory_of(
        start, [n.model_copy(update={"count": count}) if i == position else n for i, n in enumerate(old)]
    )


def _inventory_of(start: Variation, nodes: list[Nodes]) -> Variation:
    inventory = start.request.inventory.model_copy(update={"nodes": nodes})
    return start.changed(inventory=inventory)


def _memory(start: Variation, base: Outcome) -> Iterator[Knob]:
    """Of the types that the plan uses: 1 GiB more on each of their GPUs."""
    for name in dict.fromkeys(item.candidate.shape.gpu for item in base.fleet.items):
        size = catalogue.gpu(name).memory_gib

        def at(gib: float, name: str = name, size: float = size) -> Variation:
            return Variation(start.request, {name: gib - size}, start.fusions)

        taken = max(
            base.search.room(i.candidate).memory(i.limits.max_num_seqs, i.limits.budget).total / 2**30
            for i in base.fleet.items
            if i.candidate.shape.gpu == name
        )
        yield Knob(f"memory of each {name}", "GiB", size, 1.0, at, reached=taken)


def _constraints(start: Variation, base: Outcome, native: str) -> Iterator[Knob]:
    limits = start.request.constraints
    reached = _reached(base)
    for name, (step, unit) in NUMBERS.items():
        stated = getattr(limits, name, None)
        if stated is None:
            continue

        def at(value: float, name: str = name, whole: bool = isinstance(step, int)) -> Variation:
            return start.constrained(**{name: round(value) if whole else value})

        least = {"spare_replicas": 0.0}.get(name)
        yield Knob(
            f"constraints.{name}",
            unit,
            stated,
            step,
            at,
            start.constrained(**{name: None}),
            reached.get(name),
            (lambda free, name=name, least=least: _reached(free).get(name, least))
            if name in reached
            else None,
        )
    for name in LISTS:
        if getattr(limits, name, None) is not None:
            anything = every_format(name) if name in ROLES else None
            yield Knob(f"constraints.{name}", "", None, without=start.constrained(**{name: anything}))
    if limits.weights is None and limits.max_accuracy_drop is None and fmt(native).bits > 4:
        yield Knob(
            "constraints.max_accuracy_drop",
            "not stated: the checkpoint's own formats",
            None,
            without=start.constrained(max_accuracy_drop=0.01),
        )


def every_format(name: str) -> list[str]:
    """All formats of weights, activations or the cache. (A list left out allows the checkpoint's own.)"""
    return [known for known, entry in formats().items() if ROLES[name] in entry.roles]


def _reached(found: Outcome) -> dict[str, float]:
    fleet = found.fleet
    return {
        "max_gpus": fleet.gpus,
        "max_replicas": sum(item.count for item in fleet.items),
        "max_power_kw": rounded_up(fleet.watts / 1e3),
        "max_accuracy_drop": max(item.candidate.drop for item in fleet.items),
    }
