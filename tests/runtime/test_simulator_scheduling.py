"""What any simulation must obey, whatever its rules: nothing is lost, and jumps change nothing."""

from __future__ import annotations

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
        "lag_steps": draw(st.sampled_from([0.0, 1.5])),
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
