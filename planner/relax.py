"""No plan meets the request: why, and the smallest single changes that would help.

Each relaxation changes one thing (the load, one objective, the number of nodes, the formats, the
lengths, one constraint), is made as small as bisection finds it, and is verified by solving the
changed request again. What contradicts what, and pairs of changes, are `planner.conflict`'s.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from planc.cost_model import catalogue
from planc.cost_model.formats import fmt
from planc.errors import Infeasible
from planc.planner.inventory import groups
from planc.planner.loosen import (
    NEVER,
    constrained,
    lifted,
    rounded_down,
    rounded_up,
    with_load,
    with_node_count,
    with_objective,
    without_rate,
)
from planc.planner.request import Request
from planc.planner.resolving import OutOfTime
from planc.planner.search import Search
from planc.planner.variations import Outcome, Resolver, Variation

_BISECTIONS = 7
_MOST_NODES = 64
#: wall-clock seconds spent on an infeasible request when no time limit is given
_SECONDS = 120.0


@dataclass(frozen=True, slots=True)
class Relaxation:
    """A change that makes the request feasible: words, and the request that was solved.

    `isl`, `osl` are factors on the lengths of the workload (1: unchanged).
    """

    text: str
    request: Request
    isl: float = 1.0
    osl: float = 1.0


def infeasible(search: Search, time_limit: float | None = None) -> Infeasible:
    """The error to raise for a search without a fleet. What the time did not allow is said."""
    search.say("no plan; looking for relaxations")
    return explained(Resolver.of(search, _SECONDS if time_limit is None else time_limit))


def explained(resolver: Resolver) -> Infeasible:
    """The reason, relaxations one by one, the constraints that contradict each other, and pairs of changes
    where no single one helps."""
    from planc.planner.conflict import Conflict, conflict, pairs

    found: list[Relaxation] = []
    clash, late = Conflict(), False
    try:
        for item in relaxations(resolver):
            found.append(item)
        clash = conflict(resolver)
        if not found:
            for item in pairs(resolver, clash):
                found.append(item)
    except OutOfTime:
        late = True
    words = _listed("Any one of these would make it feasible:", [item.text for item in found])
    if not found:
        words = f"\n{_NOTHING_YET if late else _NOTHING}"
    words += _listed(_ALONE if len(clash.names) == 1 else _CLASH, clash.names)
    if late:
        words += "\nTime ran out before everything was tried: there may be other ways."
    return Infeasible(
        reason=why(resolver.base_search),
        relaxations=words,
        changes=[item.text for item in found],
        conflict=list(clash.names),
        complete=not late,
    )


_NOTHING = (
    "No single change that was tried (load, objectives, nodes, formats, lengths) makes it feasible, "
    "nor any two."
)
_NOTHING_YET = "No single change that was tried makes it feasible."
_ALONE = "This cannot hold, whatever else is given up:"
_CLASH = "These cannot hold together, whatever else is given up; without any one of them they can:"


def _listed(title: str, names: Sequence[str]) -> str:
    return "".join([f"\n{title}", *(f"\n  - {name}" for name in names)]) if names else ""


def why(search: Search) -> str:
    """The first thing that stands in the way."""
    if able(search):
        carried = most(Resolver.of(search))
        unit = "users" if search.traffic.concurrency is not None else "requests/s"
        if carried and search.demand:
            return (
                f"within the objectives and constraints the inventory carries at most {carried:.3g} of "
                f"{search.demand:g} {unit}"
            )
        return "no engine that meets the objectives fits into the constraints"
    if search.bench.engines:
        light = search.lightest(search.bench.engines)
        missed = [
            f"{key} cannot be below {best:.4g} (asked: {limit:g})"
            for key, best, limit in light
            if best > limit
        ]
        return "; ".join(missed) or "no engine meets all objectives at once, even at the lightest load"
    if not search.found:
        free = unbounded(search)
        if free.bench.engines:
            return why(free)
        search = free
    if search.found:
        needs = [search.room(c).memory(1, 1024) for c in search.found]
        least = min(needs, key=lambda m: m.weights / m.capacity)
        return (
            f"the model does not fit into memory: even spread widest, in the narrowest allowed format, "
            f"weights take {least.weights / 2**30:.1f} GiB of each GPU's {least.capacity / 2**30:.1f} GiB"
        )
    reasons = ", ".join(f"{reason} ({count})" for reason, count in search.pruned.most_common(4) if count)
    return f"no candidate engine is left: {reasons}"


def able(search: Search) -> bool:
    """Whether engines meet the objectives at some load: aggregated ones, or prefill and decode."""
    roles = {stream.role for stream in search.streams if stream.offers}
    return "aggregated" in roles or {"prefill", "decode"} <= roles


def unbounded(search: Search) -> Search:
    """The search without candidates left out because an objective bounds them."""
    if not any(reason.startswith("bound") and count for reason, count in search.pruned.items()):
        return search
    free = Search(search.request.changed(slo={}), search.table, models=search.models, load=search.traffic)
    return free.with_slos(search.request)


def most(resolver: Resolver, variation: Variation | None = None) -> float:
    """The most that the inventory carries within objectives and constraints: requests/s or users."""
    chosen = variation or resolver.start
    request = chosen.request.changed(objective="max_goodput")
    if chosen.request.workload.concurrency is None:
        request = request.changed(workload=without_rate(request.workload))
    found = resolver.solve(replace(chosen, request=request))
    return found.fleet.solution.value if found else 0.0


def relaxations(resolver: Resolver) -> Iterator[Relaxation]:
    """All single relaxations found, each verified. Raises OutOfTime."""
    search, base = resolver.base_search, resolver.start.request
    if base.objective != "max_goodput" and search.demand is not None:
        base = base.changed(objective="min_cost")
    tries: tuple[Callable[[Resolver, Request], Iterator[Relaxation]], ...] = (
        _less_load,
        _looser_objective,
        _more_nodes,
        _other_formats,
        _fewer_tokens,
        _lifted_constraints,
    )
    seen: set[str] = set()
    for attempt in tries:
        for item in attempt(resolver, base):
            if item.text not in seen:
                seen.add(item.text)
                yield item


def solved(resolver: Resolver, request: Request, isl: float = 1.0, osl: float = 1.0) -> Outcome | None:
    """The changed request's best fleet, if any."""
    return resolver.solve(Variation(request, isl=isl, osl=osl))


# -- one attempt each ----------------------------------------------------------------------


def _less_load(resolver: Resolver, base: Request) -> Iterator[Relaxation]:
    search = resolver.base_search
    if search.demand is None or not able(search):
        return
    carried = most(resolver, Variation(base))
    closed = search.traffic.concurrency is not None
    less = math.floor(carried) if closed else rounded_down(carried * (1 - 1e-6))
    if less <= 0 or less >= search.demand:
        return
    changed = base.changed(workload=with_load(base.workload, less, closed))
    if solved(resolver, changed) is not None:
        name = "concurrency" if closed else "request_rate"
        yield Relaxation(f"workload: {name} {search.demand:g} -> {less:g}", changed)


def _looser_objective(resolver: Resolver, base: Request) -> Iterator[Relaxation]:
    for slo in base.slos():
        key, limit = slo.key.rpartition(": ")[2], 1e3 * slo.limit

        def having(value: float, key: str = key, of: str = slo.traffic_class) -> Request:
            return with_objective(base, key, value, of)

        without = solved(resolver, having(NEVER))
        if without is None:
            continue
        low, high = limit, rounded_up(max(without.latency(slo), limit * 1.001))
        if solved(resolver, having(high)) is None:
            continue
        for _ in range(_BISECTIONS):
            middle = math.sqrt(low * high)
            if solved(resolver, having(middle)) is not None:
                high = middle
            else:
                low = middle
        value = rounded_up(high)
        if solved(resolver, having(value)) is not None:
            yield Relaxation(f"slo: {slo.key} {limit:g} -> {value:g}", having(value))


def _more_nodes(resolver: Resolver, base: Request) -> Iterator[Relaxation]:
    open_ended = constrained(base, max_gpus=None)
    for position, nodes in enumerate(base.inventory.nodes):

        def having(count: int, position: int = position) -> Request:
            return with_node_count(open_ended, position, count)

        low, high = nodes.count, 0
        count = nodes.count * 2
        while count <= nodes.count * _MOST_NODES:
            if solved(resolver, having(count)) is not None:
                high = count
                break
            low, count = count, count * 2
        if not high:
            continue
        while high - low > 1:
            middle = (low + high) // 2
            if solved(resolver, having(middle)) is not None:
                high = middle
            else:
                low = middle
        extra = "" if base.constraints.max_gpus is None else " and no max_gpus"
        yield Relaxation(
            f"inventory: {nodes.count} -> {high} nodes of {nodes.gpus_per_node} {nodes.gpu}{extra}",
            having(high),
        )


def _other_formats(resolver: Resolver, base: Request) -> Iterator[Relaxation]:
    """Allows one more format, narrower than those in use; the least harmful that helps, of each kind."""
    search, limits = resolver.base_search, base.constraints
    used_weights = {c.shape.weights for c in search.found} or {search.table.model.native_format}
    used_kv = {c.shape.kv for c in search.found} or {"bf16"}
    offered = [
        (pair, kv)
        for group in groups(base)
        for engine in limits.engines or ("vllm",)
        for pair in catalogue.engine(engine).pairs(group.gpu)
        for kv in catalogue.engine(engine).kv_formats(group.gpu)
    ]
    narrower = sorted(
        {w for (w, _), _ in offered if fmt(w).bits < min(fmt(u).bits for u in used_weights)},
        key=lambda name: (fmt(name).accuracy_drop.value, -fmt(name).bits, name),
    )
    dropping = (
        "" if limits.max_accuracy_drop is None else f" (max_accuracy_drop is {limits.max_accuracy_drop:g})"
    )
    for name in narrower:
        wider = {"weights": sorted({*used_weights, name}), "activations": None, "max_accuracy_drop": None}
        changed = constrained(base, **wider)
        if solved(resolver, changed) is not None:
            yield Relaxation(f"constraints: weights may also be {name}{dropping}", changed)
            break
    if search.table.kv_elements_per_token():
        for name in sorted({kv for _, kv in offered if fmt(kv).bits < min(fmt(u).bits for u in used_kv)}):
            more: dict[str, object] = {"kv": sorted({*used_kv, name}), "max_accuracy_drop": None}
            if limits.weights is None:
                more["weights"] = sorted(used_weights)
            changed = constrained(base, **more)
            if solved(resolver, changed) is not None:
                yield Relaxation(f"constraints: the KV cache may also be {name}{dropping}", changed)
                break


def _fewer_tokens(resolver: Resolver, base: Request) -> Iterator[Relaxation]:
    search = resolver.base_search
    names = ("isl", "osl") if search.traffic.decode_steps else ("isl",)
    if search.table.model.kind == "module" or not search.bench.engines:
        return
    for name in names:

        def works(factor: float, name: str = name) -> bool:
            return solved(resolver, base, **{name: factor}) is not None

        low, high = 1.0 / 16, 1.0
        if not works(low):
            continue
        for _ in range(_BISECTIONS):
            middle = math.sqrt(low * high)
            if works(middle):
                low = middle
            else:
                high = middle
        mean = search.traffic.isl_mean if name == "isl" else search.traffic.osl_mean
        shorter = math.floor(mean * low)
        factor = shorter / mean
        if shorter >= 1 and works(factor):
            yield Relaxation(f"workload: {name} {mean:.6g} -> {shorter} tokens", base, **{name: factor})


def _lifted_constraints(resolver: Resolver, base: Request) -> Iterator[Relaxation]:
    limits = base.constraints
    for key in ("max_gpus", "max_replicas", "max_power_kw", "max_accuracy_drop"):
        stated = getattr(limits, key)
        if stated is None:
            continue
        found = solved(resolver, constrained(base, **{key: lifted(key)}))
        if found is None:
            continue
        fleet = found.fleet
        value = {
            "max_gpus": fleet.gpus,
            "max_replicas": sum(item.count for item in fleet.items),
            "max_power_kw": rounded_up(fleet.watts / 1e3),
            "max_accuracy_drop": max(item.candidate.drop for item in fleet.items),
        }[key]
        changed = constrained(base, **{key: value})
        if solved(resolver, changed) is not None:
            yield Relaxation(f"constraints: {key} {stated:g} -> {value:g}", changed)
    for key in ("spare_replicas", "max_spot_share"):
        changed = constrained(base, **{key: None})
        if getattr(limits, key) is not None and solved(resolver, changed) is not None:
            yield Relaxation(f"constraints: no {key}", changed)
    listed = [k for k in ("tp", "pp", "dp", "ep") if getattr(limits, k) is not None]
    helped = False
    single = [(key,) for key in (*listed, "max_num_seqs", "max_num_batched_tokens", "serving")]
    for keys in [*single, tuple(listed)]:
        if not keys or (helped and len(keys) > 1) or all(getattr(limits, key) is None for key in keys):
            continue
        changed = constrained(base, **dict.fromkeys(keys))
        if solved(resolver, changed) is not None:
            helped = True
            yield Relaxation(f"constraints: leave {' and '.join(keys)} open", changed)
