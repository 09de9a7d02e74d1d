"""What a simulation leaves behind: times by request, a histogram of token gaps, load over time."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_PERCENTILES = (50, 90, 95, 99)
#: bins of a histogram per e-fold of time, and the shortest gap it tells from 0
_FINE, _SHORTEST = 50, 1e-6


@dataclass(slots=True)
class Gaps:
    """A histogram of times between a request's tokens, in bins 2 % wide; mean and count are exact."""

    counts: list[int] = field(default_factory=lambda: [0] * (_FINE * 24))
    count: int = 0
    total: float = 0.0

    def add(self, seconds: float, times: int) -> None:
        self.count += times
        self.total += seconds * times
        self.counts[self._bin(seconds)] += times

    def add_line(self, first: float, last: float, steps: int, times: int) -> None:
        """`steps` gaps that go evenly from `first` to `last`, each `times` times."""
        low, high = self._bin(first), self._bin(last)
        self.count += steps * times
        self.total += steps * times * (first + last) / 2
        if low == high:
            self.counts[low] += steps * times
            return
        slope, done = (last - first) / (steps - 1), 0
        for at in range(low, high):
            edge = _SHORTEST * math.exp((at + 1) / _FINE)
            upto = min(max(math.ceil((edge - first) / slope), done), steps)
            self.counts[at] += (upto - done) * times
            done = upto
        self.counts[high] += (steps - done) * times

    def quantile(self, q: float) -> float:
        """Seconds; the middle of the bin where it lies. nan without gaps."""
        if not self.count:
            return math.nan
        sums = np.cumsum(self.counts)
        at = int(np.searchsorted(sums, q * self.count))
        return _SHORTEST * math.exp((min(at, len(self.counts) - 1) + 0.5) / _FINE)

    @property
    def mean(self) -> float:
        return self.total / self.count if self.count else math.nan

    @staticmethod
    def _bin(seconds: float) -> int:
        if seconds <= _SHORTEST:
            return 0
        return min(int(math.log(seconds / _SHORTEST) * _FINE), _FINE * 24 - 1)


@dataclass(slots=True)
class Timeline:
    """Time integrals of what a server holds, in a bounded number of bins that double their width.

    Columns: seconds busy, sequences seated, sequences queued, share of cache blocks taken.
    """

    bins: int = 512
    width: float = 1.0
    columns: tuple[list[float], ...] = ()

    def __post_init__(self) -> None:
        if not self.columns:
            self.columns = tuple([0.0] * self.bins for _ in range(4))

    def add(self, start: float, seconds: float, values: tuple[float, float, float, float]) -> None:
        end = start + seconds
        at = int(start / self.width)
        if end <= (at + 1) * self.width and at < self.bins:
            for column, value in zip(self.columns, values):  # noqa: B905
                column[at] += value * seconds
            return
        while end >= self.width * self.bins:
            self._double()
        at = int(start / self.width)
        while True:
            edge = (at + 1) * self.width
            part = min(end, edge) - start
            for column, value in zip(self.columns, values, strict=True):
                column[at] += value * part
            if end <= edge:
                return
            start, at = edge, at + 1
            if at == self.bins:
                return

    def _double(self) -> None:
        for column in self.columns:
            column[:] = [a + b for a, b in zip(column[::2], column[1::2], strict=True)]
            column.extend([0.0] * (self.bins // 2))
        self.width *= 2

    def means(self, duration: float) -> dict[str, Any]:
        """Averages over each bin up to `duration`, and over all of it."""
        while duration > self.width * self.bins:  # nothing was there towards the end
            self._double()
        used = max(math.ceil(duration / self.width), 1)
        spans = np.minimum(np.arange(1, used + 1) * self.width, duration) - np.arange(used) * self.width
        names = ("busy", "running", "waiting", "kv")
        return {
            "width_s": self.width,
            **{
                name: (np.array(column[:used]) / np.maximum(spans, 1e-12))
                for name, column in zip(names, self.columns, strict=True)
            },
        }


@dataclass(frozen=True, slots=True)
class Records:
    """Requests by id: seconds since the load began; nan for what did not happen.

    arrival, first_token, finish   as the client sees them        admitted   first time in a step
    hit                            prompt tokens found in the prefix cache
    wave                           requests of the first wave of a closed loop (0 for open loads)
    """

    arrival_s: Floats
    admitted_s: Floats
    first_token_s: Floats
    finish_s: Floats
    prompt: Ints
    output: Ints
    preemptions: Ints
    hit: Ints
    gaps: Gaps
    timeline: Timeline
    steps: int = 0
    events: int = 0
    wave: int = 0

    @property
    def ttft_s(self) -> Floats:
        return self.first_token_s - self.arrival_s

    @property
    def e2e_s(self) -> Floats:
        return self.finish_s - self.arrival_s

    @property
    def tpot_s(self) -> Floats:
        """(finish - first token) / (output - 1), as benchmark clients count; nan for one-token answers."""
        steps = self.output - 1
        found: Floats = np.divide(
            self.finish_s - self.first_token_s, steps, out=np.full(steps.shape, np.nan), where=steps > 0
        )
        return found

    @property
    def duration_s(self) -> float:
        """From the first request to the last answer."""
        return float(self.finish_s.max() - self.arrival_s.min())

    def steady(self) -> Records:
        """Without a closed loop's first wave, whose prompts all come at once."""
        if not self.wave:
            return self
        return self.only(np.arange(self.prompt.size) >= self.wave)

    def only(self, which: NDArray[np.bool_]) -> Records:
        """Some requests. Gaps and timeline stay those of the whole run."""
        names = ("arrival_s", "admitted_s", "first_token_s", "finish_s", "prompt", "output", "preemptions")
        picked: Mapping[str, Any] = {name: getattr(self, name)[which] for name in (*names, "hit")}
        return replace(self, wave=0, **picked)

    def summary(self, slo: Mapping[str, float] | None = None) -> dict[str, Any]:
        """Means and percentiles in ms, rates per second, shares.

        slo   limits by metric (ttft_ms, tpot_ms, e2e_ms): goodput is the rate of requests within all
        """
        found: dict[str, Any] = {
            "requests": int(self.prompt.size),
            "ttft_ms": _spread(self.ttft_s * 1e3),
            "tpot_ms": _spread(self.tpot_s * 1e3),
            "itl_ms": {
                "mean": self.gaps.mean * 1e3,
                **{f"p{p}": self.gaps.quantile(p / 100) * 1e3 for p in _PERCENTILES},
            },
            "e2e_ms": _spread(self.e2e_s * 1e3),
        }
        duration = self.duration_s
        per_second = 1 / duration if duration > 0 else math.nan
        good = np.ones(self.prompt.size, dtype=bool)
        for name, limit in (slo or {}).items():
            values = getattr(self, name.removesuffix("_ms") + "_s") * 1e3
            good &= ~(values > limit)
        time = self.timeline.means(float(np.nanmax(self.finish_s)))
        weight = np.ones(len(time["busy"]))
        found |= {
            "duration_s": duration,
            "requests_s": self.prompt.size * per_second,
            "output_tok_s": float(self.output.sum()) * per_second,
            "prompt_tok_s": float(self.prompt.sum()) * per_second,
            "goodput_requests_s": float(good.sum()) * per_second,
            "goodput_share": float(good.mean()),
            "preemptions": int(self.preemptions.sum()),
            "prefix_hit_rate": float(self.hit.sum() / max(self.prompt.sum(), 1)),
            "utilisation": float(np.average(time["busy"], weights=weight)),
            "running": float(np.average(time["running"], weights=weight)),
            "waiting": float(np.average(time["waiting"], weights=weight)),
            "kv_occupancy": float(np.average(time["kv"], weights=weight)),
            "kv_occupancy_peak": float(np.max(time["kv"])),
            "steps": self.steps,
        }
        return found


def _spread(values: Floats) -> dict[str, float]:
    known = values[np.isfinite(values)]
    if not known.size:
        return {"mean": math.nan, **{f"p{p}": math.nan for p in _PERCENTILES}}
    levels = np.percentile(known, _PERCENTILES)
    return {
        "mean": float(known.mean()),
        **{f"p{p}": float(v) for p, v in zip(_PERCENTILES, levels, strict=True)},
    }
