"""Kernels from the tables of a profile in use (`planc.cost_model.calibration`): this very device.

Tables are by shape and relative to `launch + max(flops / peak, bytes / bandwidth)` with the constants
that each states:

    gemm       (m, n, k)               key: precision       [m, k] @ [k, n], weights from memory
    attention  (sequences, context)    key: part "decode"   context includes the new token
    attention  (new, context)          key: part "prefill"  one chunk after context - 1 cached tokens
    links      (ranks, bytes)          key: kind

Attention tables also state dim and group (query heads per KV head); the one nearest in both is taken.
What no table covers costs what the shipped ones, or the roofline, say.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from planc.cost_model.catalogue import Provenance
from planc.cost_model.collectives import Fabric, Kind
from planc.cost_model.features import Array
from planc.cost_model.formats import fmt, product_precision
from planc.cost_model.kernels import (
    COMPUTE,
    MEMORY,
    Attention,
    AttentionLoad,
    Bound,
    Gemm,
    GroupedGemm,
    KernelCosts,
    Priced,
    Times,
    sources,
)
from planc.cost_model.measured import links
from planc.cost_model.profile import OpFamily, Profile, Table


def ideal(table: Table, flops: Array, nbytes: Array) -> Array:
    """Seconds that a product's or attention's table is relative to."""
    of = table.info.ideal
    found: Array = of["launch_s"] + np.maximum(flops / of["flops_s"], nbytes / of["bytes_s"])
    return found


@dataclass(frozen=True)
class OnDevice:
    """Implements `KernelCosts`: `tables` first, then `rest`."""

    tables: Mapping[OpFamily, Profile]
    rest: KernelCosts

    @property
    def source(self) -> Provenance:
        return self.rest.source

    def gemm(self, specs: Sequence[Gemm]) -> Callable[[Array], Times]:
        found = [self._product(spec) for spec in specs]
        others = self.rest.gemm(specs)

        def price(m: Array) -> Times:
            times = others(m)
            seconds, bound = times.seconds.copy(), times.bound.copy()
            for row, (spec, table) in enumerate(zip(specs, found, strict=True)):
                if table is not None:
                    rows = np.maximum(m[row], 1.0)
                    flops = 2.0 * rows * spec.n * spec.k
                    width = fmt(spec.weights).bytes
                    nbytes = width * (spec.n * spec.k + rows * spec.k) + spec.out_bytes * rows * spec.n
                    ratio = np.exp(table.grid.at(rows, spec.n, spec.k))
                    seconds[row] = np.where(m[row] > 0, ratio * ideal(table, flops, nbytes), 0.0)
                    bound[row] = _bound(table, flops, nbytes)
            return Times(seconds, bound)

        return Priced(price, _sources(found, sources(others, self.rest, len(specs))))

    def attention(self, specs: Sequence[Attention]) -> Callable[[AttentionLoad], Times]:
        found = [self._attention(spec) for spec in specs]
        others = self.rest.attention(specs)

        def price(load: AttentionLoad) -> Times:
            times = others(load)
            seconds, bound = times.seconds.copy(), times.bound.copy()
            sequences = np.maximum(load.sequences, 1.0)
            for row, (spec, table) in enumerate(zip(specs, found, strict=True)):
                if table is None:
                    continue
                flops, nbytes = load.flops[row], load.kv[row] * spec.kv_bytes
                if spec.part == "decode":
                    ratio = np.exp(table.grid.at(sequences, np.maximum(load.context, 1.0)))
                    expected = ratio * ideal(table, flops, nbytes)
                else:  # chunks of several prompts run one after another
                    each = np.maximum(load.tokens / sequences, 1.0)
                    ratio = np.exp(table.grid.at(each, load.context + 1.0))
                    expected = ratio * sequences * ideal(table, flops / sequences, nbytes / sequences)
                seconds[row] = np.where(load.tokens > 0, expected, 0.0)
                bound[row] = _bound(table, flops, nbytes)
            return Times(seconds, bound)

        return Priced(price, _sources(found, sources(others, self.rest, len(specs))))

    def grouped_gemm(self, specs: Sequence[GroupedGemm]) -> Callable[[Array], Times]:
        return self.rest.grouped_gemm(specs)

    def elementwise(self, launches: Array) -> Callable[[Array], Times]:
        return self.rest.elementwise(launches)

    def collective(self, kind: Kind, ranks: int, fabric: Fabric) -> Callable[[Array], Array]:
        profile = self.tables.get("links")
        found = profile.find(kind=kind) if profile else ()
        if not found or not 1 < ranks <= min(found[0].axes[0][-1], fabric.gpus_per_node):
            return self.rest.collective(kind, ranks, fabric)
        return links.curve(found[0], kind, ranks)

    def _product(self, spec: Gemm) -> Table | None:
        precision = product_precision(spec.weights, spec.activations)
        if spec.weights != spec.activations or "gemm" not in self.tables:
            return None
        found = self.tables["gemm"].find(precision=precision)
        return found[0] if found else None

    def _attention(self, spec: Attention) -> Table | None:
        if spec.kind != "attention" or spec.latent or not spec.kv_heads or "attention" not in self.tables:
            return None

        def far(table: Table) -> float:
            key = table.info.key
            group = spec.q_heads / spec.kv_heads
            return 2 * abs(math.log(float(key["dim"]) / spec.qk_dim)) + abs(
                math.log(float(key["group"]) / group)
            )

        return min(self.tables["attention"].find(part=spec.part), key=far, default=None)


def _bound(table: Table, flops: Array, nbytes: Array) -> Bound:
    of = table.info.ideal
    found: Bound = np.where(flops / of["flops_s"] > nbytes / of["bytes_s"], COMPUTE, MEMORY).astype(np.int8)
    return found


def _sources(found: Sequence[Table | None], others: Sequence[Provenance]) -> tuple[Provenance, ...]:
    return tuple("measured" if table else other for table, other in zip(found, others, strict=True))
