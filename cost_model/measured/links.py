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


def prepare(
    kind: Kind, ranks: int, fabric: Fabric, gpu: Gpu, engine: EngineProfile, roofline: Roofline
) -> Callable[[Array], Array]:
    """Seconds of a collective of so many bytes; hierarchical over the network where ranks span nodes."""
    near, far = spread(ranks, gpu, fabric, 1)
    if ranks <= 1 or (not find(kind, gpu) and far <= 1):
        return roofline.collective(kind, ranks, fabric)
    priced: dict[tuple[Kind, int], list[Callable[[Array], Array]]] = {}

    def inside(kind: Kind, size: Array, among: int) -> Array:
        tables = find(kind, gpu)
        if not tables:
            return seconds(kind, size, among, fabric.inner(gpu, near, roofline.custom_up_to))
        if (kind, among) not in priced:
            priced[kind, among] = [curve(table, kind, among) for table in tables]
        found: Array = np.minimum.reduce([of(size) for of in priced[kind, among]])
        return found

    def price(size: Array) -> Array:
        return group_seconds(kind, size, ranks, gpu, fabric, inside=inside)

    return Priced(price, (fabric.outer(gpu).source if far > 1 else "measured",))


def find(kind: Kind, gpu: Gpu) -> tuple[Table, ...]:
    """The tables to price a kind inside a node with, the cheapest of which counts at every size.

    Engines have several kernels for one collective, borrow each other's (FlashInfer's fused all-reduce, which
    vLLM and SGLang run on Blackwell, is TensorRT-LLM's), and are tuned to take the fastest; a table holds
    the choice of one benchmark.
    """
    profile = shipped("links", gpu.name)
    return profile.find(kind=kind) if profile else ()


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
