"""Latency and energy over whole fleets, and the lowest price per token, against brute force: every flow,
every engine with every limit at every level, every fleet."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest

from planc.cost_model.energy import watts
from planc.planner.check import check
from planc.planner.compile import plan
from planc.planner.levels import fractions, running_share
from planc.planner.request import make_request
from planc.planner.search import Search
from tests.planner.cases import raw, table

GPUS = 3
#: (flow, GPUs, what it carries, what it costs)
Kind = tuple[int, int, float, float]


def drawn(seed: int, **changes: Any) -> dict[str, Any]:
    """A random small request for three GPUs, most of them with two traffic classes."""
    draw = random.Random(seed)
    chat = {"name": "chat", "isl": draw.choice([200, 800]), "osl": draw.choice([60, 250]), "weight": 0.75}
    papers = {"name": "papers", "isl": draw.choice([2000, 5000]), "osl": 80, "weight": 0.25}
    classes = draw.choice([[chat], [chat, papers], [chat, papers]])
    slo = draw.choice(
        [{}, {"ttft_mean_ms": 1500}, {"tpot_mean_ms": 45}, {"ttft_p95_ms": 2500, "tpot_mean_ms": 60}]
    )
    return raw(
        inventory={
            "nodes": [{"gpu": draw.choice(["l40s", "h100_sxm"]), "gpus_per_node": 4, "usd_per_gpu_hour": 2}]
        },
        workload={"classes": classes, "request_rate": draw.choice([1, 3, 6])},
        slo=slo,
        constraints={
            "weights": ["fp8"],
            "kv": ["bf16"],
            "pp": [1],
            "tp": [1, 2],
            "dp": [1],
            "max_gpus": GPUS,
            "max_num_seqs": draw.choice([[32], [96]]),
            "max_num_batched_tokens": [draw.choice([2048, 8192])],
        },
        **changes,
    )


def offline(seed: int) -> dict[str, Any]:
    """The same without a stated load."""
    document = drawn(seed)
    return {**document, "workload": {"classes": document["workload"]["classes"], "rate": "max"}}


@cache
def operating_points(seed: int) -> list[tuple[int, int, float, dict[str, float]]]:
    """(flow, GPUs, load, cost per objective) of every engine with every limit at every level, by the step
    model, where objectives hold."""
    found = []
    search = Search(make_request(drawn(seed)), table())
    for stream in search.streams:
        assert stream.traffic.rate is not None
        for engine in stream.bench.engines:
            shape, gpu = engine.candidate.shape, engine.candidate.group.gpu
            for limits in engine.limits:
                one = stream.evaluator(engine, limits)
                for share in fractions(GPUS + 1):
                    load = stream.traffic.rate * float(share)
                    state = one.at(load)
                    if bool(state.meets(stream.slos)[0, 0]):
                        costs = {
                            "min_latency": load * float(state.e2e[0, 0]),
                            "min_energy": shape.world * float(watts(gpu, running_share(state)[0, 0])),
                        }
                        found.append((stream.flow, shape.world, load, costs))
    return found


def kinds_by_level(seed: int, objective: str) -> list[Kind]:
    """The best engine of each size at each level of each flow."""
    best: dict[tuple[int, int, float], float] = {}
    for flow, world, load, costs in operating_points(seed):
        key = flow, world, load
        best[key] = min(best.get(key, math.inf), costs[objective])
    return [(flow, world, load, cost) for (flow, world, load), cost in best.items()]


def kinds_at_capacity(search: Search) -> list[Kind]:
    """The engine of each size that carries most of each flow, by the step model."""
    best: dict[tuple[int, int], float] = {}
    for stream in search.streams:
        for engine in stream.bench.engines:
            most = max(stream.evaluator(engine, limits).capacity(stream.slos) for limits in engine.limits)
            key = stream.flow, engine.candidate.shape.world
            best[key] = max(best.get(key, 0.0), most)
    usd = search.groups[0].usd
    return [(flow, world, most, world * usd) for (flow, world), most in best.items() if most > 0]


def fleets(kinds: list[Kind], room: int) -> Iterator[tuple[Kind, ...]]:
    """All multisets of engines that fit."""
    yield ()
    for i, kind in enumerate(kinds):
        if kind[1] <= room:
            for rest in fleets(kinds[i:], room - kind[1]):
                yield (kind, *rest)


def served(search: Search, fleet: tuple[Kind, ...]) -> float:
    """Requests/s: the class that is served least for its share decides, and halves serve each other."""
    carried: dict[int, float] = {}
    for flow, _, load, _ in fleet:
        carried[flow] = carried.get(flow, 0.0) + load
    most = []
    for number, share in enumerate(search.traffic.shares):
        halves: dict[int, dict[str, float]] = {}
        whole = 0.0
        for flow, load in carried.items():
            kind = search.flows[flow]
            if kind.role == "whole":
                whole += kind.shares[number] * load
            else:
                halves.setdefault(kind.split, {})[kind.role] = kind.shares[number] * load
        most.append((whole + sum(min(s.values()) for s in halves.values() if len(s) == 2)) / share)
    return min(most)


def least(search: Search, kinds: list[Kind], *, per_request: bool = False) -> float:
    """The least cost of any fleet that carries the demand, or the least cost per request."""
    found = math.inf
    for fleet in fleets(kinds, GPUS):
        cost, carried = sum(kind[3] for kind in fleet), served(search, fleet)
        if per_request:
            found = min(found, cost / carried if carried > 1e-9 else found)
        elif search.demand is not None and carried >= search.demand * (1 - 1e-9):
            found = min(found, cost)
    return found


#: integer loads resolve a millionth of the largest one
EXACT = 5e-5


@pytest.mark.parametrize("objective", ["min_latency", "min_energy"])
@pytest.mark.parametrize("seed", [1, 3, 6, 9])
def test_no_fleet_is_faster_or_draws_less(seed: int, objective: str) -> None:
    asked = make_request(drawn(seed, objective=objective))
    search = Search(asked, table())
    fleet = search.fleet()
    expected = least(search, kinds_by_level(seed, objective))
    if fleet is None:
        assert expected == math.inf
        return
    if objective == "min_latency" and search.demand is not None:
        expected *= 1e3 / search.demand
    assert fleet.solution.bound <= expected * (1 + EXACT)
    assert fleet.solution.value == pytest.approx(expected, rel=5e-3 if fleet.solution.gap else EXACT)


@pytest.mark.parametrize("seed", [1, 3, 7, 9])
def test_no_fleet_costs_less_per_token(seed: int) -> None:
    search = Search(make_request(offline(seed)), table())
    fleet = search.fleet()
    assert fleet is not None
    expected = least(search, kinds_at_capacity(search), per_request=True)
    price = expected / 3600 / search.traffic.osl_mean * 1e6
    assert fleet.solution.bound <= price * (1 + EXACT)
    assert fleet.solution.value == pytest.approx(price, rel=5e-3 if fleet.solution.gap else EXACT)


@pytest.mark.parametrize(
    "asked",
    [
        drawn(3, objective="min_latency"),  # prefill and decode pools for two traffic classes
        offline(7),  # a pool for each class
        offline(9),  # one prefill engine for two decode engines
    ],
)
def test_plans_of_whole_fleets_pass_the_checker(asked: dict[str, Any]) -> None:
    request = make_request(asked)
    made = plan(request, table())
    assert len(made.pools) == 2
    assert check(made, table(), request) == []
