"""The difference of two plans, by meaning: what serves the model, how, what that will do, and why.

Pools and replicas are aligned by likeness (`diff_align`), layer classes and metrics by name, and with a cost
table each metric's change is shared out among the decisions (`diff_attribution`). Search statistics and
hashes are not differences. `diff(b, a)` is the mirror of `diff(a, b)`, and a plan has no difference from
itself.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from planc.cost_model.table import CostTable
from planc.planner.counterfactual import Impossible
from planc.planner.diff_align import Pair, aligned
from planc.planner.diff_attribution import Attribution, attribution
from planc.planner.plan import LayerPlan, Plan, Predicted

Direction = Literal["+", "-", "~"]
_MIRROR: Mapping[Direction, Direction] = {"+": "-", "-": "+", "~": "~"}

#: order in which sections are shown
SECTIONS = ("model", "request", "pools", "layers", "predicted", "solver", "coverage", "other")
#: parts of a plan that have a section of their own, or that say nothing about what it does
_TREATED = {
    *("model", "request", "pools", "layers", "predicted", "predicted_by_class", "simulated", "solver"),
    *("coverage", "planc_version", "schema_version", "fingerprint", "rejected"),
}


@dataclass(frozen=True, slots=True, order=True)
class Change:
    """One difference. `path` names the thing inside its section; `old` is None for "+", `new` for "-".

    ratio   new / old - 1 where both are numbers and old is not 0
    """

    section: str
    path: str
    kind: Direction
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
            return f"+ {name}: {shown(self.new)}"
        if self.kind == "-":
            return f"- {name}: {shown(self.old)}"
        share = f"  ({100 * self.ratio:+.3g} %)" if self.ratio is not None else ""
        return f"~ {name}: {shown(self.old)} -> {shown(self.new)}{share}"

    @property
    def is_detail(self) -> bool:
        """Whether it only follows another: bands and percentiles; or moved by less than 0.1 %."""
        follows = self.path.endswith((".low", ".high", ".source")) or ".percentiles." in self.path
        follows |= self.path.startswith(("simulated", "routing.compared", "routing.reason"))
        return follows or (self.ratio is not None and abs(self.ratio) < 1e-3)


@dataclass(frozen=True, slots=True)
class PlanDiff:
    """All changes, in the order of SECTIONS. True when there are any.

    pairs          kinds of replicas of both plans, aligned
    attribution    what each decision did to each metric; None where `unattributed` says why not
    """

    changes: tuple[Change, ...]
    pairs: tuple[Pair, ...] = ()
    attribution: Attribution | None = None
    unattributed: str = ""

    def __bool__(self) -> bool:
        return bool(self.changes)

    def section(self, name: str) -> tuple[Change, ...]:
        return tuple(change for change in self.changes if change.section == name)

    def mirrored(self) -> PlanDiff:
        """What `diff` gives with the plans swapped."""
        return PlanDiff(
            _ordered(change.mirrored() for change in self.changes),
            tuple(pair.mirrored() for pair in self.pairs),
            self.attribution.mirrored() if self.attribution is not None else None,
            self.unattributed,
        )

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
            "replicas": [
                {
                    "name": pair.name,
                    "old": pair.old.title() if pair.old else None,
                    "new": pair.new.title() if pair.new else None,
                }
                for pair in self.pairs
            ],
            "attribution": self.attribution.to_json() if self.attribution is not None else None,
            "unattributed": self.unattributed,
        }


def diff(old: Plan, new: Plan, table: CostTable | None = None, *, without: str = "") -> PlanDiff:
    """What changed from one plan to the other.

    table     of the model that both serve: with it changes are attributed to decisions
    without   why there is no table
    """
    pairs = aligned(old, new)
    changes = _ordered(
        change
        for part in (
            _values("model", "", old.model.model_dump(), new.model.model_dump()),
            _values("request", "", old.request, new.request),
            _pools(old, new, pairs),
            _layers(old.layers, new.layers),
            _predictions(old, new),
            _solver(old, new),
            _named("coverage", "modelled", old.coverage.modelled, new.coverage.modelled),
            _named("coverage", "not modelled", old.coverage.not_modelled, new.coverage.not_modelled),
            _values("other", "", *(plan.model_dump(mode="json", exclude=_TREATED) for plan in (old, new))),
        )
        for change in part
    )
    if not changes:
        return PlanDiff((), pairs)
    found, reason = _attributed(old, new, table, without)
    return PlanDiff(changes, pairs, found, reason)


def same_model(old: Plan, new: Plan) -> bool:
    """Whether both plans serve one model, however it was traced."""
    key = lambda plan: (plan.model.name, plan.model.architecture, plan.model.parameters)  # noqa: E731
    return bool(key(old) == key(new))


def _attributed(
    old: Plan, new: Plan, table: CostTable | None, without: str
) -> tuple[Attribution | None, str]:
    """The attribution, or why there is none."""
    if not same_model(old, new):
        return None, "the plans serve different models"
    if table is None:
        return None, without or "no cost table was given"
    try:
        return attribution(old, new, table), ""
    except Impossible as error:
        return None, str(error)


def _ordered(changes: Iterable[Change]) -> tuple[Change, ...]:
    key = lambda c: (SECTIONS.index(c.section), c.path, {"-": 0, "~": 0, "+": 0}[c.kind], _text(c))  # noqa: E731
    return tuple(sorted(changes, key=key))


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


def _named(section: str, path: str, old: Iterable[str], new: Iterable[str]) -> Iterator[Change]:
    """Entries of two sets of names."""
    for name in sorted({*old} - {*new}):
        yield Change(section, path, "-", name, None)
    for name in sorted({*new} - {*old}):
        yield Change(section, path, "+", None, name)


# -- sections ----------------------------------------------------------------------------


def _pools(old: Plan, new: Plan, pairs: Iterable[Pair]) -> Iterator[Change]:
    for pair in pairs:
        a, b = pair.old, pair.new
        if a is None or b is None:
            if a is not None:
                yield Change("pools", pair.pool, "-", a.title(), None)
            if b is not None:
                yield Change("pools", pair.pool, "+", None, b.title())
            continue
        yield from _values("pools", f"{pair.name}.classes", list(a.classes), list(b.classes))
        yield from _values("pools", f"{pair.name}.replicas", a.count, b.count)
        yield from _values("pools", f"{pair.name}.traffic share", a.share, b.share)
        yield from _values("pools", pair.name, a.settings, b.settings)
        for field in ("cuda_graph_sizes", "memory"):
            before, after = (k.replica.model_dump()[field] for k in (a, b))
            yield from _values("pools", f"{pair.name}.{field}", before, after)
    before, after = ({gpu for replica in plan.replicas() for gpu in replica.gpus} for plan in (old, new))
    if before != after:
        yield from _values("pools", "GPUs used", len(before), len(after))
        if before - after:
            yield Change("pools", "GPUs", "-", _places(before - after), None)
        if after - before:
            yield Change("pools", "GPUs", "+", None, _places(after - before))


def _places(gpus: Iterable[str]) -> list[str]:
    """ "node/index" names by node and number."""
    split = ((gpu.rpartition("/"), gpu) for gpu in gpus)
    return [gpu for _, gpu in sorted(((node, len(index), index), gpu) for (node, _, index), gpu in split)]


def _layers(old: list[LayerPlan], new: list[LayerPlan]) -> Iterator[Change]:
    mine, other = ({layer.layer_class: layer for layer in layers} for layers in (old, new))
    for name in sorted({*mine, *other}):
        if name not in other:
            yield Change("layers", name, "-", f"{mine[name].count} layers", None)
        elif name not in mine:
            yield Change("layers", name, "+", None, f"{other[name].count} layers")
        else:
            a, b = (side[name].model_dump(exclude={"layer_class"}) for side in (mine, other))
            made = a.pop("decisions"), b.pop("decisions")
            yield from _named("layers", f"{name}.fusions", made[0].pop("fusions"), made[1].pop("fusions"))
            yield from _values("layers", name, a | made[0], b | made[1])


def _predictions(old: Plan, new: Plan) -> Iterator[Change]:
    yield from _predicted("", old.predicted, new.predicted)
    for name in sorted({*old.predicted_by_class} & {*new.predicted_by_class}):
        yield from _predicted(f"{name}: ", old.predicted_by_class[name], new.predicted_by_class[name])
    yield from _values("predicted", "simulated", old.simulated, new.simulated)


def _predicted(prefix: str, old: Mapping[str, Predicted], new: Mapping[str, Predicted]) -> Iterator[Change]:
    for name in sorted({*old, *new}):
        path = prefix + name
        if name not in new:
            yield Change("predicted", path, "-", old[name].value, None)
        elif name not in old:
            yield Change("predicted", path, "+", None, new[name].value)
        else:
            a, b = old[name].model_dump(), new[name].model_dump()
            yield from _values("predicted", path, a.pop("value"), b.pop("value"))
            yield from _values("predicted", path, a, b)


def _solver(old: Plan, new: Plan) -> Iterator[Change]:
    for name in ("objective", "status", "value", "gap"):
        yield from _values("solver", name, getattr(old.solver, name), getattr(new.solver, name))
    for name in ("model", "profile"):
        before, after = getattr(old.fingerprint, name), getattr(new.fingerprint, name)
        yield from _values("solver", f"{name} fingerprint", before, after)
    yield from _values("solver", "planc_version", old.planc_version, new.planc_version)


def shown(value: Any) -> str:
    """A value in one line."""
    if isinstance(value, float):
        return f"{value:.5g}"
    if isinstance(value, list) and len(value) > 8:
        return f"[{shown(value[0])} .. {shown(value[-1])}, {len(value)} entries]"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(shown(item) for item in value) + "]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {shown(item)}" for key, item in value.items()) + "}"
    return str(value)
