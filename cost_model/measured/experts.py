"""Routed experts from measured tables.

A table holds the shapes that one engine was timed at in one format: for each, the residual of
`planc.cost_model.experts.curve` by tokens, with constants that were fitted to the whole table. A shape
that was timed keeps its own residual; another one takes those of the nearest shapes (of as wide a model
above all), weighted by ordinary kriging over distances in logarithms.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache

import numpy as np
import numpy.typing as npt

from planc.cost_model.catalogue import EngineProfile, Gpu, Provenance, read
from planc.cost_model.experts import Curve, ExpertKernel, curve, stack
from planc.cost_model.features import Array
from planc.cost_model.kernels import GroupedGemm, Priced, Times
from planc.cost_model.profile import Profile, Table, shipped
from planc.cost_model.roofline import Roofline
from planc.cost_model.routing import TOKENS

#: what tells shapes apart, and how far a factor of e in it puts them; the model's own sizes weigh most
SHAPE: Mapping[str, float] = {"hidden": 4.0, "inner": 1.0, "experts": 1.0, "total": 4.0, "top_k": 4.0}

_NEIGHBOURS = 40
_REACH = 3.0  # distance over which residuals forget each other (Matern covariance, once differentiable)
_NOISE = 0.05  # variance of a row's own, as a share of all
_SAME = 0.02  # distance under which a shape was timed itself
_WORSE = 0.1


def prepare(
    specs: Sequence[GroupedGemm], gpu: Gpu, engine: EngineProfile, roofline: Roofline
) -> Callable[[Array], Times]:
    """The rows that the engine's profile names, else its own, else those of another engine on this GPU, else
    the roofline."""
    curves: list[Curve] = []
    sources: list[Provenance] = []
    profile = shipped("experts", gpu.name)
    for spec in specs:
        table = None
        if profile is not None:
            table = _named(profile, engine) or find(profile, spec, engine.name)
        if table is None:
            curves.append(roofline.experts(spec))
            sources.append(roofline.source)
        else:
            curves.append(measured(table, spec))
            own = table.info.key["engine"] == engine.name and _apart(table, spec)[1].min() < _SAME
            sources.append("measured" if own else "fitted")
    return Priced(stack(curves), tuple(sources))


def _named(profile: Profile, engine: EngineProfile) -> Table | None:
    """The table of `EngineProfile.expert_table`; None where none is named or this GPU has no such table."""
    return next((table for table in profile.tables if table.info.name == engine.expert_table), None)


def find(profile: Profile, spec: GroupedGemm, engine: str) -> Table | None:
    """The table for a spec's formats that was timed at the nearest shape.

    A less fitting format must be nearer by `_WORSE`, another engine's table by as far as residuals reach.
    Tables of a single library among an engine's are taken by name only (`EngineProfile.expert_table`).
    """
    ranked = [
        (
            float(_apart(table, spec)[1].min())
            + _WORSE * order
            + (0.0 if table.info.key["engine"] == engine else _REACH),
            table,
        )
        for order, name in enumerate(_formats(spec.weights, spec.activations))
        for table in profile.find(format=name)
        if not table.info.key.get("library")
    ]
    return min(ranked, key=lambda item: item[0])[1] if ranked else None


def measured(table: Table, spec: GroupedGemm) -> Curve:
    """The table's formula for the spec times its residual there."""
    of = table.info.ideal
    kernel = ExpertKernel(**{name: of[name] for name in ExpertKernel.names()})
    ideal = curve(spec, kernel, of["weight_bytes"], of["bytes_s"], of["flops_s"])
    rows, weights, _ = nearest(table, spec)
    residual = weights @ table.values[rows]
    ratio = np.interp(np.log(TOKENS), np.log(table.axes[1]), residual)
    return Curve(ideal.seconds * np.exp(ratio), ideal.bound)


def nearest(table: Table, spec: GroupedGemm) -> tuple[npt.NDArray[np.intp], Array, float]:
    """(rows, weights that sum to one, distance of the first): the shapes that stand for the spec."""
    shapes, distance = _apart(table, spec)
    rows = np.argsort(distance, kind="stable")[:_NEIGHBOURS]
    first = float(distance[rows[0]])
    if first < _SAME:
        return rows[:1], np.ones(1), first
    near = shapes[rows]
    among = np.sqrt(((near[:, None] - near) ** 2).sum(-1))
    solved = np.linalg.solve(
        _alike(among) + _NOISE * np.eye(rows.size), np.stack([_alike(distance[rows]), np.ones(rows.size)], 1)
    )
    weights, even = solved.T
    return rows, weights + even * (1.0 - weights.sum()) / even.sum(), first


def _apart(table: Table, spec: GroupedGemm) -> tuple[Array, Array]:
    """Where a table's shapes lie, [shapes, sizes], and how far from the spec, [shapes]."""
    here = {
        "hidden": spec.hidden,
        "inner": spec.inner,
        "experts": spec.experts,
        "total": float(spec.total_experts),
        "top_k": float(spec.top_k),
    }
    shapes = np.stack([far * np.log(table.extra[name]) for name, far in SHAPE.items()], axis=1)
    spot = np.array([far * np.log(max(here[name], 1e-9)) for name, far in SHAPE.items()])
    return shapes, np.sqrt(((shapes - spot) ** 2).sum(axis=1))


def _alike(distance: Array) -> Array:
    """Covariance of residuals so far apart, 1 at none."""
    scaled = np.sqrt(3.0) * distance / _REACH
    found: Array = (1.0 + scaled) * np.exp(-scaled)
    return found


def _formats(weights: str, activations: str) -> Iterator[str]:
    for pair in _pairs():
        if (pair["weights"], pair["activations"]) == (weights, activations):
            yield from pair["measured"]


@cache
def _pairs() -> tuple[Mapping[str, str], ...]:
    return tuple(read("experts.yaml")["pairs"])
