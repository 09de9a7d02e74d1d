"""Columns of the master problem, its limits, and what a fleet of them carries: exact, in integers.

A column belongs to a flow: requests of some traffic classes, in stated shares, and the part of the work
on them. With n engines of load l in flow f, of which k may fail,

    carried(f) <= sum n l - k max l          shares(f, c) carried(f)  of class c
    whole(c) + sum over splits of min(prefill(c), decode(c)) >= demand(c)

In a closed loop the demand is users, which a decode engine holds at a stated rate of requests. Its prefill
half must be able to feed all of that:

    whole + sum over splits of decode >= users        prefill(split) >= sum n feed
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

#: integer units of the demand
UNIT = 1_000_000


@dataclass(frozen=True, slots=True)
class Flow:
    """Requests that some columns carry.

    shares   per traffic class, the requests of it in one unit of load
    role     "whole", or one half of the work on a request
    split    halves of the same split serve each other
    """

    shares: tuple[float, ...] = (1.0,)
    role: Literal["whole", "prefill", "decode"] = "whole"
    split: int = 0


@dataclass(frozen=True, slots=True)
class Column:
    """An engine that may be bought any number of times.

    group, pieces, size   it takes `pieces` pieces of `size` GPUs in islands of node group `group`
    load                  what it carries, in the demand's unit
    weight                what one costs in the primary objective
    drop                  relative accuracy loss
    watts                 power at this load
    family                formats: a fleet keeps to one family, so that all replicas answer alike
    flow                  index into `Limits.flows`
    owner                 the model that it serves, where several share an inventory
    firm                  False: it may be taken away (spot instances)
    feed                  requests/s that it takes from prefill engines, where its load is users
    """

    group: int
    pieces: int
    size: int
    load: float
    weight: float
    drop: float
    watts: float
    family: str = ""
    flow: int = 0
    owner: int = 0
    firm: bool = True
    feed: float = 0.0

    @property
    def gpus(self) -> int:
        return self.pieces * self.size


@dataclass(frozen=True, slots=True)
class Limits:
    """What a fleet must carry and may take.

    islands     GPUs of each island, per group
    demand      of all traffic classes; None: carry as much as possible
    classes     share of each traffic class in the demand
    spare       engines of each flow that may fail while the rest still carries the demand
    firm_share  share of every class that columns which are not firm may not carry
    gap, nodes  relative gap, and nodes of branch and bound, at which the search for a better fleet stops
    """

    islands: tuple[tuple[int, ...], ...]
    demand: float | None
    max_gpus: int | None = None
    max_replicas: int | None = None
    max_watts: float | None = None
    classes: tuple[float, ...] = (1.0,)
    flows: tuple[Flow, ...] = (Flow(),)
    spare: int = 0
    firm_share: float = 0.0
    gap: float = 0.0
    nodes: int | None = None

    @property
    def plain(self) -> bool:
        """One flow that carries everything: the demand is met when loads add up to it."""
        return self.flows == (Flow(),) and not self.spare and not self.firm_share


@dataclass(frozen=True, slots=True)
class Solution:
    """counts per column; `value` and `bound` of the primary objective in its own unit."""

    counts: tuple[int, ...]
    status: Literal["optimal", "feasible"]
    value: float
    bound: float

    @property
    def gap(self) -> float:
        return abs(self.value - self.bound) / max(abs(self.value), 1e-12)


def undominated(columns: Sequence[Column], multiples: bool = False) -> list[int]:
    """Columns that no other replaces at no loss; of equal ones the first stays. `multiples`: several engines
    may stand in for one (see `outdoes`)."""
    groups: dict[tuple[object, ...], list[int]] = {}
    for i, column in enumerate(columns):
        groups.setdefault((column.owner, column.group, column.family, column.flow), []).append(i)
    kept: list[int] = []
    for members in groups.values():
        for i in members:
            mine = columns[i]
            if mine.load > 0 and not any(
                (replaces(columns[j], mine) and (j < i or not replaces(mine, columns[j])))
                or (multiples and outdoes(columns[j], mine))
                for j in members
                if j != i
            ):
                kept.append(i)
    return sorted(kept)


def replaces(a: Column, b: Column) -> bool:
    """Whether `a` may stand in for `b` everywhere, at no loss: same pieces in the same group, no more weight,
    drop or power, no less load."""
    return (
        (a.owner, a.group, a.pieces, a.size, a.family, a.flow)
        == (b.owner, b.group, b.pieces, b.size, b.family, b.flow)
        and a.load >= b.load
        and a.feed <= b.feed
        and a.weight <= b.weight
        and a.drop <= b.drop
        and a.watts <= b.watts
    )


def outdoes(a: Column, b: Column) -> bool:
    """Whether several engines `a` may stand in for one larger `b`, at no loss: they fit where it lies, and
    fewer of them may fail at once. Not where the number of replicas is limited."""
    if a.pieces != 1 or a.gpus >= b.gpus or b.size % a.size or a.load <= 0 or a.firm != b.firm:
        return False
    times = math.ceil(b.load / a.load - 1e-9)
    return (
        (a.owner, a.group, a.family, a.flow) == (b.owner, b.group, b.family, b.flow)
        and times * a.gpus <= b.gpus
        and times * a.feed <= b.feed
        and times * a.weight <= b.weight * (1 + 1e-12)
        and times * a.watts <= b.watts * (1 + 1e-12)
        and a.drop <= b.drop
    )


def integer_loads(columns: Sequence[Column], whole: float | None) -> list[int]:
    """Loads in millionths of `whole` (None: of the largest load), rounded down; a load that was made as an
    exact share of it (1/n) is rounded up, so that n of them reach it."""
    if whole is None:
        whole = max((c.load for c in columns), default=1.0)
    found = []
    for column in columns:
        share = column.load / whole
        exact_share = share > 0 and abs(1 / share - round(1 / share)) < 1e-9
        found.append(min(math.ceil(share * UNIT - 1e-6) if exact_share else math.floor(share * UNIT), 10**12))
    return found


def integer_weights(weights: Sequence[float], every: Sequence[float] = ()) -> tuple[list[int], float]:
    """Weights as integers of at most about 1e6 (over `every` weight), and the scale; exact where all are
    multiples of 1e-4."""
    every = every or weights
    most = max(every, default=0.0)
    if most <= 0:
        return [0] * len(weights), 1.0
    round_ones = most * 1e4 <= 1e7 and all(abs(w * 1e4 - round(w * 1e4)) < 1e-6 for w in every)
    scale = 1e4 if round_ones else 1e6 / most
    return [round(w * scale) for w in weights], scale


def carried(columns: Sequence[Column], limits: Limits, counts: Sequence[int], loads: Sequence[int]) -> int:
    """The demand that a fleet carries, in the loads' unit, spare and firm engines as asked; exact."""
    every = list(zip(columns, counts, loads, strict=True))
    if limits.plain:
        return sum(n * load for _, n, load in every)
    whole = _served(every, limits, limits.spare)
    if limits.firm_share:
        firm = [part for part in every if part[0].firm]
        whole = min(whole, _served(firm, limits, 0) / limits.firm_share)
    return math.floor(whole + 1e-3)


def _served(parts: Sequence[tuple[Column, int, int]], limits: Limits, spare: int) -> float:
    amounts: dict[int, float] = {}
    for flow in {column.flow for column, _, _ in parts}:
        mine = [(n, load) for column, n, load in parts if column.flow == flow]
        lost = spare * max((load for n, load in mine if n), default=0)
        amounts[flow] = max(sum(n * load for n, load in mine) - lost, 0)
    fed = _fed(parts, limits, spare)
    least = math.inf
    for number, share in enumerate(limits.classes):
        served = 0.0
        halves: dict[tuple[int, str], float] = {}
        for flow, amount in amounts.items():
            kind = limits.flows[flow]
            part = kind.shares[number] * amount
            if kind.role == "whole":
                served += part
            else:
                key = (kind.split, kind.role)
                halves[key] = halves.get(key, 0.0) + part
        for split in {split for split, _ in halves}:
            served += _together(split, halves, fed)
        if share > 0:
            least = min(least, served / share)
    return least


def _fed(parts: Sequence[tuple[Column, int, int]], limits: Limits, spare: int) -> dict[int, bool]:
    """Of splits whose decode engines hold users: whether the prefill engines feed all of them."""
    needs: dict[int, float] = {}
    given: dict[int, list[tuple[int, float]]] = {}
    for column, n, _ in parts:
        split = limits.flows[column.flow].split
        if column.feed:
            needs[split] = needs.get(split, 0.0) + n * column.feed
        elif n:
            given.setdefault(split, []).append((n, column.load))
    found = {}
    for split, need in needs.items():
        most = max((load for _, load in given.get(split, [])), default=0.0)
        found[split] = sum(n * load for n, load in given.get(split, [])) - spare * most >= need * (1 - 1e-9)
    return found


def _together(split: int, halves: dict[tuple[int, str], float], fed: dict[int, bool]) -> float:
    """What the two halves of a split serve."""
    decoded = halves.get((split, "decode"), 0.0)
    if split in fed:
        return decoded if fed[split] else 0.0
    return min(halves.get((split, "prefill"), 0.0), decoded)


def greedy(
    columns: Sequence[Column], limits: Limits, loads: Sequence[int], weights: Sequence[int]
) -> tuple[int, ...] | None:
    """Counts bought one by one: the engine that serves most of what is missing for its weight, or where that
    fills the inventory too early, for its GPUs; None when neither reaches the demand. Only engines that do
    all the work on a request are bought."""
    if limits.demand is not None and (found := _bought(columns, limits, loads, weights)):
        return found
    return _bought(columns, limits, loads, [column.gpus for column in columns])


def _bought(
    columns: Sequence[Column], limits: Limits, loads: Sequence[int], prices: Sequence[int]
) -> tuple[int, ...] | None:
    counts = [0] * len(columns)
    rooms = [list(islands) for islands in limits.islands]
    missing = [math.inf if limits.demand is None else UNIT * share * 1.001 for share in limits.classes]
    while any(left > 0 for left in missing):
        best: tuple[float, int] | None = None
        for i, column in enumerate(columns):
            flow = limits.flows[column.flow]
            if flow.role != "whole" or not _fits(column, rooms[column.group]):
                continue
            useful = sum(
                min(left, share * loads[i]) for left, share in zip(missing, flow.shares, strict=True)
            )
            rank = useful / max(prices[i], 1e-9)
            if useful > 0 and (best is None or rank > best[0]):
                best = rank, i
        if best is None:
            break
        i = best[1]
        counts[i] += 1
        _take(columns[i], rooms[columns[i].group])
        shares = limits.flows[columns[i].flow].shares
        missing = [left - share * loads[i] for left, share in zip(missing, shares, strict=True)]
    found = tuple(counts)
    return found if any(found) and keeps(columns, limits, found) else None


def _fits(column: Column, rooms: Sequence[int]) -> bool:
    return sum(room // column.size for room in rooms) >= column.pieces


def _take(column: Column, rooms: list[int]) -> None:
    for _ in range(column.pieces):
        fullest = min((i for i, room in enumerate(rooms) if room >= column.size), key=lambda i: rooms[i])
        rooms[fullest] -= column.size


def keeps(columns: Sequence[Column], limits: Limits, counts: Sequence[int]) -> bool:
    """Whether whole engines keep all limits but packing, in integers: a solver's tolerance must not leak into
    a plan."""
    loads = integer_loads(columns, limits.demand)
    gpus = sum(n * c.gpus for n, c in zip(counts, columns, strict=True))
    watts = sum(n * math.ceil(c.watts) for n, c in zip(counts, columns, strict=True))
    return (
        (limits.demand is None or carried(columns, limits, counts, loads) >= UNIT)
        and (limits.max_gpus is None or gpus <= limits.max_gpus)
        and (limits.max_replicas is None or sum(counts) <= limits.max_replicas)
        and (limits.max_watts is None or watts <= limits.max_watts)
        and gpus <= sum(sum(islands) for islands in limits.islands)
    )
