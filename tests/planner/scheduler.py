"""A step-by-step simulation of one scheduler with chunked prefill: the oracle of the closed forms.

It knows nothing of queueing theory: requests arrive, each step carries one token of every running
sequence and as many prompt tokens as the budget leaves, first come first served.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Measured:
    ttft: np.ndarray
    tpot: np.ndarray
    batch: float
    rate: float


def simulate(
    seconds: Callable[[int, int, float], float],
    *,
    isl: int,
    osl: int,
    rate: float,
    budget: int,
    seats: int,
    requests: int,
    seed: int,
    users: int = 0,
) -> Measured:
    """`seconds(sequences, prompt tokens, prompt tokens cached before)` prices a step.

    users   above 0: a closed loop of so many users, `rate` is not used
    """
    draw = random.Random(seed)
    now, next_arrival, made = 0.0, draw.expovariate(rate) if not users else 0.0, 0
    waiting: deque[list[float]] = deque()  # [arrival, tokens left]
    running: list[list[float]] = []  # [arrival, first token, tokens left]
    ttft, tpot, batch_time, warm = [], [], 0.0, requests // 5
    start = 0.0
    if users:
        waiting.extend([draw.uniform(0, 1e-6), float(isl)] for _ in range(users))
    while len(ttft) < requests:
        if not users:
            while next_arrival <= now:
                waiting.append([next_arrival, float(isl)])
                next_arrival += draw.expovariate(rate)
        room, chunk, cached, finished = budget - len(running), 0, 0.0, []
        free = seats - len(running)
        for item in list(waiting):
            if room <= 0 or len(finished) >= free:
                break
            part = int(min(room, item[1]))
            cached = isl - item[1]
            chunk, room = chunk + part, room - part
            item[1] -= part
            if item[1] == 0:
                finished.append(item)
        if not running and chunk == 0:
            now = next_arrival
            continue
        step = seconds(len(running), chunk, cached)
        now += step
        made += 1
        if len(ttft) >= warm:
            start = start or now - step
            batch_time += step * len(running)
        leaving = []
        for item in running:
            item[2] -= 1
            if item[2] == 0:
                leaving.append(item)
        for item in leaving:
            running.remove(item)
            tpot.append((now - item[1]) / (osl - 1))
            if users:
                waiting.append([now, float(isl * draw.uniform(0.9, 1.1) // 1)])
        for item in finished:
            waiting.remove(item)
            ttft.append(now - item[0])
            running.append([item[0], now, osl - 1])
    return Measured(
        np.array(ttft[warm:]),
        np.array(tpot[warm // 2 :]),
        batch_time / (now - start),
        len(ttft[warm:]) / (now - start),
    )
