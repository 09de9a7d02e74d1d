"""Which engines of one plan are those of another: pools and kinds of replicas, paired by likeness.

Identical replicas are one kind with a count. Pools of one role are paired by the traffic classes that they
serve, kinds inside a pair of pools by the weight of all settings that are equal: where an engine runs and
how it is cut weigh most. The likest are paired first; what is left over was added or removed. Nothing
depends on positions, or on which plan comes first.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from planc.errors import PlancError
from planc.planner.inventory import Group, groups
from planc.planner.plan import Plan, Pool, Replica, Role
from planc.planner.request import make_request

#: what a replica is given, as opposed to what it is
_PLACED = ("gpus", "traffic_share", "memory", "cuda_graph_sizes")
SETTINGS = tuple(name for name in Replica.model_fields if name not in _PLACED)
_WEIGHTS = {"gpu": 8, "engine": 8, "tp": 4, "pp": 4, "dp": 4, "ep": 4, "weights": 2, "kv": 2}
_DEGREES = ("tp", "pp", "dp", "ep", "cp")
_ANY = 0.5  # likeness of a pool for all traffic classes to one for some

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Kind:
    """Replicas that differ in nothing but their GPUs.

    share   of the requests, all of them together
    group   the nodes they lie in; None where the plan's request cannot say
    """

    role: Role
    classes: tuple[str, ...]
    replica: Replica
    count: int
    share: float
    group: Group | None

    @property
    def settings(self) -> dict[str, Any]:
        return {name: getattr(self.replica, name) for name in SETTINGS}

    @property
    def key(self) -> str:
        """A canonical text: ties between equally like kinds are broken by it."""
        where = None if self.group is None else (self.group.index, self.group.usd)
        return json.dumps([self.settings, self.count, where], sort_keys=True, default=str)

    def title(self) -> str:
        r = self.replica
        degrees = "".join(f" {name}={getattr(r, name)}" for name in _DEGREES if getattr(r, name) > 1)
        gpus = r.tp * r.pp * r.dp
        return f"{self.count} x {r.engine} on {gpus} {r.gpu}{degrees}, {r.weights}/{r.activations}/{r.kv}"


@dataclass(frozen=True, slots=True)
class Pair:
    """A kind of the old plan and what it is in the new one; None where it is in one plan only.

    pool    the pair of pools that it is in, by role, with traffic classes where a role has several pools
    name    the same, with a number where there are several kinds
    served  traffic classes of the pool in either plan; None where only the other plan has it
    """

    pool: str
    name: str
    served: tuple[tuple[str, ...] | None, tuple[str, ...] | None]
    old: Kind | None
    new: Kind | None

    @property
    def kept(self) -> bool:
        """Whether both plans have the pool."""
        return None not in self.served

    def mirrored(self) -> Pair:
        return Pair(self.pool, self.name, self.served[::-1], self.new, self.old)


def aligned(old: Plan, new: Plan) -> tuple[Pair, ...]:
    """Every kind of both plans, once."""
    homes = _homes(old), _homes(new)
    found: list[Pair] = []
    for name, before, after in _pools(old, new):
        mine, other = _kinds(before, homes[0]), _kinds(after, homes[1])
        pairs = matched(mine, other, _likeness, lambda kind: kind.key)
        pairs.sort(key=_order)
        served = tuple(before.classes) if before else None, tuple(after.classes) if after else None
        for number, (a, b) in enumerate(pairs):
            found.append(Pair(name, f"{name}[{number}]" if len(pairs) > 1 else name, served, a, b))
    return tuple(found)


def matched(
    before: Sequence[T], after: Sequence[T], likeness: Callable[[T, T], float], key: Callable[[T], str]
) -> list[tuple[T | None, T | None]]:
    """Pairs, best first, and then whatever has no partner. The pairs do not depend on the direction."""
    ranked = sorted(
        ((-likeness(a, b), sorted((key(a), key(b))), i, j))
        for i, a in enumerate(before)
        for j, b in enumerate(after)
    )
    rows, columns = set(range(len(before))), set(range(len(after)))
    pairs: list[tuple[T | None, T | None]] = []
    for _, _, i, j in ranked:
        if i in rows and j in columns:
            rows.remove(i)
            columns.remove(j)
            pairs.append((before[i], after[j]))
    pairs += [(before[i], None) for i in sorted(rows)]
    pairs += [(None, after[j]) for j in sorted(columns)]
    return pairs


# -- pools -------------------------------------------------------------------------------


def _pools(old: Plan, new: Plan) -> list[tuple[str, Pool | None, Pool | None]]:
    """Pairs of pools with their names, which are the same in both directions."""
    found = []
    for role in sorted({pool.role for pool in (*old.pools, *new.pools)}):
        sides = [[pool for pool in plan.pools if pool.role == role] for plan in (old, new)]
        pairs = matched(sides[0], sides[1], _overlap, lambda pool: pool.model_dump_json())
        names = [_served(pair) for pair in pairs]
        for name, (a, b) in sorted(zip(names, pairs, strict=True), key=lambda item: item[0]):
            found.append((role if len(pairs) == 1 else f"{role}({name})", a, b))
    return found


def _overlap(a: Pool, b: Pool) -> float:
    """Share of their traffic classes that both serve."""
    if not a.classes or not b.classes:
        return 1.0 if a.classes == b.classes else _ANY
    return len({*a.classes} & {*b.classes}) / len({*a.classes} | {*b.classes})


def _served(pools: tuple[Pool | None, Pool | None]) -> str:
    return "|".join(sorted({", ".join(pool.classes) or "all" for pool in pools if pool is not None}))


# -- kinds -------------------------------------------------------------------------------


def _kinds(pool: Pool | None, homes: Mapping[str, Group]) -> list[Kind]:
    if pool is None:
        return []
    found: dict[tuple[int, str], list[tuple[Replica, Group | None]]] = {}
    for replica in pool.replicas:
        home = homes.get(replica.gpus[0].rpartition("/")[0]) if replica.gpus else None
        home = home if home is not None and home.gpu.name == replica.gpu else None
        text = replica.model_dump_json(exclude={"gpus", "traffic_share"})
        found.setdefault((-1 if home is None else home.index, text), []).append((replica, home))
    return [
        Kind(
            pool.role,
            tuple(pool.classes),
            same[0][0],
            len(same),
            sum(replica.traffic_share for replica, _ in same),
            same[0][1],
        )
        for same in found.values()
    ]


def _homes(plan: Plan) -> dict[str, Group]:
    """Node name -> its group; {} where the request is not one that this version reads."""
    try:
        return {name: group for group in groups(make_request(plan.request)) for name in group.names}
    except PlancError:
        return {}


def _likeness(a: Kind, b: Kind) -> float:
    """Weight of all that is equal."""
    mine, other = a.settings, b.settings
    same = sum(_WEIGHTS.get(name, 1) for name in SETTINGS if mine[name] == other[name])
    return same + 0.5 * (a.count == b.count)


def _order(pair: tuple[Kind | None, Kind | None]) -> tuple[bool, list[str]]:
    """Pairs first, then kinds of one plan only, each by text; the same in both directions."""
    present = sorted(kind.key for kind in pair if kind is not None)
    return len(present) < 2, present
