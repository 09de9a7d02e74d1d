"""Which layers every machine of a heterogeneous cluster holds, so that most tokens flow.

`place_layers` searches placements (a first one at once, blocks in sequence, pipelines side by side, small
changes, and on small clusters all placements), measures each by the exact maximum flow over the real links,
and proves a bound by configurations of layers. Status, bound and gap are those of the whole search.
"""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from planc.errors import Infeasible
from planc.planner import layer_exact
from planc.planner.layer_blocks import LONGEST, Branch, blocks, branches, choose, placed
from planc.planner.layer_bound import Pool, Prices, layers_covered, simple_bound, upper_bound
from planc.planner.layer_cluster import COORDINATOR, Cluster, Link, Machine, Range
from planc.planner.layer_local import chains, climb

__all__ = ["COORDINATOR", "LayerPlacement", "Link", "Machine", "place_layers"]

#: relative gap that counts as none: rates are rounded
_PROVED = 1e-4

#: groups of machines behind narrow links that a placement passes one after the other: as many are tried in
#: every order, and where there are more, the two that hold most
_GROUPS = 4

#: layers' worth that one block may waste, tried from little to much
_WASTE = (0.1, 0.25, 0.5, 1.0, 2.0)

#: relative steps of T: how close the search goes, and how far it falls after a failure
_STEP, _FALL = 5e-4, 0.95

#: random changes tried to a placement, times machines squared: what it costs to measure them
_MOVES = 1_000_000

#: share of the bound below which the search for a sequence gives up
_FLOOR = 0.02

#: seconds for one choice of blocks
_CHOOSING = 5.0


@dataclass(frozen=True, slots=True)
class LayerPlacement:
    """A placement with the flow it carries and what is proved about it.

    ranges    (machine, first layer, layer after the last), idle machines left out
    links     (source, target, tokens/s) that the maximum flow uses
    tokens_s  the maximum flow; bound: no placement passes more
    latency_s mean time of a token on links
    """

    status: Literal["optimal", "feasible"]
    tokens_s: float
    bound: float
    ranges: tuple[tuple[str, int, int], ...]
    links: tuple[tuple[str, str, float], ...]
    latency_s: float
    seconds: float

    @property
    def gap(self) -> float:
        """(bound - flow) / flow."""
        return self.bound / self.tokens_s - 1.0


def place_layers(
    machines: Sequence[Machine],
    links: Sequence[Link],
    layers: int,
    *,
    partial: bool = False,
    time_limit: float = 60.0,
    gap: float = 0.01,
) -> LayerPlacement:
    """The placement of most tokens/s found within the limit; ends early once within `gap` of its bound.

    partial   a machine may take over in the middle of its range (Helix's partial inference)

    Raises InvalidField for machines and links that cannot be, Infeasible where no placement passes a token.
    Runs single-threaded from fixed seeds; only an expired limit makes two runs differ.
    """
    started = time.monotonic()
    cluster = Cluster(machines, links, layers)
    room = sum(len(machine.tokens_s) for machine in machines)
    if room < layers:
        raise Infeasible(
            reason=f"the machines hold {room} layers together, the model has {layers}",
            relaxations=" Add machines or memory.",
        )
    search = _Search(cluster, partial, started + time_limit)
    search.offer(chains(cluster))
    bound = max(upper_bound(cluster, started + 0.4 * time_limit), search.tokens_s)
    if bound > 0 and layer_exact.size(cluster) > layer_exact.TINY:
        search.series(bound, gap)
        search.side_by_side(gap)
        search.swap(bound, gap)
        enough, end = bound / (1 + gap), started + time_limit
        search.offer(climb(cluster, search.ranges, partial, enough, _MOVES // len(machines) ** 2, end))
    if search.tokens_s * (1 + gap) < bound and layer_exact.size(cluster) <= layer_exact.SMALL:
        exact = layer_exact.solve(cluster, partial, search.ranges, bound, started + time_limit)
        search.offer(exact.ranges)
        bound = min(bound, exact.bound)
    if search.tokens_s <= 0:
        raise Infeasible(
            reason="no placement was found that links pass a token through",
            relaxations=" Add links, or machines that hold more layers.",
        )
    flow = cluster.flow(search.ranges, partial)
    bound = max(bound, flow.tokens_s)
    return LayerPlacement(
        "optimal" if bound <= flow.tokens_s * (1 + _PROVED) else "feasible",
        flow.tokens_s,
        bound,
        tuple((machines[at].name, *span) for at, span in enumerate(search.ranges) if span is not None),
        flow.links,
        flow.seconds,
        time.monotonic() - started,
    )


class _Search:
    """The best placement so far and ways to find better ones."""

    def __init__(self, cluster: Cluster, partial: bool, deadline: float) -> None:
        self.cluster, self.partial, self.deadline = cluster, partial, deadline
        self.ranges: list[Range] = [None] * len(cluster.machines)
        self.tokens_s = 0.0

    @property
    def left(self) -> float:
        return self.deadline - time.monotonic()

    def offer(self, ranges: Sequence[Range]) -> float:
        """The flow of a placement, which is kept if it is the best."""
        flow = self.cluster.flow(ranges, self.partial).tokens_s
        if flow > self.tokens_s:
            self.ranges, self.tokens_s = list(ranges), flow
        return flow

    def series(self, bound: float, gap: float) -> None:
        """Groups one after the other, in every order of those that hold the model together."""
        groups = range(len(self.cluster.groups))
        count = _GROUPS if len(groups) <= _GROUPS else 2
        most = sorted(groups, key=lambda group: -self._room(group))[:count]
        orders = [
            order
            for count in range(1, len(most) + 1)
            for order in itertools.permutations(sorted(most), count)
            if sum(map(self._room, order)) >= self.cluster.layers
        ]
        self._sequences(orders, bound, gap)

    def side_by_side(self, gap: float) -> None:
        """A pipeline within every group that can hold the model alone."""
        alone: list[Range] = [None] * len(self.cluster.machines)
        if len(self.cluster.groups) == 1:
            return
        for group, members in enumerate(self.cluster.groups):
            if self._room(group) < self.cluster.layers:
                continue
            part = _Search(self.cluster, self.partial, min(self.deadline, time.monotonic() + self.left / 4))
            part._sequences([(group,)], _alone(self.cluster, members), gap)
            alone = [mine or other for mine, other in zip(alone, part.ranges, strict=True)]
        self.offer(alone)

    def swap(self, bound: float, gap: float) -> None:
        """Trade the ranges of two machines of a kind while that brings flow: links differ."""
        if len(self.cluster.groups) == 1:
            return
        machines = self.cluster.machines
        pairs = [
            (i, j)
            for i, j in itertools.combinations(range(len(machines)), 2)
            if machines[i].tokens_s == machines[j].tokens_s
        ]
        better = True
        while better and self.tokens_s * (1 + gap) < bound and self.left > 0:
            better = False
            for i, j in pairs:
                trial = list(self.ranges)
                trial[i], trial[j] = trial[j], trial[i]
                before = self.tokens_s
                if trial[i] != trial[j] and self.left > 0:
                    better |= self.offer(trial) > before * (1 + 1e-9)

    def _room(self, group: int) -> int:
        return sum(len(self.cluster.machines[at].tokens_s) for at in self.cluster.groups[group])

    def _sequences(self, orders: Sequence[tuple[int, ...]], bound: float, gap: float) -> None:
        """Blocks in sequence, for the largest T found between what is held already and the bound."""
        low, high = 0.0, bound
        rows = {group: _rows(self.cluster, group) for order in orders for group in order}
        kinds = Counter(
            self.cluster.machines[at].tokens_s for group in rows for at in self.cluster.groups[group]
        )
        pool: Pool = set()
        tokens_s = high
        while self.left > 0 and high > max(low * (1 + gap), _FLOOR * bound):
            prices = layers_covered(kinds, tokens_s, pool=pool, deadline=self.deadline)
            found = self._sequence(orders, rows, prices, tokens_s)
            low, high = (max(tokens_s, found), high) if found > 0 else (low, tokens_s)
            if high - low <= _STEP * high:
                return
            tokens_s = max((low + high) / 2, _FALL * high)

    def _sequence(
        self,
        orders: Sequence[tuple[int, ...]],
        rows: dict[int, dict[int, list[Branch]]],
        prices: Prices,
        tokens_s: float,
    ) -> float:
        """The flow of a sequence that passes about T; 0 where none is found."""
        spare = prices.layers - self.cluster.layers
        if spare < 0:
            return 0.0
        for waste in (*(waste for waste in _WASTE if waste < spare), spare):
            offers = [
                block
                for group, row in rows.items()
                for block in blocks(self.cluster, group, tokens_s, prices, waste, row)
            ]
            for order in orders:
                if self.left <= 0:
                    return 0.0
                found = choose(self.cluster, order, offers, tokens_s, min(self.left, _CHOOSING))
                if found is not None:
                    return self.offer(placed(self.cluster, found))
        return 0.0


def _rows(cluster: Cluster, group: int) -> dict[int, list[Branch]]:
    kinds = Counter(cluster.machines[at].tokens_s for at in cluster.groups[group])
    return {layers: branches(kinds, layers) for layers in range(1, min(cluster.layers, LONGEST) + 1)}


def _alone(cluster: Cluster, members: Sequence[int]) -> float:
    """Tokens/s that a group's machines cannot exceed without the others, links left out."""
    machines = [cluster.machines[at] for at in members]
    return simple_bound(machines, cluster.layers)
