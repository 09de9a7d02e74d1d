"""Continuous batching with chunked prefill in steady state, in closed form, over arrays.

One scheduler (an engine has `dp` of them) runs steps. A step carries one token of every decoding
sequence and, while prompts wait, a chunk of up to budget - sequences prompt tokens. Everything
follows from three step times as functions of the number b of decoding sequences:

    D(b)   a step without prompt tokens
    M(b)   a step with one prompt's next chunk
    F(b)   a step whose budget is full of prompt tokens

With B sequences decoding on average and S decode steps per request, request rate and time per
output token follow without iteration. Each request lengthens the steps by X = chunks (M - D), so
the share of time that prompts take is P = rate X and

    TPOT = D / (1 - P),   rate = B / (S TPOT)  =>  rate = B / (S D + B X)          (Little's law)

Prompts come in bursts: over the life of a request the time they take has variance V per second, with
V = rate X^2 TPOT^2 / D^2 for Poisson arrivals (long-run variance of the busy time of M/G/1), so that
a request's TPOT has variance V TPOT / S and its mean exceeds the time average by V / 2S.

The batch that a sequence meets is B + 1 under Poisson arrivals (size-biased mean), B in a closed
loop. TTFT = wait for a seat + wait for the prompt queue + rest of the running step + own chunks +
constant. The prompt queue is G/G/1 with service I F / budget (Kingman; exact M/G/1 by
Pollaczek-Khinchine when arrivals are Poisson); seats are a many-server queue by Halfin and Whitt
(Operations Research 29, 1981). Percentiles: waits have exponential tails, prompts follow the length
distribution, the batch met by a request averages a Poisson number over the request's own life
(M/G/infinity: variance 2B/3); independent parts add in quadrature.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from planc.planner.priors import priors
from planc.planner.request import Metric, Slo
from planc.planner.traffic import Part, Traffic

Array = NDArray[np.float64]
#: an engine's `serving.first_token` as a number: decode steps until the client has it, before the hand-over
FIRST = {"prefill": -1.0, "decode": 0.0, "again": 1.0}
_SETTLE = 12


class StepTimes(Protocol):
    """Step times of N schedulers; arguments and results are arrays [N, K].

    budget      prompt and decode tokens per step [N, 1]     pp, dp   degrees [N, 1]
    request_s   a request's way to the scheduler [N, 1]
    lag_steps   steps that pass besides, as asynchronous scheduling costs one [N, 1]
    first_token where the client has it from when prompts are computed elsewhere, see FIRST [N, 1]
    per_seq     rows that a step computes for each decoding sequence, 1 without speculation [N, 1]
    pace        tokens that each of them gains by a step, on average [N, 1]
    """

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
        """(D, M, F) in seconds of the slowest stage, with `seqs` decoding sequences in the step."""
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
        return np.maximum(self.tpot + NormalDist().inv_cdf(q) * self._tpot_sd, self._decode / self._pace)

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


def steady(
    times: StepTimes,
    traffic: Traffic,
    batch: Array,
    seats: Array,
    scale: float = 1.0,
    role: Part = "aggregated",
    transfer_s: Array | float = 0.0,
    fresh: Array | float | None = None,
    load_s: Array | float = 0.0,
) -> Steady:
    """The steady state with about `batch` sequences decoding on average per scheduler: the parameter
    that everything is explicit in. The result's own `batch` adds what bursts of prompts hold back.

    batch       [N, K], at most `seats`
    seats       [N, 1] sequences that may run at once
    scale       factor on every step time, for bands
    role        the part of the work that the engine does, where it is not all of it
    transfer_s  [N, 1] seconds that the cache of a prompt takes from the other pool, for its half of the work
    fresh       [N, 1] prompt tokens that are computed, where engines find unlike shares; None: the traffic's
    load_s      [N, 1] seconds that a request waits for what it finds elsewhere
    """
    traffic = traffic.of(role)
    if traffic.role == "decode":
        return _decode_only(times, traffic, batch, seats, scale, np.asarray(transfer_s, dtype=np.float64))
    fresh = traffic.new_tokens if fresh is None else fresh
    if traffic.decode_steps == 0:
        return _prompts_only(times, traffic, batch, seats, scale, fresh, load_s)
    known = priors()
    closed = traffic.concurrency is not None
    met = np.maximum(batch, 1.0) if closed else np.minimum(batch + 1.0, np.maximum(seats, 1.0))
    decode, mixed, full = (part * scale for part in times.at(met / times.pp))
    budget = np.maximum(times.budget - times.per_seq * met / times.pp, 1.0)
    chunks = np.maximum(fresh / budget, 1.0)
    steps = traffic.decode_steps / times.pace
    # several prompts share a step once more than one arrives per step; then their cost is the fluid one
    alone = np.minimum(1.0, steps / np.maximum(batch, 1e-12))
    extra = alone * chunks * (mixed - decode) + (1 - alone) * fresh / budget * (full - decode)
    extra = np.maximum(extra, 0.0)
    rate = _rate(batch, steps * times.pp * decode, extra, times.dp)
    prompt_share = 1 - (1 - np.minimum(rate * extra, 1.0)) ** times.dp
    variability = (_arrivals(traffic) + traffic.isl_cv2) / 2
    with np.errstate(divide="ignore", invalid="ignore"):
        tpot = np.where(prompt_share < 1, times.pp * decode / (1 - prompt_share), np.inf)
        # prompts come in bursts: variance of the stalls that one request meets, and its mean's excess
        stalls = 2 * variability * (extra * tpot / (times.pp * decode)) ** 2 * rate
        tpot = tpot + stalls / (2 * steps)

    service = fresh / budget * full
    busy = rate * service
    with np.errstate(divide="ignore", invalid="ignore"):
        queue = np.where(busy < known.stable, busy / (1 - busy) * service * variability, np.inf)
    partial = np.ceil(chunks - 1e-9) - chunks  # the last chunk is a partial one: a plain step and its share
    room = np.maximum(budget - np.minimum(fresh, budget), 1.0)
    # prompts that arrive after this one and still ride in its step (those before it are in the queue's wait)
    shared = np.clip(rate * mixed / 2 * fresh / room, 0.0, 1.0) * (1 - np.minimum(fresh / budget, 1.0))
    last = mixed + np.maximum(full - mixed, 0.0) * np.where(chunks <= 1, shared, 0.0)
    own = (chunks - 2 + times.pp) * mixed + last + partial * decode + load_s
    mixed_share = np.minimum(rate * chunks * mixed, 1.0)
    residual = 0.5 * ((1 - mixed_share) * decode + mixed_share * np.where(chunks <= 1, last, 0.0))

    stay = own + steps * tpot
    taken = rate * stay
    if closed:
        chance, wait = np.zeros_like(taken), np.zeros_like(taken)
    else:
        chance, wait = _seat_queue(taken, np.maximum(seats, 1.0), stay)
    lag = times.lag_steps * np.where(np.isfinite(tpot), tpot, 0.0)
    ttft = chance * wait + queue + residual + own + lag + times.request_s
    impossible = ~np.isfinite(tpot) | (busy >= known.stable) | (taken > seats + 1e-9)
    ttft = np.where(impossible, np.inf, ttft)

    over, _, _ = times.at(
        np.minimum(met + np.sqrt(2 * np.maximum(batch, 0) / 3), np.maximum(seats, 1.0)) / times.pp
    )
    with np.errstate(invalid="ignore"):
        slope = np.maximum(over * scale - decode, 0.0) * tpot / decode
        tpot_sd = np.hypot(0.0 if closed else slope, np.sqrt(stalls * tpot / steps))
        users = rate * (np.where(impossible, 0.0, ttft) + steps * tpot)
    return Steady(
        traffic=traffic,
        batch=rate * steps * tpot,
        rate=rate,
        ttft=ttft,
        tpot=tpot / times.pace,
        users=users,
        busy=busy,
        full=taken / np.maximum(seats, 1.0),
        _decode=times.pp * decode,
        _mixed=times.pp * mixed,
        _mixed_share=np.minimum(rate * chunks * tpot, 1.0),
        _seat_wait=wait,
        _seat_chance=chance,
        _queue_wait=queue,
        _residual=residual,
        _own=own,
        _tpot_sd=tpot_sd / times.pace,
        _pace=times.pace,
    )


def _prompts_only(
    times: StepTimes,
    traffic: Traffic,
    batch: Array,
    seats: Array,
    scale: float,
    fresh: Array | float,
    load_s: Array | float,
) -> Steady:
    """Requests without decode steps: encoders, plain modules, one-token answers.

    `batch` / `seats` is the share of the highest stable rate. A step takes what has come, up to its budget:
    n = x + exp(-x) prompts, x those that come in a step's time, so steps run n-th as often as prompts come
    and last between M and F. What waits longer than the running step does so in an M/G/1 queue of prompts
    with service F / (prompts per budget); for one prompt per step both parts are Pollaczek and Khinchine's.
    """
    known = priors()
    _, mixed, full = (part * scale for part in times.at(np.ones_like(batch)))
    chunks = fresh / np.maximum(times.budget, 1.0)
    service = chunks * full
    rate = batch / np.maximum(seats, 1.0) * known.stable / service
    busy = np.minimum(rate * service, known.stable)
    most = np.maximum(1 / chunks, 1.0)
    each = np.where(most > 1, np.maximum(full - mixed, 0.0) / np.maximum(most - 1, 1e-9), 0.0)
    together, step = np.ones_like(rate), mixed
    for _ in range(_SETTLE):
        come = rate * step * np.maximum(chunks, 1.0)
        together = np.minimum(come + np.exp(-come), most)
        step = np.minimum(mixed + (together - 1) * each, np.maximum(full, mixed))
    running = np.minimum(rate * step * np.maximum(chunks, 1.0) / together, 1.0)
    # a prompt that comes while a step runs shares its own with those that come in that time too
    stages, room = np.maximum(chunks, 1.0) - 1 + times.pp, np.maximum(most - 1, 1e-9)
    shared = running * room * -np.expm1(-come / room)
    own = stages * (mixed + shared * each) + load_s
    own_sd = stages * np.sqrt(shared * (1 - shared / most)) * each
    alone = _arrivals(traffic) + traffic.isl_cv2
    residual = running * step * np.maximum(chunks, 1.0) * (1 + traffic.isl_cv2 / together) / 2
    queue = busy**2 / (1 - busy) * service * alone / 2
    ttft = own + queue + residual + times.request_s
    zero = np.zeros_like(ttft)
    return Steady(
        traffic=traffic,
        batch=rate * own,
        rate=rate,
        ttft=ttft,
        tpot=zero,
        users=rate * ttft,
        busy=running,
        full=rate * own / np.maximum(seats, 1.0),
        _decode=zero,
        _mixed=zero,
        _mixed_share=zero,
        _seat_wait=zero,
        _seat_chance=zero,
        _queue_wait=queue + residual,
        _residual=zero,
        _own=own,
        _tpot_sd=zero,
        _pace=times.pace,
        _own_sd=own_sd,
    )


def _decode_only(
    times: StepTimes, traffic: Traffic, batch: Array, seats: Array, scale: float, transfer: Array
) -> Steady:
    """A pool that decodes prompts computed elsewhere: no step carries a prompt.

    A request waits for a seat, then its cache arrives; the next step takes notice, and the one after has it.
    Where the client already has its first token (`first_token` < 0), that hand-over is part of TPOT, else of
    TTFT; `ttft` is what this pool adds to the TTFT of the other one. An engine that computes the first token
    again is sent the request when the other one is done.
    """
    met = np.minimum(batch + 1.0, np.maximum(seats, 1.0))
    decode = times.at(met / times.pp)[0] * scale
    tpot = times.pp * decode
    early = times.first_token < 0
    again = np.maximum(times.first_token, 0.0)
    steps = traffic.decode_steps / times.pace + again
    rate = batch / (steps * tpot)
    residual = (0.5 - np.expm1(-np.maximum(batch, 0.0))) * decode
    stay = transfer + residual + steps * tpot
    taken = rate * stay
    chance, wait = _seat_queue(taken, np.maximum(seats, 1.0), stay)
    handover = chance * wait + transfer + residual
    impossible = taken > seats + 1e-9
    late = handover + again * (tpot + times.request_s) + times.lag_steps * tpot
    ttft = np.where(impossible, np.inf, np.where(early, 0.0, late))
    over = times.at(
        np.minimum(met + np.sqrt(2 * np.maximum(batch, 0) / 3), np.maximum(seats, 1.0)) / times.pp
    )
    zero = np.zeros_like(tpot)
    after = np.where(early, handover / np.maximum(traffic.decode_steps, 1.0), 0.0)
    return Steady(
        traffic=traffic,
        batch=batch,
        rate=rate,
        ttft=ttft,
        tpot=np.where(impossible, np.inf, tpot / times.pace + after),
        users=rate * np.where(impossible, 0.0, chance * wait + stay),
        busy=zero,
        full=taken / np.maximum(seats, 1.0),
        _decode=tpot,
        _mixed=np.where(early, handover + tpot, zero),
        _mixed_share=np.where(early, 1 / np.maximum(traffic.decode_steps, 1.0), zero),
        _seat_wait=np.where(early, 0.0, wait),
        _seat_chance=np.where(early, 0.0, chance),
        _queue_wait=zero,
        _residual=np.where(early, 0.0, residual),
        _own=np.where(early, 0.0, transfer + zero),
        _tpot_sd=np.maximum(over[0] * scale - decode, 0.0) * times.pp / times.pace,
        _pace=times.pace,
    )


def _rate(batch: Array, cycle: Array, extra: Array, dp: Array) -> Array:
    """rate with rate * cycle = batch * (1 - rate * extra)^dp: attention-DP ranks stall on each other's
    prompts."""
    rate = batch / (cycle + batch * extra)
    if np.all(dp == 1):
        return rate
    for _ in range(40):  # Newton from the right on a convex, increasing function
        free = np.maximum(1 - rate * extra, 0.0)
        value = rate * cycle - batch * free**dp
        slope = cycle + batch * dp * extra * free ** (dp - 1)
        step = value / slope
        rate = np.maximum(rate - step, 0.0)
        if np.all(np.abs(step) <= 1e-13 * rate):
            break
    return rate


def _arrivals(traffic: Traffic) -> float:
    """Squared coefficient of variation of arrivals at the prompt queue. A closed loop's are spread by
    the lengths, and a client never waits behind itself."""
    if traffic.concurrency is None:
        return traffic.arrival_cv2
    return (traffic.concurrency - 1) / traffic.concurrency


def _seat_queue(load: Array, seats: Array, stay: Array) -> tuple[Array, Array]:
    """(chance to wait, mean wait of those who wait) of a many-server queue.

    Halfin and Whitt 1981: with beta = (seats - load) / sqrt(load), P = 1 / (1 + beta Phi(beta) / phi(beta)).
    """
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        spare = np.maximum(seats - load, 1e-9)
        beta = np.minimum(spare / np.sqrt(np.maximum(load, 1e-9)), 38.0)
        density = np.exp(-beta * beta / 2) / math.sqrt(2 * math.pi)
        chance = density / (density + beta * _normal_cdf(beta))
        wait = stay / spare
    return chance, wait


_normal_quantile = np.vectorize(
    lambda q: NormalDist().inv_cdf(q) if 0 < q < 1 else -math.inf, otypes=[np.float64]
)


def _normal_cdf(x: Array) -> Array:
    """Phi(x) for x >= 0: Abramowitz and Stegun 26.2.17, absolute error below 7.5e-8."""
    t = 1 / (1 + 0.2316419 * x)
    series = t * (0.319381530 + t * (-0.356563782 + t * (1.781477937 + t * (-1.821255978 + t * 1.330274429))))
    return np.asarray(1 - np.exp(-x * x / 2) / math.sqrt(2 * math.pi) * series)


def _tail(chance: Array, q: float) -> Array:
    """Quantile of an exponential tail that starts with probability `chance`, in units of its mean."""
    return np.log(np.maximum(chance / (1 - q), 1.0))


def _quadrature(*parts: Array) -> Array:
    """Independent deviations from the mean, added in quadrature with their signs."""
    total = sum(part * np.abs(part) for part in parts)
    return np.sign(total) * np.sqrt(np.abs(total))
