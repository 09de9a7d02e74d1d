"""What binds, and what a unit of each constraint is worth.

The problem is an integer one, so its constraints have no dual prices: a millisecond more may buy nothing
and three may save a GPU. Each price is the difference of two optima: the request solved again with the
constraint one unit looser, one unit tighter, at the nearest value that pays (found by bisection; the optimum
is monotone in every constraint), and without it. What a unit would gain if engines could be bought in parts
stands beside them, as that of a linear relaxation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from planc.planner.explain_knobs import Knob, knobs
from planc.planner.loosen import rounded_down, rounded_up
from planc.planner.resolving import F, OutOfTime, Resolving, V
from planc.planner.variations import Outcome, Resolver

_BISECTIONS = 5

Verdict = Literal["binds", "limits", "slack", "not tried"]


@dataclass(frozen=True, slots=True)
class Price:
    """What a constraint costs. Gains are in the objective's unit; None: not known, or there is no plan.

    step               one unit in the looser direction
    reached            what the plan makes of it
    verdict            binds: one unit looser is better already; limits: some looser value is; slack: none is
    looser, tighter    the objective's gain from one unit looser, and its loss from one unit tighter
    tighter_fails      one unit tighter is infeasible
    pays_at, pays      the nearest looser value that gains anything, and what it gains
    without, instead   gain from leaving the constraint out, and what is in its place then
    marginal           gain of the linear relaxation from one unit looser, on interpolated capacities; None
                       where nothing is gained, or the objective depends on how loaded engines are
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
    instead: str = "left out"
    marginal: float | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def prices(resolver: Resolver, base: Outcome) -> Iterator[Price]:
    """One price per constraint that the request states, and per thing it could have more of."""
    yield from priced(resolver, base, knobs(resolver, base))


def priced(resolver: Resolving[V, F], base: F, turned: Iterable[Knob[V, F]]) -> Iterator[Price]:
    """One price per constraint. Those that time did not allow are "not tried"."""
    late = False
    for knob in turned:
        reached = None if knob.reached is None else knob.reached(base)
        found = Price(knob.name, knob.unit, knob.stated, knob.step, reached, instead=knob.instead)
        if not late:
            resolver.say(f"pricing {knob.name}")
            try:
                found = _priced(resolver, base, knob, found)
            except OutOfTime:
                late = True
        yield found


def _priced(resolver: Resolving[V, F], base: F, knob: Knob[V, F], price: Price) -> Price:
    free = None if knob.without is None else resolver.solve(knob.without)
    without = _gained(resolver, free, base)
    price = replace(price, without=without)
    if knob.at is None or knob.stated is None:
        return replace(price, verdict="limits" if without else "slack")
    back = knob.stated - knob.step
    if _holds(knob, price.reached, back):
        price = replace(price, tighter=0.0)
    elif back >= knob.least:
        found = resolver.solve(knob.at(back))
        loss = resolver.gain(found, base)
        price = replace(price, tighter=None if loss is None else max(0.0, -loss), tighter_fails=found is None)
    if without == 0.0:  # then no looser value gains
        return replace(price, looser=0.0, verdict="slack")
    unit, known = knob.stated + knob.step, knob.stated
    if without and free is not None:
        known, pays_at, pays = _nearest(resolver, base, knob, _far(knob, free), without)
        price = replace(price, pays_at=pays_at, pays=pays)
    if known == unit or _beyond(knob, known, unit):
        looser: float | None = 0.0
    else:
        looser = _gained(resolver, resolver.solve(knob.at(unit)), base)
    if looser:
        price = replace(price, pays_at=unit, pays=looser)
    verdict: Verdict = "binds" if looser else "limits" if without else "slack"
    marginal = None if verdict == "slack" else resolver.marginal(base, knob.at(unit))
    return replace(price, looser=looser, verdict=verdict, marginal=marginal)


def _gained(resolver: Resolving[V, F], found: F | None, base: F) -> float | None:
    """What a looser constraint gains: nothing at least, since the plan is one under it too."""
    gain = resolver.gain(found, base)
    return None if gain is None else max(gain, 0.0)


def _holds(knob: Knob[V, F], reached: float | None, value: float) -> bool:
    """Whether the plan is one under a tighter value already; then it is the best one still."""
    if reached is None or not knob.sure:
        return False
    return reached <= value if knob.step > 0 else reached >= value


def _far(knob: Knob[V, F], free: F) -> float:
    assert knob.stated is not None
    if knob.far is not None or knob.reached is None:
        return knob.stated + knob.step if knob.far is None else knob.far
    reached = knob.reached(free)
    return max(reached, knob.stated + knob.step) if knob.step > 0 else min(reached, knob.stated + knob.step)


def _beyond(knob: Knob[V, F], value: float, unit: float) -> bool:
    """Whether a value is looser than one unit more."""
    return value > unit if knob.step > 0 else value < unit


def _nearest(
    resolver: Resolving[V, F], base: F, knob: Knob[V, F], far: float, without: float
) -> tuple[float, float | None, float | None]:
    """(loosest value known to gain nothing, nearest value known to gain, its gain); None where not even `far`
    gains. Where a plan that reaches a value is one under it, `far` gains what having no limit does."""
    assert knob.at is not None
    assert knob.stated is not None
    tidy = _tidy(knob)
    low, high = knob.stated, tidy(far)
    best = without if knob.sure else _gained(resolver, resolver.solve(knob.at(high)), base)
    if not best:
        return high, None, None
    for _ in range(_BISECTIONS):
        middle = tidy(math.sqrt(low * high) if low > 0 and high > 0 else (low + high) / 2)
        if not min(low, high) < middle < max(low, high):
            break
        found = _gained(resolver, resolver.solve(knob.at(middle)), base)
        if found:
            high, best = middle, found
        else:
            low = middle
    return low, high, best


def _tidy(knob: Knob[V, F]) -> Callable[[float], float]:
    """Rounds a value outwards: to whole ones, or to three digits."""
    if knob.whole:
        return lambda value: float(math.ceil(value) if knob.step > 0 else math.floor(value))
    return rounded_up if knob.step > 0 else rounded_down
