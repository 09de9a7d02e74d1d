"""Operating points: what engines do at a load, and what requests meet there."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from planc.planner.request import Metric, Slo
from planc.planner.traffic import Traffic

Array = NDArray[np.float64]
#: an engine's `serving.first_token` as a number: decode steps until the client has it, before the hand-over
FIRST = {"prefill": -1.0, "decode": 0.0, "again": 1.0}


class StepTimes(Protocol):
    """Step times of N schedulers; arguments and results are arrays [N, K].

    budget      prompt and decode tokens per step [N, 1]     pp, dp   degrees [N, 1]
    request_s   a request's way to the scheduler [N, 1]
    lag_steps   steps that pass besides, as asynchronous scheduling costs one [N, 1]
    first_token where the client has it from when prompts are computed elsewhere, see FIRST [N, 1]
    per_seq     rows that a step computes for each decoding sequence, 1 without speculation [N, 1]
    pace        tokens that each of them gains by a step, on average [N, 1]
    places      batches to look at around a mean one, in standard deviations; their own is 1
    """

    @property
    def places(self) -> tuple[float, ...]: ...

    @property
    def budget(self) -> Array: ...

    @property
    def pp(self) -> Array: ...

    @property
    def dp(self) -> Array: ...

    @property
    def request_s(self) -> Array: ...

    @property
    def lag_steps(self) -> Array: ...

    @property
    def first_token(self) -> Array: ...

    @property
    def per_seq(self) -> Array: ...

    @property
    def pace(self) -> Array: ...

    def at(self, seqs: Array) -> tuple[Array, Array, Array]:
        """(D, A, F) of `planner.steady_state` in seconds of the slowest stage, with `seqs` decoding sequences
        in the step."""
        ...


@dataclass(frozen=True, slots=True)
class Steady:
    """Means at one load, arrays [N, K], seconds. Infinite times where the load cannot be carried.

    batch    decoding sequences of one scheduler     rate   requests/s of one scheduler
    users    requests in the system of one scheduler (decoding, prefilling and waiting)
    busy     share of time that prompts take          full  share of the seats that are taken
    """

    traffic: Traffic
    batch: Array
    rate: Array
    ttft: Array
    tpot: Array
    users: Array
    busy: Array
    full: Array
    _decode: Array
    _mixed: Array
    _mixed_share: Array
    _seat_wait: Array
    _seat_chance: Array
    _queue_wait: Array
    _residual: Array
    _own: Array
    _tpot_sd: Array
    _pace: Array
    _own_sd: Array | float = 0.0

    @property
    def e2e(self) -> Array:
        return self.ttft + self.traffic.decode_steps * self.tpot

    def mean(self, metric: Metric) -> Array:
        """TTFT, TPOT (and ITL, which has the same mean), or end-to-end latency."""
        return {"ttft": self.ttft, "tpot": self.tpot, "itl": self.tpot, "e2e": self.e2e}[metric]

    def quantile(self, metric: Metric, q: float) -> Array:
        """A percentile over requests (ITL: over tokens)."""
        return {"ttft": self._ttft_at, "tpot": self._tpot_at, "itl": self._itl_at, "e2e": self._e2e_at}[
            metric
        ](q)

    def value(self, slo: Slo) -> Array:
        state = self.of(slo.traffic_class) if slo.traffic_class else self
        return state.mean(slo.metric) if slo.quantile is None else state.quantile(slo.metric, slo.quantile)

    def of(self, traffic_class: str) -> Steady:
        """What the requests of one traffic class meet: they wait like all others, and their own chunks are
        as many as their own input makes."""
        mine = self.traffic.only(traffic_class)
        if mine is self.traffic:
            return self
        own = self._own * (
            mine.isl_mean
            * (1 - mine.hit_rate)
            / max(self.traffic.isl_mean * (1 - self.traffic.hit_rate), 1.0)
        )
        return replace(self, traffic=mine, ttft=self.ttft + own - self._own, _own=own)

    def meets(self, slos: tuple[Slo, ...]) -> NDArray[np.bool_]:
        """Where the load is stable and every objective holds."""
        found = np.isfinite(self.ttft) & np.isfinite(self.tpot)
        for slo in slos:
            found &= self.value(slo) <= slo.limit
        return found

    def _ttft_at(self, q: float) -> Array:
        seat = np.where(self._seat_chance > 1 - q, self._seat_wait * _tail(self._seat_chance, q), 0.0)
        busy = np.clip(self.busy, 1e-12, 1.0)
        queue = np.where(busy > 1 - q, self._queue_wait / busy * _tail(busy, q), 0.0)
        isl = self.traffic.isl
        longer = self.traffic.quantile(isl, q) / max(self.traffic.isl_mean, 1e-9) - 1.0
        with np.errstate(invalid="ignore"):
            return self.ttft + _quadrature(
                seat - self._seat_wait * self._seat_chance,
                np.where(np.isfinite(queue), queue - self._queue_wait, 0.0),
                self._residual * (2 * q - 1),
                self._own * longer,
                NormalDist().inv_cdf(q) * np.asarray(self._own_sd),
            )

    def _tpot_at(self, q: float) -> Array:
        least, z = self._decode / self._pace, NormalDist().inv_cdf(q)
        with np.errstate(invalid="ignore"):  # what stalls add is skewed to the right, as a gamma variable is
            skew = 2 * np.minimum(self._tpot_sd / np.maximum(self.tpot - least, 1e-12), 1.0)
            return np.maximum(self.tpot + (z + skew * (z * z - 1) / 6) * self._tpot_sd, least)

    def _itl_at(self, q: float) -> Array:
        late = (1 - q) * self._pace  # of the gaps between steps; tokens of one step have none between them
        inside = np.clip(1 - late, 0.0, 1 - 1e-12)
        plain = self._decode + np.maximum(_normal_quantile(inside), 0.0) * self._tpot_sd * self._pace
        found = np.where(self._mixed_share >= late, np.maximum(self._mixed, plain), plain)
        return np.where(late < 1, found, 0.0)

    def _e2e_at(self, q: float) -> Array:
        steps = np.maximum(self.traffic.osl - 1, 0)
        more = self.traffic.quantile(steps, q) - self.traffic.decode_steps
        ttft = self._ttft_at(q)
        return self.e2e + _quadrature(
            np.subtract(ttft, self.ttft, out=np.zeros_like(ttft), where=np.isfinite(self.ttft)),
            self.tpot * more,
            self.traffic.decode_steps * (self._tpot_at(q) - self.tpot),
        )


_normal_quantile = np.vectorize(
    lambda q: NormalDist().inv_cdf(q) if 0 < q < 1 else -math.inf, otypes=[np.float64]
)


def _tail(chance: Array, q: float) -> Array:
    """Quantile of an exponential tail that starts with probability `chance`, in units of its mean."""
    return np.log(np.maximum(chance / (1 - q), 1.0))


def _quadrature(*parts: Array) -> Array:
    """Independent deviations from the mean, added in quadrature with their signs."""
    total = sum(part * np.abs(part) for part in parts)
    return np.sign(total) * np.sqrt(np.abs(total))
