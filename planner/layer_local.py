"""Placements step by step: a first one at once, and small changes that bring flow.

`chains` lays one pipeline after the other over machines that links join; it is there before any bound is
known. `climb` changes a placement at random from a fixed seed and keeps what carries no less: it heeds links
that no formula sees.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence

from planc.planner.layer_cluster import Cluster, Range

#: machines tried in the search for one pipeline
_TRIES = 4000


def chains(cluster: Cluster) -> list[Range]:
    """Pipelines over machines that hold as much as they can, until no further one is found."""
    ranges: list[Range] = [None] * len(cluster.machines)
    while (path := _chain(cluster, [at for at, span in enumerate(ranges) if span is None])) is not None:
        for at, span in path:
            ranges[at] = span
    return ranges


def _chain(cluster: Cluster, free: Sequence[int]) -> list[tuple[int, tuple[int, int]]] | None:
    """A pipeline over free machines, over the widest links first; None where none is found in some tries."""
    hub, layers, tries = len(cluster.machines), cluster.layers, _TRIES
    path: list[tuple[int, tuple[int, int]]] = []

    def steps(before: int, start: int) -> list[tuple[int, int]]:
        held = {at for at, _ in path}
        found = [
            (at, min(len(cluster.machines[at].tokens_s), layers - start))
            for at in free
            if at not in held and cluster.between[before, at] > 0 and cluster.machines[at].tokens_s
        ]
        rate = {at: min(cluster.between[before, at], cluster.rate(at, k)) for at, k in found}
        return sorted(found, key=lambda step: (rate[step[0]], -step[0]))

    if sum(len(cluster.machines[at].tokens_s) for at in free) < layers:
        return None
    waiting = [steps(hub, 0)]
    while waiting and tries:
        if not waiting[-1]:
            waiting.pop()
            if path:
                path.pop()
            continue
        tries -= 1
        at, held = waiting[-1].pop()
        start = path[-1][1][1] if path else 0
        if start + held < layers:
            path.append((at, (start, start + held)))
            waiting.append(steps(at, start + held))
        elif cluster.between[at, hub] > 0:
            return [*path, (at, (start, layers))]
    return None


def climb(
    cluster: Cluster, ranges: Sequence[Range], partial: bool, enough: float, moves: int, deadline: float
) -> list[Range]:
    """A placement that carries at least as much: `moves` random changes, fewer where `enough` flows."""
    rng = random.Random(0)
    best = list(ranges)
    flow = cluster.flow(best, partial).tokens_s
    for _ in range(moves):
        if flow >= enough or time.monotonic() > deadline:
            break
        trial = _changed(cluster, best, rng)
        if trial == best:
            continue
        found = cluster.flow(trial, partial).tokens_s
        if found >= flow:
            best, flow = trial, found
    return best


def _changed(cluster: Cluster, ranges: Sequence[Range], rng: random.Random) -> list[Range]:
    """One machine elsewhere, two machines' ranges traded, or a boundary one layer on."""
    trial, kind = list(ranges), rng.random()
    machine = rng.randrange(len(trial))
    bounds = sorted({0, cluster.layers} | {edge for span in ranges if span for edge in span})
    if kind < 0.4:
        start = rng.choice([bound for bound in bounds if bound < cluster.layers])
        most = min(len(cluster.machines[machine].tokens_s), cluster.layers - start)
        ends = [end for end in bounds if start < end <= start + most]
        if ends and rng.random() < 0.7:
            trial[machine] = (start, rng.choice(ends))
        elif most:
            trial[machine] = (start, start + rng.randint(1, most))
    elif kind < 0.6:
        other = rng.randrange(len(trial))
        trial[machine], trial[other] = trial[other], trial[machine]
    elif inner := bounds[1:-1]:
        edge, step = rng.choice(inner), rng.choice((-1, 1))
        move = lambda bound: bound + step * (bound == edge)  # noqa: E731
        trial = [span and (move(span[0]), move(span[1])) for span in trial]
    fits = (
        span is None or 0 < span[1] - span[0] <= len(one.tokens_s)
        for span, one in zip(trial, cluster.machines, strict=True)
    )
    return trial if all(fits) else list(ranges)
