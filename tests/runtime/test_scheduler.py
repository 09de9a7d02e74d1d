"""Properties of continuous batching: nothing leaks, no limit is broken, everyone gets an answer."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planc.errors import InvalidField
from planc.runtime.kv_cache import KVCache, Pool
from planc.runtime.scheduler import Limits, Scheduler, Step


@dataclass(frozen=True)
class Load:
    blocks: int
    block_size: int
    limits: Limits
    requests: tuple[tuple[int, int, int], ...]  # prompt, max_new_tokens, tokens until its end token


@st.composite
def loads(draw: st.DrawFn) -> Load:
    block_size = draw(st.integers(1, 5))
    blocks = draw(st.integers(1, 20))
    most = blocks * block_size
    requests = []
    for _ in range(draw(st.integers(1, 8))):
        prompt = draw(st.integers(1, most))
        new = draw(st.integers(1, most - prompt + 1))
        requests.append((prompt, new, draw(st.integers(1, 2 * most))))
    limits = Limits(draw(st.integers(1, 6)), draw(st.integers(1, 30)))
    return Load(blocks, block_size, limits, tuple(requests))


def drive(load: Load) -> tuple[Scheduler, list[Step]]:
    """Runs a load to its end, checking every step; fails if it takes more steps than it can need."""
    cache = KVCache(load.blocks, load.block_size, load.limits.max_num_seqs)
    scheduler = Scheduler(load.limits, cache)
    for index, (prompt, new, _) in enumerate(load.requests):
        scheduler.add(index, prompt, new)
    cached = [0] * len(load.requests)
    produced = [0] * len(load.requests)
    steps: list[Step] = []
    while scheduler.busy:
        step = scheduler.schedule()
        steps.append(step)
        assert len(steps) < 10_000, "no progress"
        assert step.parts, "an empty step while work is left"
        assert step.tokens <= load.limits.max_num_batched_tokens
        assert len(scheduler.running) <= load.limits.max_num_seqs
        for index in step.preempted:
            cached[index] = 0
        tables = [block for s in scheduler.running for block in cache.table(s.id)]
        assert len(tables) == len(set(tables)), "a block belongs to two sequences"
        assert len(tables) + cache.free_blocks == load.blocks, "a block leaked"
        slots = [cache.state_slot(s.id) for s in scheduler.running]
        assert len(slots) == len(set(slots))
        for part in step.parts:
            assert part.start == cached[part.sequence], "a token was skipped or computed twice"
            assert len(cache.table(part.sequence)) * load.block_size >= part.stop
            written = cache.slots(part.sequence, part.start, part.stop)
            assert len(set(written)) == part.stop - part.start
            cached[part.sequence] = part.stop
            known = load.requests[part.sequence][0] + produced[part.sequence]
            assert part.samples == (part.stop == known)
        for part in step.parts:
            produced[part.sequence] += part.samples
        ended = {
            p.sequence
            for p in step.parts
            if p.samples and produced[p.sequence] == load.requests[p.sequence][2]
        }
        finished = scheduler.advance(step, ended)
        assert ended <= set(finished)
    for (_, new, end), count in zip(load.requests, produced, strict=True):
        assert count == min(new, end)
    return scheduler, steps


@settings(max_examples=150, deadline=None)
@given(loads())
def test_everyone_finishes_and_nothing_leaks(load: Load) -> None:
    scheduler, _ = drive(load)
    assert scheduler.cache.free_blocks == load.blocks


def test_a_full_cache_preempts_the_latest_and_recomputes_it() -> None:
    load = Load(4, 2, Limits(2, 8), ((4, 4, 99), (3, 3, 99)))
    _, steps = drive(load)
    assert [s.preempted for s in steps if s.preempted] == [(1,)]
    recomputed = [p for s in steps for p in s.parts if p.sequence == 1 and p.start == 0]
    assert [(p.stop, p.samples) for p in recomputed] == [(3, True), (4, True)]


def test_a_long_prompt_is_prefilled_in_chunks_beside_decoding() -> None:
    load = Load(10, 4, Limits(2, 5), ((2, 6, 99), (12, 1, 99)))
    _, steps = drive(load)
    assert [[(p.sequence, p.start, p.stop) for p in s.parts] for s in steps[:4]] == [
        [(0, 0, 2), (1, 0, 3)],
        [(0, 2, 3), (1, 3, 7)],
        [(0, 3, 4), (1, 7, 11)],
        [(0, 4, 5), (1, 11, 12)],
    ]
    assert [s.decode for s in steps[2:5]] == [False, True, True]


@pytest.mark.parametrize(
    ("prompt", "new", "field"),
    [(0, 1, "prompt"), (1, 0, "max_new_tokens"), (5, 5, "prompt + max_new_tokens")],
)
def test_requests_that_cannot_run_are_refused(prompt: int, new: int, field: str) -> None:
    scheduler = Scheduler(Limits(1, 8), KVCache(2, 4, 1))
    with pytest.raises(InvalidField) as caught:
        scheduler.add(0, prompt, new)
    assert caught.value.fields["field"] == field


def test_limits_and_sizes_must_be_positive() -> None:
    with pytest.raises(InvalidField, match="max_num_seqs"):
        Limits(0, 1)
    with pytest.raises(InvalidField, match="block_size"):
        KVCache(1, 0, 1)


def test_a_pool_gives_each_place_once() -> None:
    pool = Pool(3)
    taken = pool.take(3)
    assert sorted(taken) == [0, 1, 2]
    assert pool.free == 0
    pool.give_back([1])
    assert pool.take(1) == [1]
    with pytest.raises(AssertionError):
        pool.give_back([1, 1])
