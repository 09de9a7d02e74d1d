"""Configurations between two plans: each decision taken from the one or from the other.

`Mixture.decisions` lists what differs, in the order of `ORDER`; `Mixture.at` is the configuration in which
some of them are as in the new plan and the rest as in the old one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from planc.errors import PlancError
from planc.planner.counterfactual import Engines, Impossible, Place
from planc.planner.diff_align import SETTINGS, Kind, Pair, aligned
from planc.planner.inventory import Group, groups
from planc.planner.plan import Plan
from planc.planner.request import Request, make_request

#: what follows from the other settings
_DERIVED = ("kv_blocks", "block_size", "pipeline_layers", "kv_offload")
#: decisions that set more than the field of their name
_FIELDS: Mapping[str, tuple[str, ...]] = {"pp": ("pp", "pipeline_layers")}
_ENGINE = tuple(name for name in SETTINGS if name not in _DERIVED)
#: decisions in the order in which they are tried: what is asked, what it costs, what serves, how, how many
ORDER = ("workload", "slo", "prices", "machines", "pools", "nodes", *_ENGINE, "replicas", "traffic split")

_LISTED = 3  # changes of one decision that are named in a line
_SHORT = 1e-4  # share of the offered load that a plan may lack by rounding

#: (what, value in the old plan, value in the new one)
Row = tuple[str, Any, Any]


@dataclass(frozen=True, slots=True)
class Decision:
    """One thing that was asked for or decided differently. `changes` in words: (what of it, old, new)."""

    name: str
    changes: tuple[tuple[str, str, str], ...] = ()

    def mirrored(self) -> Decision:
        return Decision(self.name, tuple((what, new, old) for what, old, new in self.changes))

    def text(self, arrow: str = "->") -> str:
        if not self.changes:
            return self.name
        words = [f"{what} {old} {arrow} {new}".strip() for what, old, new in self.changes]
        if len(words) == 1:
            what, old, new = self.changes[0]
            return f"{self.name} {what}".strip() + f": {old} {arrow} {new}"
        more = [f"and {len(words) - _LISTED} more"] if len(words) > _LISTED + 1 else []
        return f"{self.name}: " + ", ".join([*words[: _LISTED if more else None], *more])

    def to_json(self) -> dict[str, Any]:
        changes = [{"part": what, "old": old, "new": new} for what, old, new in self.changes]
        return {"name": self.name, "changes": changes}


class Mixture:
    """Two plans of one model and what lies between them. Raises Impossible for a request that is not one."""

    def __init__(self, old: Plan, new: Plan) -> None:
        self.plans = old, new
        self.pairs = aligned(old, new)
        self.requests = _requests(old, new)
        if any(kind.group is None for pair in self.pairs for kind in (pair.old, pair.new) if kind):
            raise Impossible("a plan's nodes are not among those of its request")
        if any(not 0 < share < math.inf for side in self._shares for share in side.values()):
            raise Impossible("a pool takes no requests")
        self.full = _full(old, self.requests[0]), _full(new, self.requests[1])
        self._twins = _twins(groups(self.requests[0]), groups(self.requests[1]))

    # -- what differs --------------------------------------------------------------------

    @cached_property
    def decisions(self) -> tuple[Decision, ...]:
        changed = {name: [row for row in self._rows(name) if row[1] != row[2]] for name in ORDER}
        return tuple(
            Decision(name, tuple((what, _worth(old), _worth(new)) for what, old, new in rows))
            for name, rows in changed.items()
            if rows
        )

    def _rows(self, name: str) -> Iterator[Row]:
        """What a decision sets, in both plans, equal or not."""
        both = [(pair.name, pair.old, pair.new) for pair in self.pairs if pair.old and pair.new]
        label = (lambda where: where) if len(self.pairs) > 1 else (lambda where: "")
        if name in ("workload", "slo"):
            old, new = (dict(_leaves(plan.request.get(name, {}))) for plan in self.plans)
            yield from ((key, old.get(key), new.get(key)) for key in sorted({*old, *new}))
            if name == "workload" and old == new:
                words = {False: "all of it", True: "as much as objectives allow"}
                yield "carried", words[self.full[0]], words[self.full[1]]
        elif name in ("prices", "machines"):
            used = {kind.replica.gpu for pair in self.pairs for kind in (pair.old, pair.new) if kind}
            view = _price if name == "prices" else _machine
            for a, b in self._twins:
                if a.gpu.name in used:
                    yield from (
                        (f"{a.gpu.name} {key}".strip(), view(a)[key], view(b)[key]) for key in view(a)
                    )
        elif name == "pools":
            mine, other = (side.keys() for side in self._shares)
            gone, come = (" + ".join(map(_pool, sorted(side))) for side in (mine - other, other - mine))
            yield "", gone or None, come or None
        elif name == "replicas":
            yield from ((label(p.name), _count(p.old), _count(p.new)) for p in self.pairs if p.kept)
        elif name == "traffic split":
            yield from self._split()
        elif name == "nodes":
            yield from ((label(where), *_places(a, b)) for where, a, b in both if self._moved(a, b))
        else:
            for where, old_kind, new_kind in both:
                yield label(where), _setting(old_kind, name), _setting(new_kind, name)

    # -- configurations ------------------------------------------------------------------

    def at(self, new: frozenset[str]) -> tuple[list[Engines], Request, bool]:
        """Engines, request, and whether they are as full as they may be, with the decisions named in `new` as
        in the new plan."""
        old, other = self.requests
        asked = {name: getattr(other if name in new else old, name) for name in ("workload", "slo")}
        request, full = old.changed(**asked), self.full["workload" in new]
        limited = (bool(own.slos()) or not most for most, own in zip(self.full, self.requests, strict=True))
        if full and not request.slos() and all(limited):
            raise Impossible("no objective limits the load")
        present = (item for item in (self._mixed(pair, new) for pair in self.pairs) if item.count)
        engines = self._sharing(list(present), new)
        return engines, request, full

    def _sharing(self, engines: Sequence[Engines], new: frozenset[str]) -> list[Engines]:
        """Pools take what they take in the plan that says so, however many engines they have now."""
        decided = "pools" if self._shares[0].keys() != self._shares[1].keys() else "traffic split"
        wanted = self._shares[decided in new]
        given: dict[Place, float] = {}
        for item in engines:
            given[item.place] = given.get(item.place, 0.0) + item.count * item.share
        if any(not 0 < share < math.inf for share in given.values()):
            raise Impossible("a pool takes no requests")
        return [replace(item, share=item.share / given[item.place] * wanted[item.place]) for item in engines]

    def _mixed(self, pair: Pair, new: frozenset[str]) -> Engines:
        """A kind with each setting from its own side. A kind of one plan only is itself on both sides, with
        no engines on the other."""
        number = "replicas" if pair.kept else "pools"
        if pair.old is not None and pair.new is not None:
            sides = pair.old, pair.new
            fields = {
                field: getattr(sides[name in new].replica, field)
                for name in _ENGINE
                for field in _FIELDS.get(name, (name,))
            }
            replica, count = pair.old.replica.model_copy(update=fields), sides[number in new].count
            share = _each(sides[("traffic split" if self._splits else number) in new])
            side = int(("gpu" if pair.old.replica.gpu != pair.new.replica.gpu else "nodes") in new)
            kind = sides[side]
        else:
            side = int(pair.old is None)
            only = pair.new if pair.old is None else pair.old
            assert only is not None
            kind = only
            replica, share = kind.replica, _each(kind)
            count = kind.count if (number in new) == bool(side) else 0
        served = pair.served["pools" in new] if pair.kept else kind.classes
        assert served is not None
        assert kind.group is not None
        return Engines((kind.role, served), replica, count, share, self._priced(kind.group, side, new))

    def _priced(self, group: Group, side: int, new: frozenset[str]) -> Group:
        """The group with price and machines of the sides that `new` says, where both inventories have it."""
        twin = next((t for t in self._twins if t[side].index == group.index), None)
        if twin is None:
            return group
        price = twin["prices" in new]
        return replace(twin["machines" in new], usd=price.usd, priced=price.priced)

    # -- parts ---------------------------------------------------------------------------

    @cached_property
    def _splits(self) -> bool:
        """Whether how the traffic is split is a decision of its own."""
        return any(decision.name == "traffic split" for decision in self.decisions)

    @cached_property
    def _shares(self) -> tuple[dict[Place, float], dict[Place, float]]:
        """Share of the requests that each pool of either plan takes."""
        found: tuple[dict[Place, float], dict[Place, float]] = ({}, {})
        for pair in self.pairs:
            for side, kind in zip(found, (pair.old, pair.new), strict=True):
                if kind is not None:
                    place = kind.role, kind.classes
                    side[place] = side.get(place, 0.0) + kind.share
        return found

    def _split(self) -> Iterator[Row]:
        """Shares of pools that both plans have, and of engines where those of a pool changed unlike."""
        old, new = self._shares
        if old.keys() == new.keys() and len(old) > 1:
            yield from ((_pool(place), _percent(old[place]), _percent(new[place])) for place in sorted(old))
        for pool in sorted({pair.pool for pair in self.pairs}):
            each = [
                (p.name, _each(p.old), _each(p.new)) for p in self.pairs if p.pool == pool and p.old and p.new
            ]
            factors = [b / a for _, a, b in each if a]
            if factors and max(factors) > min(factors) * (1 + 1e-6):
                yield from ((name, _percent(a), _percent(b)) for name, a, b in each)

    def _moved(self, old: Kind, new: Kind) -> bool:
        """Whether a kind went to other nodes with the same GPUs."""
        if old.group is None or new.group is None or old.replica.gpu != new.replica.gpu:
            return False
        return not any((old.group.index, new.group.index) == (a.index, b.index) for a, b in self._twins)


def _requests(old: Plan, new: Plan) -> tuple[Request, Request]:
    found, wrong = [], set()
    for plan in (old, new):
        try:
            found.append(make_request(plan.request))
        except PlancError as error:
            wrong.add(str(error))
    if wrong:
        raise Impossible("; ".join(sorted(wrong)))
    return found[0], found[1]


def _full(plan: Plan, request: Request) -> bool:
    """Whether a plan's engines carry the most that the objectives allow: the workload says "max", or asks for
    more than that."""
    if request.workload.concurrency is not None:
        return False
    rates = [c.request_rate for c in request.workload.classes if c.request_rate is not None]
    wanted, carried = request.workload.request_rate or sum(rates), plan.predicted.get("requests_s")
    short = carried is not None and wanted > carried.value * (1 + _SHORT)
    return request.workload.rate == "max" or short


def _twins(old: Sequence[Group], new: Sequence[Group]) -> list[tuple[Group, Group]]:
    """Node groups that are in both inventories: same GPU and name, else same place among that GPU's."""
    found = []
    for name in sorted({group.gpu.name for group in old} & {group.gpu.name for group in new}):
        mine = [group for group in old if group.gpu.name == name]
        other = [group for group in new if group.gpu.name == name]
        pairs = [(a, b) for a in mine for b in other if a.names[0] == b.names[0]]
        left = [a for a in mine if a not in (p[0] for p in pairs)]
        right = [b for b in other if b not in (p[1] for p in pairs)]
        pairs += zip(left, right, strict=False)
        found += sorted(pairs, key=lambda pair: sorted((pair[0].names[0], pair[1].names[0])))
    return found


def _price(group: Group) -> dict[str, Any]:
    return {"": group.usd}


def _machine(group: Group) -> dict[str, Any]:
    """What matters of nodes besides their GPUs and price."""
    network = group.fabric.inter_node_gbit_s
    return {
        "nodes": len(group.names),
        "GPUs per node": group.per_node,
        "network": "default" if network is None else f"{network:g} Gbit/s",
        "caches": ", ".join(f"{name} {gib:g} GiB" for name, gib, _ in group.stores) or "none",
    }


def _pool(place: Place) -> str:
    role, classes = place
    return f"{role} ({', '.join(classes)})" if classes else role


def _percent(share: float) -> str:
    return f"{100 * share:.4g} %"


def _places(old: Kind, new: Kind) -> tuple[str, str]:
    assert old.group is not None
    assert new.group is not None
    return old.group.names[0], new.group.names[0]


def _count(kind: Kind | None) -> int:
    return 0 if kind is None else kind.count


def _each(kind: Kind) -> float:
    return kind.share / kind.count


def _setting(kind: Kind, name: str) -> Any:
    """What a decision sets; of a pipeline also the layers of its stages."""
    value = getattr(kind.replica, name)
    stages = kind.replica.pipeline_layers
    return f"{value} ({'+'.join(map(str, stages))} layers)" if name == "pp" and len(stages) > 1 else value


def _worth(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, Mapping):
        return " ".join(f"{key}={_worth(item)}" for key, item in sorted(value.items())) or "none"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(path, value) of a tree's leaves; a list with one entry is that entry."""
    if isinstance(value, Mapping):
        for key in value:
            yield from _leaves(value[key], f"{path}.{key}" if path else str(key))
    elif isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
        for i, item in enumerate(value):
            yield from _leaves(item, path if len(value) == 1 else f"{path}[{i}]")
    else:
        yield path, value
