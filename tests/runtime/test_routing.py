"""Which router a fleet gets, and what prefixes it finds behind each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import pytest

from planc.planner.compile import plan
from planc.planner.offers import Fleet
from planc.planner.plan import Policy, Routing
from planc.planner.routing import DEFAULT, POLICIES, decided, words
from planc.planner.search import Search
from planc.planner.traffic import Traffic, traffic
from planc.runtime.referee import Simulation
from planc.runtime.routing import behind
from planc.runtime.simulator.router import ROUTERS
from tests.planner.cases import request, table
from tests.runtime.simulated import Linear, server

#: 1,000 prefixes of 1,024 tokens before 256 of a request's own
RECURRING = {"isl": 1280, "osl": 50, "request_rate": 4, "prefix_hit_rate": 0.8, "prefix_tokens": 1_024_000}
BUSY = {
    "workload": RECURRING | {"request_rate": 30},
    "inventory": {"nodes": [{"gpu": "l40s", "gpus_per_node": 8}]},
}


def flow(**changes: Any) -> Traffic:
    return traffic(request(workload=RECURRING | changes), "causal_lm")


def hit_rate(router: str, blocks: int, of: Traffic, running: float = 0.0) -> float:
    """Of two servers with so many blocks of 16 tokens."""
    one = server(Linear(0.002, per_token=1e-6), blocks, prefix_caching=True)
    records, filled, _ = behind(router, [one, one], [1.0, 1.0], [running] * 2, of, 4.0, 0)
    return float(records.hit[filled].sum() / records.prompt[filled].sum())


def test_behind_a_router_that_heeds_them_each_cache_holds_its_part() -> None:
    """Two caches of five eighths of what recurs: in turn each finds as much, apart more."""
    blocks = 40_000
    apart, turns = (hit_rate(router, blocks, flow()) for router in ("prefix_aware", "round_robin"))
    assert 0.4 < turns < 0.6
    assert apart > 1.25 * turns


@pytest.mark.parametrize("router", ROUTERS)
def test_caches_that_hold_all_find_all_behind_every_router(router: str) -> None:
    small = flow(prefix_tokens=102_400)
    assert hit_rate(router, 20_000, small) == pytest.approx(0.8, abs=0.05)


def test_of_many_prefixes_as_many_are_played_as_tell_the_same() -> None:
    """Forty times the prefixes in forty times the cache are found as often, in 2.5 times the requests."""
    few, many = flow(prefix_tokens=512_000), flow(prefix_tokens=20_480_000)
    found = hit_rate("round_robin", 16_000, few), hit_rate("round_robin", 640_000, many)
    assert found[1] == pytest.approx(found[0], abs=0.05)


class Player:
    """A fleet behind routers, with figures given."""

    def __init__(self, **e2e_ms: float) -> None:
        self.e2e_ms = e2e_ms

    def routes(
        self, search: Search, fleet: Fleet, policies: Sequence[Policy]
    ) -> Mapping[Policy, Mapping[str, float]]:
        return {p: {"e2e_ms": self.e2e_ms.get(p, 100.0), "excess": 1.0} for p in policies}


@cache
def busy() -> tuple[Search, Fleet]:
    return searched()


def searched(**changes: Any) -> tuple[Search, Fleet]:
    search = Search(request(**BUSY | changes), table())
    fleet = search.fleet()
    assert fleet is not None
    return search, fleet


def test_another_router_has_to_be_better_by_more_than_chance() -> None:
    search, fleet = busy()
    assert sum(item.count for item in fleet.items) > 1
    for e2e, chosen in ((60.0, "prefix_aware"), (99.0, DEFAULT)):
        found = decided(search, fleet, Player(prefix_aware=e2e))
        assert found is not None
        assert found.policy == chosen
        assert set(found.compared) == set(POLICIES)


@pytest.mark.parametrize(
    ("workload", "reason"),
    [
        ({"prefix_hit_rate": None, "prefix_tokens": None}, "does not say how much recurs"),
        ({"prefix_tokens": None, "request_rate": 80}, "does not say how much recurs"),
    ],
)
def test_the_default_says_why(workload: dict[str, Any], reason: str) -> None:
    given = {k: v for k, v in (BUSY["workload"] | workload).items() if v is not None}  # type: ignore[operator]
    found = decided(*searched(workload=given), Player(prefix_aware=1.0))
    assert found is not None
    assert (found.policy, found.compared) == (DEFAULT, {})
    assert reason in found.reason
    unplayed = decided(*busy())
    assert unplayed is not None
    assert "not simulated" in unplayed.reason


def test_one_replica_needs_no_router() -> None:
    search, fleet = busy()
    (item, *_) = fleet.items
    alone = replace(fleet, items=(replace(item, count=1),))
    assert decided(search, alone, Player()) is None


def test_a_plan_states_the_router_and_what_it_gains() -> None:
    found = plan(request(**BUSY), table(), referee=Simulation())
    assert found.routing is not None
    rates = {policy: values["hit_rate"] for policy, values in found.routing.compared.items()}
    assert set(rates) == set(POLICIES)
    assert rates["prefix_aware"] > 1.1 * rates["least_loaded"]
    if found.routing.policy != DEFAULT:
        best = found.routing.compared[found.routing.policy]["e2e_ms"]
        assert best < 0.98 * found.routing.compared[DEFAULT]["e2e_ms"]


def test_what_a_router_gains_is_said_in_a_sentence() -> None:
    figures = {"ttft_ms": 300.0, "tpot_ms": 20.0, "e2e_ms": 9000.0, "excess": 1.0}
    compared: dict[Policy, dict[str, float]] = {
        "least_loaded": {"hit_rate": 0.25, **figures},
        "prefix_aware": {"hit_rate": 0.5, **figures, "ttft_ms": 200.0},
    }
    said = words(Routing(policy="prefix_aware", reason="", compared=compared))
    assert said.startswith(
        "prefix_aware: 50 % of prompts found instead of 25 %, mean TTFT 200 ms instead of 300"
    )
    assert words(Routing(policy=DEFAULT, reason="a closed loop")) == "least_loaded: a closed loop"
