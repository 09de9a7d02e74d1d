"""Routers: who takes the next request."""

from __future__ import annotations

from collections import Counter

import pytest

from planc.errors import UnknownName
from planc.runtime.simulator.router import ROUTERS, Router, Target, router


def routed(policy: Router, targets: list[Target], count: int, blocks: tuple[int, ...] = ()) -> list[int]:
    """Where `count` prompts of 100 tokens go that never finish."""
    found = []
    for _ in range(count):
        choice = policy.choose(targets, 100, blocks)
        targets[choice].sent(100)
        found.append(choice)
    return found


def test_round_robin_takes_turns_by_weight() -> None:
    assert routed(router("round_robin"), [Target(), Target(), Target()], 6) == [0, 1, 2, 0, 1, 2]
    mixed = routed(router("round_robin"), [Target(3.0), Target(1.0)], 8)
    assert Counter(mixed) == {0: 6, 1: 2}
    assert mixed[:4] != [0, 0, 0, 1]  # spread out, not in runs


@pytest.mark.parametrize("name", ["least_loaded", "power_of_two", "prefix_aware"])
def test_an_idle_replica_is_preferred_to_a_busy_one(name: str) -> None:
    targets = [Target(requests=9, tokens=9000), Target()]
    assert routed(router(name), targets, 5) == [1] * 5
    targets[1].finished(100)
    assert (targets[1].requests, targets[1].tokens) == (4, 400)


def test_loads_are_compared_by_weight() -> None:
    targets = [Target(4.0), Target(1.0)]
    assert Counter(routed(router("least_loaded"), targets, 50)) == {0: 40, 1: 10}


def test_two_choices_balance_better_than_one() -> None:
    """The gap between the fullest and the mean is O(log log n) with two choices (Mitzenmacher, 2001)."""
    targets = [Target() for _ in range(64)]
    routed(router("power_of_two", seed=3), targets, 6400)
    assert max(target.requests for target in targets) <= 104
    assert routed(router("power_of_two", seed=3), [Target() for _ in range(8)], 50) == routed(
        router("power_of_two", seed=3), [Target() for _ in range(8)], 50
    )


def test_prefixes_stay_together_until_the_load_tips() -> None:
    policy = router("prefix_aware")
    targets = [Target(), Target()]
    first = policy.choose(targets, 2048, (1, 2, 3, 4))
    targets[first].sent(2048)
    targets[first].finished(2048)
    assert policy.choose(targets, 2100, (1, 2, 3, 4, 5)) == first
    assert policy.choose(targets, 2048, (9, 2, 3, 4)) in (0, 1)  # hashes name whole prefixes: no match
    targets[first].sent(50_000)
    assert policy.choose(targets, 2100, (1, 2, 3, 4, 5)) != first


def test_every_router_works_alone_and_unknown_ones_do_not() -> None:
    for name in ROUTERS:
        assert routed(router(name), [Target()], 3, (1, 2)) == [0, 0, 0]
    with pytest.raises(UnknownName, match="power_of_two"):
        router("power_of_to")
