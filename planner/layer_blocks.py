"""Placements as a sequence of blocks: machines side by side that together pass T tokens/s over some layers.

A block covers L layers with branches side by side; a branch is one machine or a few in a row. All machines
that end a block hand over to all that start the next, so any sequence of blocks with L adding up to the
model passes T, links permitting. Machines with the same rates in the same group (`Cluster.groups`) are
counted, so the choice of blocks is a small integer program:

    find how many of each block, sum of L = N, machines of each kind at most as many as there are

Groups follow each other in a stated order. Between two of them a block hands over across narrow links, so
there the last block of one and the first of the next must have enough machines at the seam.
Blocks that waste more than the whole placement may waste (by the prices of `layer_bound`) are left out.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from planc.planner.layer_bound import Prices, Rates
from planc.planner.layer_cluster import Cluster, Range

#: machines in a row within a branch, layers of a block, and blocks kept
_IN_ROW, LONGEST, _BLOCKS = 3, 24, 4000


@dataclass(frozen=True, slots=True)
class Branch:
    """Machines in a row: (kind, layers held) each, and the tokens/s that the slowest passes."""

    parts: tuple[tuple[Rates, int], ...]
    tokens_s: float


@dataclass(frozen=True, slots=True)
class Block:
    """Branches of one group side by side over `layers` layers."""

    group: int
    layers: int
    branches: tuple[Branch, ...]

    @property
    def machines(self) -> Counter[Rates]:
        return Counter(kind for branch in self.branches for kind, _ in branch.parts)


def branches(kinds: Counter[Rates], layers: int) -> list[Branch]:
    """The best split of `layers` over every set of up to three machines, fastest first."""
    found: list[Branch] = []
    ordered = sorted(kinds)
    for count in range(1, min(_IN_ROW, layers) + 1):
        for row in itertools.combinations_with_replacement(ordered, count):
            if any(row.count(kind) > kinds[kind] for kind in set(row)):
                continue
            best: dict[int, tuple[float, tuple[int, ...]]] = {0: (math.inf, ())}
            for kind in row:
                grown: dict[int, tuple[float, tuple[int, ...]]] = {}
                for covered, (rate, sizes) in best.items():
                    for k in range(1, min(len(kind), layers - covered) + 1):
                        passed = min(rate, kind[k - 1])
                        if passed > grown.get(covered + k, (0.0, ()))[0]:
                            grown[covered + k] = passed, (*sizes, k)
                best = grown
            if layers in best:
                rate, sizes = best[layers]
                found.append(Branch(tuple(zip(row, sizes, strict=True)), rate))
    return sorted(found, key=lambda branch: (-branch.tokens_s, branch.parts))


def blocks(
    cluster: Cluster, group: int, tokens_s: float, prices: Prices, spare: float, rows: dict[int, list[Branch]]
) -> list[Block]:
    """Blocks of one group that pass T and waste at most `spare` layers' worth of machines, best first.

    rows   branches by layers, as `branches` gives them
    """
    kinds = Counter(cluster.machines[at].tokens_s for at in cluster.groups[group])
    found: dict[tuple[int, int, tuple[tuple[Rates, int], ...]], tuple[float, Block]] = {}
    worth = prices.worth
    for layers, offered in rows.items():
        cost = [sum(worth[kind] for kind, _ in branch.parts) for branch in offered]
        least = min((c / min(b.tokens_s, tokens_s) for c, b in zip(cost, offered, strict=True)), default=0.0)

        def grow(
            start: int,
            chosen: tuple[Branch, ...],
            passed: float,
            paid: float,
            layers: int = layers,
            offered: list[Branch] = offered,
            cost: list[float] = cost,
            least: float = least,
        ) -> None:
            if len(found) >= 4 * _BLOCKS:
                return
            if passed >= tokens_s:
                if len(chosen) == 1 < len(chosen[0].parts):
                    return  # its machines are blocks of their own
                block = Block(group, layers, chosen)
                key = layers, len(chosen), tuple(sorted(block.machines.items()))
                if key not in found or paid < found[key][0]:
                    found[key] = paid - layers, block
                return
            for at in range(start, len(offered)):
                total, more = passed + offered[at].tokens_s, paid + cost[at]
                if more + max(tokens_s - total, 0.0) * least > layers + spare + 1e-6:
                    continue
                taken = Counter(kind for each in (*chosen, offered[at]) for kind, _ in each.parts)
                if all(taken[kind] <= kinds[kind] for kind in taken):
                    grow(at, (*chosen, offered[at]), total, more)

        grow(0, (), 0.0, 0.0)
    ranked = sorted(found.values(), key=lambda each: (each[0] / each[1].layers, each[1].layers))
    return [block for _, block in ranked[:_BLOCKS]]


def choose(
    cluster: Cluster, order: Sequence[int], offers: Sequence[Block], tokens_s: float, seconds: float
) -> list[Block] | None:
    """Blocks for exactly all layers, group after group in this order; None if none were found in time."""
    from datetime import timedelta

    from ortools.math_opt.python import mathopt  # type: ignore[import-untyped]

    offers = [block for block in offers if block.group in order]
    model = mathopt.Model()
    count = [model.add_integer_variable(lb=0, ub=cluster.layers // block.layers) for block in offers]
    model.add_linear_constraint(
        mathopt.fast_sum(block.layers * n for block, n in zip(offers, count, strict=True)) == cluster.layers
    )
    for group in order:
        kinds = Counter(cluster.machines[at].tokens_s for at in cluster.groups[group])
        for kind, held in sorted(kinds.items()):
            used = [
                block.machines[kind] * n
                for block, n in zip(offers, count, strict=True)
                if block.group == group and block.machines[kind]
            ]
            if used:
                model.add_linear_constraint(mathopt.fast_sum(used) <= held)
    ends: dict[tuple[str, int], list[mathopt.Variable]] = {}
    for side, group in [("last", g) for g in order[:-1]] + [("first", g) for g in order[1:]]:
        marked = [model.add_binary_variable() for _ in offers]
        for block, n, mark in zip(offers, count, marked, strict=True):
            model.add_linear_constraint(mark <= (n if block.group == group else 0))
        model.add_linear_constraint(mathopt.fast_sum(marked) == 1)
        ends[side, group] = marked
    for group in order[1:-1]:  # a block is first and last at once only where it comes twice
        for n, a, b in zip(count, ends["first", group], ends["last", group], strict=True):
            model.add_linear_constraint(a + b <= n)
    for left, right in itertools.pairwise(order):
        seams = _seams(cluster, left, right, tokens_s)
        taken = [model.add_binary_variable() for _ in seams]
        model.add_linear_constraint(mathopt.fast_sum(taken) == 1)
        for (sending, receiving), seam in zip(seams, taken, strict=True):
            for side, group, least in (("last", left, sending), ("first", right, receiving)):
                fit = [
                    m
                    for block, m in zip(offers, ends[side, group], strict=True)
                    if len(block.branches) >= least
                ]
                model.add_linear_constraint(mathopt.fast_sum(fit) >= seam)
    model.minimize(mathopt.fast_sum(len(block.branches) * n for block, n in zip(offers, count, strict=True)))
    result = mathopt.solve(
        model,
        mathopt.SolverType.HIGHS,
        params=mathopt.SolveParameters(
            time_limit=timedelta(seconds=max(seconds, 0.01)), random_seed=0, relative_gap_tolerance=1.0
        ),
    )
    if not result.has_primal_feasible_solution():
        return None
    value = result.variable_values()
    sequence: list[Block] = []
    for group in order:
        middle = [
            b for b, n in zip(offers, count, strict=True) if b.group == group for _ in range(round(value[n]))
        ]
        edge: dict[str, list[Block]] = {"first": [], "last": []}
        for side in edge:
            for block, mark in zip(offers, ends.get((side, group), []), strict=bool((side, group) in ends)):
                if value[mark] > 0.5:
                    edge[side].append(block)
                    middle.remove(block)
        sequence += [*edge["first"], *middle, *edge["last"]]
    return sequence


def _seams(cluster: Cluster, left: int, right: int, tokens_s: float) -> list[tuple[int, int]]:
    """Machines needed on both sides of a seam, by the links' mean: (1, 3), (2, 2), (3, 1) ..."""
    pairs = cluster.between[list(cluster.groups[left]), :][:, list(cluster.groups[right])]
    rate = float(pairs.mean())
    links = math.ceil(tokens_s / rate) if rate > 0 else math.inf
    most = max(len(cluster.groups[left]), len(cluster.groups[right]))
    if links > most * most:
        return []
    return [(sending, math.ceil(links / sending)) for sending in range(1, min(most, int(links)) + 1)]


def placed(cluster: Cluster, sequence: Sequence[Block]) -> list[Range]:
    """Layers of every machine when the blocks follow each other; machines of a kind in their order."""
    free: dict[tuple[int, Rates], Iterator[int]] = {}
    for group, members in enumerate(cluster.groups):
        for kind in {cluster.machines[at].tokens_s for at in members}:
            free[group, kind] = iter([at for at in members if cluster.machines[at].tokens_s == kind])
    ranges: list[Range] = [None] * len(cluster.machines)
    start = 0
    for block in sequence:
        for branch in block.branches:
            at = start
            for kind, held in branch.parts:
                ranges[next(free[block.group, kind])] = (at, at + held)
                at += held
        start += block.layers
    return ranges
