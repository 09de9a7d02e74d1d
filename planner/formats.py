"""Which number formats an engine may use, and how much accuracy they cost a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from planc.cost_model.catalogue import EngineProfile
from planc.cost_model.formats import fmt
from planc.cost_model.parts import Exceptions, Held, Part, banded, held, scheme, taken
from planc.cost_model.sensitivities import Sensitivities, load
from planc.cost_model.table import CostTable
from planc.planner.inventory import Group
from planc.planner.request import Constraints, Request

#: layers from which on the first and last quarter of a class are told apart from those between
_HALVED = 8

#: weights, activations, kv
Formats = tuple[str, str, str]


def allowed(
    table: CostTable, group: Group, profile: EngineProfile, limits: Constraints
) -> tuple[list[tuple[str, str]], list[str]]:
    """((weights, activations) pairs, cache formats) that run on the group's GPU and may be used.

    Without a list: the checkpoint's own weight format and the plain cache; with max_accuracy_drop
    also every narrower format (the budget is checked later, so that it can be counted).
    """
    native = table.model.native_format
    pairs = profile.pairs(group.gpu)
    runs_native = any(weights == native for weights, _ in pairs)
    widest = "fp32" if native == "fp32" else "bf16"
    base = native if runs_native else widest
    open_budget = limits.max_accuracy_drop is not None

    def weights_ok(name: str) -> bool:
        if limits.weights is not None:
            return name in limits.weights
        return name == base or (open_budget and fmt(name).bits < fmt(base).bits)

    def kv_ok(name: str) -> bool:
        if limits.kv is not None:
            return name in limits.kv
        plain = "fp32" if base == "fp32" else "bf16"
        return name == plain or (open_budget and fmt(name).bits < 16)

    kinds = list(profile.kv_formats(group.gpu))
    caches = [kv for kv in kinds if kv_ok(kv)] if table.kv_elements_per_token() else kinds[:1]
    return [
        (weights, activations)
        for weights, activations in pairs
        if weights_ok(weights) and (limits.activations is None or activations in limits.activations)
    ], caches


def accuracy_drop(native: str, weights: str, activations: str, kv: str) -> float:
    """Relative loss of the average task score against the published checkpoint: published averages
    per format, added up (`assumed` in the catalogue). The native format and wider ones lose nothing."""
    drop = 0.0
    narrower = weights != native and fmt(weights).bits < fmt(native).bits
    if narrower:
        drop += fmt(weights).accuracy_drop.value
    if activations not in (weights, native) and fmt(activations).bits < 16 and weights != native:
        drop += fmt(activations).accuracy_drop.value
    cache = fmt(kv)
    if cache.bits < 16 and cache.kv_accuracy_drop is not None:
        drop += cache.kv_accuracy_drop.value
    return drop


def accuracy(request: Request, table: CostTable) -> Accuracy:
    """What formats cost this model, by the sensitivities that the request names. Raises FileMissing,
    FileUnreadable, or InvalidField for a file of another model."""
    name = request.constraints.sensitivities
    if name is None:
        return Accuracy(table)
    found = load(request.path(name))
    found.check(table, where=f"sensitivities '{name}'")
    return Accuracy(table, found)


@dataclass(frozen=True)
class Accuracy:
    """What formats cost one model: the loss of everything in a scheme, shared out over the parts.

    Of a part it is the scheme's loss (published averages, or what `measured` states) times the part's share:
    of the divergence where that was measured on every part, else of the parameters that a token meets. The
    loss of a mixed assignment is the sum over its parts, as if their errors were independent.
    """

    table: CostTable
    measured: Sensitivities | None = None

    @cached_property
    def parts(self) -> tuple[Held, ...]:
        """The parts whose formats are decided one by one: all modules of all layer classes, in the bands of
        layers that were measured, else with the outer half of the layers apart from the inner one. No matrix
        lies in two. What comes first stays wide where two are as good."""
        named: dict[tuple[str, str], set[tuple[int, ...]]] = {}
        for entry in self.measured.parts if self.measured else ():
            where = entry.where
            if where.layers:
                named.setdefault((where.layer_class, where.module), set()).add(where.layers)
        found = []
        for part in held(self.table):
            layers = self._layers[part.layer_class]
            bands = sorted(named.get((part.layer_class, part.module), ()))
            if self.measured is None and not part.cached and len(layers) >= _HALVED:
                quarter = len(layers) // 4
                bands = [(*layers[:quarter], *layers[-quarter:])]
            known = {layer for band in bands for layer in band}
            rest = tuple(layer for layer in layers if layer not in known)
            if bands and rest:
                bands.append(rest)
            found += [replace(part, layers=band, count=len(band)) for band in bands] or [part]
        return tuple(found)

    def uniform(self, formats: Formats) -> float:
        """What everything in the same formats loses."""
        weights, activations, kv = formats
        native, stated = self.table.model.native_format, self._stated(f"{weights}/{activations}")
        if stated is None:
            return accuracy_drop(native, weights, activations, kv)
        return stated + accuracy_drop(native, native, native, kv)

    def of(self, formats: Formats, exceptions: Exceptions) -> float:
        """What an engine loses with these formats, but for the exceptions."""
        if not exceptions:
            return self.uniform(formats)
        weights, activations, kv = formats
        total = 0.0
        for part in self.parts:
            usual = kv if part.cached else f"{weights}/{activations}"
            for layer in part.layers or self._layers[part.layer_class] or (None,):
                band = banded(part.layer_class, () if layer is None else (layer,))
                given = taken(exceptions, band, part.module) or usual
                total += self.of_part(part, given) / part.count
        return total

    def of_part(self, part: Held, name: str) -> float:
        """What one of `parts` loses in a scheme (a cache in a format)."""
        native = self.table.model.native_format
        if part.cached:
            return accuracy_drop(native, native, native, name) * self._share(part, name)
        stated = self._stated(name)
        whole = accuracy_drop(native, *scheme(name), "bf16") if stated is None else stated
        return whole * self._share(part, name)

    def _share(self, part: Held, name: str) -> float:
        divergence = {} if part.cached else self._divergences.get(name, {})
        if divergence:
            return divergence.get(part.part, 0.0) / sum(divergence.values())
        if not takes(part, name):
            return 0.0
        alike = [p for p in self.parts if p.cached == part.cached and takes(p, name)]
        return part.count * part.active / sum(p.count * p.active for p in alike)

    def _stated(self, name: str) -> float | None:
        return self.measured.drops.get(name) if self.measured else None

    @cached_property
    def _layers(self) -> Mapping[str, tuple[int, ...]]:
        return {cls.name: cls.layers for cls in self.table.classes}

    @cached_property
    def _divergences(self) -> Mapping[str, Mapping[Part, float]]:
        """Scheme -> part -> divergence, of schemes that were measured on every part that takes them."""
        found: dict[str, dict[Part, float]] = {}
        for entry in self.measured.parts if self.measured else ():
            found.setdefault(entry.scheme, {})[entry.where] = entry.kl
        matrices = [part for part in self.parts if not part.cached]
        return {
            name: mine
            for name, mine in found.items()
            if all(part.part in mine for part in matrices if takes(part, name)) and sum(mine.values()) > 0
        }


def takes(part: Held, name: str) -> bool:
    """Whether a part can take a scheme at all (routed experts alone take mxfp4)."""
    return part.cached or part.family in fmt(scheme(name)[0]).families
