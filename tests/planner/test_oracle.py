"""The whole planner against brute force: every shape, every format, every limit, every fleet."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest

from planc.planner.evaluate import Precise
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
    """Least price of any fleet on four GPUs that carries the demand, one family of formats each."""
    kinds: dict[tuple[str, str], dict[int, float]] = {}
    for engine in search.bench.engines:
        shape = engine.candidate.shape
        best = max(Precise(engine, limits, search.traffic).capacity(search.slos) for limits in engine.limits)
        sizes = kinds.setdefault((shape.weights, shape.kv), {})
        sizes[shape.world] = max(sizes.get(shape.world, 0.0), best)
    demand, price = search.demand, search.groups[0].usd
    assert demand is not None
    found = float("inf")
    for sizes in kinds.values():
        worlds = sorted(sizes)
        for counts in itertools.product(*(range(GPUS // w + 1) for w in worlds)):
            gpus = sum(n * w for n, w in zip(counts, worlds, strict=True))
            carried = sum(n * sizes[w] for n, w in zip(counts, worlds, strict=True))
            if gpus <= GPUS and carried >= demand * (1 + 1e-5):
                found = min(found, gpus * price)
    return found


@pytest.mark.parametrize("seed", range(24))
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
            assert bool(item.state(search.traffic).meets(search.slos)[0, 0])
