"""No plan meets the request: why, and the smallest single changes that would help.

Each relaxation changes one thing (the load, one objective, the number of nodes, the formats, the
lengths, one constraint), is made as small as bisection finds it, and is verified by solving the
changed request again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from planc.cost_model import catalogue
from planc.cost_model.formats import fmt
from planc.errors import Infeasible
from planc.planner.inventory import groups
from planc.planner.offers import Fleet
from planc.planner.request import Request
from planc.planner.search import Search
from planc.planner.workload import Workload

_BISECTIONS = 7
_MOST_NODES = 64


@dataclass(frozen=True, slots=True)
class Relaxation:
    """One change that makes the request feasible: words, and the request that was solved.

    `isl`, `osl` are factors on the lengths of the workload (1: unchanged).
    """

    text: str
    request: Request
    isl: float = 1.0
    osl: float = 1.0


def infeasible(search: Search, time_limit: float | None = None) -> Infeasible:
    """The error to raise, with its reason and relaxations."""
    search.say("no plan; looking for relaxations")
    found = relaxations(search)
    lines = "".join(f"\n  - {item.text}" for item in found)
    words = (
        f"\nAny one of these would make it feasible:{lines}"
        if found
        else (
            "\nNo single change that was tried (load, objectives, nodes, formats, lengths) makes it feasible."
        )
    )
    return Infeasible(reason=why(search), relaxations=words, changes=[item.text for item in found])


def why(search: Search) -> str:
    """The first thing that stands in the way."""
    if search.offers:
        carried = _most(search)
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


def relaxations(search: Search) -> list[Relaxation]:
    """All single relaxations found, each verified."""
    base = search.request
    if base.objective != "max_goodput" and search.demand is not None:
        base = base.changed(objective="min_cost")
    tries: tuple[Callable[[Search, Request], Iterator[Relaxation]], ...] = (
        _less_load,
        _looser_objective,
        _more_nodes,
        _other_formats,
        _fewer_tokens,
        _lifted_constraints,
    )
    found = {item.text: item for attempt in tries for item in attempt(search, base)}
    return list(found.values())


def solved(search: Search, request: Request, isl: float = 1.0, osl: float = 1.0) -> Fleet | None:
    """The changed request, solved among the promising layouts: a plan found there is a plan."""
    load = search.traffic.scaled(isl=isl, osl=osl) if (isl, osl) != (1.0, 1.0) else None
    return Search(request, search.table, models=search.models, load=load, layouts=search.promising).fleet()


def _most(search: Search, request: Request | None = None) -> float:
    """The most that the inventory carries within objectives and constraints."""
    chosen = (request or search.request).changed(objective="max_goodput")
    load = replace(search.traffic, rate=None) if search.traffic.concurrency is None else search.traffic
    found = Search(chosen, search.table, models=search.models, load=load, layouts=search.promising).fleet()
    return found.capacity if found else 0.0


# -- one attempt each ----------------------------------------------------------------------


def _less_load(search: Search, base: Request) -> Iterator[Relaxation]:
    if search.demand is None or not search.offers:
        return
    carried = _most(search, base)
    closed = search.traffic.concurrency is not None
    less = math.floor(carried) if closed else rounded_down(carried * (1 - 1e-6))
    if less <= 0 or less >= search.demand:
        return
    changed = base.changed(workload=with_load(base.workload, less, closed))
    if solved(search, changed) is not None:
        name = "concurrency" if closed else "request_rate"
        yield Relaxation(f"workload: {name} {search.demand:g} -> {less:g}", changed)


def with_load(workload: Workload, load: float, closed: bool) -> Workload:
    """The workload with another total load; per-class rates keep their proportions."""
    rates = [c.request_rate for c in workload.classes]
    if not closed and rates and all(rate is not None for rate in rates):
        factor = load / sum(rate for rate in rates if rate is not None)
        classes = [
            c.model_copy(update={"request_rate": (c.request_rate or 0.0) * factor}) for c in workload.classes
        ]
        return workload.model_copy(update={"classes": classes})
    return workload.model_copy(update={"concurrency": int(load)} if closed else {"request_rate": load})


def unbounded(search: Search) -> Search:
    """The search without candidates left out because an objective bounds them."""
    if not any(reason.startswith("bound") and count for reason, count in search.pruned.items()):
        return search
    free = Search(search.request.changed(slo={}), search.table, models=search.models, load=search.traffic)
    return free.with_slos(search.request)


def _looser_objective(search: Search, base: Request) -> Iterator[Relaxation]:
    search = unbounded(search)
    for key, limit in sorted(base.slo.items()):
        rest = {k: v for k, v in base.slo.items() if k != key}

        def having(value: float, key: str = key, rest: dict[str, float] = rest) -> Request:
            return base.changed(slo={**rest, key: value})

        without = search.with_slos(base.changed(slo=rest)).fleet()
        if without is None:
            continue
        slo = next(s for s in base.slos() if s.key == key)
        reached = 1e3 * max(float(i.state(search.traffic).value(slo)[0, 0]) for i in without.items)
        low, high = limit, max(reached, limit * 1.001)
        if search.with_slos(having(rounded_up(high))).fleet() is None:
            continue
        for _ in range(_BISECTIONS):
            middle = math.sqrt(low * high)
            if search.with_slos(having(middle)).fleet() is not None:
                high = middle
            else:
                low = middle
        value = rounded_up(high)
        if solved(search, having(value)) is not None:
            yield Relaxation(f"slo: {key} {limit:g} -> {value:g}", having(value))


def _more_nodes(search: Search, base: Request) -> Iterator[Relaxation]:
    for position, nodes in enumerate(base.inventory.nodes):

        def having(count: int, position: int = position) -> Request:
            old = base.inventory.nodes
            changed = [
                n.model_copy(update={"count": count}) if i == position else n for i, n in enumerate(old)
            ]
            limits = base.constraints
            if limits.max_gpus is not None:
                limits = limits.model_copy(update={"max_gpus": None})
            return base.changed(
                inventory=base.inventory.model_copy(update={"nodes": changed}), constraints=limits
            )

        low, high = nodes.count, 0
        count = nodes.count * 2
        while count <= nodes.count * _MOST_NODES:
            if solved(search, having(count)) is not None:
                high = count
                break
            low, count = count, count * 2
        if not high:
            continue
        while high - low > 1:
            middle = (low + high) // 2
            if solved(search, having(middle)) is not None:
                high = middle
            else:
                low = middle
        extra = "" if base.constraints.max_gpus is None else " and no max_gpus"
        yield Relaxation(
            f"inventory: {nodes.count} -> {high} nodes of {nodes.gpus_per_node} {nodes.gpu}{extra}",
            having(high),
        )


def _other_formats(search: Search, base: Request) -> Iterator[Relaxation]:
    """Allows one more format, narrower than those in use; the least harmful that helps, of each kind."""
    limits = base.constraints
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
    for name in narrower:
        wider = {"weights": sorted({*used_weights, name}), "activations": None, "max_accuracy_drop": None}
        changed = base.changed(constraints=limits.model_copy(update=wider))
        if solved(search, changed) is not None:
            yield Relaxation(f"constraints: weights may also be {name}{_dropping(limits)}", changed)
            break
    if search.table.kv_elements_per_token():
        for name in sorted({kv for _, kv in offered if fmt(kv).bits < min(fmt(u).bits for u in used_kv)}):
            wider = {"kv": sorted({*used_kv, name}), "max_accuracy_drop": None}
            if limits.weights is None:
                wider["weights"] = sorted(used_weights)
            changed = base.changed(constraints=limits.model_copy(update=wider))
            if solved(search, changed) is not None:
                yield Relaxation(f"constraints: the KV cache may also be {name}{_dropping(limits)}", changed)
                break


def _dropping(limits: object) -> str:
    stated = getattr(limits, "max_accuracy_drop", None)
    return "" if stated is None else f" (max_accuracy_drop is {stated:g})"


def _fewer_tokens(search: Search, base: Request) -> Iterator[Relaxation]:
    names = ("isl", "osl") if search.traffic.decode_steps else ("isl",)
    if search.table.model.kind == "module" or not search.bench.engines:
        return
    for name in names:

        def works(factor: float, name: str = name) -> bool:
            return solved(search, base, **{name: factor}) is not None

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


def _lifted_constraints(search: Search, base: Request) -> Iterator[Relaxation]:
    limits = base.constraints
    for key in ("max_gpus", "max_replicas", "max_power_kw", "max_accuracy_drop"):
        stated = getattr(limits, key)
        if stated is None:
            continue
        fleet = solved(search, base.changed(constraints=limits.model_copy(update={key: None})))
        if fleet is None:
            continue
        value = {
            "max_gpus": fleet.gpus,
            "max_replicas": sum(item.count for item in fleet.items),
            "max_power_kw": rounded_up(fleet.watts / 1e3),
            "max_accuracy_drop": max(item.candidate.drop for item in fleet.items),
        }[key]
        changed = base.changed(constraints=limits.model_copy(update={key: value}))
        if solved(search, changed) is not None:
            yield Relaxation(f"constraints: {key} {stated:g} -> {value:g}", changed)
    listed = [k for k in ("tp", "pp", "dp", "ep") if getattr(limits, k) is not None]
    helped = False
    for keys in [(key,) for key in listed] + [("max_num_seqs",), ("max_num_batched_tokens",), tuple(listed)]:
        if not keys or (helped and len(keys) > 1) or all(getattr(limits, key) is None for key in keys):
            continue
        changed = base.changed(constraints=limits.model_copy(update=dict.fromkeys(keys)))
        if solved(search, changed) is not None:
            helped = True
            yield Relaxation(f"constraints: leave {' and '.join(keys)} open", changed)


def rounded_up(value: float) -> float:
    """Rounded up to three significant digits."""
    unit = 10.0 ** (math.floor(math.log10(value)) - 2)
    return float(f"{math.ceil(value / unit - 1e-9) * unit:.12g}")


def rounded_down(value: float) -> float:
    """Rounded down to three significant digits."""
    if value <= 0:
        return 0.0
    unit = 10.0 ** (math.floor(math.log10(value)) - 2)
    return float(f"{math.floor(value / unit + 1e-9) * unit:.12g}")
