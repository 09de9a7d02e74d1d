"""Several replicas: behind one router, and in pools that prefill and decode."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from planc.cost_model import catalogue
from planc.planner.trace import MOONCAKE_BLOCK, read
from planc.runtime.simulator import closed_loop, disaggregated, open_loop
from planc.runtime.simulator.cluster import Lockstep, fronted, sending, simulate_cluster, together
from planc.runtime.simulator.disaggregated import simulate_disaggregated
from planc.runtime.simulator.energy import joules
from planc.runtime.simulator.load import Load, fixed, poisson, uniform
from planc.runtime.simulator.records import Records
from planc.runtime.simulator.replica import FirstToken, Journal, Replica
from planc.runtime.simulator.router import ROUTERS, RandomRank, RoundRobin, Target
from tests.runtime.simulated import Linear, server, simulate

CLOCK = Linear(0.01, 1e-4, 1e-7, 1e-5)
OPEN = open_loop(poisson(4.0, 300, seed=1), uniform(100, 1000), uniform(2, 200))
CLOSED = closed_loop(24, 240, uniform(100, 1000), uniform(2, 200))


def same(one: Records, other: Records) -> None:
    for name in ("arrival_s", "admitted_s", "first_token_s", "finish_s", "preemptions"):
        assert np.allclose(getattr(one, name), getattr(other, name), atol=1e-9), name
    first, second = one.summary(), other.summary()
    for name in ("utilisation", "running", "waiting", "kv_occupancy"):
        assert first[name] == pytest.approx(second[name], abs=1e-9), name


def sound(found: Records) -> None:
    assert np.isfinite(found.finish_s).all()
    assert (found.arrival_s < found.first_token_s).all()
    assert ((found.first_token_s < found.finish_s) | (found.output == 1)).all()


@pytest.mark.parametrize("load", [OPEN, CLOSED], ids=["open", "closed"])
@pytest.mark.parametrize("router", ROUTERS)
def test_one_replica_is_the_simulator_of_one(load: Load, router: str) -> None:
    one = server(CLOCK, 400, max_num_seqs=16)
    same(simulate_cluster([one], load, router=router), simulate(one, load))


def test_turns_split_an_open_load_into_independent_ones() -> None:
    one, count = server(CLOCK, max_num_seqs=16), 200
    arrivals = poisson(4.0, count, seed=5)
    prompt, output = np.arange(100, 100 + count), np.arange(20, 20 + count)
    both = simulate_cluster([one, one], open_loop(arrivals, prompt, output))
    for half in (slice(0, None, 2), slice(1, None, 2)):
        alone = simulate(one, open_loop(arrivals[half], prompt[half], output[half]))
        assert np.allclose(both.finish_s[half], alone.finish_s, atol=1e-9)
        assert np.allclose(both.first_token_s[half], alone.first_token_s, atol=1e-9)


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("load", [OPEN, CLOSED], ids=["open", "closed"])
def test_every_request_is_served_once_and_the_same_way_again(load: Load, router: str) -> None:
    servers = [server(CLOCK, max_num_seqs=16), server(CLOCK, 300, max_num_seqs=8)]
    found = simulate_cluster(servers, load, router=router, weights=[2.0, 1.0], seed=4)
    sound(found)
    same(found, simulate_cluster(servers, load, router=router, weights=[2.0, 1.0], seed=4))


def test_routers_that_look_beat_turns_under_uneven_load() -> None:
    """Every other request is long: turns send all of them to one replica."""
    one = server(CLOCK, max_num_seqs=4)
    output = np.tile([400, 10], 150)
    load = open_loop(poisson(1.2, 300, seed=2), fixed(100), output)
    waits = {
        name: simulate_cluster([one, one], load, router=name).summary()["ttft_ms"]["mean"] for name in ROUTERS
    }
    assert waits["least_loaded"] < 0.5 * waits["round_robin"]
    assert waits["power_of_two"] < 0.5 * waits["round_robin"]


def test_prefix_aware_routing_finds_more_in_the_caches() -> None:
    """Forty conversations of eight turns each; a replica's cache holds about half of them."""
    one = server(CLOCK, 1400, max_num_seqs=16, prefix_caching=True)
    turns = [(c, t) for t in range(8) for c in range(40)]
    prefix = [tuple(1000 * c + i for i in range(t + 1)) for c, t in turns]
    prompt = np.array([64 * (t + 1) + 1 for _, t in turns])
    load = open_loop(poisson(8.0, len(turns), seed=9), prompt, fixed(8), prefix=prefix, prefix_block=64)
    hits = {name: int(simulate_cluster([one] * 3, load, router=name).hit.sum()) for name in ROUTERS}
    assert hits["prefix_aware"] > 1.5 * hits["round_robin"]


def test_a_request_goes_where_it_fits() -> None:
    servers = [server(CLOCK, 20, max_num_seqs=8), server(CLOCK, 100, max_num_seqs=8)]
    load = open_loop(np.arange(10.0), fixed(800), fixed(50))
    sound(simulate_cluster(servers, load))


# -- prefill and decode apart ------------------------------------------------------------


def apart(load: Load, *, blocks: int = 4000, seconds: float = 0.002, decoders: int = 2) -> Records:
    one = server(CLOCK, blocks, max_num_seqs=16)
    return simulate_disaggregated(
        [one], [one] * decoders, load, transfer_s=lambda tokens: seconds * tokens / 1000
    )


@pytest.mark.parametrize("load", [OPEN, CLOSED], ids=["open", "closed"])
def test_pools_serve_every_request_and_prompts_stall_nobody(load: Load) -> None:
    found = apart(load)
    sound(found)
    same(found, apart(load))
    together = simulate_cluster([server(CLOCK, 4000, max_num_seqs=16)] * 2, load)
    assert found.summary()["itl_ms"]["p99"] < together.summary()["itl_ms"]["p99"]


def test_one_request_step_by_step() -> None:
    """The first token from the prefill side, the transfer, one step to take the cache over, decode steps."""
    found = apart(open_loop([0.5], fixed(1000), fixed(11)), seconds=0.3)
    first = 0.5 + CLOCK.mixed(0, 0, [(1000, 0)])[0]
    steps = sum(CLOCK.line(1, 1001 + i).seconds for i in range(10))
    assert found.first_token_s[0] == pytest.approx(first)
    assert found.finish_s[0] == pytest.approx(first + 0.3 + steps, rel=1e-3)
    assert found.gaps.count == 10
    assert found.gaps.total == pytest.approx(float(found.finish_s[0] - found.first_token_s[0]))


@pytest.mark.parametrize(("first", "later"), [("prefill", 0), ("decode", 0), ("again", 1)])
def test_where_the_first_token_comes_from(first: FirstToken, later: int) -> None:
    """Made again, it takes a step more, and the decoding engine hears of the request 0.2 s later."""
    one = server(Linear(0.01), 4000, request_ms=200)
    load = open_loop([0.0], fixed(1000), fixed(11))
    found = simulate_disaggregated([one], [one], load, transfer_s=lambda tokens: 0.5, first_token=first)
    prefilled = 0.2 + 0.01
    came = prefilled + 0.2 * later + 0.5
    at = {"prefill": prefilled, "decode": came, "again": came + 0.01}[first]
    assert found.first_token_s[0] == pytest.approx(at)
    assert found.finish_s[0] == pytest.approx(came + 0.01 * (10 + later))


@pytest.mark.parametrize("load", [OPEN, CLOSED], ids=["open", "closed"])
def test_decoding_replicas_run_ahead_of_nothing_that_reaches_them(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As long as no prompt can be done, decoding goes on by itself: nearly the same as step by step."""
    ahead = apart(load, decoders=3)
    monkeypatch.setattr(disaggregated, "_shortest", lambda *_: 0.0)
    exact = apart(load, decoders=3)
    for name in ("first_token_s", "finish_s"):
        assert np.abs(getattr(ahead, name) - getattr(exact, name)).mean() < 0.05
    assert ahead.events < 0.8 * exact.events
    assert np.nanmean(ahead.tpot_s) == pytest.approx(np.nanmean(exact.tpot_s), rel=0.02)


@pytest.mark.parametrize("load", [OPEN, CLOSED], ids=["open", "closed"])
def test_replicas_that_do_both_take_their_share(load: Load) -> None:
    journal, (prompt, output) = Journal(load.requests), load.lengths(0)
    one = server(CLOCK, 4000, max_num_seqs=32)
    fronts = [fronted("least_loaded", [Replica(one, journal)], [share], 0, 0) for share in (0.75, 0.75, 0.25)]
    run = disaggregated.Disaggregated(
        sending(load, journal, prompt.tolist(), output.tolist()),
        *fronts[:2],
        journal,
        lambda source, target, tokens: 0.002,
        whole=fronts[2],
    )
    run.run()
    sound(together(run.replicas, journal, prompt, output))
    both = run.served_by == 2
    assert both.mean() == pytest.approx(0.25, abs=0.01)
    assert ((run.decoded_by == -1) == (both | (output == 1))).all()


def test_one_token_answers_never_reach_the_decode_pool() -> None:
    found = apart(open_loop(np.arange(5.0), fixed(100), fixed(1)))
    assert np.array_equal(found.first_token_s, found.finish_s)


def test_a_link_carries_one_cache_at_a_time() -> None:
    """Ten prompts at once, half a second of transfer each: the last one decodes five seconds later."""
    found = apart(open_loop(np.zeros(10), fixed(100), fixed(5)), seconds=5.0, decoders=1)
    assert float(found.finish_s.max() - found.first_token_s.min()) > 5.0
    wide = apart(open_loop(np.zeros(10), fixed(100), fixed(5)), seconds=0.05, decoders=1)
    assert float(wide.finish_s.max()) < 0.5


def test_slow_decoding_holds_up_prefilling() -> None:
    """Prompts stay where they were prefilled until the decode side has room, so later ones wait."""
    load = open_loop(np.linspace(0, 1, 60), fixed(400), fixed(200))
    tight, wide = apart(load, blocks=150, decoders=1), apart(load, blocks=4000, decoders=4)
    sound(tight)
    assert tight.summary()["ttft_ms"]["mean"] > 5 * wide.summary()["ttft_ms"]["mean"]
    assert tight.summary()["kv_occupancy_peak"] <= 1.0


# -- attention ranks that prefill --------------------------------------------------------------


def in_step(arrivals: list[float], joint_s: float = 0.0, **how: bool) -> Records:
    """Prompts of 1000 tokens on two ranks by turns, a second each; a seat each, and a transfer of 0.1 s."""
    rank = server(Linear(0.0, 0.0, 0.0, 1e-3), 4000, max_num_seqs=1)
    return simulate_disaggregated(
        [rank] * 2,
        [server(Linear(0.01), 4000)],
        open_loop(arrivals, fixed(1000), fixed(2)),
        transfer_s=lambda tokens: 0.1,
        prompt_router=RoundRobin(),
        lockstep=[Lockstep(range(2), joint_s)],
        **how,
    )


def test_a_rank_waits_for_the_step_that_the_others_run() -> None:
    assert in_step([0.0, 0.0]).first_token_s == pytest.approx([1.0, 1.0])
    assert in_step([0.0, 0.4]).first_token_s == pytest.approx([1.0, 2.0])


def test_a_step_is_shorter_by_the_experts_of_ranks_without_prompts() -> None:
    """0.6 of its second is the experts' of both ranks: 0.3 s for each."""
    assert in_step([0.0, 0.0], 3e-4).first_token_s == pytest.approx([1.0, 1.0])
    assert in_step([0.0, 0.4], 3e-4).first_token_s == pytest.approx([0.7, 1.4])


def test_a_rank_whose_seat_is_still_held_misses_a_step() -> None:
    """Two prompts on each rank: the second of them begins when the cache of the first has been fetched."""
    free, held = in_step([0.0] * 4), in_step([0.0] * 4, keeps_seat=True)
    assert free.first_token_s == pytest.approx([1.0, 1.0, 2.0, 2.0])
    assert held.first_token_s == pytest.approx([1.0, 1.0, 2.1, 3.1])


def test_engines_in_turn_and_any_of_their_ranks() -> None:
    router, targets = RandomRank(4, seed=1), [Target() for _ in range(8)]
    chosen = [router.choose(targets, 100, ()) for _ in range(400)]
    assert all(rank // 4 == turn % 2 for turn, rank in enumerate(chosen))
    assert set(chosen) == set(range(8))


def test_energy_is_idle_power_and_what_busy_windows_add() -> None:
    gpu = catalogue.gpu("h100_sxm")
    edges = np.array([0.0, 10.0, 20.0, 25.0])
    idle, full, partly = joules(gpu, 2, np.array([0.0, 10.0, 2.5]), edges)
    assert idle == pytest.approx(2 * gpu.idle_w * 10)
    assert full == pytest.approx(2 * gpu.tdp_w * 10)
    assert gpu.idle_w * 10 < partly < gpu.tdp_w * 10


# -- recorded traffic --------------------------------------------------------------------


@pytest.mark.skipif("PLANC_DATA" not in os.environ, reason="needs the recorded traces (PLANC_DATA)")
def test_a_cache_without_end_finds_what_the_trace_repeats() -> None:
    """36.6 % of the Mooncake trace's blocks were seen before. The simulator keeps whole blocks only, and
    computes at least the last token of a prompt."""
    file = Path(os.environ["PLANC_DATA"]) / "traces" / "mooncake_conversation_trace.jsonl"
    rows = list(read(file, "mooncake"))
    seen: set[int] = set()
    kept: set[int] = set()
    blocks = repeated = hits = 0
    for row in rows:
        blocks += len(row.blocks)
        repeated += sum(block in seen for block in row.blocks)
        seen.update(row.blocks)
        hits += sum(block in kept for block in row.blocks[: (row.prompt - 1) // MOONCAKE_BLOCK])
        kept.update(row.blocks[: row.prompt // MOONCAKE_BLOCK])
    assert repeated / blocks == pytest.approx(0.366, abs=5e-4)

    fast = server(Linear(1e-5), 1 << 26, max_num_batched_tokens=1 << 20, prefix_caching=True)
    load = open_loop(
        np.arange(len(rows), dtype=float),
        [row.prompt for row in rows],
        fixed(1),
        prefix=[row.blocks for row in rows],
        prefix_block=MOONCAKE_BLOCK,
    )
    assert simulate(fast, load).hit.sum() == hits * MOONCAKE_BLOCK
