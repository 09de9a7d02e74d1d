"""Prefill and decode pools of one closed loop, with decode steps at their mean context.

Prompts queue for the first free prefill scheduler, which takes as many whole prompts as its token budget
holds; the cache then moves over the network, and a decode scheduler with fewest sequences takes the request
as soon as its cache holds it. Sequences of one scheduler share its steps, so each advances one token per
D(b), and requests finish at known marks on the scheduler's own count of tokens: events are arrivals, ends
of prompt steps, transfers and finishes.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from heapq import heappop, heappush

import numpy as np

from planc.cost_model.collectives import transfer_seconds
from planc.runtime.simulator import Clock, Load, Records
from planc.runtime.simulator.records import Gaps, Timeline
from planc.runtime.validation.constants import Constants
from planc.runtime.validation.lint import mean_lengths
from planc.runtime.validation.setups import Engine, Setup


@dataclass(slots=True)
class _Decoder:
    """One decode scheduler: `marks` are (token count at which it finishes, request)."""

    room: int
    tokens: float = 0.0
    since: float = 0.0
    turn: int = 0
    marks: list[tuple[float, int]] = field(default_factory=list)


def simulate_pools(
    setup: Setup,
    prefill: Engine,
    prompt_clock: Clock,
    decode_clock: Clock,
    constants: Constants,
    load: Load,
    seed: int,
) -> Records:
    """Requests of a closed loop through both pools."""
    prompts, outputs = load.lengths(seed)
    count = prompts.size
    decode = setup.decode
    prompt, answer = mean_lengths(setup)
    sizes = (float(decode.memory.sequence_bytes(prompt + answer / 2)), float(decode.memory.kv_cache))
    room = max(min(int(sizes[1] / sizes[0]), 4 * decode.max_num_seqs), 1)
    decoders = [_Decoder(room) for _ in range(decode.workers * decode.shape.dp)]
    free = prefill.workers * prefill.shape.dp
    steps: dict[int, float] = {}

    def step(batch: int) -> float:
        if batch not in steps:
            steps[batch] = decode_clock.line(batch, prompt + answer / 2).seconds
        return steps[batch]

    def move(tokens: int) -> float:
        size = float(prefill.memory.kv_bytes_per_token) * tokens
        return float(transfer_seconds(size, setup.fabric.outer(setup.gpu)))

    arrival, admitted, first, finish = (np.full(count, np.nan) for _ in range(4))
    events: list[tuple[float, int, int, int]] = []  # time, kind, number, turn
    queue: deque[int] = deque()
    waiting: deque[int] = deque()
    sent = 0

    def send(now: float) -> None:
        nonlocal sent
        if sent < count:
            arrival[sent] = now
            heappush(events, (now + constants.request_ms * 1e-3, 0, sent, 0))
            sent += 1

    def start_prompts(now: float) -> None:
        nonlocal free
        while free and queue:
            free -= 1
            taken, tokens = [queue.popleft()], 0
            tokens = int(prompts[taken[0]])
            while queue and tokens + prompts[queue[0]] <= prefill.budget:
                taken.append(queue.popleft())
                tokens += int(prompts[taken[-1]])
            took, cached = 0.0, 0
            if tokens > prefill.budget:  # one long prompt, in chunks
                while cached < tokens:
                    new = min(prefill.budget, tokens - cached)
                    took += prompt_clock.mixed(0, 0.0, [(new, cached)])[0]
                    cached += new
            else:
                took = prompt_clock.mixed(0, 0.0, [(int(prompts[i]), 0) for i in taken])[0]
            for request in taken:
                admitted[request] = now
                heappush(events, (now + took + move(int(prompts[request])), 2, request, 0))
            heappush(events, (now + took, 1, 0, 0))

    def advance(one: _Decoder, now: float) -> None:
        if one.marks:
            one.tokens += (now - one.since) / step(len(one.marks))
        one.since = now

    def plan(number: int) -> None:
        one = decoders[number]
        one.turn += 1
        if one.marks:
            left = max(one.marks[0][0] - one.tokens, 0.0) * step(len(one.marks))
            heappush(events, (one.since + left, 3, number, one.turn))

    def seat(now: float) -> None:
        while waiting:
            number = min(range(len(decoders)), key=lambda i: len(decoders[i].marks) - decoders[i].room)
            one = decoders[number]
            if len(one.marks) >= one.room:
                return
            request = waiting.popleft()
            advance(one, now)
            lag = constants.lag_steps * step(len(one.marks) + 1)
            first[request] = now + lag
            heappush(one.marks, (one.tokens + max(int(outputs[request]) - 1, 1), request))
            plan(number)

    for _ in range(load.concurrency or 1):
        send(0.0)
    while events:
        now, kind, number, turn = heappop(events)
        if kind == 0:
            queue.append(number)
            start_prompts(now)
        elif kind == 1:
            free += 1
            start_prompts(now)
        elif kind == 2:
            waiting.append(number)
            seat(now)
        elif decoders[number].turn == turn:
            one = decoders[number]
            advance(one, now)
            _, request = heappop(one.marks)
            finish[request] = now + constants.lag_steps * step(len(one.marks) + 1)
            plan(number)
            send(finish[request])
            seat(now)
    zeros = np.zeros(count, dtype=np.int64)
    return Records(
        arrival_s=arrival,
        admitted_s=admitted,
        first_token_s=first,
        finish_s=finish,
        prompt=prompts,
        output=outputs,
        preemptions=zeros,
        hit=zeros,
        gaps=Gaps(),
        timeline=Timeline(),
        wave=load.concurrency or 0,
    )
