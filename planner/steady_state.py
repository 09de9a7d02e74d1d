"""Continuous batching with chunked prefill in steady state, in closed form, over arrays.

One scheduler (an engine has `dp` of them) runs steps. A step carries one token of every decoding
sequence and, while prompts wait, a chunk of up to budget - sequences prompt tokens. Everything
follows from three times as functions of the number b of decoding sequences:

    D(b)   a step without prompt tokens
    A(b)   all the steps of a prompt that has them to itself, on average over the prompts
    F(b)   a step whose budget is full of prompt tokens

With B sequences decoding on average and S decode steps per request, request rate and time per
output token follow without iteration. Each request lengthens the steps by X, between A - pieces D where
prompts come one by one and their share of F - D where they crowd; the share of time that prompts
take is P = rate X and

    TPOT = D / (1 - P),   rate = B / (S TPOT)  =>  rate = B / (S D + B X)          (Little's law)

in time average. A request finds more than that: when its own prompt is done, those that came meanwhile are
still to be computed, P (wait + own) of work on average, and work W is left behind its last token as at any
time, so that its mean TPOT is longer by (P (wait + own) - W X / service) / (1 - P) S. The number of decoding
sequences fluctuates by more than a Poisson variable (`queues.spread_of`), and they meet a batch of B plus its
variance over mean (B in a closed loop). Stalls have variance V = rate X^2 TPOT^2 / D^2 per second for Poisson
arrivals (long-run variance of the busy time of M/G/1).

TTFT = wait for a seat + wait for the prompt queue + rest of the running step + own chunks + constant. The
prompt queue is G/G/1 with service I F / budget (Kingman; exact M/G/1 by Pollaczek-Khinchine when arrivals are
Poisson); seats are a many-server queue by Halfin and Whitt (Operations Research 29, 1981). Percentiles: waits
have exponential tails, prompts follow the length distribution, stalls are gamma variables, the batch met by
a request averages over its own life (M/G/infinity: 2/3 of the variance); independent parts add in
quadrature.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from planc.planner.operating_point import Array, Steady, StepTimes
from planc.planner.pool_halves import decode_only, prompts_only
from planc.planner.priors import priors
from planc.planner.queues import (
    AVERAGED,
    apart,
    around,
    arrivals_cv2,
    bridged,
    pieces,
    rate_of,
    seat_queue,
    spread_of,
)
from planc.planner.traffic import Part, Traffic


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
        return decode_only(times, traffic, batch, seats, scale, np.asarray(transfer_s, dtype=np.float64))
    fresh = traffic.new_tokens if fresh is None else fresh
    if traffic.decode_steps == 0:
        return prompts_only(times, traffic, batch, seats, scale, fresh, load_s)
    beside = _beside(times, traffic, batch, seats, scale)
    prompts = _prompts(times, traffic, beside, batch, fresh)
    spread = np.ones_like(prompts.rate)
    if not beside.closed:
        beside, prompts, spread = _fluctuating(times, traffic, beside, prompts, batch)
    wait = _waiting(times, traffic, beside, prompts, fresh, load_s)
    tpot, tpot_sd = _token_times(times, traffic, beside, prompts, wait, spread)

    steps, closed = traffic.decode_steps / times.pace, beside.closed
    stay = wait.own + steps * tpot
    taken = prompts.rate * stay
    chance, seat_wait = np.zeros_like(taken), np.zeros_like(taken)
    if not closed:
        chance, seat_wait = seat_queue(taken, np.maximum(seats, 1.0), stay, spread)
    lag = times.lag_steps * np.where(np.isfinite(tpot), tpot, 0.0)
    ttft = chance * seat_wait + wait.queue + wait.residual + wait.own + lag + times.request_s
    impossible = ~np.isfinite(tpot) | (wait.busy >= priors().stable) | (taken > seats + 1e-9)
    ttft = np.where(impossible, np.inf, ttft)
    with np.errstate(invalid="ignore"):
        users = prompts.rate * (np.where(impossible, 0.0, ttft) + steps * tpot)
    return Steady(
        traffic=traffic,
        batch=prompts.rate * steps * tpot,
        rate=prompts.rate,
        ttft=ttft,
        tpot=tpot / times.pace,
        users=users,
        busy=wait.busy,
        full=taken / np.maximum(seats, 1.0),
        _decode=times.pp * beside.decode,
        _mixed=times.pp * prompts.chunk,
        _mixed_share=np.minimum(prompts.rate * prompts.steps * tpot, 1.0),
        _seat_wait=seat_wait,
        _seat_chance=chance,
        _queue_wait=wait.queue,
        _residual=wait.residual,
        _own=wait.own,
        _tpot_sd=tpot_sd / times.pace,
        _pace=times.pace,
    )


class _Beside(NamedTuple):
    """Steps beside the batch that a sequence meets: seconds D, A and F, by how much D grows with one standard
    deviation `sd` of a Poisson batch, and the room for prompt tokens."""

    closed: bool
    met: Array
    sd: Array
    decode: Array
    alone: Array
    full: Array
    growth: Array
    room: Array


def _beside(times: StepTimes, traffic: Traffic, batch: Array, seats: Array, scale: float) -> _Beside:
    closed, sd = traffic.concurrency is not None, np.sqrt(np.maximum(batch, 1e-12))
    if closed:
        met = np.maximum(batch, 1.0)
        decode, alone, full = (part * scale for part in times.at(met / times.pp))
        growth = np.zeros_like(decode)
    else:
        met = np.minimum(batch + 1.0, np.maximum(seats, 1.0))
        decode, alone, full, growth = around(times, met, sd, seats, scale)
    room = np.maximum(times.budget - times.per_seq * met / times.pp, 1.0)
    return _Beside(closed, met, sd, decode, alone, full, growth, room)


class _Prompts(NamedTuple):
    """What prompts cost. Per request: `fluid` full steps' worth of tokens, `single` the share of prompts that
    have their steps to themselves, `steps` with its tokens, `extra` seconds X that they are longer for it,
    `chunk` seconds of a step by itself. `rate` of requests; `share` P of time with prompts."""

    fluid: Array
    single: Array
    steps: Array
    extra: Array
    chunk: Array
    rate: Array
    share: Array


def _prompts(
    times: StepTimes, traffic: Traffic, beside: _Beside, batch: Array, fresh: Array | float
) -> _Prompts:
    decode, alone, full = beside.decode, beside.alone, beside.full
    fluid, cut = fresh / beside.room, pieces(traffic, beside.room)
    cycle, chunk = traffic.decode_steps / times.pace * times.pp * decode, alone / cut
    crowded, lonely = fluid * np.maximum(full - decode, 0.0), np.maximum(alone - cut * decode, 0.0)
    rate = rate_of(batch, cycle, crowded, times.dp)
    for _ in range(2):
        single = np.where(fluid < 1, apart(rate, decode, chunk), 1 - np.minimum(rate * fluid * full, 1.0))
        extra = single * lonely + (1 - single) * crowded
        rate = rate_of(batch, cycle, extra, times.dp, rate)
    return _Prompts(
        fluid, single, fluid + single * (cut - fluid), extra, chunk, rate, _share(rate, extra, times.dp)
    )


def _share(rate: Array, extra: Array, dp: Array) -> Array:
    found: Array = 1 - (1 - np.minimum(rate * extra, 1.0)) ** dp
    return found


def _fluctuating(
    times: StepTimes, traffic: Traffic, beside: _Beside, prompts: _Prompts, batch: Array
) -> tuple[_Beside, _Prompts, Array]:
    """The same with a batch that varies by more than a Poisson variable; and that variance over its mean."""
    growth, sd, decode = beside.growth, beside.sd, beside.decode
    spread = spread_of(traffic, prompts.share, growth / sd * beside.met / decode)
    longer = np.minimum(growth / sd * np.minimum(batch, 1.0) * (spread - 1), growth)
    cut = pieces(traffic, beside.room)
    beside = beside._replace(
        decode=decode + longer, alone=beside.alone + cut * longer, full=beside.full + longer
    )
    cycle = traffic.decode_steps / times.pace * times.pp * beside.decode
    rate = rate_of(batch, cycle, prompts.extra, times.dp, prompts.rate)
    return beside, prompts._replace(rate=rate, share=_share(rate, prompts.extra, times.dp)), spread


class _Waiting(NamedTuple):
    """Seconds until a prompt is done: in the queue, for the rest of the running step, for its own steps. A
    queue's server is `busy`, each prompt takes it `service`; `mixed` is the share of time with prompts, and
    `variability` half the squared coefficients of variation of arrivals and service."""

    queue: Array
    residual: Array
    own: Array
    busy: Array
    service: Array
    mixed: Array
    variability: Array


def _waiting(
    times: StepTimes,
    traffic: Traffic,
    beside: _Beside,
    prompts: _Prompts,
    fresh: Array | float,
    load_s: Array | float,
) -> _Waiting:
    alone, full, room, rate, fluid = beside.alone, beside.full, beside.room, prompts.rate, prompts.fluid
    service = fluid * full
    if not beside.closed:  # the last piece of a prompt leaves its step half empty
        service = service + np.where(fluid < 1, 0.0, prompts.single * np.maximum(alone - fluid * full, 0.0))
    busy = rate * service
    arrivals = bridged(beside.met, busy) if beside.closed else arrivals_cv2(traffic)
    variability = (arrivals + traffic.isl_cv2) / 2
    with np.errstate(divide="ignore", invalid="ignore"):
        queue = np.where(busy < priors().stable, busy / (1 - busy) * service * variability, np.inf)
    # prompts that arrive after this one and still ride in its step (those before it are in the queue's wait)
    left = np.maximum(room - np.minimum(fresh, room), 1.0)
    shared = np.clip(rate * prompts.chunk / 2 * fresh / left, 0.0, 1.0) * (1 - np.minimum(fluid, 1.0))
    last = np.maximum(full - prompts.chunk, 0.0) * np.where(fluid < 1, shared, 0.0)
    own = alone + (times.pp - 1) * prompts.chunk + last + load_s
    mixed = np.minimum(rate * (prompts.extra + prompts.steps * beside.decode), 1.0)
    running = np.where(fluid < 1, prompts.chunk + last, 0.0)
    residual = 0.5 * ((1 - mixed) * beside.decode + mixed * running)
    return _Waiting(queue, residual, own, busy, service, mixed, np.asarray(variability))


def _token_times(
    times: StepTimes,
    traffic: Traffic,
    beside: _Beside,
    prompts: _Prompts,
    wait: _Waiting,
    spread: Array,
) -> tuple[Array, Array]:
    """(mean, standard deviation) over requests of the seconds per decode step."""
    decode, rate, extra, share = beside.decode, prompts.rate, prompts.extra, prompts.share
    steps = traffic.decode_steps / times.pace
    with np.errstate(divide="ignore", invalid="ignore"):
        tpot = np.where(share < 1, times.pp * decode / (1 - share), np.inf)
        # prompts come in bursts: variance of the stalls that one request meets
        stalls = 2 * wait.variability * (extra * tpot / (times.pp * decode)) ** 2 * rate
        more, ahead = stalls / 2, np.zeros_like(stalls)
        if not beside.closed:
            waited = np.where(np.isfinite(wait.queue), wait.queue, 0.0)
            in_steps = 1 / np.maximum(wait.mixed + (1 - wait.mixed) * prompts.chunk / decode, 1e-12)
            found, left = share * (waited + wait.own), waited * extra / wait.service * in_steps
            more = (found - left) / (1 - share)
            ahead = rate * (waited + wait.own) * extra**2 + (share * waited) ** 2
        tpot = tpot + more / steps * traffic.step_spread
        noise = stalls * tpot / steps * traffic.step_spread + ahead / ((1 - share) * steps) ** 2
        batches = np.sqrt(spread * AVERAGED) * beside.growth * tpot / decode
        return tpot, np.hypot(batches, np.sqrt(noise))
