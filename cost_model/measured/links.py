"""Collectives inside and across nodes.

A table holds one kind of collective as one engine (or NCCL) runs it on neighbours of one node, by ranks
and bytes of the full tensor. Its ideal is `collectives.alpha_beta` with the constants that it states.
Engines replay decode steps as CUDA graphs and hide launches behind kernels in prompts, so tables are of
captured kernels; what launching costs is the step's business.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from planc.cost_model.catalogue import EngineProfile, Gpu
from planc.cost_model.collectives import Constants, Fabric, Kind, alpha_beta, group_seconds, seconds, spread
from planc.cost_model.features import Array
from planc.cost_model.kernels import Priced
from planc.cost_model.profile import Table, shipped
from planc.cost_model.roofline import Roofline

#: an engine's own collective is not believed beyond this multiple of the fastest known one
DEFECT = 1.75


def prepare(
    kind: Kind, ranks: int, fabric: Fabric, gpu: Gpu, engine: EngineProfile, roofline: Roofline
) -> Callable[[Array], Array]:
    """Seconds of a collective of so many bytes; hierarchical over the network where ranks span nodes."""
    near, far = spread(ranks, gpu, fabric, 1)
    tables = find(kind, gpu, engine)
    if ranks <= 1 or (not tables and far <= 1):
        return roofline.collective(kind, ranks, fabric)
    priced: dict[tuple[Kind, int], list[Callable[[Array], Array]]] = {}

    def inside(kind: Kind, size: Array, among: int) -> Array:
        tables = find(kind, gpu, engine)
        if not tables:
            return seconds(kind, size, among, fabric.inner(gpu, near, roofline.own))
        if (kind, among) not in priced:
            priced[kind, among] = [curve(table, kind, among) for table in tables]
        own, *others = [of(size) for of in priced[kind, among]]
        return own if not others else _sane(own, np.minimum.reduce(others))

    def price(size: Array) -> Array:
        return group_seconds(kind, size, ranks, gpu, fabric, inside=inside)

    return Priced(price, (fabric.outer(gpu).source if far > 1 else "measured",))


def find(kind: Kind, gpu: Gpu, engine: EngineProfile) -> tuple[Table, ...]:
    """The tables of a kind inside a node: first that of the kernels which run, then all others.

    Those are the engine's own; for an all-reduce fused with what follows TensorRT-LLM's, which FlashInfer
    wraps for vLLM and SGLang; else NCCL's.
    """
    profile = shipped("links", gpu.name)
    found = profile.find(kind=kind) if profile else ()
    fused = kind == "all_reduce" and gpu.arch in engine.fused_all_reduce
    order = ["trtllm"] * fused + [engine.name, "nccl"]
    rank = lambda t: order.index(t.info.key["engine"]) if t.info.key["engine"] in order else len(order)  # noqa: E731
    return tuple(sorted(found, key=rank))


def _sane(own: Array, others: Array) -> Array:
    """Seconds of the engine's own kernel, or of the fastest one where its own takes `DEFECT` times as long:
    a benchmark's choice of algorithm that a serving engine, tuned on its machine, does not make."""
    found: Array = np.where(own > DEFECT * others, others, own)
    return found


def curve(table: Table, kind: Kind, ranks: int) -> Callable[[Array], Array]:
    """Seconds by bytes for a number of ranks; beyond the table's ends the ideal extrapolates.

    A message never takes longer than a larger one: it could be padded to that. Some engines' choice between
    algorithms leaves spikes of a factor of three at single sizes.
    """
    knots = np.log(table.axes[1])
    values = table.grid.at(float(ranks), table.axes[1])
    stated = table.info.ideal
    of = Constants(alpha_us=stated["alpha_us"], per_step_us=stated["per_step_us"], share=1.0)
    ideal = np.log(alpha_beta(kind, table.axes[1], ranks, of, stated["bytes_s"]))
    values = np.minimum.accumulate((values + ideal)[::-1])[::-1] - ideal

    def price(size: Array) -> Array:
        size = np.asarray(size, dtype=np.float64)
        ratio = np.exp(np.interp(np.log(np.maximum(size, 1.0)), knots, values))
        return np.where(size > 0, ratio * alpha_beta(kind, size, ranks, of, stated["bytes_s"]), 0.0)

    return price
