"""Queues and fluctuations of a scheduler, over arrays."""

from __future__ import annotations

import math

import numpy as np

from planc.planner.operating_point import Array, StepTimes
from planc.planner.traffic import Traffic

#: variance of the number of others, averaged over a request's life, as a share of its variance (M/G/infinity)
AVERAGED = 2 / 3


def middle_of(most: Array) -> Array:
    """Prompts between one and all that a step holds, at which steps are looked at too."""
    return np.sqrt(most)


def around(
    times: StepTimes, met: Array, sd: Array, seats: Array, scale: float
) -> tuple[Array, Array, Array, Array]:
    """(D, A, F) averaged over batches around `met`, and by how much D grows with one `sd` of the batch."""
    most, places = np.maximum(seats, 1.0), times.places
    wanted = np.concatenate([np.clip(met + place * sd, 1.0, most) for place in places], axis=1)
    found = [np.split(part * scale, len(places), axis=1) for part in times.at(wanted / times.pp)]
    decode, alone, full = (sum(parts[1:], parts[0]) / len(places) for parts in found)
    grown = sum((place * part for place, part in zip(places, found[0], strict=True)), np.zeros_like(decode))
    return decode, alone, full, np.maximum(grown / sum(place**2 for place in places), 0.0)


def apart(rate: Array, decode: Array, chunk: Array) -> Array:
    """Steps with prompts per prompt, where a step takes all that came during the one before it.

    A share q of the steps has prompts: those that follow one of `decode` or `chunk` seconds in which any
    came.
    """
    after_one, after_many = -np.expm1(-rate * decode), np.exp(-rate * chunk)
    q = after_one / (after_one + after_many)
    return np.asarray(q / np.maximum(rate * (decode + q * (chunk - decode)), 1e-12))


def pieces(traffic: Traffic, room: Array) -> Array:
    """Mean number of pieces that a prompt is cut into: half of one more than fits exactly, if it is cut."""
    found = np.zeros_like(room)
    for share, tokens in traffic.prompts:
        found = found + share * np.where(tokens < room, 1.0, tokens / room + 0.5)
    return found


def rate_of(batch: Array, cycle: Array, extra: Array, dp: Array, near: Array | None = None) -> Array:
    """rate with rate * cycle = batch * (1 - rate * extra)^dp: attention-DP ranks stall on each other's
    prompts. `near`: a rate to start from."""
    rate: Array = batch / (cycle + batch * extra)
    if np.all(dp == 1):
        return rate
    rate = rate if near is None else np.minimum(near, rate)
    for _ in range(40):  # Newton on a convex, increasing function: from the right after one step at most
        free = np.maximum(1 - rate * extra, 0.0)
        value = rate * cycle - batch * free**dp
        slope = cycle + batch * dp * extra * free ** (dp - 1)
        step = value / slope
        rate = np.maximum(rate - step, 0.0)
        if np.all(np.abs(step) <= 1e-10 * rate):
            break
    return rate


def arrivals_cv2(traffic: Traffic) -> float:
    """Squared coefficient of variation of arrivals at the prompt queue. A closed loop's are spread by
    the lengths, and a client never waits behind itself."""
    if traffic.concurrency is None:
        return traffic.arrival_cv2
    return (traffic.concurrency - 1) / traffic.concurrency


def spread_of(traffic: Traffic, prompt_share: Array, elasticity: Array) -> Array:
    """Variance over mean of the number of decoding sequences in an open loop.

    Each arrival adds one and holds up the n that run for X: with n X (1 - P) / (S D) = P that is as good as
    1 / (1 - P) arrivals. Departures are a birth-death process's, and a larger batch's longer steps weaken the
    pull back to the mean by their elasticity d ln D / d ln n (linear noise approximation).
    """
    free = np.maximum(1 - prompt_share, 0.02)
    arrivals = (arrivals_cv2(traffic) + traffic.isl_cv2 * prompt_share**2) / free**2
    return np.asarray((1 + arrivals) / 2 / np.maximum(1 - elasticity, 0.1))


def seat_queue(load: Array, seats: Array, stay: Array, spread: Array | float = 1.0) -> tuple[Array, Array]:
    """(chance to wait, mean wait of those who wait) of a many-server queue.

    Halfin and Whitt 1981: with beta = (seats - load) / sd, P = 1 / (1 + beta Phi(beta) / phi(beta)); `spread`
    is the variance of the number in the system over its mean, 1 with Poisson arrivals and equal servers.
    """
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        spare = np.maximum(seats - load, 1e-9)
        beta = np.minimum(spare / np.sqrt(np.maximum(load * spread, 1e-9)), 38.0)
        density = np.exp(-beta * beta / 2) / math.sqrt(2 * math.pi)
        chance = density / (density + beta * normal_cdf(beta))
        wait = spread * stay / spare
    return chance, wait


def bridged(users: Array, busy: Array) -> Array:
    """By how much less than after Poisson arrivals is waited in a closed loop, whose clients come back after
    about the same time: N D/D/1 as a Brownian bridge (Norros, Roberts, Simonian and Virtamo, IEEE Journal on
    Selected Areas in Communications 9, 1991)."""
    x = np.maximum(1 - busy, 0.02) * np.sqrt(users)
    return np.asarray(x * _mills(x))


def normal_cdf(x: Array) -> Array:
    """Phi(x) for x >= 0, absolute error below 7.5e-8."""
    return np.asarray(1 - np.exp(-x * x / 2) / math.sqrt(2 * math.pi) * _mills(x))


def _mills(x: Array) -> Array:
    """(1 - Phi(x)) / phi(x) for x >= 0: Abramowitz and Stegun 26.2.17."""
    t = 1 / (1 + 0.2316419 * x)
    series = t * (0.319381530 + t * (-0.356563782 + t * (1.781477937 + t * (-1.821255978 + t * 1.330274429))))
    return np.asarray(series)
