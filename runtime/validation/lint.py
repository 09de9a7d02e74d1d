"""Rows that measurements themselves speak against, by rules stated here; no prediction is looked at.

monotone      in a sweep over concurrency (same cell, layout and lengths) TPOT falls from one load to a higher
              one, by more than `_FALL` under one engine version, by more than `_CHANGE` whatever the
              versions; the fewest rows that must go so that the rest rises are flagged, where the sweep
              has at least three loads
capped        in a sweep, a load at least `_MORE` times another's has a TPOT less than `_FLAT` above it and
              a TTFT over `_LATE` times as long: fewer sequences ran than the load says
duplicates    rows of one cell, layout, lengths and concurrency differ by more than `_SPREAD` in TPOT:
              different software under one label, and nothing says which, so all are flagged
unexplained   no engine version, in a cell where other rows state theirs, and not confirmed by a row of the
              same cell, lengths and concurrency within `_SPREAD`
rate          the prompts and answers need more operations per second than the GPUs have
stalled       mean TTFT exceeds the time in which this layout, at the rate of prompt tokens that it is
              measured to sustain in some row, would have read the prompts of all clients, and `_STEPS`
              steps more, although the cache holds all clients' sequences
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence

from planc.cost_model.formats import product_precision
from planc.runtime.validation.points import Point
from planc.runtime.validation.setups import Setup

_FALL = 0.05
_CHANGE = 0.25
_SPREAD = 0.10
_STEPS = 50
_MORE, _FLAT, _LATE = 4.0, 0.10, 10.0

RULES = ("monotone", "capped", "duplicates", "unexplained", "rate", "stalled")


def lint(setups: Sequence[Setup]) -> dict[int, tuple[str, ...]]:
    """The rules that each point breaks, by its row; points that break none are absent."""
    points = [setup.point for setup in setups]
    flagged: dict[int, list[str]] = defaultdict(list)
    for name, rows in (
        ("monotone", _falling(points)),
        ("capped", _capped(points)),
        ("duplicates", _unlike(points)),
        ("unexplained", _unexplained(points)),
        ("rate", (s.point.row for s in setups if _too_fast(s))),
        ("stalled", _stalled(setups)),
    ):
        for row in rows:
            flagged[row].append(name)
    return {row: tuple(names) for row, names in flagged.items()}


def mean_lengths(setup: Setup) -> tuple[float, float]:
    """Mean prompt and answer, tokens, as the load generator draws them."""
    mean = (setup.harness.length_low + setup.harness.length_high) / 2
    return mean * setup.point.isl, mean * setup.point.osl


def requests_per_second(setup: Setup) -> float | None:
    """Measured rate of requests, by Little's law; None where a time is missing."""
    point = setup.point
    if point.ttft_ms is None or point.tpot_ms is None:
        return None
    _, answer = mean_lengths(setup)
    return point.concurrency / (point.ttft_ms + max(answer - 1, 0.0) * point.tpot_ms) * 1e3


def _grouped(points: Iterable[Point], key: Callable[[Point], Hashable]) -> Mapping[Hashable, list[Point]]:
    found: dict[Hashable, list[Point]] = defaultdict(list)
    for point in points:
        if point.tpot_ms is not None:
            found[key(point)].append(point)
    return found


def _falling(points: Sequence[Point]) -> set[int]:
    found: set[int] = set()
    one = _grouped(points, lambda p: (p.cell, p.engine_version, p.layout, p.workload))
    any_version = _grouped(points, lambda p: (p.cell, p.layout, p.workload))
    for groups, fall in ((one, _FALL), (any_version, _CHANGE)):
        for sweep in groups.values():
            if len({p.concurrency for p in sweep}) >= 3:
                ordered = sorted(sweep, key=lambda p: (p.concurrency, p.tpot_ms or 0.0))
                kept = _longest_rise([p.tpot_ms or 0.0 for p in ordered], fall)
                found |= {p.row for i, p in enumerate(ordered) if i not in kept}
    return found


def _longest_rise(values: Sequence[float], fall: float) -> set[int]:
    """Indices of the longest part of a sequence in which no value lies more than the share `fall` below
    the one before; the earliest of equally long ones."""
    best: list[list[int]] = []
    for i, value in enumerate(values):
        before = [chain for chain in best if values[chain[-1]] * (1 - fall) <= value]
        best.append([*_longest(before), i])
    return set(_longest(best))


def _longest(chains: Sequence[list[int]]) -> list[int]:
    """The first of the longest ones."""
    return max(chains, key=lambda chain: len(chain), default=[])


def _capped(points: Sequence[Point]) -> set[int]:
    found: set[int] = set()
    for sweep in _grouped(points, lambda p: (p.cell, p.layout, p.workload)).values():
        for high in sweep:
            for low in sweep:
                more = high.concurrency >= _MORE * low.concurrency
                flat = (high.tpot_ms or 0.0) < (1 + _FLAT) * (low.tpot_ms or 0.0)
                late = (high.ttft_ms or 0.0) > _LATE * (low.ttft_ms or math.inf)
                if more and flat and late:
                    found.add(high.row)
    return found


def _unlike(points: Sequence[Point]) -> set[int]:
    found: set[int] = set()
    for same in _grouped(points, lambda p: (p.cell, p.layout, p.workload, p.concurrency)).values():
        times = [p.tpot_ms or 0.0 for p in same]
        if max(times) > min(times) * (1 + _SPREAD):
            found |= {p.row for p in same}
    return found


def _unexplained(points: Sequence[Point]) -> set[int]:
    stated = {p.cell for p in points if p.engine_version}
    groups = _grouped(points, lambda p: (p.cell, p.gpus, p.workload, p.concurrency))
    found: set[int] = set()
    for same in groups.values():
        for point in same:
            if point.engine_version or point.cell not in stated:
                continue
            near = [
                p
                for p in same
                if p.engine_version and abs((p.tpot_ms or 0.0) / (point.tpot_ms or 1.0) - 1) <= _SPREAD
            ]
            if not near:
                found.add(point.row)
    return found


def _too_fast(setup: Setup) -> bool:
    rate = requests_per_second(setup)
    if rate is None:
        return False
    prompt, answer = mean_lengths(setup)
    shape = setup.decode.shape
    work = 2.0 * setup.table.model.active_parameters * (prompt + answer) * rate
    peak = setup.gpu.peak_flops(product_precision(shape.weights, shape.activations))
    return work > peak * setup.point.gpus


def _stalled(setups: Sequence[Setup]) -> set[int]:
    best: dict[Hashable, float] = defaultdict(float)
    for setup in setups:
        rate = requests_per_second(setup)
        if rate is not None:
            key = (setup.point.cell, setup.point.layout)
            best[key] = max(best[key], rate * mean_lengths(setup)[0])
    found: set[int] = set()
    for setup in setups:
        point = setup.point
        if point.ttft_ms is None or point.tpot_ms is None or point.mode == "disagg":
            continue
        prompt, answer = mean_lengths(setup)
        engine = setup.decode
        held = engine.memory.kv_tokens * engine.workers * engine.shape.dp
        if point.concurrency * (prompt + answer) > 0.8 * held:
            continue
        burst = point.concurrency * prompt / best[point.cell, point.layout] * 1e3
        if point.ttft_ms > burst + _STEPS * point.tpot_ms:
            found.add(point.row)
    return found
