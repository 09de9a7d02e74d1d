"""Pools that do half of the work on a request: prompts alone, or decoding alone."""

from __future__ import annotations

import numpy as np

from planc.planner.operating_point import Array, Steady, StepTimes
from planc.planner.priors import priors
from planc.planner.queues import AVERAGED, around, arrivals_cv2, middle_of, seat_queue, spread_of
from planc.planner.traffic import Traffic

_HALVINGS = 18


def prompts_only(
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
    and last between A and F. What waits longer than the running step does so in an M/G/1 queue of prompts
    with service F / (prompts per budget); for one prompt per step both parts are Pollaczek and Khinchine's.
    """
    known = priors()
    some, alone, full = (part * scale for part in times.at(np.ones_like(batch)))
    chunks = fresh / np.maximum(times.budget, 1.0)
    one, most = np.where(chunks < 1, alone, full), np.maximum(1 / chunks, 1.0)
    middle = middle_of(most)
    first = np.maximum(some - one, 0.0) / np.maximum(middle - 1, 1e-9) * (most > 1)
    later = np.maximum(full - np.maximum(some, one), 0.0) / np.maximum(most - middle, 1e-9) * (most > 1)

    def step_of(prompts: Array) -> Array:
        """Seconds of a step: two straight lines, for a few prompts often cost more each than many."""
        found = one + first * (np.minimum(prompts, middle) - 1) + later * np.maximum(prompts - middle, 0.0)
        return np.asarray(found)

    service = chunks * full
    rate = batch / np.maximum(seats, 1.0) * known.stable / service
    busy = np.minimum(rate * service, known.stable)
    low, high = np.ones_like(rate), most * np.ones_like(rate)
    for _ in range(_HALVINGS):
        together = (low + high) / 2
        come = rate * step_of(together) * np.maximum(chunks, 1.0)
        more = come + np.exp(-come) > together
        low, high = np.where(more, together, low), np.where(more, high, together)
    step = step_of(together)
    come = rate * step * np.maximum(chunks, 1.0)
    running = np.minimum(come / together, 1.0)
    # a prompt that comes while a step runs shares its own with those that come in that time too; it is
    # likelier to come in a long one, and steps follow each other's lengths (the queue has that of small ones)
    slope = np.where(together < middle, first, later)
    pull = np.minimum(rate * slope, 0.95)
    spread = np.minimum(arrivals_cv2(traffic) * together / (1 - pull**2), (most - together) * (together - 1))
    come = come * (1 + np.maximum(spread * (1 - 2 / most), 0.0) * (slope / step) ** 2)
    stages, room = np.maximum(chunks, 1.0) - 1 + times.pp, np.maximum(most - 1, 1e-9)
    shared = running * room * -np.expm1(-come / room)
    own = stages * step_of(1 + shared) + load_s
    each = np.where(1 + shared < middle, first, later)
    own_sd = stages * np.sqrt(shared * (1 - shared / most)) * each
    variability = arrivals_cv2(traffic) + traffic.isl_cv2
    residual = running * step * np.maximum(chunks, 1.0) * (1 + traffic.isl_cv2 / together) / 2
    queue = busy**2 / (1 - busy) * service * variability / 2
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


def decode_only(
    times: StepTimes, traffic: Traffic, batch: Array, seats: Array, scale: float, transfer: Array
) -> Steady:
    """A pool that decodes prompts computed elsewhere: no step carries a prompt.

    A request waits for a seat, then its cache arrives; the next step takes notice, and the one after has it.
    Where the client already has its first token (`first_token` < 0), that hand-over is part of TPOT, else of
    TTFT; `ttft` is what this pool adds to the TTFT of the other one. An engine that computes the first token
    again is sent the request when the other one is done.
    """
    met = np.minimum(batch + 1.0, np.maximum(seats, 1.0))
    sd = np.sqrt(np.maximum(batch, 1e-12))
    decode, _, _, above = around(times, met, sd, seats, scale)
    tpot = times.pp * decode
    early = times.first_token < 0
    again = np.maximum(times.first_token, 0.0)
    steps = traffic.decode_steps / times.pace + again
    rate = batch / (steps * tpot)
    residual = (0.5 - np.expm1(-np.maximum(batch, 0.0))) * decode
    stay = transfer + residual + steps * tpot
    taken = rate * stay
    elasticity = above / sd * met / decode
    spread = spread_of(traffic, np.zeros_like(rate), elasticity)
    chance, wait = seat_queue(taken, np.maximum(seats, 1.0), stay, spread)
    handover = chance * wait + transfer + residual
    impossible = taken > seats + 1e-9
    late = handover + again * (tpot + times.request_s) + times.lag_steps * tpot
    ttft = np.where(impossible, np.inf, np.where(early, 0.0, late))
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
        _tpot_sd=np.sqrt(spread * AVERAGED) * above * times.pp / times.pace,
        _pace=times.pace,
    )
