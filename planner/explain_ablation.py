"""What each decision of a plan bought: the best plan that may not take it.

A decision counts when it departs from what one would get without choosing: the checkpoint's own formats,
one GPU per engine, the engine's default limits, one kind of engine. Each is forbidden in turn, all others
are free again, and the request is solved anew.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from planc.cost_model import catalogue
from planc.cost_model.formats import fmt
from planc.cost_model.fused import chosen
from planc.cost_model.table import CostTable
from planc.planner.explain_knobs import MANY_NODES
from planc.planner.formats import allowed
from planc.planner.loosen import times_nodes
from planc.planner.plan import Plan, Replica
from planc.planner.resolving import OutOfTime
from planc.planner.variations import Outcome, Resolver, Variation

_METRICS = (
    "ttft_ms",
    "tpot_ms",
    "e2e_ms",
    "output_tok_s",
    "usd_per_hour",
    "usd_per_million_tokens",
    "joules_per_token",
    "memory_gib",
)


@dataclass(frozen=True, slots=True)
class Decision:
    """Something that was decided. `without` are the variations that decide it otherwise: the best counts."""

    name: str
    instead: str
    without: Sequence[Variation]


@dataclass(frozen=True, slots=True)
class Ablation:
    """The best plan without a decision.

    loss       by how much the objective is worse, in its unit; None where no plan is left or the two have
               no common unit. Below 0 where the plan was not proved best and this one is better
    fleet      what that plan runs
    metrics    its predicted means; `reason` says why there is no plan
    more_nodes True: that plan takes more nodes than there are, `MANY_NODES` times as many being offered
    tried      False when time ran out first
    """

    decision: str
    instead: str
    tried: bool = True
    loss: float | None = None
    fleet: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)
    reason: str = ""
    more_nodes: bool = False

    def to_json(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__} | {"metrics": dict(self.metrics)}


def ablations(resolver: Resolver, base: Outcome) -> Iterator[Ablation]:
    """One per decision of the base's plan, in the order of `decisions`."""
    late = False
    for decision in decisions(resolver, base):
        if not late:
            resolver.say(f"without {decision.name}")
            try:
                yield _ablated(resolver, base, decision)
                continue
            except OutOfTime:
                late = True
        yield Ablation(decision.name, decision.instead, tried=False)


def _ablated(resolver: Resolver, base: Outcome, decision: Decision) -> Ablation:
    found = [outcome for variation in decision.without if (outcome := resolver.solve(variation)) is not None]
    if not found:
        return _with_more_nodes(resolver, base, decision)

    def rank(outcome: Outcome) -> tuple[float, float]:
        gain = resolver.gain(outcome, base)
        return -math.inf if gain is None else gain, -outcome.fleet.usd

    best = max(found, key=rank)
    gain = resolver.gain(best, base)
    return Ablation(
        decision.name,
        decision.instead,
        loss=None if gain is None else 0.0 - gain,
        fleet=fleet_words(best.plan),
        metrics=metrics(best.plan),
    )


def _with_more_nodes(resolver: Resolver, base: Outcome, decision: Decision) -> Ablation:
    """The inventory is too small without the decision: what would it take? Asked of a larger one where the
    objective is a cost; else why there is no plan."""
    blank = Ablation(decision.name, decision.instead)
    if resolver.start.request.objective != "min_cost":
        return replace(blank, reason=resolver.why(decision.without[0]))
    for variation in decision.without:
        larger = replace(variation, request=times_nodes(variation.request, MANY_NODES))
        larger = larger.constrained(max_gpus=None) if variation.request.constraints.max_gpus else larger
        found = resolver.solve(larger)
        gain = resolver.gain(found, base)
        if found is not None and gain is not None:
            return replace(
                blank,
                loss=max(0.0, -gain),
                more_nodes=True,
                fleet=fleet_words(found.plan),
                metrics=metrics(found.plan),
                reason="the inventory is too small without it",
            )
    return replace(blank, reason=resolver.why(decision.without[0]))


def metrics(plan: Plan) -> dict[str, float]:
    """Means of what a plan predicts."""
    return {name: plan.predicted[name].value for name in _METRICS if name in plan.predicted}


def fleet_words(plan: Plan) -> str:
    """The replicas of a plan on one line."""
    kinds: dict[tuple[str, str], int] = {}
    for pool in plan.pools:
        for replica in pool.replicas:
            role = "" if pool.role in ("aggregated", "encoder") else f"{pool.role} "
            key = (role, engine_words(replica))
            kinds[key] = kinds.get(key, 0) + 1
    return " + ".join(f"{count} x {role}{words}" for (role, words), count in kinds.items())


def engine_words(replica: Replica) -> str:
    degrees = "".join(
        f" {name}={value}"
        for name in ("tp", "pp", "dp", "ep", "cp")
        if (value := getattr(replica, name)) > 1 or name == "tp"
    )
    return f"{replica.gpu}{degrees} {replica.weights}/{replica.activations}/{replica.kv}"


# -- decisions -----------------------------------------------------------------------------


def decisions(resolver: Resolver, base: Outcome) -> Iterator[Decision]:
    """Every decision of the plan that could be taken back, formats first."""
    start, plan, table = resolver.start, base.plan, resolver.table
    for rule in (_formats, _parts, _degrees, _mixtures, _limits, _techniques, _fusions):
        yield from rule(start, plan, table, base)


Rule = Callable[[Variation, Plan, CostTable, Outcome], Iterator[Decision]]


def _taken(plan: Plan, name: str) -> list[Any]:
    return sorted({getattr(replica, name) for replica in plan.replicas()})


def _formats(start: Variation, plan: Plan, table: CostTable, base: Outcome) -> Iterator[Decision]:
    native = table.model.native_format
    replica = plan.replicas()[0]
    pairs = catalogue.engine(replica.engine).pairs(catalogue.gpu(replica.gpu))
    plain = native if any(w == native for w, _ in pairs) else "fp32" if native == "fp32" else "bf16"
    weights, acts, kv = (_taken(plan, name) for name in ("weights", "activations", "kv"))
    if any(fmt(w).bits < fmt(plain).bits for w in weights):
        other = {"weights": [plain], "activations": None}
        yield Decision(f"weights={'/'.join(weights)}", f"weights={plain}", [start.constrained(**other)])
    if any(fmt(a).bits < 16 for a in acts) and any((w, "bf16") in pairs for w in weights):
        other = {"activations": ["bf16"]}
        yield Decision(f"activations={'/'.join(acts)}", "activations=bf16", [start.constrained(**other)])
    if any(fmt(k).bits < 16 for k in kv):
        yield Decision(f"kv={'/'.join(kv)}", "kv=bf16", [start.constrained(kv=["bf16"])])


def _parts(start: Variation, plan: Plan, table: CostTable, base: Outcome) -> Iterator[Decision]:
    """Parts of the model in formats of their own."""
    named = sorted(
        {f"{part}={form}" for replica in plan.replicas() for part, form in replica.formats.items()}
    )
    if not named:
        return
    limits = start.request.constraints
    if limits.formats:
        without = [start.constrained(formats=None)]
    else:
        first = base.fleet.items[0].candidate
        schemes, caches = allowed(table, first.group, first.profile, limits)
        without = [
            start.constrained(weights=[weights], activations=[acts], kv=[kv])
            for weights, acts in schemes
            for kv in caches
        ]
    yield Decision(", ".join(named), "the same formats throughout", without)


def _degrees(start: Variation, plan: Plan, table: CostTable, base: Outcome) -> Iterator[Decision]:
    for name in ("tp", "pp", "dp", "ep", "cp"):
        taken = [degree for degree in _taken(plan, name) if degree > 1]
        if taken:
            shown = "/".join(map(str, taken))
            yield Decision(f"{name}={shown}", f"{name}=1", [start.constrained(**{name: [1]})])


def _mixtures(start: Variation, plan: Plan, table: CostTable, base: Outcome) -> Iterator[Decision]:
    """Kinds of GPU, of engines and of pools side by side; and the number of replicas."""
    replicas = plan.replicas()
    gpus = _taken(plan, "gpu")
    if len(gpus) > 1:
        yield Decision(
            f"gpu={'+'.join(gpus)}", "one type of GPU", [start.constrained(gpus=[gpu]) for gpu in gpus]
        )
    roles = {pool.role for pool in plan.pools}
    if "prefill" in roles:
        other = start.constrained(serving=["aggregated"])
        yield Decision("prefill and decode apart", "each engine does both", [other])
    layouts = {item.candidate.layout for item in base.fleet.items}
    if len(layouts) > 1 and len(roles) == 1:
        seen = base.search.promising or frozenset()
        alone = [Variation(start.request, layouts=frozenset({one})) for one in sorted(seen | layouts)]
        yield Decision("replicas of several shapes", "all replicas alike", alone)
    if len(replicas) > 1:
        fewer = start.constrained(max_replicas=len(replicas) - 1)
        yield Decision(f"{len(replicas)} replicas", f"at most {len(replicas) - 1}", [fewer])


def _limits(start: Variation, plan: Plan, table: CostTable, base: Outcome) -> Iterator[Decision]:
    profile = catalogue.engine(plan.replicas()[0].engine)
    for name in ("max_num_seqs", "max_num_batched_tokens"):
        taken, usual = _taken(plan, name), getattr(profile, name)
        if taken != [usual]:
            shown = "/".join(map(str, taken))
            other = start.constrained(**{name: [usual]})
            yield Decision(f"{name}={shown}", f"{profile.name}'s default, {usual}", [other])


def _techniques(start: Variation, plan: Plan, table: CostTable, base: Outcome) -> Iterator[Decision]:
    if any(replica.speculative for replica in plan.replicas()):
        methods = sorted({str(r.speculative["method"]) for r in plan.replicas() if r.speculative})
        plain = start.constrained(speculative=None)
        yield Decision(f"speculation ({', '.join(methods)})", "every token by the model itself", [plain])
    if any(replica.kv_offload for replica in plan.replicas()):
        inventory = start.request.inventory
        nodes = [n.model_copy(update=dict.fromkeys(("host_memory_gib", "nvme_gib"))) for n in inventory.nodes]
        bare = inventory.model_copy(update={"nodes": nodes, "cache_store_gib": None})
        yield Decision("caches beyond the GPU", "on the GPUs alone", [start.changed(inventory=bare)])
    if not any(replica.prefix_caching for replica in plan.replicas()):
        return
    workload = start.request.workload
    if workload.trace is not None:
        trace = workload.trace.model_copy(update={"prefix_hit_rate": 0.0})
        other = workload.model_copy(update={"trace": trace})
    else:
        classes = [c.model_copy(update={"prefix_hit_rate": 0.0}) for c in workload.classes]
        other = workload.model_copy(update={"classes": classes})
    yield Decision("prefix caching", "every prompt computed whole", [start.changed(workload=other)])


def _fusions(start: Variation, plan: Plan, table: CostTable, base: Outcome) -> Iterator[Decision]:
    """All fusions of the engine's kernels at once, then one by one."""
    taken = {offer.name for i in base.fleet.items for offer in chosen(table, i.candidate.profile, None)}
    if not taken:
        return
    gone = Variation(start.request, fusions=frozenset())
    yield Decision(f"{len(taken)} fusions", "every op a kernel of its own", [gone])
    for name in sorted(taken) if len(taken) > 1 else ():
        rest = Variation(start.request, fusions=frozenset(taken - {name}))
        yield Decision(f"fusion {name}", "without it", [rest])
