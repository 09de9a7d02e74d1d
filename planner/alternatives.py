"""Why the others lost: for every decision, the best fleet of one kind of engine that decides it otherwise,
with its numbers. What the search saw suffices for that; `planner.explain` solves anew."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from planc.cost_model.energy import watts
from planc.planner.levels import running_share
from planc.planner.offers import Deployed, Fleet, Offer
from planc.planner.plan import Rejected
from planc.planner.search import Search

DECISIONS = ("gpu", "engine", "tp", "pp", "dp", "ep", "cp", "weights", "activations", "kv")
_MOST = 24


def rejected(search: Search, fleet: Fleet) -> list[Rejected]:
    """One entry per decision and other value, nearest to the plan first, then what was pruned unevaluated."""
    taken = {name: {getattr(i.candidate.shape, name) for i in fleet.items} for name in DECISIONS}
    found: list[tuple[float, Rejected]] = []
    if any(item.role != "aggregated" for item in fleet.items):
        found.append(_best_of(search, fleet, "serving=aggregated", search.offers) or _unserved())
    for name in DECISIONS:
        values = {getattr(c.shape, name) for c in search.found} - taken[name]
        for value in sorted(values, key=str):
            found.append(_best_with(search, fleet, name, value))
    found.sort(key=lambda both: (both[0], both[1].decision))
    kept = [entry for _, entry in found[:_MOST]]
    return kept + [
        Rejected(decision=f"{count} candidates", reason=reason)
        for reason, count in sorted(search.pruned.items())
        if count and reason != "dominated"
    ]


def _unserved() -> tuple[float, Rejected]:
    reason = "no engine that does both meets the objectives at any load"
    return math.inf, Rejected(decision="serving=aggregated", reason=reason)


def _best_with(search: Search, fleet: Fleet, name: str, value: object) -> tuple[float, Rejected]:
    decision = f"{name}={value}"
    offers = [o for o in search.offers if getattr(o.engine.candidate.shape, name) == value]
    found = _best_of(search, fleet, decision, offers)
    return found or (math.inf, Rejected(decision=decision, reason=_dead(search, name, value)))


def _best_of(
    search: Search, fleet: Fleet, decision: str, offers: Sequence[Offer]
) -> tuple[float, Rejected] | None:
    """The best fleet of one of these, or the most that one of them carries; None without offers."""
    ranked = sorted(_fleets(search, offers), key=lambda both: both[0])
    if ranked:
        (cost, _), item = ranked[0]
        return cost, _lost(search, fleet, decision, item)
    if not offers:
        return None
    best = max(offers, key=lambda o: o.capacity * _room(search, o))
    carried = best.capacity * _room(search, best)
    asked = f" of {search.demand:.3g}" if search.demand is not None else ""
    whole = f"{carried:.3g}{asked} {_unit(search)}"
    reason = f"one kind of engine carries {whole} with all GPUs of its kind"
    return math.inf, Rejected(decision=decision, reason=reason, predicted={"capacity": carried})


def _fleets(search: Search, offers: Sequence[Offer]) -> Iterator[tuple[tuple[float, float], Deployed]]:
    """Fleets of one kind that carry the demand (or fill the inventory), with their rank: as few engines as
    suffice, or all that there is room for where the objective depends on how loaded they are."""
    demand, by_load = search.demand, search.request.objective in ("min_latency", "min_energy")
    for offer in offers:
        room = _room(search, offer)
        few = room if demand is None else math.ceil(demand / offer.capacity - 1e-9)
        if not 1 <= few <= room:
            continue
        for count in sorted({few, room}) if by_load else [few]:
            load = offer.capacity if demand is None else demand / count
            usd = count * offer.engine.candidate.usd
            rank = usd if demand is not None else usd / (count * offer.capacity)
            item = Deployed(offer.engine, offer.limits, count, load, offer.capacity)
            rank = _by_load(search, item) if by_load else rank
            if math.isfinite(rank):
                yield (rank, -count * offer.capacity), item


def _room(search: Search, offer: Offer) -> int:
    """Engines of this kind that fit into the inventory."""
    candidate, allowed = offer.engine.candidate, search.request.constraints
    pieces, size = candidate.pieces
    most = sum(island // size for island in candidate.group.islands) // pieces
    if allowed.max_gpus is not None:
        most = min(most, allowed.max_gpus // candidate.shape.world)
    return min(most, allowed.max_replicas or most)


def _by_load(search: Search, item: Deployed) -> float:
    """Mean end-to-end latency (ms) or power (W) of identical engines at their load."""
    state = item.state(search.traffic)
    if not math.isfinite(state.ttft[0, 0]):
        return math.inf
    if search.request.objective == "min_latency":
        return 1e3 * float(state.e2e[0, 0])
    one = watts(item.candidate.group.gpu, running_share(state))
    return item.count * item.candidate.shape.world * float(one[0, 0])


def _lost(search: Search, fleet: Fleet, decision: str, item: Deployed) -> Rejected:
    state = item.state(search.traffic)
    usd, gpus = item.count * item.candidate.usd, item.count * item.candidate.shape.world
    numbers = {
        "usd_per_hour": usd,
        "gpus": float(gpus),
        "capacity_users" if search.traffic.concurrency else "capacity_requests_s": item.count * item.capacity,
        "ttft_ms": 1e3 * float(state.ttft[0, 0]),
        "e2e_ms": 1e3 * float(state.e2e[0, 0]),
    }
    if search.traffic.decode_steps:
        numbers["tpot_ms"] = 1e3 * float(state.tpot[0, 0])
    plan = f"{item.count} x {item.candidate.label()}"
    objective = search.request.objective
    if objective == "min_latency":
        mine = fleet.solution.value
        reason = f"slower: {plan} takes {numbers['e2e_ms']:.4g} ms end to end against {mine:.4g} ms"
    elif objective == "min_energy":
        reason = f"draws more: {plan} {_by_load(search, item):.4g} W against {fleet.solution.value:.4g} W"
    elif objective == "min_cost" and search.demand is None:
        tokens = (search.traffic.osl_mean or search.traffic.isl_mean) * item.count * item.capacity
        price = f"{usd / 3600 / tokens * 1e6:.4g} USD per million tokens"
        reason = f"dearer: {plan} costs {price} against {fleet.solution.value:.4g}"
    elif objective == "max_goodput":
        mine = fleet.capacity
        reason = f"carries less: {plan} {item.count * item.capacity:.4g} {_unit(search)} against {mine:.4g}"
    elif usd > fleet.usd * (1 + 1e-9):
        reason = f"dearer: {plan} costs {usd:.4g} USD/h against {fleet.usd:.4g}"
    elif item.candidate.drop > max(i.candidate.drop for i in fleet.items) + 1e-12:
        reason = f"same price, but {plan} loses more accuracy ({100 * item.candidate.drop:.2g} %)"
    else:
        spare = f"{item.count * item.capacity:.4g} {_unit(search)}"
        reason = f"no better: {plan} costs the same and carries up to {spare}"
    return Rejected(decision=decision, reason=reason, predicted=dict(sorted(numbers.items())))


def _dead(search: Search, name: str, value: object) -> str:
    """No candidate with this value meets the objectives at any load, or none fits."""
    evaluated = [e for e in search.bench.engines if getattr(e.candidate.shape, name) == value]
    if not evaluated:
        return "weights and one sequence do not fit into memory"
    light = search.lightest(evaluated)
    missed = [f"{key} {found:.4g} > {limit:g} ms" for key, found, limit in light if found > limit]
    return "misses the objectives even at the lightest load: " + "; ".join(missed)


def _unit(search: Search) -> str:
    return "users" if search.traffic.concurrency is not None else "requests/s"
