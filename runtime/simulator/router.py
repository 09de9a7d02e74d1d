"""Which replica takes the next request.

A router sees what a gateway sees: how much it has sent to each replica and what has come back. It does
not know lengths of outputs. Replicas of different sizes carry `weight`s; loads are compared per weight.
"""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from planc.cost_model.catalogue import unknown


@dataclass(slots=True)
class Target:
    """One replica (or one data-parallel rank of it) as the router knows it.

    weight     its share of the traffic when all are equally loaded
    requests   sent and not finished
    tokens     prompt tokens of those
    """

    weight: float = 1.0
    requests: int = 0
    tokens: int = 0

    def sent(self, prompt: int) -> None:
        self.requests += 1
        self.tokens += prompt

    def finished(self, prompt: int) -> None:
        self.requests -= 1
        self.tokens -= prompt


class Router(Protocol):
    """Chooses a target for a prompt whose prefix blocks have these hashes (none: nothing to share)."""

    def choose(self, targets: Sequence[Target], prompt: int, blocks: Sequence[int]) -> int: ...


@dataclass(slots=True)
class RoundRobin:
    """In turn, in proportion to the weights: smooth weighted round-robin, as nginx does it."""

    credit: list[float] = field(default_factory=list)

    def choose(self, targets: Sequence[Target], prompt: int, blocks: Sequence[int]) -> int:
        if len(self.credit) != len(targets):
            self.credit = [0.0] * len(targets)
        credit, total, best = self.credit, 0.0, 0
        for i, target in enumerate(targets):
            credit[i] += target.weight
            total += target.weight
            if credit[i] > credit[best] + 1e-9 * total:
                best = i
        credit[best] -= total
        return best


@dataclass(slots=True)
class LeastLoaded:
    """The fewest outstanding requests per weight; ties go to the fewest outstanding prompt tokens."""

    def choose(self, targets: Sequence[Target], prompt: int, blocks: Sequence[int]) -> int:
        return min(range(len(targets)), key=lambda i: _load(targets[i]))


@dataclass(slots=True)
class RandomRank:
    """Engines in turn, and any of an engine's `ranks`: where a number drawn for each request decides
    (SGLang's follow_bootstrap_room)."""

    ranks: int
    seed: int = 0
    engines: int = 0
    random: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)

    def choose(self, targets: Sequence[Target], prompt: int, blocks: Sequence[int]) -> int:
        first = self.engines * self.ranks % len(targets)
        self.engines += 1
        return first + self.random.randrange(self.ranks)


@dataclass(slots=True)
class PowerOfTwo:
    """The less loaded of two drawn at random (Mitzenmacher, 2001)."""

    seed: int = 0
    random: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)

    def choose(self, targets: Sequence[Target], prompt: int, blocks: Sequence[int]) -> int:
        if len(targets) == 1:
            return 0
        first, second = self.random.sample(range(len(targets)), 2)
        return first if _load(targets[first]) <= _load(targets[second]) else second


@dataclass(slots=True)
class PrefixAware:
    """The least (prompt tokens left to compute + outstanding prompt tokens per mean weight).

    Blocks that were sent to a target count as cached there until `remembered` others were sent since.
    The sum of both costs is that of NVIDIA Dynamo's KV router.
    """

    block_tokens: int = 512
    remembered: int = 1 << 16
    known: list[OrderedDict[int, None]] = field(default_factory=list)

    def choose(self, targets: Sequence[Target], prompt: int, blocks: Sequence[int]) -> int:
        if len(self.known) != len(targets):
            self.known = [OrderedDict() for _ in targets]
        mean = sum(target.weight for target in targets) / len(targets)

        def cost(i: int) -> tuple[float, float]:
            matched = 0
            for block in blocks:
                if block not in self.known[i]:
                    break
                matched += 1
            fresh = max(prompt - matched * self.block_tokens, 0)
            return fresh + targets[i].tokens * mean / targets[i].weight, _load(targets[i])[0]

        best = min(range(len(targets)), key=cost)
        held = self.known[best]
        for block in blocks:
            held[block] = None
            held.move_to_end(block)
        while len(held) > self.remembered:
            held.popitem(last=False)
        return best


def _load(target: Target) -> tuple[float, float]:
    return target.requests / target.weight, target.tokens / target.weight


ROUTERS = ("round_robin", "least_loaded", "power_of_two", "prefix_aware")


def router(name: str, seed: int = 0, block_tokens: int = 512, remembered: int = 1 << 16) -> Router:
    """A fresh router by name. Raises UnknownName."""
    if name == "round_robin":
        return RoundRobin()
    if name == "least_loaded":
        return LeastLoaded()
    if name == "power_of_two":
        return PowerOfTwo(seed)
    if name == "prefix_aware":
        return PrefixAware(block_tokens, remembered)
    return unknown("router", name, "router", ROUTERS)
