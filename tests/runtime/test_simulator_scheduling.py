"""What any simulation must obey, whatever its rules: nothing is lost, and jumps change nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planc.errors import InvalidField
from planc.runtime.simulator import Load, Speculation, closed_loop, open_loop, simulate
from planc.runtime.simulator.load import uniform
from tests.runtime.simulated import Linear, run, server

CLOCK = Linear(0.01, 1e-4, 1e-6, 1e-5)


@st.composite
def rules(draw: st.DrawFn) -> dict[str, Any]:
    reserved = draw(st.sampled_from([0.0, 0.0, 0.4, 1.0]))
    drafts = draw(st.sampled_from([None, None, None, Speculation(3, 0.6, 0.001)]))
    return {
        "max_num_seqs": draw(st.integers(1, 8)),
        "max_num_batched_tokens": draw(st.sampled_from([4, 16, 64])),
        "scheduling": draw(st.sampled_from(["mixed", "prefill_first"])),
        "chunked": draw(st.booleans()),
        "prompts_per_step": draw(st.sampled_from([None, 1, 2])),
        "reserved_output": reserved,
        "reserved_floor": 0.1 if reserved == 0.4 and draw(st.booleans()) else None,
        "reserved_steps": 20,
        "preemption": draw(st.sampled_from(["recompute", "swap"])),
        "swap_s_per_token": 1e-4,
        "max_adapters": draw(st.sampled_from([None, 1, 2])),
        "adapter_ms": 3.0,
        "recv_interval": draw(st.sampled_from([1, 1, 3])),
        "stream_interval": draw(st.sampled_from([1, 1, 4])),
        "request_ms": draw(st.sampled_from([0.0, 7.0])),
        "intake_ms": draw(st.sampled_from([0.0, 2.0])),
        "intake_us": 50.0,
        "lag_steps": draw(st.sampled_from([0.0, 1.5])),
        "stream_us": draw(st.sampled_from([0.0, 0.0, 5000.0])),
        "asynchronous": draw(st.booleans()),
        "prefix_caching": draw(st.booleans()),
        "speculative": drafts,
    }


@st.composite
def requests(draw: st.DrawFn) -> Load:
    count = draw(st.integers(1, 12))
    lengths = st.integers(1, 30)
    prompt = [draw(lengths) for _ in range(count)]
    output = [draw(lengths) for _ in range(count)]
    if draw(st.booleans()):
        return closed_loop(draw(st.integers(1, 6)), count, prompt, output)
    gaps = [draw(st.sampled_from([0.0, 0.013, 0.2, 3.0])) for _ in range(count)]
    column = lambda most: [draw(st.integers(0, most)) for _ in range(count)]  # noqa: E731
    family = column(1)
    prefix = [
        [100 * kind + block for block in range(size // 8)] for kind, size in zip(family, prompt, strict=True)
    ]
    return open_loop(
        np.cumsum(gaps), prompt, output, priority=column(2), adapter=column(3), prefix=prefix, prefix_block=8
    )


@settings(max_examples=150, deadline=None)
@given(how=rules(), load=requests(), blocks=st.sampled_from([16, 20, 40, 400]))
def test_every_token_is_made_nothing_leaks_and_jumps_change_nothing(
    how: dict[str, Any], load: Load, blocks: int
) -> None:
    # drafts are accepted unevenly, 2 then 3 say, which jumps smooth: times must not tell the two apart
    of = server(CLOCK if how["speculative"] is None else Linear(0.01, 1e-4, 0, 1e-5), blocks, 4, **how)
    found, left = run(of, load)
    output = found.output
    assert np.all(np.isfinite(found.first_token_s))
    assert np.all(found.finish_s >= found.first_token_s - 1e-12)
    assert np.all(found.first_token_s > found.arrival_s)
    if how["speculative"] is None:
        assert found.gaps.count == int((output - 1).sum())
    scheduler = left.scheduler
    assert left.cache.free_blocks == blocks
    assert (scheduler.owed, scheduler.decoding.size, scheduler.seated, scheduler.queued) == (0, 0, 0, 0)
    assert scheduler.decoding.cached == 0

    slow, stepped = run(of, load, jumps=False)
    assert stepped.steps == left.steps
    for name in ("admitted_s", "first_token_s", "finish_s", "preemptions", "hit"):
        np.testing.assert_allclose(getattr(found, name), getattr(slow, name), rtol=1e-9, atol=1e-9)
    assert found.gaps.count == slow.gaps.count
    assert found.gaps.total == pytest.approx(slow.gaps.total, rel=1e-9, abs=1e-12)
    for mine, other in zip(left.timeline.columns[:3], stepped.timeline.columns[:3], strict=True):
        np.testing.assert_allclose(mine, other, atol=1e-9)


def test_prompts_first_hold_up_the_decodes_and_mixing_does_not() -> None:
    load = open_loop([0.0, 0.055], [10, 1000], [20, 1])
    clock = Linear(0.01, per_token=1e-3)
    mixed = simulate(server(clock), load)
    first = simulate(server(clock, scheduling="prefill_first"), load)
    assert mixed.gaps.count == first.gaps.count == 19
    assert mixed.finish_s[0] == pytest.approx(0.02 + 19 * 0.01 + 1.0)
    assert first.finish_s[0] == pytest.approx(0.02 + 19 * 0.01 + 1.01)
    assert first.gaps.quantile(0.99) == pytest.approx(1.02, rel=0.02)


def test_a_stream_interval_shows_the_first_token_with_the_nth() -> None:
    load = open_loop([0.0, 0.0, 0.0], [10, 10, 10], [20, 5, 1])
    found = simulate(server(Linear(0.01), stream_interval=8), load)
    assert found.first_token_s == pytest.approx([0.08, 0.05, 0.01])
    assert found.finish_s == pytest.approx([0.2, 0.05, 0.01])
    assert found.tpot_s[0] == pytest.approx(0.12 / 19)


def test_arrivals_wait_for_the_next_look() -> None:
    load = open_loop([0.0, 0.035], [10, 10], [40, 1])
    found = simulate(server(Linear(0.01), recv_interval=10), load)
    assert found.admitted_s == pytest.approx([0.0, 0.1])


def test_an_asynchronous_engine_takes_an_arrival_into_the_step_after_the_next() -> None:
    load = open_loop([0.0, 0.035], [10, 10], [40, 1])
    found = simulate(server(Linear(0.01), asynchronous=True), load)
    assert found.admitted_s == pytest.approx([0.0, 0.05])
    alone = simulate(server(Linear(0.01), asynchronous=True), open_loop([0.0, 1.0], [10, 10], [4, 1]))
    assert alone.admitted_s == pytest.approx([0.0, 1.0])


def test_answers_that_end_together_cost_asynchronous_engines_a_prompt_more() -> None:
    """Equal lengths: clients stay in step, every step of a convoy holds a prompt, and a new request waits
    for two or three of them, however many clients there are."""
    clock = Linear(0.001, per_token=1e-4)
    for clients in (8, 16):
        load = closed_loop(clients, 10 * clients, 1000, 50)
        waits = [
            simulate(
                server(clock, max_num_batched_tokens=1100, chunked=False, request_ms=1, asynchronous=late),
                load,
            )
            .steady()
            .ttft_s.mean()
            for late in (False, True)
        ]
        assert waits == pytest.approx([0.2, 0.27], rel=0.08)


def test_a_frontend_takes_requests_one_at_a_time() -> None:
    load = open_loop([0.0, 0.0, 0.0, 1.0], [10, 10, 20, 10], [1, 1, 1, 1])
    found = simulate(server(Linear(0.001), intake_ms=5.0, intake_us=1000.0), load)
    assert found.admitted_s == pytest.approx([0.015, 0.03, 0.055, 1.015])


def test_request_time_and_lag_are_added_to_what_clients_see() -> None:
    load = open_loop([1.0], [10], [11])
    plain = simulate(server(Linear(0.01)), load)
    late = simulate(server(Linear(0.01), request_ms=25, lag_steps=2), load)
    assert late.first_token_s - plain.first_token_s == pytest.approx([0.045])
    assert late.finish_s - plain.finish_s == pytest.approx([0.045])
    assert late.tpot_s == pytest.approx(plain.tpot_s)


def test_shared_prefixes_are_computed_once_and_the_oldest_are_lost_first() -> None:
    ask = lambda prefixes, blocks: simulate(  # noqa: E731
        server(Linear(0.01, per_token=1e-4), blocks, 16, prefix_caching=True),
        open_loop(np.arange(len(prefixes)), 100, 1, prefix=prefixes, prefix_block=32),
    )
    found = ask([[1, 2, 3], [1, 2, 3], [1, 2, 4], [5, 6, 7], [9, 2, 3]], 1000)
    assert found.hit.tolist() == [0, 96, 64, 0, 0]
    assert found.ttft_s == pytest.approx(0.01 + 1e-4 * (100 - found.hit))
    # room for one and a half prompts: the second one drives out the longest blocks of the first
    assert ask([[1, 2, 3], [5, 6, 7], [1, 2, 3]], 10).hit.tolist() == [0, 0, 32]
    assert ask([[1, 2, 3], [5, 6, 7], [1, 2, 3]], 14).hit.tolist() == [0, 0, 96]


def test_a_whole_prompt_in_the_cache_still_computes_its_last_token() -> None:
    load = open_loop([0.0, 1.0], [64, 64], [2, 2], prefix=[[1, 2], [1, 2]], prefix_block=32)
    found = simulate(server(Linear(), prefix_caching=True), load)
    assert found.hit.tolist() == [0, 32]


def test_adapters_beyond_the_limit_wait_and_loading_costs() -> None:
    load = open_loop([0.0, 0.0, 0.0, 0.0], 10, 10, adapter=[0, 1, 0, -1])
    found = simulate(server(Linear(0.01), max_adapters=1, adapter_ms=50), load)
    assert found.admitted_s == pytest.approx([0.0, 0.15, 0.0, 0.0])
    assert found.ttft_s == pytest.approx([0.06, 0.21, 0.06, 0.06])


def test_drafts_make_more_tokens_of_a_step() -> None:
    speculation = Speculation(draft=3, acceptance=0.7, draft_s=0.002)
    assert speculation.tokens == pytest.approx((1 - 0.7**4) / 0.3)
    load = open_loop([0.0], [10], [1001])
    found = simulate(server(Linear(0.01), speculative=speculation), load)
    assert found.tpot_s[0] == pytest.approx(0.012 / speculation.tokens, rel=2e-3)


def test_higher_priority_goes_first_and_the_lowest_gives_way() -> None:
    load = open_loop([0.0, 0.0, 0.001], [60, 60, 60], [60, 60, 60], priority=[0, 2, 1])
    seated = simulate(server(Linear(0.01), max_num_seqs=1), load)
    assert seated.admitted_s[2] < seated.admitted_s[1]
    short = simulate(server(Linear(0.01), 15, 16), load)
    assert short.preemptions[0] == 0
    assert short.preemptions[1] >= 1


def test_reserving_output_never_preempts_and_swapping_computes_nothing_again() -> None:
    load = closed_loop(8, 32, 64, 128)
    clock = Linear(0.01, per_token=1e-4)
    keep = simulate(server(clock, 60, 16, reserved_output=1.0), load)
    again = simulate(server(clock, 60, 16), load)
    swap = simulate(server(clock, 60, 16, preemption="swap"), load)
    some = simulate(server(clock, 60, 16, reserved_output=0.5), load)
    assert keep.preemptions.sum() == 0
    assert again.preemptions.sum() > some.preemptions.sum()
    assert swap.finish_s.max() < again.finish_s.max()


def test_prompts_per_step_and_whole_prompts() -> None:
    load = open_loop([0.0] * 4, [60, 60, 60, 200], 1)
    one = simulate(server(Linear(0.01), prompts_per_step=1), load)
    assert one.admitted_s == pytest.approx([0.0, 0.01, 0.02, 0.03])
    whole = simulate(server(Linear(0.01), chunked=False, max_num_batched_tokens=100), load)
    assert whole.admitted_s == pytest.approx([0.0, 0.01, 0.02, 0.03])
    cut = simulate(server(Linear(0.01), max_num_batched_tokens=100), load)
    assert cut.finish_s == pytest.approx([0.01, 0.02, 0.02, 0.04])


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: open_loop([], 1, 1), "arrival_s"),
        (lambda: open_loop([0.0, -1.0], 1, 1), "arrival_s"),
        (lambda: open_loop([0.0, float("nan")], 1, 1), "arrival_s"),
        (lambda: open_loop([0.0], 0, 1), "prompt"),
        (lambda: open_loop([0.0, 1.0], [1], 1), "prompt"),
        (lambda: closed_loop(0, 1, 1, 1), "concurrency"),
        (lambda: closed_loop(2, 4, 1, 1, burst=False), "ramp_s"),
        (lambda: uniform(5, 2), "low"),
        (lambda: Speculation(0, 0.5), "draft"),
        (lambda: server(Linear(), reserved_output=1.5), "reserved_output"),
        (lambda: server(Linear(), stream_interval=0), "stream_interval"),
        (lambda: simulate(server(Linear(), 0), open_loop([0.0], 1, 1)), "kv_blocks"),
        (lambda: simulate(server(Linear(), 1), open_loop([0.0], 100, 1)), "prompt + max_new_tokens"),
    ],
)
def test_bad_loads_and_rules_are_refused(make: Any, field: str) -> None:
    with pytest.raises(InvalidField) as caught:
        make()
    assert caught.value.fields["field"] == field


class Draining(Linear):
    """A pipeline whose prompts come out a second after their step."""

    def mixed(
        self, seqs: int, context: float, chunks: Sequence[tuple[int, int]], draft: int = 0
    ) -> tuple[float, float]:
        return super().mixed(seqs, context, chunks, draft)[0], 1.0


def test_answers_end_as_much_later_as_their_prompts_leave_a_pipeline() -> None:
    load = closed_loop(1, 3, uniform(64, 64), uniform(11, 11))
    plain, drained = (simulate(server(clock), load, seed=0) for clock in (Linear(0.01), Draining(0.01)))
    assert np.allclose(drained.ttft_s, plain.ttft_s + 1.0)
    assert np.allclose(drained.tpot_s, plain.tpot_s)
