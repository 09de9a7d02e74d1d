"""Closed loops over prefill and decode pools: so many users, each with one request on its way.

A user waits E = E_prefill + E_decode for an answer and then asks again, so that pools at X requests/s hold
X E users (Little's law). Both terms grow with X, so a fleet that holds the users at some rate within its
objectives holds them at a lower one too. The master problem takes decode engines at levels: rate r, users
in its seats r (S + p), with S their stay and p the least time of a prompt, which understates those of the
pools together; prefill engines must feed r.
What the pools do at the stated number of users is then found by bisection.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from planc.planner.evaluate import Precise
from planc.planner.offers import NEAR, Offer
from planc.planner.stream import Stream

#: of a decode engine's batch at its capacity: with too few prefill engines it runs below that
_LEVELS = np.array([0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0])
_ROUNDS, _CLOSE = 40, 1e-6


def prompt_seconds(prefill: Stream) -> float:
    """The least that a prompt takes on any engine of a stream; 0 where there is none."""
    if not prefill.offers:
        return 0.0
    light = prefill.bench.steady(1e-3 * prefill.bench.seats).ttft
    return NEAR * float(light.min())


def at_levels(offer: Offer) -> list[Offer]:
    """A decode engine of a closed loop, by the step model, at each rate that it may run at."""
    exact, prompt_s = offer.precise(), offer.stream.prompt_s
    if not exact.capacity or prompt_s is None:
        return []
    one = exact.stream.evaluator(exact.engine, exact.limits)
    state = one.state(_LEVELS * float(exact.stream.at(exact).batch[0, 0]))
    rates = np.minimum(one.load(state), exact.capacity)
    users = state.full[0] * exact.limits.seats * exact.engine.candidate.shape.dp + rates * prompt_s
    good = np.isfinite(state.ttft[0]) & np.isfinite(state.tpot[0])
    return [
        replace(exact, users=float(held), feed=float(rate))
        for held, rate in zip(users[good], rates[good], strict=True)
    ]


def rates(offers: Sequence[Offer], counts: Sequence[int], loads: Sequence[float]) -> list[float]:
    """Loads of a fleet in a closed loop with the halves' in requests/s: of pools that hold as many users as
    their decode engines were given, all engines of a pool equally full. Where prefill engines cannot feed
    that many, decode engines keep to the levels that they were bought at, of which the fullest hold most."""
    found = list(loads)
    bought = [i for i, load in enumerate(loads) if counts[i] and load > 0]
    for split in sorted({offers[i].stream.split for i in bought if offers[i].feed}):
        mine = [i for i in bought if offers[i].stream.split == split]
        users = sum(counts[i] * loads[i] for i in mine if offers[i].feed)
        for level in (False, True):
            pools = _pools([offers[i] for i in mine], [counts[i] for i in mine], level)
            full = fullness(pools, users)
            if full < 1.0:
                break
        for i, pool in zip(mine, pools, strict=True):
            found[i] = pool.most * full
    return found


def _pools(offers: Sequence[Offer], counts: Sequence[int], level: bool) -> list[Pool]:
    """Engines at the most that both halves carry together; decode engines at no more than their `level`."""
    most = [offer.feed if level and offer.feed else offer.capacity for offer in offers]
    halves: dict[bool, float] = {}
    for offer, count, rate in zip(offers, counts, most, strict=True):
        halves[offer.feed > 0] = halves.get(offer.feed > 0, 0.0) + count * rate
    whole = min(halves.values())
    return [
        Pool(
            count,
            offer.stream.evaluator(offer.engine, offer.limits),
            rate * whole / halves[offer.feed > 0],
        )
        for offer, count, rate in zip(offers, counts, most, strict=True)
    ]


@dataclass(frozen=True, slots=True)
class Pool:
    """`count` equal engines of a half, each at `most` requests/s when full."""

    count: int
    engine: Precise
    most: float


def fullness(pools: Sequence[Pool], users: float) -> float:
    """The share of its rate at which each of these engines runs when together they hold so many users; 1
    where they hold no more. By false position on users, which grow with it (Illinois: an end that stays
    counts half)."""
    low, high, below, above = 0.0, 1.0, -users, _held(pools, 1.0) - users
    if above <= 0:
        return 1.0
    for _ in range(_ROUNDS):
        middle = (low * above - high * below) / (above - below)
        missing = _held(pools, middle) - users
        if abs(missing) <= _CLOSE * users:
            return middle
        if missing < 0:
            low, below, above = middle, missing, above / 2
        else:
            high, above, below = middle, missing, below / 2
    return high


def _held(pools: Sequence[Pool], full: float) -> float:
    """Users with a request on these engines, or on its way to them."""
    loads = [full * pool.most for pool in pools]
    return sum(
        pool.count * load * float(pool.engine.at(load).e2e[0, 0])
        for pool, load in zip(pools, loads, strict=True)
    )
