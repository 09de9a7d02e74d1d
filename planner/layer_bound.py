"""How many tokens per second no placement of layers can pass: a bound by configurations of layers.

Were T tokens/s to pass, then at every layer machines that hold it pass T together. Forget that a machine's
layers are neighbours: what is left is covering each of N layers with a configuration, a multiset of (kind
of machine, layers held) whose rates sum to T at least, where a machine that holds k layers lends k slots.
The linear relaxation over all configurations (Gilmore & Gomory 1961, columns priced by a knapsack) says how
many layers can be covered; fewer than N, and T is out of reach. Its prices alone prove it: with price
p(kind, k) of a slot such that every configuration costs 1 at least,

    layers covered <= sum over machines of max over k of k p(kind, k)

Links come in once: when every layer lies on one machine alone, consecutive machines hand T over one link.
Where no set of machines joined by links of at least T can hold the model, some layer has two machines or
more, and the relaxation is told so (`shared`).
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from planc.planner.layer_cluster import Cluster, Machine

#: steps that T is divided into; rates are rounded up to them, which only loosens the bound
_STEPS = 2000

Rates = tuple[float, ...]

#: (slot, how many), slots by number
Config = tuple[tuple[int, int], ...]

#: configurations by what their slots are: ((kind, layers held), how many)
Pool = set[tuple[tuple[tuple[Rates, int], int], ...]]


@dataclass(frozen=True, slots=True, eq=False)
class Prices:
    """What the relaxation proves at T: the most layers covered, and each kind's worth in layers."""

    layers: float
    worth: dict[Rates, float]


def upper_bound(cluster: Cluster, deadline: float, precision: float = 1e-3) -> float:
    """Tokens/s that no placement exceeds, found by halving to a relative precision."""
    coordinator = min(float(cluster.between[-1].sum()), float(cluster.between[:, -1].sum()))
    low, high = 0.0, min(simple_bound(cluster.machines, cluster.layers), coordinator)
    pool: Pool = set()
    while high - low > precision * high and time.monotonic() < deadline:
        middle = max((low + high) / 2, 0.95 * high)
        if reach(cluster, middle, pool, deadline) < cluster.layers * (1 - 1e-9):
            high = middle
        else:
            low = middle
    return high


def simple_bound(machines: Sequence[Machine], layers: int) -> float:
    """The largest T with sum over machines of max over k of k min(rate(k), T) >= N T."""
    low, high = 0.0, 2.0 * sum(max(machine.tokens_s, default=0.0) for machine in machines)
    for _ in range(60):
        middle = (low + high) / 2
        held = sum(
            max((k * min(rate, middle) for k, rate in enumerate(machine.tokens_s, 1)), default=0.0)
            for machine in machines
        )
        low, high = (middle, high) if held * (1 + 1e-12) >= layers * middle else (low, middle)
    return high


def reach(cluster: Cluster, tokens_s: float, pool: Pool | None = None, deadline: float = math.inf) -> float:
    """An upper bound on the layers that T tokens/s can pass, worked out as far as N layers ask for."""
    kinds, layers = Counter(machine.tokens_s for machine in cluster.machines), cluster.layers
    whole = layers_covered(kinds, tokens_s, enough=layers, pool=pool, deadline=deadline).layers
    if whole < layers:
        return whole
    for part in cluster.reachable(tokens_s):
        held = Counter(cluster.machines[at].tokens_s for at in part)
        if held == kinds:
            return whole
        alone = layers_covered(held, tokens_s, enough=layers, pool=pool, deadline=deadline)
        if alone.layers >= layers:
            return whole
    return layers_covered(kinds, tokens_s, shared=True, enough=layers, pool=pool, deadline=deadline).layers


def layers_covered(
    kinds: Counter[Rates],
    tokens_s: float,
    shared: bool = False,
    enough: float = float("inf"),
    pool: Pool | None = None,
    deadline: float = math.inf,
) -> Prices:
    """The relaxation at T for machines of these kinds.

    shared   some layer has two machines at least
    enough   stop once it is clear whether as many layers can be covered
    deadline what is proved by then is returned
    pool     configurations worth trying first, and where new ones are kept
    """
    slots = [(kind, k) for kind in kinds for k, rate in enumerate(kind, 1) if rate > 0]
    if not slots:
        return Prices(0.0, dict.fromkeys(kinds, 0.0))
    pool = set() if pool is None else pool
    steps = np.array([min(_STEPS, math.ceil(kind[k - 1] / tokens_s * _STEPS)) for kind, k in slots])
    place = {slot: at for at, slot in enumerate(slots)}
    columns: set[Config] = {
        ((at, int(count)),)
        for least in (1, 1 + shared)
        for at, count in enumerate(np.maximum(-(-_STEPS // steps), least))
    }
    for config in pool:
        if all(slot in place for slot, _ in config):
            column = tuple(sorted((place[slot], count) for slot, count in config))
            if sum(steps[at] * count for at, count in column) >= _STEPS:
                columns.add(column)
    master, proved = _Master(slots, kinds, shared), Prices(float("inf"), {})
    master.add(sorted(columns))
    while True:
        covered, prices = master.solve()
        single, alone = _cheapest(prices, steps, at_least=1)
        pair, joint = _cheapest(prices, steps, at_least=2) if shared else (single, alone)
        if single > 0:
            found = _proof(slots, kinds, prices / single, pair / single - 1 if shared else 0.0)
            proved = min(proved, found, key=lambda each: each.layers)
        fresh = sorted({config for config in (alone, joint) if config not in columns})
        late = time.monotonic() > deadline
        if not fresh or late or covered >= enough or proved.layers < min(enough, covered * (1 + 1e-9)):
            return proved
        columns.update(fresh)
        pool.update(tuple((slots[at], count) for at, count in config) for config in fresh)
        master.add(fresh)


def _proof(
    slots: Sequence[tuple[Rates, int]], kinds: Counter[Rates], prices: NDArray[np.float64], joint: float
) -> Prices:
    """What slot prices prove at which every configuration costs 1, and one of two machines 1 + joint."""
    worth: dict[Rates, float] = dict.fromkeys(kinds, 0.0)
    for (kind, k), price in zip(slots, prices, strict=True):
        worth[kind] = max(worth[kind], k * float(price))
    return Prices(sum(count * worth[kind] for kind, count in kinds.items()) - joint, worth)


class _Master:
    """Slot prices that are best for the configurations known: least worth of all machines."""

    def __init__(self, slots: Sequence[tuple[Rates, int]], kinds: Counter[Rates], shared: bool) -> None:
        from ortools.math_opt.python import mathopt  # type: ignore[import-untyped]

        self.mathopt, self.model = mathopt, mathopt.Model()
        self.price = [self.model.add_variable(lb=0.0) for _ in slots]
        self.bonus = self.model.add_variable(lb=0.0) if shared else None
        worth = {kind: self.model.add_variable(lb=0.0) for kind in kinds}
        for price, (kind, k) in zip(self.price, slots, strict=True):
            self.model.add_linear_constraint(worth[kind] - k * price >= 0)
        total = mathopt.fast_sum(kinds[kind] * variable for kind, variable in worth.items())
        self.model.minimize(total - self.bonus if self.bonus is not None else total)
        self.solver = mathopt.IncrementalSolver(self.model, mathopt.SolverType.GLOP)

    def add(self, configs: Sequence[Config]) -> None:
        for config in configs:
            cost = self.mathopt.fast_sum(count * self.price[at] for at, count in config)
            if self.bonus is not None and sum(count for _, count in config) > 1:
                cost = cost - self.bonus
            self.model.add_linear_constraint(cost >= 1)

    def solve(self) -> tuple[float, NDArray[np.float64]]:
        """Layers that the known configurations cover, and slot prices."""
        result = self.solver.solve()
        values = result.variable_values(self.price)
        return float(result.objective_value()), np.maximum(values, 0.0)


def _cheapest(prices: NDArray[np.float64], steps: NDArray[np.int64], at_least: int) -> tuple[float, Config]:
    """The cheapest configuration of at_least 1 or 2 machines that covers all steps: price and counts."""
    best, last = np.zeros(_STEPS + 1), np.zeros(_STEPS + 1, dtype=np.int64)
    for level in range(1, _STEPS + 1):
        cost = best[np.maximum(level - steps, 0)] + prices
        last[level] = cost.argmin()
        best[level] = cost[last[level]]
    chosen: list[int] = []
    level, price = _STEPS, float(best[-1])
    if at_least == 2:
        rest = np.maximum(_STEPS - steps, 0)
        cost = prices + np.maximum(best[rest], prices.min())
        first = int(cost.argmin())
        price, level = float(cost[first]), int(rest[first])
        chosen.append(first)
        if level == 0 or best[level] < prices.min():
            chosen.append(int(prices.argmin()))
            level = 0
    while level > 0:
        chosen.append(int(last[level]))
        level = max(level - int(steps[chosen[-1]]), 0)
    return price, tuple(sorted(Counter(chosen).items()))
