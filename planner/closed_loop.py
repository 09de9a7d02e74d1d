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
from dataclasses import replace

from planc.planner.offers import NEAR, Offer
from planc.planner.stream import Stream

#: of a decode engine's capacity: with fewer prefill engines than would feed it wholly it runs below that
_LEVELS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.35, 0.2)
_HALVINGS = 30


def prompt_seconds(prefill: Stream) -> float:
    """The least that a prompt takes on any engine of a stream; 0 where there is none."""
    if not prefill.offers:
        return 0.0
    light = prefill.bench.steady(1e-3 * prefill.bench.seats).ttft
    return NEAR * float(light.min())


def at_levels(offer: Offer) -> list[Offer]:
    """A decode engine of a closed loop, by the step model, at each rate that it may run at."""
    exact = offer.precise()
    found = [replace(exact, level=level) for level in _LEVELS]
    return [one for one in found if one.load > 0]


def rates(offers: Sequence[Offer], counts: Sequence[int], loads: Sequence[float]) -> list[float]:
    """Loads of a fleet in a closed loop with the halves' in requests/s: of pools that hold as many users as
    their decode engines were given, all engines of a pool equally full."""
    found = list(loads)
    bought = [i for i, load in enumerate(loads) if counts[i] and load > 0]
    for split in sorted({offers[i].stream.split for i in bought if offers[i].stream.role == "decode"}):
        mine = [i for i in bought if offers[i].stream.split == split]
        prefill = [i for i in mine if offers[i].stream.role == "prefill"]
        decode = [i for i in mine if offers[i].stream.role == "decode"]
        users = sum(counts[i] * loads[i] for i in decode)
        most = {i: offers[i].capacity * offers[i].level for i in mine}
        needed = sum(counts[i] * most[i] for i in decode) / sum(counts[i] * most[i] for i in prefill)
        most |= {i: most[i] * needed for i in prefill}
        low, high = 0.0, 1.0
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            held = sum(counts[i] * _users(offers[i], most[i] * middle) for i in mine)
            low, high = (middle, high) if held < users else (low, middle)
        for i in mine:
            found[i] = most[i] * high
    return found


def _users(offer: Offer, rate: float) -> float:
    """Requests on an engine, or on their way to it, at a rate."""
    state = offer.stream.evaluator(offer.engine, offer.limits).at(rate)
    return rate * float(state.e2e[0, 0])
