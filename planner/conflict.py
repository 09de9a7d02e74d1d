"""Which constraints contradict each other, and pairs of changes where no single one helps.

A minimal conflict is found by a deletion filter (Chinneck and Dravnieks, ORSA Journal on Computing 3, 1991):
constraints are left out one after another, and stay out where the rest is infeasible still. What remains is
infeasible, and feasible without any one of its members: each of these statements was made by solving.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import combinations

from planc.planner.loosen import (
    LISTS,
    NEVER,
    NUMBERS,
    constrained,
    left_open,
    lifted,
    rounded_down,
    rounded_up,
    times_nodes,
    with_load,
    with_objective,
)
from planc.planner.relax import Relaxation
from planc.planner.request import Request
from planc.planner.slo import Slo
from planc.planner.variations import Resolver, Variation

_MANY_NODES = 64
_MOST_GPUS = 4096
_LIGHT = 1e-3  # share of the load that counts as none
_BISECTIONS = 5
_MOST_PAIRS = 4

Change = Callable[[Request], Request]


@dataclass(frozen=True, slots=True)
class Part:
    """One constraint of a request.

    name       as it is shown
    left_out   takes it away
    at         gives it another value, of those that are numbers: `stated` now, `far` as good as left out
    words      how a changed value is shown
    """

    name: str
    left_out: Change
    stated: float = 0.0
    far: float = 0.0
    at: Callable[[Request, float], Request] | None = None
    words: Callable[[float], str] = str
    whole: bool = False


@dataclass(frozen=True, slots=True)
class Conflict:
    """Constraints that cannot hold together, though they could without any one of them; () when the request
    is infeasible whatever it leaves out."""

    parts: tuple[Part, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(part.name for part in self.parts)


def conflict(resolver: Resolver) -> Conflict:
    """A minimal set of the request's own constraints that contradict each other. Raises OutOfTime."""
    kept = parts(resolver)
    if not _feasible(resolver, kept, ()):
        return Conflict()
    resolver.say("looking for the conflict")
    every = list(kept)
    for part in every:
        rest = [other for other in kept if other is not part]
        if not _feasible(resolver, every, rest):
            kept = rest
    return Conflict(tuple(kept))


def _feasible(resolver: Resolver, every: list[Part], kept: list[Part] | tuple[Part, ...]) -> bool:
    """Whether the request is feasible with only the kept parts."""
    request = resolver.start.request
    for part in every:
        if all(part is not other for other in kept):
            request = part.left_out(request)
    return resolver.solve(_comparable(resolver, request)) is not None


def _comparable(resolver: Resolver, request: Request) -> Variation:
    """Feasibility does not depend on what is optimised; prices are quick to optimise."""
    if request.objective != "max_goodput" and resolver.base_search.demand is not None:
        request = request.changed(objective="min_cost")
    return Variation(request)


def pairs(resolver: Resolver, clash: Conflict) -> Iterator[Relaxation]:
    """Two changes at once, each as small as bisection finds it; at least one is of the conflict. Raises
    OutOfTime."""
    every = parts(resolver)
    members = set(clash.names)
    tried = [(a, b) for a, b in combinations(every, 2) if not members or {a.name, b.name} & members]
    found = 0
    for a, b in tried:
        resolver.say(f"leaving out {a.name} and {b.name}")
        request = b.left_out(a.left_out(resolver.start.request))
        if resolver.solve(_comparable(resolver, request)) is None:
            continue
        yield _both(resolver, a, b)
        found += 1
        if found == _MOST_PAIRS:
            return


def _both(resolver: Resolver, a: Part, b: Part) -> Relaxation:
    """The first as little changed as the second left out allows, then the second as little as that allows."""
    start = resolver.start.request
    one, first = _least(resolver, a, b.left_out(start))
    request, second = _least(resolver, b, one(start))
    return Relaxation(f"{first} and {second}", request(one(start)))


def _least(resolver: Resolver, part: Part, request: Request) -> tuple[Change, str]:
    """(the smallest change of one part that makes the rest of a request feasible, in words)."""
    at = part.at
    if at is None:
        return part.left_out, f"{part.name} left open"

    def works(value: float) -> bool:
        return resolver.solve(_comparable(resolver, at(request, value))) is not None

    up = part.far > part.stated
    tidy = (lambda v: float(round(v))) if part.whole else rounded_up if up else rounded_down
    low, high = part.stated, part.far
    if works(low):
        return (lambda r: r), f"{part.name} as it is"
    for _ in range(_BISECTIONS + (4 if part.far / max(part.stated, 1e-9) > 1e3 else 0)):
        middle = tidy(math.sqrt(low * high))
        if not min(low, high) < middle < max(low, high):
            break
        low, high = (low, middle) if works(middle) else (middle, high)
    return (lambda r: at(r, high)), f"{part.name} -> {part.words(high)}"


# -- the parts of a request ----------------------------------------------------------------


def parts(resolver: Resolver) -> list[Part]:
    """What a request states, the less telling first: constraints, formats that it leaves closed, the
    inventory's size, the load, objectives. The filter tends to keep what comes last."""
    request = resolver.start.request
    return [
        *_constraints(request),
        *_inventory(request),
        *_load(resolver),
        *(_objective(slo) for slo in request.slos()),
    ]


def _constraints(request: Request) -> Iterator[Part]:
    limits = request.constraints
    for name in LISTS:
        stated = getattr(limits, name)
        if stated is not None:
            shown = f"constraints.{name}: {', '.join(map(str, stated))}"
            yield Part(shown, _opened(name))
    for name in NUMBERS:
        if getattr(limits, name) is not None:
            yield Part(f"constraints.{name}: {getattr(limits, name):g}", _lifted(name))
    if limits.max_accuracy_drop is None:
        for name, shown in (
            ("weights", "the checkpoint's own weight format"),
            ("kv", "an unquantized cache"),
        ):
            if getattr(limits, name) is None:
                yield Part(f"constraints.{name} left out: {shown}", _opened(name))


def _opened(name: str) -> Change:
    more = {"activations": None} if name == "weights" else {}
    return lambda request: constrained(request, **{name: left_open(name)}, **more)


def _lifted(name: str) -> Change:
    return lambda request: constrained(request, **{name: lifted(name)})


def _inventory(request: Request) -> Iterator[Part]:
    gpus = sum(nodes.count * nodes.gpus_per_node for nodes in request.inventory.nodes)
    factor = max(min(_MANY_NODES, _MOST_GPUS // gpus), 2)
    nodes = ", ".join(f"{n.count} x {n.gpus_per_node} {n.gpu}" for n in request.inventory.nodes)
    yield Part(
        f"inventory: {nodes}",
        lambda r: times_nodes(r, factor),
        stated=1,
        far=factor,
        at=lambda r, value: times_nodes(r, round(value)),
        words=lambda value: f"{value:g} times as many nodes",
        whole=True,
    )


def _load(resolver: Resolver) -> Iterator[Part]:
    demand = resolver.base_search.demand
    if demand is None:
        return
    closed = resolver.base_search.traffic.concurrency is not None
    least = 1.0 if closed else demand * _LIGHT
    name = "concurrency" if closed else "request_rate"

    def at(request: Request, load: float) -> Request:
        return request.changed(workload=with_load(request.workload, load, closed))

    yield Part(
        f"workload.{name}: {demand:g}",
        lambda request: at(request, least),
        stated=demand,
        far=least,
        at=at,
        words=lambda value: f"{value:g}",
        whole=closed,
    )


def _objective(slo: Slo) -> Part:
    key = slo.key.rpartition(": ")[2]

    def at(request: Request, limit: float) -> Request:
        return with_objective(request, key, limit, slo.traffic_class)

    return Part(
        f"slo.{slo.key}: {1e3 * slo.limit:g}",
        lambda request: at(request, NEVER),
        stated=1e3 * slo.limit,
        far=1e3 * slo.limit * 2**20,
        at=at,
        words=lambda value: f"{value:g}",
    )
