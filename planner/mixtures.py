"""Formats that differ between the parts of a model: the best assignments under an accuracy budget.

What an assignment takes (time of a step, bytes) and what it loses are sums over the parts, so the best one
of every loss is found exactly, part by part: `front` keeps, of all assignments of the parts so far, those
that no other beats in both. The engines made of them are then priced like any others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from planc.cost_model.catalogue import EngineProfile
from planc.cost_model.features import Array
from planc.cost_model.formats import fmt
from planc.cost_model.kernels import Attention
from planc.cost_model.parts import KV, Exceptions, Held, Part, module_of, scheme
from planc.cost_model.shape import EngineShape, refusals
from planc.cost_model.step import StepLoad, StepModel
from planc.planner.formats import Accuracy, Formats
from planc.planner.inventory import Group

#: steps that assignments are ranked by: decode at four batches, prompts, and both as in four tokens in for
#: one out; bytes of weights and of a cache of this many tokens come last
_CONTEXT = 2000
_DECODE = (1, 16, 64, 256)
_PROMPT = 4096
_CACHED = 64 * _CONTEXT

_LOADS = StepLoad([*_DECODE, 0], _CONTEXT, [*[0] * len(_DECODE), _PROMPT], [*[0] * len(_DECODE), 1])

#: ways to cut an engine that are looked at, and mixed assignments that are tried, per engine and GPU
_CUTS, MOST = 3, 4

#: share of a step that a mixture must save to be tried: it needs a checkpoint of its own
GAIN = 0.02

#: losses closer than this are the same: sums of shares are not exact
_SAME, _DIGITS = 1e-12, 12


@dataclass(frozen=True, slots=True)
class Choice:
    """One scheme of one part: what it takes and what it loses."""

    scheme: str
    cost: float
    drop: float


@dataclass(frozen=True, slots=True)
class Assignment:
    """A scheme for every part, in the parts' order."""

    schemes: tuple[str, ...]
    cost: float
    drop: float


def front(parts: Sequence[Sequence[Choice]], budget: float) -> list[Assignment]:
    """The assignments within the budget that no other beats in both cost and drop, by rising drop.

    Exact: a partial assignment that another beats in both cannot be part of a better whole. Of equal ones
    that stays in which earlier parts take earlier choices.
    """
    costs, drops = np.zeros(1), np.zeros(1)
    picks = np.zeros((1, 0), dtype=np.int16)
    for choices in parts:
        count = len(choices)
        costs = (costs[:, None] + np.array([choice.cost for choice in choices])).ravel()
        drops = (drops[:, None] + np.array([choice.drop for choice in choices])).ravel()
        picks = np.column_stack([np.repeat(picks, count, axis=0), np.tile(np.arange(count), len(picks))])
        cost, drop = np.round(costs / costs.max(initial=1e-300), _DIGITS), np.round(drops, _DIGITS)
        order = np.lexsort((np.arange(costs.size), cost, drop))
        order = order[drops[order] <= budget + _SAME]
        least = np.minimum.accumulate(cost[order])
        keep = order[np.concatenate([[True], cost[order][1:] < least[:-1]])[: order.size]]
        costs, drops, picks = costs[keep], drops[keep], picks[keep]
    return [
        Assignment(tuple(choices[pick].scheme for choices, pick in zip(parts, row, strict=True)), cost, drop)
        for row, cost, drop in zip(picks, costs.tolist(), drops.tolist(), strict=True)
    ]


def mixtures(
    accuracy: Accuracy,
    group: Group,
    profile: EngineProfile,
    cuts: Iterable[EngineShape],
    schemes: Sequence[tuple[str, str]],
    caches: Sequence[str],
    budget: float,
) -> list[tuple[Formats, Exceptions]]:
    """Mixed assignments worth trying: for some of the ways to cut an engine (shapes whose formats do not
    matter) the best within the budget in each kind of step and in bytes; of these the ones that are best
    most often. None where one format throughout is as good."""
    found: Counter[tuple[str, ...]] = Counter()
    for shape in _some(list(dict.fromkeys(replace(cut, pp=1) for cut in cuts))):
        for choices in choices_of(accuracy, shape, group, profile, schemes, caches):
            best = front(choices, budget)
            if best and best[-1].cost < (1 - GAIN) * _uniform(accuracy.parts, choices, budget):
                found[best[-1].schemes] += 1
    made = dict.fromkeys(assigned(accuracy.parts, names) for names, _ in found.most_common())
    return [one for one in made if one[1]][:MOST]


def choices_of(
    accuracy: Accuracy,
    shape: EngineShape,
    group: Group,
    profile: EngineProfile,
    schemes: Sequence[tuple[str, str]],
    caches: Sequence[str],
) -> list[list[list[Choice]]]:
    """For each thing that assignments are ranked by: the choices of every part, for an engine cut like
    `shape` (whose formats do not matter)."""
    matrices = {
        f"{w}/{a}": replace(shape, weights=w, activations=a, kv="bf16", formats=()) for w, a in schemes
    }
    first = next(iter(matrices.values()))
    takes = {**matrices, **{kv: replace(first, kv=kv) for kv in caches}}
    table, gpu = accuracy.table, group.gpu
    priced: dict[EngineShape, dict[Part, list[float]]] = {}
    costs = {}
    for name, one in takes.items():
        if one not in priced and not refusals(one, table, gpu, profile):
            priced[one] = _costs(accuracy.parts, StepModel(table, one, gpu, group.fabric, profile))
        if one in priced:
            costs[name] = priced[one]
    found = []
    for rank in range(len(_DECODE) + 3):
        rows = [
            [
                Choice(name, costs[name][part.part][rank], accuracy.of_part(part, name))
                for name in (caches if part.cached else matrices)
                if name in costs
            ]
            for part in accuracy.parts
        ]
        if all(rows):
            found.append(rows)
    return found


def _uniform(parts: Sequence[Held], choices: Sequence[Sequence[Choice]], budget: float) -> float:
    """The least cost of one scheme for all matrices and one format for all caches."""
    totals: dict[bool, dict[str, tuple[float, float]]] = {False: {}, True: {}}
    for part, row in zip(parts, choices, strict=True):
        for choice in row:
            cost, drop = totals[part.cached].get(choice.scheme, (0.0, 0.0))
            totals[part.cached][choice.scheme] = cost + choice.cost, drop + choice.drop
    matrices, caches = (list(totals[cached].values()) or [(0.0, 0.0)] for cached in (False, True))
    within = [a + b for a, lost in matrices for b, more in caches if lost + more <= budget + _SAME]
    return min(within, default=np.inf)


def assigned(parts: Sequence[Held], schemes: Sequence[str]) -> tuple[Formats, Exceptions]:
    """An assignment as an engine shape says it: the formats that most elements have, and the exceptions.
    Bands of a class that take the same are named together."""
    weights, activations = scheme(_most(parts, schemes, cached=False) or "bf16/bf16")
    kv = _most(parts, schemes, cached=True) or "bf16"
    usual = {True: kv, False: f"{weights}/{activations}"}
    bands: dict[tuple[str, str, str], list[int]] = {}
    for part, name in zip(parts, schemes, strict=True):
        if name != usual[part.cached]:
            bands.setdefault((part.layer_class, part.module, name), []).extend(part.layers)
    exceptions = []
    for (layer_class, module, name), layers in bands.items():
        held = sum(p.count for p in parts if (p.layer_class, p.module) == (layer_class, module))
        named = () if len(layers) == held else tuple(sorted(layers))
        exceptions.append((str(Part(layer_class, module, named)), name))
    return (weights, activations, kv), tuple(sorted(exceptions))


def _most(parts: Sequence[Held], schemes: Sequence[str], *, cached: bool) -> str | None:
    elements: Counter[str] = Counter()
    for part, name in zip(parts, schemes, strict=True):
        if part.cached == cached:
            elements[name] += part.whole
    return min(elements, key=lambda name: (-elements[name], name)) if elements else None


def _some(cuts: Sequence[EngineShape]) -> list[EngineShape]:
    """At most `_CUTS` of them, spread evenly."""
    if len(cuts) <= _CUTS:
        return list(cuts)
    return [cuts[round(i * (len(cuts) - 1) / (_CUTS - 1))] for i in range(_CUTS)]


def _costs(parts: Sequence[Held], model: StepModel) -> dict[Part, list[float]]:
    """What each part takes in a model of one format throughout, per thing that assignments are ranked by."""
    seconds: dict[tuple[str, str], Array] = {}
    for kernel, each in model.kernel_seconds(_LOADS):
        cached = isinstance(kernel.spec, Attention)
        key = kernel.layer_class, KV if cached else module_of(kernel.sites[0], kernel.family)
        seconds[key] = seconds.get(key, 0.0) + each
    counts = {cls.name: cls.count for cls in model.table.classes}
    found = {}
    for part in parts:
        share = part.count / counts[part.layer_class]
        steps = list(seconds.get((part.layer_class, part.module), np.zeros(_LOADS.arrays().size)) * share)
        balanced = steps[2] / _DECODE[2] + 4 * steps[-1] / _PROMPT
        found[part.part] = [*steps, balanced, _bytes(part, model.shape)]
    return found


def _bytes(part: Held, shape: EngineShape) -> float:
    if part.cached:
        return part.whole * fmt(shape.kv).bytes * _CACHED
    weights = fmt(shape.weights)
    return part.whole * (weights if part.family in weights.families else fmt("bf16")).bytes
