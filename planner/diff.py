"""The difference of two plans, by meaning: what serves the model, how, and what that will do.

Pools are aligned by role, replicas by likeness (identical ones are one kind with a count), layer
classes and metrics by name. Search statistics and hashes are not differences. `diff(b, a)` is the
mirror of `diff(a, b)`, and a plan has no difference from itself.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from planc.planner.plan import LayerPlan, Plan, Pool, Predicted, Replica

Kind = Literal["+", "-", "~"]
_MIRROR: Mapping[Kind, Kind] = {"+": "-", "-": "+", "~": "~"}

#: order in which sections are shown
SECTIONS = ("model", "request", "pools", "layers", "predicted", "solver", "coverage")
_SETTINGS = tuple(
    name
    for name in Replica.model_fields
    if name not in ("gpus", "traffic_share", "memory", "cuda_graph_sizes")
)


@dataclass(frozen=True, slots=True, order=True)
class Change:
    """One difference. `path` names the thing inside its section; `old` is None for "+", `new` for "-".

    ratio   new / old - 1 where both are numbers and old is not 0
    """

    section: str
    path: str
    kind: Kind
    old: Any = None
    new: Any = None

    @property
    def ratio(self) -> float | None:
        numbers = isinstance(self.old, int | float) and isinstance(self.new, int | float)
        return self.new / self.old - 1 if numbers and self.old else None

    def mirrored(self) -> Change:
        return Change(self.section, self.path, _MIRROR[self.kind], self.new, self.old)

    def text(self) -> str:
        """One line, first character "+", "-" or "~"."""
        name = f"{self.section}.{self.path}" if self.path else self.section
        if self.kind == "+":
            return f"+ {name}: {_shown(self.new)}"
        if self.kind == "-":
            return f"- {name}: {_shown(self.old)}"
        share = f"  ({100 * self.ratio:+.3g} %)" if self.ratio is not None else ""
        return f"~ {name}: {_shown(self.old)} -> {_shown(self.new)}{share}"


@dataclass(frozen=True, slots=True)
class PlanDiff:
    """All changes, in the order of SECTIONS. True when there are any."""

    changes: tuple[Change, ...]

    def __bool__(self) -> bool:
        return bool(self.changes)

    def section(self, name: str) -> tuple[Change, ...]:
        return tuple(change for change in self.changes if change.section == name)

    def mirrored(self) -> PlanDiff:
        """What `diff` gives with the plans swapped."""
        return _ordered(change.mirrored() for change in self.changes)

    def lines(self) -> list[str]:
        """Plain text, one line per change."""
        return [change.text() for change in self.changes] or ["the plans do not differ"]

    def to_json(self) -> dict[str, Any]:
        return {
            "differs": bool(self),
            "changes": [
                {
                    "section": c.section,
                    "path": c.path,
                    "kind": {"+": "added", "-": "removed", "~": "changed"}[c.kind],
                    "old": c.old,
                    "new": c.new,
                    "ratio": c.ratio,
                    "text": c.text(),
                }
                for c in self.changes
            ],
        }


def diff(old: Plan, new: Plan) -> PlanDiff:
    """What changed from one plan to the other."""
    return _ordered(
        change
        for part in (
            _values("model", "", old.model.model_dump(), new.model.model_dump()),
            _values("request", "", old.request, new.request),
            _pools(old, new),
            _layers(old.layers, new.layers),
            _predicted(old.predicted, new.predicted),
            _solver(old, new),
            _named("coverage", "modelled", old.coverage.modelled, new.coverage.modelled),
            _named("coverage", "not modelled", old.coverage.not_modelled, new.coverage.not_modelled),
        )
        for change in part
    )


def _ordered(changes: Iterator[Change]) -> PlanDiff:
    key = lambda c: (SECTIONS.index(c.section), c.path, {"-": 0, "~": 0, "+": 0}[c.kind], _text(c))  # noqa: E731
    return PlanDiff(tuple(sorted(changes, key=key)))


def _text(change: Change) -> str:
    """A tie-break that does not depend on the direction."""
    return "|".join(sorted((json.dumps(change.old, sort_keys=True), json.dumps(change.new, sort_keys=True))))


# -- generic parts -----------------------------------------------------------------------


def _values(section: str, path: str, old: Any, new: Any) -> Iterator[Change]:
    """Leaves of two trees. Mappings and lists of mappings are entered, other lists compared whole."""
    if _same(old, new):
        return
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in sorted({*old, *new}):
            inner = f"{path}.{key}" if path else str(key)
            if key not in old:
                yield Change(section, inner, "+", None, new[key])
            elif key not in new:
                yield Change(section, inner, "-", old[key], None)
            else:
                yield from _values(section, inner, old[key], new[key])
    elif _rows(old) and _rows(new):
        for i in range(max(len(old), len(new))):
            inner = f"{path}[{i}]"
            if i >= len(old):
                yield Change(section, inner, "+", None, new[i])
            elif i >= len(new):
                yield Change(section, inner, "-", old[i], None)
            else:
                yield from _values(section, inner, old[i], new[i])
    else:
        yield Change(section, path, "~", old, new)


def _rows(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, Mapping) for item in value)


def _same(old: Any, new: Any) -> bool:
    """Equal, numbers to the nine digits that a saved plan keeps."""
    if isinstance(old, float) or isinstance(new, float):
        number = isinstance(old, int | float) and isinstance(new, int | float)
        return number and math.isclose(old, new, rel_tol=1e-8)
    return bool(old == new)


def _named(section: str, path: str, old: list[str], new: list[str]) -> Iterator[Change]:
    """Entries of two sets of names."""
    for name in sorted({*old} - {*new}):
        yield Change(section, path, "-", name, None)
    for name in sorted({*new} - {*old}):
        yield Change(section, path, "+", None, name)


# -- pools -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Engines:
    """Replicas of a pool that differ in nothing but their GPUs."""

    replica: Replica
    count: int
    share: float

    @property
    def settings(self) -> dict[str, Any]:
        return {name: getattr(self.replica, name) for name in _SETTINGS}

    @property
    def key(self) -> str:
        return json.dumps([self.settings, self.count], sort_keys=True, default=str)

    def title(self) -> str:
        r = self.replica
        degrees = " ".join(
            f"{n}={getattr(r, n)}" for n in ("tp", "pp", "dp", "ep", "cp") if getattr(r, n) > 1
        )
        return (
            f"{self.count} x {r.engine} on {r.tp * r.pp * r.dp * r.cp} {r.gpu}"
            f"{' ' + degrees if degrees else ''}, {r.weights}/{r.activations}/{r.kv}"
        )


def _pools(old: Plan, new: Plan) -> Iterator[Change]:
    mine, other = ({pool.role: pool for pool in plan.pools} for plan in (old, new))
    for role in sorted({*mine, *other}):
        if role not in other:
            yield from (Change("pools", role, "-", kind.title(), None) for kind in _kinds(mine[role]))
        elif role not in mine:
            yield from (Change("pools", role, "+", None, kind.title()) for kind in _kinds(other[role]))
        else:
            yield from _pool(role, mine[role], other[role])
    before, after = ({gpu for replica in plan.replicas() for gpu in replica.gpus} for plan in (old, new))
    if before != after:
        yield Change("pools", "GPUs used", "~", len(before), len(after))
        yield from _named("pools", "GPU", sorted(before), sorted(after))


def _kinds(pool: Pool) -> list[_Engines]:
    found: dict[str, list[Replica]] = {}
    for replica in pool.replicas:
        found.setdefault(replica.model_dump_json(exclude={"gpus", "traffic_share"}), []).append(replica)
    return [_Engines(same[0], len(same), sum(r.traffic_share for r in same)) for same in found.values()]


def _pool(role: str, old: Pool, new: Pool) -> Iterator[Change]:
    before, after = _kinds(old), _kinds(new)
    pairs = _matched(before, after)
    several = len(pairs) > 1 or len(before) > 1 or len(after) > 1
    for number, (a, b) in enumerate(pairs):
        path = f"{role}[{number}]" if several else role
        yield from _values("pools", f"{path}.replicas", a.count, b.count)
        yield from _values("pools", f"{path}.traffic share", a.share, b.share)
        yield from _values("pools", path, a.settings, b.settings)
        yield from _values(
            "pools", f"{path}.cuda_graph_sizes", a.replica.cuda_graph_sizes, b.replica.cuda_graph_sizes
        )
        yield from _values(
            "pools", f"{path}.memory", a.replica.memory.model_dump(), b.replica.memory.model_dump()
        )
    taken = {id(a) for a, _ in pairs} | {id(b) for _, b in pairs}
    yield from (Change("pools", role, "-", a.title(), None) for a in before if id(a) not in taken)
    yield from (Change("pools", role, "+", None, b.title()) for b in after if id(b) not in taken)


def _matched(before: list[_Engines], after: list[_Engines]) -> list[tuple[_Engines, _Engines]]:
    """Pairs by likeness, best first; the order does not depend on the direction."""
    ranked = sorted(
        ((_likeness(a, b), tuple(sorted((a.key, b.key))), a, b) for a in before for b in after),
        key=lambda item: (-item[0], item[1]),
    )
    used: set[int] = set()
    pairs = []
    for _, _, a, b in ranked:
        if id(a) not in used and id(b) not in used:
            used |= {id(a), id(b)}
            pairs.append((a, b))
    return pairs


def _likeness(a: _Engines, b: _Engines) -> float:
    """Equal settings; where it runs and how it is cut weigh most."""
    weights = {"gpu": 8, "engine": 8, "tp": 4, "pp": 4, "dp": 4, "ep": 4, "weights": 2, "kv": 2}
    mine, other = a.settings, b.settings
    return sum(weights.get(name, 1) for name in _SETTINGS if mine[name] == other[name]) + 0.5 * (
        a.count == b.count
    )


# -- layers, metrics, solver ---------------------------------------------------------------


def _layers(old: list[LayerPlan], new: list[LayerPlan]) -> Iterator[Change]:
    mine, other = ({layer.layer_class: layer for layer in layers} for layers in (old, new))
    for name in sorted({*mine, *other}):
        if name not in other:
            yield Change("layers", name, "-", f"{mine[name].count} layers", None)
        elif name not in mine:
            yield Change("layers", name, "+", None, f"{other[name].count} layers")
        else:
            a, b = mine[name].decisions, other[name].decisions
            yield from _values("layers", f"{name}.count", mine[name].count, other[name].count)
            yield from _values("layers", f"{name}.format", a.format, b.format)
            yield from _values("layers", f"{name}.sharding", a.sharding, b.sharding)
            yield from _values("layers", f"{name}.kernel", a.kernel, b.kernel)
            yield from _named("layers", f"{name}.fusions", a.fusions, b.fusions)


def _predicted(old: Mapping[str, Predicted], new: Mapping[str, Predicted]) -> Iterator[Change]:
    for name in sorted({*old, *new}):
        if name not in new:
            yield Change("predicted", name, "-", old[name].value, None)
        elif name not in old:
            yield Change("predicted", name, "+", None, new[name].value)
        else:
            a, b = old[name], new[name]
            yield from _values("predicted", name, a.value, b.value)
            yield from _values("predicted", f"{name}.percentiles", a.percentiles, b.percentiles)
            for end in ("low", "high"):
                yield from _values("predicted", f"{name}.{end}", getattr(a, end), getattr(b, end))
            yield from _values("predicted", f"{name}.source", a.source, b.source)


def _solver(old: Plan, new: Plan) -> Iterator[Change]:
    for name in ("objective", "status", "value", "gap"):
        yield from _values("solver", name, getattr(old.solver, name), getattr(new.solver, name))
    for name in ("model", "profile"):
        before, after = getattr(old.fingerprint, name), getattr(new.fingerprint, name)
        yield from _values("solver", f"{name} fingerprint", before, after)
    yield from _values("solver", "planc_version", old.planc_version, new.planc_version)


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.5g}"
    if isinstance(value, list) and len(value) > 8:
        return f"[{_shown(value[0])} .. {_shown(value[-1])}, {len(value)} entries]"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_shown(item) for item in value) + "]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_shown(item)}" for key, item in value.items()) + "}"
    return str(value)
