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
    known = priors()
    closed = traffic.concurrency is not None
    met = np.maximum(batch, 1.0) if closed else np.minimum(batch + 1.0, np.maximum(seats, 1.0))
    sd = np.sqrt(np.maximum(batch, 1e-12))
    if closed:
        decode, alone, full = (part * scale for part in times.at(met / times.pp))
        above = np.zeros_like(decode)
    else:
        decode, alone, full, above = around(times, met, sd, seats, scale)
    room = np.maximum(times.budget - times.per_seq * met / times.pp, 1.0)
    steps = traffic.decode_steps / times.pace
    fluid, cut = fresh / room, pieces(traffic, room)
    cycle, chunk = steps * times.pp * decode, alone / cut
    crowded, lonely = fluid * np.maximum(full - decode, 0.0), np.maximum(alone - cut * decode, 0.0)
    rate = rate_of(batch, cycle, crowded, times.dp)
    for _ in range(2):
        single = np.where(fluid < 1, apart(rate, decode, chunk), 1 - np.minimum(rate * fluid * full, 1.0))
        extra = single * lonely + (1 - single) * crowded
        rate = rate_of(batch, cycle, extra, times.dp, rate)
    prompt_share = 1 - (1 - np.minimum(rate * extra, 1.0)) ** times.dp
    spread = np.ones_like(rate)
    if not closed:
        spread = spread_of(traffic, prompt_share, above / sd * met / decode)
        longer = np.minimum(above / sd * np.minimum(batch, 1.0) * (spread - 1), above)
        decode, alone, full = decode + longer, alone + cut * longer, full + longer
        rate = rate_of(batch, steps * times.pp * decode, extra, times.dp, rate)
        prompt_share = 1 - (1 - np.minimum(rate * extra, 1.0)) ** times.dp

    service = fluid * full
    if not closed:  # the last piece of a prompt leaves its step half empty
        service = service + np.where(fluid < 1, 0.0, single * np.maximum(alone - fluid * full, 0.0))
    busy = rate * service
    arrivals = bridged(met, busy) if closed else arrivals_cv2(traffic)
    variability = (arrivals + traffic.isl_cv2) / 2
    with np.errstate(divide="ignore", invalid="ignore"):
        queue = np.where(busy < known.stable, busy / (1 - busy) * service * variability, np.inf)
    # prompts that arrive after this one and still ride in its step (those before it are in the queue's wait)
    beside = np.maximum(room - np.minimum(fresh, room), 1.0)
    shared = np.clip(rate * chunk / 2 * fresh / beside, 0.0, 1.0) * (1 - np.minimum(fluid, 1.0))
    last = np.maximum(full - chunk, 0.0) * np.where(fluid < 1, shared, 0.0)
    own = alone + (times.pp - 1) * chunk + last + load_s
    mixed_share = np.minimum(rate * (extra + (fluid + single * (cut - fluid)) * decode), 1.0)
    residual = 0.5 * ((1 - mixed_share) * decode + mixed_share * np.where(fluid < 1, chunk + last, 0.0))

    behind, behind_var = np.zeros_like(rate), np.zeros_like(rate)
    if not closed:
        waited = np.where(np.isfinite(queue), queue, 0.0)
        in_steps = 1 / np.maximum(mixed_share + (1 - mixed_share) * chunk / decode, 1e-12)
        behind = prompt_share * (waited + own) - waited * extra / service * in_steps
        behind_var = rate * (waited + own) * extra**2 + (prompt_share * waited) ** 2
    with np.errstate(divide="ignore", invalid="ignore"):
        tpot = np.where(prompt_share < 1, times.pp * decode / (1 - prompt_share), np.inf)
        # prompts come in bursts: variance of the stalls that one request meets
        stalls = 2 * variability * (extra * tpot / (times.pp * decode)) ** 2 * rate
        behind = stalls / 2 if closed else behind / (1 - prompt_share)
        tpot = tpot + behind / steps * traffic.step_spread
    stay = own + steps * tpot
    taken = rate * stay
    if closed:
        chance, wait = np.zeros_like(taken), np.zeros_like(taken)
    else:
        chance, wait = seat_queue(taken, np.maximum(seats, 1.0), stay, spread)
    lag = times.lag_steps * np.where(np.isfinite(tpot), tpot, 0.0)
    ttft = chance * wait + queue + residual + own + lag + times.request_s
    impossible = ~np.isfinite(tpot) | (busy >= known.stable) | (taken > seats + 1e-9)
    ttft = np.where(impossible, np.inf, ttft)

    with np.errstate(invalid="ignore"):
        batches = np.sqrt(spread * AVERAGED) * above * tpot / decode
        burst = stalls * tpot / steps * traffic.step_spread + behind_var / ((1 - prompt_share) * steps) ** 2
        tpot_sd = np.hypot(0.0 if closed else batches, np.sqrt(burst))
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
        _mixed=times.pp * chunk,
        _mixed_share=np.minimum(rate * (fluid + single * (cut - fluid)) * tpot, 1.0),
        _seat_wait=wait,
        _seat_chance=chance,
        _queue_wait=queue,
        _residual=residual,
        _own=own,
        _tpot_sd=tpot_sd / times.pace,
        _pace=times.pace,
    )
