"""Why the fleet of several models is as it is: what binds the inventory that they share and whom more of it
would serve, what sharing costs each of them, and what the decisions of each bought.

Each figure is the difference of two optima of all models together, found as the fleet itself was.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from planc.cost_model.table import CostTable
from planc.errors import CheckFailed
from planc.planner.explain import SECONDS, Engine, engine_json, engines
from planc.planner.explain_ablation import Ablation, Decision, decisions, fleet_words, metrics
from planc.planner.explain_knobs import Knob, Turned, of_constraints, of_inventory, of_load, of_memory
from planc.planner.explain_prices import Price, priced
from planc.planner.joint import Joint, JointPlan
from planc.planner.referee import Referee
from planc.planner.resolving import OutOfTime
from planc.planner.shared import Fleets, SharedResolver, Shares


@dataclass(frozen=True, slots=True)
class SharedPrice:
    """A price of the whole fleet. `gains`: what each model's part gains at the first value that pays."""

    price: Price
    gains: Mapping[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {**self.price.to_json(), "gains": dict(self.gains)}


@dataclass(frozen=True, slots=True)
class Share:
    """What a model takes of the fleet, USD per hour.

    part      what its engines cost
    alone     what they would cost with the whole inventory to itself; None: not known
    saved     what the fleet would cost less without this model; None: not known
    by        its engines, and those it would have alone
    """

    model: str
    gpus: int
    part: float
    by: str
    alone: float | None = None
    alone_by: str = ""
    saved: float | None = None

    @property
    def pays(self) -> float | None:
        """How much dearer its own engines are for sharing."""
        return None if self.alone is None else _tidy(self.part - self.alone)

    @property
    def costs_others(self) -> float | None:
        """How much dearer the others' engines are for it."""
        return None if self.saved is None else _tidy(self.saved - self.part)

    def to_json(self) -> dict[str, Any]:
        found = {name: getattr(self, name) for name in self.__slots__}
        return {**found, "pays": self.pays, "costs_others": self.costs_others}


@dataclass(frozen=True, slots=True)
class FleetExplanation:
    """All of it. Values are in USD per hour."""

    value: float
    status: str
    models: Mapping[str, str]
    shares: tuple[Share, ...]
    prices: tuple[SharedPrice, ...]
    ablations: tuple[tuple[str, Ablation], ...]
    engines: Mapping[str, tuple[Engine, ...]]
    notes: tuple[str, ...]
    complete: bool
    solved: int
    simulated: bool

    def to_json(self) -> dict[str, Any]:
        return {
            "objective": {"name": "usd_per_hour", "value": self.value, "maximised": False},
            "status": self.status,
            "models": dict(self.models),
            "sharing": [share.to_json() for share in self.shares],
            "constraints": [price.to_json() for price in self.prices],
            "decisions": [{"model": name, **ablation.to_json()} for name, ablation in self.ablations],
            "engines": {name: [engine_json(one) for one in found] for name, found in self.engines.items()},
            "notes": list(self.notes),
            "complete": self.complete,
            "solved": self.solved,
            "simulated": self.simulated,
        }


def explain_fleet(
    plan: JointPlan,
    joint: Joint,
    tables: Mapping[str, CostTable],
    *,
    time_limit: float | None = None,
    progress: Callable[[str], None] | None = None,
    referee: Referee | None = None,
) -> FleetExplanation:
    """Explains the plans of several models on one inventory; parameters as of `planner.explain.explain`.

    Raises CheckFailed when the models have no plans with present numbers.
    """
    limit = SECONDS if time_limit is None else time_limit
    resolver = SharedResolver(joint, tables, seconds=limit, progress=progress, referee=referee)
    base = resolver.base
    if base is None:
        raise CheckFailed(
            what="the fleet's request",
            reason="no plans meet it with present numbers",
            mend="Compile it again; that says what would help.",
        )
    with resolver.within(0.2):
        shares = tuple(_shares(resolver, base))
    with resolver.within(0.6):
        found = tuple(_prices(resolver, base))
    taken = tuple(_ablations(resolver, base))
    if any(one.price.verdict == "not tried" for one in found):
        found = tuple(_prices(resolver, base))  # what was solved is remembered
    complete = (
        all(one.price.verdict != "not tried" for one in found)
        and all(ablation.tried for _, ablation in taken)
        and all(share.alone is not None for share in shares)
    )
    return FleetExplanation(
        value=base.value,
        status=plan.solution.status,
        models={name: fleet_words(one) for name, one in plan.plans.items()},
        shares=shares,
        prices=found,
        ablations=taken,
        engines={name: engines(one, tables[name], joint.requests[name]) for name, one in plan.plans.items()},
        notes=tuple(_notes(plan, base, resolver, complete)),
        complete=complete,
        solved=resolver.solved,
        simulated=referee is not None,
    )


# -- what sharing costs --------------------------------------------------------------------


def _shares(resolver: SharedResolver, base: Shares) -> Iterator[Share]:
    for name, part in base.parts.items():
        resolver.say(f"{name} alone")
        found = Share(name, part.fleet.gpus, part.value, fleet_words(part.plan))
        try:
            alone = resolver.solve(replace(base.variation, models={name: base.variation.models[name]}))
            others = resolver.solve(base.variation.without_model(name))
        except OutOfTime:
            yield found
            continue
        if alone is not None:
            found = replace(found, alone=alone.value, alone_by=fleet_words(alone.parts[name].plan))
        if others is not None:
            found = replace(found, saved=base.value - others.value)
        yield found


def _tidy(usd: float) -> float:
    """Without the noise of sums."""
    return round(usd, 9) + 0.0


# -- what binds ----------------------------------------------------------------------------


def _prices(resolver: SharedResolver, base: Shares) -> Iterator[SharedPrice]:
    turned = {knob.name: knob for knob in _knobs(resolver, base)}
    for price in priced(resolver, base, turned.values()):
        gains: dict[str, float] = {}
        if price.pays and price.pays_at is not None:
            at = turned[price.name].at
            assert at is not None
            looser = resolver.solve(at(price.pays_at))  # solved before
            if looser is not None:
                gains = {name: part.value - looser.parts[name].value for name, part in base.parts.items()}
        yield SharedPrice(price, {name: gain for name, gain in gains.items() if abs(gain) > 1e-9})


def _knobs(resolver: SharedResolver, base: Shares) -> Iterator[Knob[Fleets, Shares]]:
    """What is shared first; then what is asked of each model, and what each allows."""
    first = next(iter(resolver.single.values()))
    for knob in of_inventory(first):
        yield _for_all(base, knob)
    used = [replica.gpu for part in base.parts.values() for replica in part.plan.replicas()]
    for gpu in dict.fromkeys(used):
        yield _for_all(base, of_memory(first, gpu), max)
    for name, unit in (("max_gpus", "GPUs"), ("max_power_kw", "kW")):
        limit = getattr(base.variation.limits, name)
        if limit is not None:
            yield limit_of_all(base, name, unit, limit)
    for name, single in resolver.single.items():
        for knob in of_load(single, base.parts[name]):
            yield _for_one(base, name, knob)
    for name, single in resolver.single.items():
        for knob in of_constraints(single):
            yield _for_one(base, name, knob)


def _for_all(
    base: Shares, knob: Turned, whole: Callable[[Iterable[float]], float] = sum
) -> Knob[Fleets, Shares]:
    """A constraint of the inventory, turned for all models. `whole`: what the fleet makes of it, from what
    each model does."""
    at, reached, start = knob.at, knob.reached, base.variation
    assert at is not None
    assert reached is not None
    return Knob(
        knob.name,
        knob.unit,
        knob.stated,
        knob.step,
        lambda value: start.on(at(value)),
        None if knob.without is None else start.on(knob.without),
        knob.instead,
        lambda found: whole(reached(part) for part in found.parts.values()),
        knob.far,
        knob.least,
        knob.sure,
    )


def _for_one(base: Shares, name: str, knob: Turned) -> Knob[Fleets, Shares]:
    """A constraint of one model, turned for it alone."""
    at, reached, start = knob.at, knob.reached, base.variation
    return Knob(
        f"{name}: {knob.name}",
        knob.unit,
        knob.stated,
        knob.step,
        None if at is None else lambda value: start.with_model(name, at(value)),
        None if knob.without is None else start.with_model(name, knob.without),
        knob.instead,
        None if reached is None else lambda found: reached(found.parts[name]),
        knob.far,
        knob.least,
        knob.sure,
    )


def limit_of_all(base: Shares, name: str, unit: str, limit: float) -> Knob[Fleets, Shares]:
    """A limit of the whole fleet."""
    start, whole = base.variation, isinstance(limit, int)

    def reached(found: Shares) -> float:
        if name == "max_gpus":
            return float(found.gpus)
        return sum(part.fleet.watts for part in found.parts.values()) / 1e3

    return Knob(
        f"constraints.{name}",
        unit,
        limit,
        1 if whole else 1.0,
        lambda value: start.limited(**{name: round(value) if whole else value}),
        start.limited(**{name: None}),
        reached=reached,
    )


# -- decisions -----------------------------------------------------------------------------


def _ablations(resolver: SharedResolver, base: Shares) -> Iterator[tuple[str, Ablation]]:
    """One per decision of each model: the best fleet of all where this model may not take it."""
    late = False
    for name, part in base.parts.items():
        for decision in decisions(resolver.single[name], part):
            if any(one.fusions is not None for one in decision.without):
                continue  # kernels are the engine's, which several models may run on
            if not late:
                resolver.say(f"{name} without {decision.name}")
                try:
                    yield name, _ablated(resolver, base, name, decision)
                    continue
                except OutOfTime:
                    late = True
            yield name, Ablation(decision.name, decision.instead, tried=False)


def _ablated(resolver: SharedResolver, base: Shares, name: str, decision: Decision) -> Ablation:
    start = base.variation
    found = [
        outcome
        for one in decision.without
        if (outcome := resolver.solve(start.with_model(name, one))) is not None
    ]
    if not found:
        reason = "the inventory does not hold all models without it"
        return Ablation(decision.name, decision.instead, reason=reason)
    best = min(found, key=lambda outcome: outcome.value)
    plan = best.parts[name].plan
    return Ablation(
        decision.name,
        decision.instead,
        loss=0.0 - (resolver.gain(best, base) or 0.0),
        fleet=fleet_words(plan),
        metrics=metrics(plan),
    )


def _notes(plan: JointPlan, base: Shares, resolver: SharedResolver, complete: bool) -> Iterator[str]:
    if not math.isclose(plan.solution.value, base.value, rel_tol=1e-6):
        yield (
            f"solved again the best costs {base.value:.6g} USD/h, not {plan.solution.value:.6g}: the plans "
            "were made with other numbers, or in less time. Gains and losses are against the former"
        )
    if resolver.missed:
        yield f"the plan misses {resolver.missed}; so may what is compared with it"
    if resolver.judges:
        yield "every fleet that is compared was judged by playing the workload"
    elif any(one.simulated for one in plan.plans.values()):
        yield "the plans were simulated; here both sides are compared by formulas alone"
    else:
        yield "both sides are compared by formulas alone, as the plans were made"
    if resolver.restricted:
        yield "solved among promising layouts: gains may be larger, and losses smaller, than stated"
    if not complete:
        yield "time ran out before everything was tried (--time-limit)"
