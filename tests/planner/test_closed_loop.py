"""Closed loops over prefill and decode pools: against all fleets there are, and by Little's law."""

from __future__ import annotations

import itertools
import math
import random
from typing import Any

import pytest

from planc.planner.check import check
from planc.planner.closed_loop import at_levels, prompt_seconds
from planc.planner.compile import plan
from planc.planner.request import make_request
from planc.planner.search import Search
from planc.planner.solve import Column, Flow, Limits, solve
from planc.runtime.referee import Simulation
from tests.planner.cases import raw, table

GPUS = 4
HALVES = (Flow(), Flow(role="prefill", split=1), Flow(role="decode", split=1))


def drawn(seed: int) -> dict[str, Any]:
    """A random small request for one node of four GPUs."""
    draw = random.Random(seed)
    return raw(
        inventory={"nodes": [{"gpu": "h100_sxm", "gpus_per_node": GPUS, "usd_per_gpu_hour": 2.5}]},
        workload={
            "isl": draw.choice([1500, 3000]),
            "osl": draw.choice([100, 300]),
            "concurrency": draw.choice([40, 70, 100]),
        },
        slo=draw.choice(
            [{"tpot_mean_ms": 13}, {"ttft_mean_ms": 1500, "tpot_mean_ms": 16}, {"tpot_p90_ms": 14}]
        ),
        constraints={
            "weights": ["fp8"],
            "kv": ["bf16"],
            "pp": [1],
            "tp": [1, 2],
            "max_num_seqs": [64],
            "max_num_batched_tokens": [8192],
        },
    )


def cheapest(search: Search) -> float:
    """Least price of any fleet that holds the users: aggregated engines at their capacity, decode engines at
    each level, prefill engines that feed them."""
    kinds: dict[tuple[int, int, float], tuple[float, float]] = {}
    for stream in search.streams:
        for offer in stream.offers:
            world = offer.engine.candidate.shape.world
            for one in at_levels(offer) if stream.role == "decode" else [offer.precise()]:
                users, feed = (one.users, one.feed) if stream.role == "decode" else (one.capacity, 0.0)
                key = stream.flow, world, round(feed, 6)
                kinds[key] = max(kinds.get(key, (0.0, 0.0)), (users, feed))
    best = math.inf
    found = list(kinds.items())
    for size in range(1, GPUS + 1):
        for fleet in itertools.combinations_with_replacement(found, size):
            gpus = sum(world for (_, world, _), _ in fleet)
            if gpus <= GPUS and holds(search, fleet) >= (search.demand or 0.0) * (1 + 1e-5):
                best = min(best, gpus * search.groups[0].usd)
    return best


def holds(search: Search, fleet: Any) -> float:
    """Users of a fleet; 0 where prefill engines do not feed what decodes."""
    users = 0.0
    missing: dict[int, float] = {}
    for (number, _, _), (load, feed) in fleet:
        flow = search.flows[number]
        users += 0.0 if flow.role == "prefill" else load
        if flow.role != "whole":
            missing[flow.split] = missing.get(flow.split, 0.0) + (feed if flow.role == "decode" else -load)
    return 0.0 if any(rate > 0 for rate in missing.values()) else users


@pytest.mark.parametrize("seed", [0, 1, 7, 11, 16, 17, 18, 23])
def test_no_fleet_is_cheaper(seed: int) -> None:
    search = Search(make_request(drawn(seed)), table())
    fleet = search.fleet()
    assert (fleet.usd if fleet else math.inf) == pytest.approx(cheapest(search))
    for item in fleet.items if fleet else ():
        assert item.stream is not None
        assert item.load <= item.capacity * (1 + 1e-6)
        assert bool(item.state(search.traffic).meets(item.stream.slos)[0, 0])


def test_requests_per_second_and_seconds_make_the_users() -> None:
    """A plan of pools for 120 users: by Little's law, in the simulator, and by the checker's means."""
    document = {
        **drawn(0),
        "inventory": {"nodes": [{"gpu": "h100_sxm", "gpus_per_node": 8, "usd_per_gpu_hour": 2.5}]},
        "workload": {"isl": 3000, "osl": 200, "concurrency": 120},
        "slo": {"ttft_mean_ms": 1500, "tpot_mean_ms": 14},
    }
    document["constraints"] = {**document["constraints"], "serving": ["disaggregated"]}
    asked = make_request(document)
    made = plan(asked, table(), referee=Simulation())
    assert {pool.role for pool in made.pools} == {"prefill", "decode"}
    predicted = made.predicted
    users = predicted["requests_s"].value * predicted["e2e_ms"].value / 1e3
    assert users == pytest.approx(120, rel=1e-3)
    assert made.simulated["e2e_ms"]["mean"] == pytest.approx(predicted["e2e_ms"].value, rel=0.1)
    assert check(made, table(), asked) == []
    wrong = made.model_copy(deep=True)
    wrong.predicted["requests_s"] = wrong.predicted["requests_s"].model_copy(update={"value": 1.0})
    assert any("users" in reason for reason in check(wrong, table(), asked))


def test_decode_engines_are_fed() -> None:
    """Two decode engines hold the users, and two prefill engines are bought for them, not the one that a
    minimum of both halves would suggest."""
    columns = [
        Column(0, 1, 1, load=6.0, weight=1.0, drop=0.0, watts=0.0, flow=1),
        Column(0, 1, 1, load=50.0, weight=1.0, drop=0.0, watts=0.0, flow=2, feed=5.0),
    ]
    found = solve(columns, Limits(((8,),), 100.0, flows=HALVES))
    assert found is not None
    assert found.counts == (2, 2)


def test_a_prompt_takes_time_at_any_load() -> None:
    search = Search(make_request(drawn(1)), table())
    prefill = next(stream for stream in search.streams if stream.role == "prefill")
    assert 0 < prompt_seconds(prefill) < min(float(prefill.at(o).ttft[0, 0]) for o in prefill.offers)
