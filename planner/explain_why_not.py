"""Why not otherwise? The best plan that takes the named decisions, against the plan, and what sank it.

In this order: a rule that the configuration breaks; memory it lacks; an objective it misses even at next to
no load; the load it cannot carry on this inventory; or simply what it costs, and where the GPU time goes
that makes the difference. Decisions that the request itself forbids are evaluated as if it did not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from planc.cost_model import catalogue
from planc.cost_model.shape import refusals
from planc.errors import Infeasible, PlancError
from planc.planner.accounts import Term, compared, gpu_time, memory_terms
from planc.planner.estimate import estimate
from planc.planner.explain_ablation import engine_words, fleet_words, metrics
from planc.planner.explain_asked import asked, completed, fixed, forbidden, in_inventory, is_so
from planc.planner.explain_knobs import MANY_NODES
from planc.planner.loosen import times_nodes
from planc.planner.plan import Plan
from planc.planner.search import Search
from planc.planner.settings import SETTINGS
from planc.planner.traffic import traffic
from planc.planner.variations import Outcome, Resolver, Variation, hardware

_TERMS = 3
_SLIGHT_GIB = 0.05
GIB = 2.0**30

Verdict = Literal["chosen", "illegal", "memory", "objectives", "capacity", "worse", "no better", "better"]


@dataclass(frozen=True, slots=True)
class WhyNot:
    """What became of an alternative.

    asked         the decisions that were named
    reason        what sank it, one sentence
    forbidden     constraints of the request that it breaks; the rest is as if they were not there
    fleet, value  the best plan that takes them, and its objective; None without one
    missed        (objective, best that can be had, limit) in ms, where objectives sank it
    terms         what differs most: GPU time per token, or memory
    """

    asked: Mapping[str, Any]
    verdict: Verdict
    reason: str
    forbidden: tuple[str, ...] = ()
    fleet: str = ""
    value: float | None = None
    plan_value: float | None = None
    unit: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)
    plan_metrics: Mapping[str, float] = field(default_factory=dict)
    missed: tuple[tuple[str, float, float], ...] = ()
    terms: tuple[Term, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {
            **{name: getattr(self, name) for name in ("verdict", "reason", "fleet", "value", "plan_value")},
            "asked": dict(self.asked),
            "unit": self.unit,
            "forbidden": list(self.forbidden),
            "metrics": dict(self.metrics),
            "plan_metrics": dict(self.plan_metrics),
            "missed": [
                {"objective": k, "best_ms": best, "limit_ms": limit} for k, best, limit in self.missed
            ],
            "terms": [term.to_json() for term in self.terms],
        }


def why_not(resolver: Resolver, base: Outcome, text: str) -> WhyNot:
    """What sank the named alternative. Raises InvalidField, UnknownField or UnknownName for what cannot be
    named, OutOfTime."""
    wanted = asked(text)
    about = WhyNot(
        wanted,
        "chosen",
        "the plan is so already",
        plan_value=base.value,
        unit=base.objective,
        plan_metrics=metrics(base.plan),
    )
    in_inventory(resolver, wanted)
    if is_so(base.plan, wanted):
        return about
    resolver.say(f"trying {text}")
    about = replace(about, forbidden=tuple(forbidden(resolver, base, wanted)))
    if "replicas" in wanted:
        return _counted(resolver, base, about)
    variation = fixed(resolver, wanted, about.forbidden)
    search = resolver.search(variation)
    if search is None or not any(stream.found for stream in search.streams):
        return replace(about, verdict="illegal", reason=_rule(base.plan, resolver, wanted, search))
    found = resolver.solve(variation)
    if found is None:
        return _no_plan(resolver, base, about, variation, search)
    return _compared(resolver, base, about, found)


# -- what sank it --------------------------------------------------------------------------


def _rule(plan: Plan, resolver: Resolver, wanted: Mapping[str, Any], search: Search | None) -> str:
    """The first rule that the configuration breaks."""
    shape = completed(plan.replicas()[0], wanted)
    gpu, profile = catalogue.gpu(shape.gpu), catalogue.engine(shape.engine)
    broken = refusals(shape, resolver.table, gpu, profile)
    named = [refusal for refusal in broken if refusal.field in wanted]
    if named or broken:
        first = (named or broken)[0]
        return f"{first.field}={getattr(shape, first.field, '')}: {first.reason}"
    if search is not None:
        pruned = [reason for reason, count in search.pruned.most_common() if count]
        if pruned:
            return "no such engine: " + "; ".join(pruned[:3])
    return "the request contradicts it"


def _no_plan(
    resolver: Resolver, base: Outcome, about: WhyNot, variation: Variation, search: Search
) -> WhyNot:
    if not any(stream.bench.engines for stream in search.streams):
        return replace(about, verdict="memory", reason=_lacking(search))
    able = {stream.role for stream in search.streams if stream.offers}
    if "aggregated" not in able and not {"prefill", "decode"} <= able:
        light = tuple(search.lightest(search.bench.engines)) if search.bench.engines else ()
        missed = tuple(entry for entry in light if entry[1] > entry[2])
        words = "; ".join(
            f"{key} is {best:.4g} ms at best, {best - limit:.3g} above {limit:g}"
            for key, best, limit in missed
        )
        reason = words or "no engine meets all objectives at once"
        return replace(about, verdict="objectives", reason=f"at next to no load: {reason}", missed=missed)
    about = replace(about, verdict="capacity", reason=resolver.why(variation))
    larger = replace(variation, request=times_nodes(variation.request, MANY_NODES))
    found = resolver.solve(larger)
    if found is None or found.objective != base.objective:
        return about
    with_nodes = _compared(resolver, base, about, found)
    reason = f"{about.reason}; with more nodes, {with_nodes.reason}"
    return replace(with_nodes, verdict="capacity", reason=reason)


def _lacking(search: Search) -> str:
    """By how much the least demanding engine lacks memory."""
    worst = []
    for candidate in search.found:
        room = search.room(candidate)
        caps = search.request.constraints.max_num_seqs or [1]
        budgets = search.request.constraints.max_num_batched_tokens or [1024]
        found = room.memory(min(caps), min(budgets))
        one = float(found.sequence_bytes(search.max_model_len)) if found.kept else 0.0
        taken = found.weights + found.activations + found.graphs + found.overhead + found.states
        worst.append((taken + one - found.limit, candidate, found, one))
    lack, candidate, found, one = min(worst, key=lambda entry: entry[0])
    own = found.activations + found.graphs + found.overhead + found.states
    return (
        f"{candidate.label()} lacks {lack / GIB:.1f} GiB on each GPU: {found.weights / GIB:.1f} GiB of "
        f"weights, {own / GIB:.1f} GiB of the engine's own and {one / GIB:.1f} GiB for one sequence, of "
        f"{found.limit / GIB:.1f} GiB that it may take"
    )


def _compared(resolver: Resolver, base: Outcome, about: WhyNot, found: Outcome) -> WhyNot:
    """The best plan with the decisions against the plan: value, and the terms that speak most against it."""
    gain = resolver.gain(found, base)
    plan, mine = found.plan, base.plan
    terms = _terms(resolver, base, found)
    result = replace(
        about,
        fleet=fleet_words(plan),
        value=found.value,
        metrics=metrics(plan),
        terms=terms,
    )
    if gain is None:
        return replace(
            result,
            verdict="worse",
            reason=f"there is no plan of the same kind: it can only be had by {found.objective}",
        )
    words = f"{abs(gain):.4g} {base.unit}"
    if gain < 0:
        share = abs(gain) / abs(base.value)
        verb = "carries less" if resolver.maximising else "costs more"
        return replace(result, verdict="worse", reason=f"it {verb}: {words} ({share:.1%})")
    if gain > 0:
        barred = "; ".join(about.forbidden)
        return replace(
            result,
            verdict="better",
            reason=f"better by {words}, but " + (barred or "the plan is not optimal"),
        )
    return replace(result, verdict="no better", reason=_tie(mine, plan, base, found))


def _terms(resolver: Resolver, base: Outcome, found: Outcome) -> tuple[Term, ...]:
    """What it takes more of: GPUs, their price, GPU time per token by term, memory."""
    request, table = resolver.start.request, resolver.table
    load = traffic(request, table.model.kind)
    mine = gpu_time(base.plan, table, request, load)
    with hardware(found.variation):
        other = gpu_time(found.plan, table, request, load)
    time = sorted(compared(mine, other, "GPU-ms per token"), key=lambda term: -term.change)
    prices = [fleet.usd / fleet.gpus for fleet in (base.fleet, found.fleet)]
    whole = [Term("GPUs", "", base.fleet.gpus, found.fleet.gpus), Term("price of a GPU", "USD/h", *prices)]
    memory = [term for term in memory_terms(base.plan, found.plan)[:1] if abs(term.change) > _SLIGHT_GIB]
    more = [term for term in time[:_TERMS] if term.change > 0]
    return (*(term for term in whole if abs(term.change) > 1e-9), *more, *memory)


def _tie(mine: Plan, plan: Plan, base: Outcome, found: Outcome) -> str:
    """Equal in the objective: what decided."""
    here, there = (max(i.candidate.drop for i in o.fleet.items) for o in (base, found))
    if there > here + 1e-12:
        return f"equal in {base.unit}, but its formats lose more accuracy ({there:.2%} against {here:.2%})"
    if found.fleet.capacity < base.fleet.capacity * (1 - 1e-6):
        return (
            f"equal in {base.unit}, but it has less to spare: it carries up to "
            f"{found.fleet.capacity:.4g} against {base.fleet.capacity:.4g}"
        )
    return f"equal in {base.unit}; of equal plans the first in a fixed order is taken"


# -- a stated number of replicas -----------------------------------------------------------


def _counted(resolver: Resolver, base: Outcome, about: WhyNot) -> WhyNot:
    """The configuration itself, as many times as asked: the plan's first engine with what was named."""
    first = base.plan.replicas()[0]
    shape = completed(first, about.asked)
    own = {name: getattr(first, name) for name in SETTINGS if hasattr(first, name)}
    named = {name: getattr(shape, name) for name in SETTINGS if hasattr(shape, name)}
    settings = {**own, **named, **{k: v for k, v in about.asked.items() if k != "serving"}}
    settings.pop("max_model_len", None)
    if {"pp", "engine"} & about.asked.keys():
        settings.pop("pipeline_layers", None)
    try:
        found = estimate(resolver.start.request, resolver.table, **settings)
    except Infeasible as error:
        return replace(about, verdict="memory", reason=str(error.fields["reason"]))
    except PlancError as error:
        return replace(about, verdict="illegal", reason=str(error))
    value = found.predicted.get(base.objective)
    result = replace(
        about,
        fleet=f"{found.replicas} x {engine_words(found.replica)}",
        value=None if value is None else value.value,
        metrics={k: p.value for k, p in found.predicted.items() if k in about.plan_metrics},
    )
    if not found.meets_slo:
        return replace(result, verdict="objectives", reason="; ".join(found.notes) or "objectives are missed")
    if result.value is None or base.value == 0:
        return replace(result, verdict="no better", reason="it meets the objectives too")
    gain = (result.value - base.value) * (1 if resolver.maximising else -1)
    if gain < -1e-9 * abs(base.value):
        words = f"{abs(gain):.4g} {base.unit} ({abs(gain) / abs(base.value):.1%})"
        return replace(result, verdict="worse", reason=f"it is worse by {words}")
    return replace(result, verdict="no better", reason=f"equal in {base.unit}")
