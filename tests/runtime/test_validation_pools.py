"""Measured points of prefill and decode pools: what is simulated, and what it hangs on."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from planc.runtime.validation import disaggregated
from planc.runtime.validation.constants import Constants
from planc.runtime.validation.harness import harness
from planc.runtime.validation.points import Point, PoolLabel
from planc.runtime.validation.predict import Predictor, Times
from planc.runtime.validation.setups import Setup, setup
from tests.sample_tables import qwen235b

KNOWN = Predictor()
POINT = Point(
    row=1, id="", model="qwen3-235b", gpu="h200_sxm", engine="sglang", engine_version="0.5", weights="bf16",
    mode="disagg", isl=1024, osl=1024, concurrency=64, tp=1, pp=1, attention_dp=1, moe_tp=1, moe_ep=1,
    gpus=24, prefill=PoolLabel(1, 8, 1, 8), decode=PoolLabel(2, 8, 1, 8), ttft_ms=None, tpot_ms=None,
)  # fmt: skip


def made(**changes: object) -> Setup:
    point = replace(POINT, **changes)  # type: ignore[arg-type]
    return setup(point, harness(point, {"requests_per_client": 4.0}), lambda name: qwen235b())


def times(given: Setup) -> Times:
    return KNOWN.times(given, Constants.shipped(given.profile))


def test_pools_of_a_common_factor_are_deployments_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two prefill and four decode engines are twice one and two."""
    twice = made(prefill=PoolLabel(2, 8, 1, 8), decode=PoolLabel(4, 8, 1, 8), concurrency=128, gpus=48)
    assert twice.prefill is not None
    assert disaggregated.slices(twice, twice.prefill) == 2
    assert times(twice) == times(made())
    monkeypatch.setattr(disaggregated, "slices", lambda setup, prefill: 1)
    monkeypatch.setattr("planc.runtime.validation.predict.slices", lambda setup, prefill: 1)
    whole, part = times(twice), times(made())
    assert whole.tpot == pytest.approx(part.tpot, rel=0.02)
    assert whole.ttft == pytest.approx(part.ttft, rel=0.25)


def test_decoding_is_that_of_its_share_of_the_clients() -> None:
    """Half the clients for half the decode engines: the same TPOT, while prefill has half to do."""
    two, one = times(made()), times(made(decode=PoolLabel(1, 8, 1, 8), concurrency=32, gpus=16))
    assert one.tpot == pytest.approx(two.tpot, rel=0.03)
    assert one.ttft < two.ttft


def test_longer_prompts_are_paid_in_ttft_alone() -> None:
    short, long = times(made(concurrency=8)), times(made(concurrency=8, isl=8192))
    assert long.ttft > 2 * short.ttft
    assert long.tpot < 1.2 * short.tpot
    assert math.isfinite(long.ttft_steady)


def test_a_stated_layout_of_prefill_wins_over_its_label() -> None:
    one, stated = made(), made(flags={"prompt_dp": 8, "prompt_ep": 8})
    assert one.prefill is not None
    assert stated.prefill is not None
    assert (one.prefill.shape.tp, one.prefill.shape.dp) == (8, 1)
    assert (stated.prefill.shape.tp, stated.prefill.shape.dp, stated.prefill.shape.ep) == (1, 8, 8)
    assert stated.decode == one.decode


def test_what_decodes_keeps_no_room_for_prompts() -> None:
    found = made(isl=8192, flags={"max_num_batched_tokens": 65536})
    assert found.prefill is not None
    assert found.decode.memory.activations < found.prefill.memory.activations


def test_stated_seats_make_requests_wait() -> None:
    free, seated = made(), made(flags={"max_num_seqs": 32})
    assert times(seated).ttft > 5 * times(free).ttft
    assert times(seated).tpot < times(free).tpot


def test_experts_and_graphs_as_an_engine_was_told() -> None:
    told = made(flags={"expert_table": "trtllm/bfloat16", "graphed_rows": 2048}).profile
    assert (told.expert_table, told.cuda_graphs.piecewise) == ("trtllm/bfloat16", 2048)
    usual = made().profile
    assert (usual.expert_table, usual.cuda_graphs.piecewise) == (None, 0)


@pytest.mark.parametrize(("prefill", "copies"), [({"prompt_dp": 8}, 8.0), ({}, 1.0)])
def test_ranks_that_decode_fetch_what_they_hold_from_those_that_prefilled(
    prefill: dict[str, int], copies: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = made(flags=prefill)
    assert found.prefill is not None
    assert found.decode.shape.tp == found.prefill.shape.tp * copies
    assert (
        disaggregated.handed_over(found.prefill, found.decode)
        == copies * found.decode.memory.kv_bytes_per_token
    )


def test_prompts_bound_to_ranks_are_simulated_rank_by_rank() -> None:
    """A prompt alone pays for its own experts' work; where all ranks do the same it pays for eight."""
    bound, shared = made(flags={"prompt_dp": 8}), made(flags={"prompt_dp": 8, "prompt_router": None})
    assert bound.harness.prompt_router == "random_rank"  # SGLang's default
    assert bound.prefill is not None
    assert disaggregated.slices(bound, bound.prefill) == 1
    assert disaggregated.slices(shared, bound.prefill) == 2
    assert times(bound).ttft_steady < 0.7 * times(shared).ttft_steady
