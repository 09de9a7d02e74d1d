"""The whole planner against brute force: every shape, every format, every limit, every fleet."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest

from planc.planner.request import make_request
from planc.planner.search import Search
from tests.planner.cases import raw, table

GPUS = 4


def drawn(seed: int) -> dict[str, Any]:
    """A random small request for one node of four GPUs."""
    draw = random.Random(seed)
    workload: dict[str, Any] = {"isl": draw.choice([300, 1000, 3000]), "osl": draw.choice([50, 200, 600])}
    if draw.random() < 0.25:
        workload["concurrency"] = draw.choice([8, 40, 150])
    else:
        workload["request_rate"] = draw.choice([0.5, 2, 5, 9, 14])
    slo = draw.choice(
        [{}, {"tpot_mean_ms": draw.choice([20, 35, 60])}, {"ttft_p95_ms": 1500, "tpot_p90_ms": 70}]
    )
    return raw(
        inventory={
            "nodes": [
                {
                    "gpu": draw.choice(["l40s", "h100_sxm"]),
                    "gpus_per_node": GPUS,
                    "usd_per_gpu_hour": draw.choice([1.0, 2.5]),
                }
            ]
        },
        workload=workload,
        slo=slo,
        constraints={
            "weights": draw.choice([["bf16"], ["bf16", "fp8"], ["fp8", "w4a16"]]),
            "kv": draw.choice([["bf16"], ["bf16", "fp8"]]),
            "pp": [1],
            "max_num_seqs": draw.choice([[64], [16, 128]]),
            "max_num_batched_tokens": draw.choice([[2048], [1024, 8192]]),
        },
    )


def cheapest(search: Search) -> float:
    """Least price of any fleet on four GPUs that carries the demand, one family of formats each: aggregated
    engines, and prefill and decode halves of each split of the objectives."""
    kinds: dict[tuple[str, str], dict[tuple[int, int], float]] = {}
    for stream in search.streams:
        for engine in stream.bench.engines:
            shape = engine.candidate.shape
            best = max(stream.evaluator(engine, limits).capacity(stream.slos) for limits in engine.limits)
            mine = kinds.setdefault((shape.weights, shape.kv), {})
            key = stream.flow, shape.world
            mine[key] = max(mine.get(key, 0.0), best)
    demand, price = search.demand, search.groups[0].usd
    assert demand is not None
    found = float("inf")
    for capacity in kinds.values():
        useful = sorted(key for key, most in capacity.items() if most > 0)
        for engines in fleets(useful, GPUS):
            carried: dict[int, float] = {}
            for flow, world in engines:
                carried[flow] = carried.get(flow, 0.0) + capacity[flow, world]
            halves: dict[int, list[float]] = {}
            whole = 0.0
            for number, flow in enumerate(search.flows):
                if flow.role == "whole":
                    whole += carried.get(number, 0.0)
                else:
                    halves.setdefault(flow.split, []).append(carried.get(number, 0.0))
            whole += sum(min(pair) for pair in halves.values())
            if whole >= demand * (1 + 1e-5):
                found = min(found, sum(world for _, world in engines) * price)
    return found


def fleets(kinds: list[tuple[int, int]], room: int) -> Iterator[list[tuple[int, int]]]:
    """All multisets of engines (flow, GPUs) that fit."""
    yield []
    for i, kind in enumerate(kinds):
        if kind[1] <= room:
            for rest in fleets(kinds[i:], room - kind[1]):
                yield [kind, *rest]


@pytest.mark.parametrize("seed", range(60))
def test_no_fleet_is_cheaper(seed: int) -> None:
    search = Search(make_request(drawn(seed)), table())
    fleet = search.fleet()
    expected = cheapest(search)
    if fleet is None:
        assert expected == float("inf")
    else:
        assert fleet.usd == pytest.approx(expected)
        assert fleet.solution.status == "optimal"
        for item in fleet.items:
            assert item.stream is not None
            assert bool(item.state(search.traffic).meets(item.stream.slos)[0, 0])
