"""Dense matrix products from measured tables.

A table's ideal is `max(flops / peak, bytes / bandwidth) + 3 us` with the peaks that the file states. Tables
hold the product alone; quantization of its input is a kernel of its own (see `lower`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from planc.cost_model import block_products
from planc.cost_model.catalogue import EngineProfile, Gpu, Provenance, gpus
from planc.cost_model.features import Array
from planc.cost_model.formats import fmt, product_precision
from planc.cost_model.kernels import COMPUTE, LAUNCH, MEMORY, Gemm, Priced, Times
from planc.cost_model.profile import Table, shipped
from planc.cost_model.roofline import Roofline

#: start and end of a kernel in the ideal, s
LAUNCH_S = 3e-6

#: rows at which a product is looked up before pricing, besides those of its table; between them seconds are
#: linear in m, and beyond the last one (no engine's step holds so many) they are that of the last
_KNOTS = np.geomspace(1, 2**22, 177)

#: engines whose tables stand in for a missing one, most alike first
_ENGINES = ("vllm", "sglang", "trtllm")


def peaks(gpu: Gpu, weights: str, activations: str) -> dict[str, float]:
    """Constants of the ideal of a format pair on a GPU: flop/s, bytes/s, s."""
    precision = product_precision(weights, activations)
    return {"flops": gpu.peak_flops(precision), "bytes_s": gpu.memory_bytes_s, "launch_s": LAUNCH_S}


def ideal_seconds(m: Any, n: Any, k: Any, spec: Gemm, of: Mapping[str, float]) -> Array:
    """max(flops / peak, bytes / bandwidth) + launch, s, of [m, k] @ [k, n] in a spec's formats."""
    compute, memory = _work(m, n, k, spec, of)
    return np.asarray(np.maximum(compute, memory) + of["launch_s"])


def _work(m: Any, n: Any, k: Any, spec: Gemm, of: Mapping[str, float]) -> tuple[Any, Any]:
    moved = n * k * fmt(spec.weights).bytes + m * k * fmt(spec.activations).bytes + m * n * spec.out_bytes
    return 2.0 * m * n * k / of["flops"], moved / of["bytes_s"]


def prepare(
    specs: Sequence[Gemm], gpu: Gpu, engine: EngineProfile, roofline: Roofline
) -> Callable[[Array], Times]:
    """Takes m [R, N]. Measured specs are looked up once, as seconds over m; pricing is one interpolation."""
    told = {row for row, spec in enumerate(specs) if block_products.runs(spec, gpu, engine)}
    found = [None if row in told else find(spec, gpu, engine) for row, spec in enumerate(specs)]
    curves = {
        row: _curve(spec, choice, gpu)
        for row, (spec, choice) in enumerate(zip(specs, found, strict=True))
        if choice is not None
    }
    curves |= {row: (_KNOTS, ascending(block_products.seconds(_KNOTS, specs[row], gpu))) for row in told}
    rest = [row for row in range(len(specs)) if row not in curves]
    physics = roofline.gemm([specs[row] for row in rest])
    compute_from, launch_to = (
        np.array([_bounds(spec, gpu) for spec in specs]).reshape(-1, 2, 1).swapaxes(0, 1)
    )

    def price(m: Array) -> Times:
        seconds = np.empty_like(m, dtype=np.float64)
        bound = np.where(m > compute_from, COMPUTE, np.where(m < launch_to, LAUNCH, MEMORY)).astype(np.int8)
        for row, (knots, values) in curves.items():
            seconds[row] = np.interp(m[row], knots, values)
        if rest:
            others = physics(m[rest])
            seconds[rest], bound[rest] = others.seconds, others.bound
        seconds[m <= 0] = 0.0
        return Times(seconds, bound)

    known: list[Provenance] = [roofline.source if choice is None else choice[1] for choice in found]
    return Priced(price, tuple("fitted" if row in told else source for row, source in enumerate(known)))


def find(spec: Gemm, gpu: Gpu, engine: EngineProfile) -> tuple[Table, Provenance] | None:
    """The table to price a product with, and how well it fits the question. In this order: the engine's own
    ("measured"); another engine's on the same GPU; the residuals of a product in the same arithmetic there
    (both "fitted"); the same on a GPU of the same chip (of unknown quality: "roofline")."""
    for near in (gpu, *(other for other in gpus().values() if _same_chip(other, gpu))):
        profile = shipped("gemm", near.name)
        if profile is None:
            continue
        same: Provenance = "fitted" if near is gpu else "roofline"
        for weights, activations in _alike(spec):
            for name in dict.fromkeys((engine.name, *_ENGINES)):
                for table in profile.find(engine=name, weights=weights, activations=activations):
                    own = near is gpu and name == engine.name and weights == _named(spec.weights)
                    return table, "measured" if own else same
    return None


def _same_chip(one: Gpu, two: Gpu) -> bool:
    """Variants of one chip: the same architecture, and size and speed within a third of each other."""
    near = lambda a, b: 3 / 4 < a / b < 4 / 3  # noqa: E731
    return one.arch == two.arch and all(
        near(a, b)
        for a, b in ((one.sm_count, two.sm_count), (one.peak_flops("bf16"), two.peak_flops("bf16")))
    )


def _named(form: str) -> str:
    return "bf16" if form == "fp16" else form


def _alike(spec: Gemm) -> list[tuple[str, str]]:
    """Format pairs whose residuals serve a spec: its own, then one that computes in the same arithmetic."""
    own = _named(spec.weights), _named(spec.activations)
    stand_in = {"bf16": "bf16", "fp16": "bf16", "fp8": "fp8", "int8": "fp8", "fp4": "nvfp4"}
    other = stand_in.get(product_precision(spec.weights, spec.activations))
    return list(dict.fromkeys([own, *([(other, other)] if other else [])]))


def _curve(spec: Gemm, choice: tuple[Table, Provenance], gpu: Gpu) -> tuple[Array, Array]:
    """(m, seconds) at knots: the table's residual at (m, n, k) times the ideal of this spec on this GPU."""
    table, source = choice
    exact = source != "roofline" and table.info.key["weights"] == _named(spec.weights)
    of = table.info.ideal if exact else peaks(gpu, spec.weights, spec.activations)
    axis = table.axes[0]
    knots = np.union1d(_KNOTS, axis)
    residual = np.interp(np.log(knots), np.log(axis), table.grid.at(axis, spec.n, spec.k))
    return knots, ascending(np.exp(residual) * ideal_seconds(knots, spec.n, spec.k, spec, of))


def ascending(seconds: Array) -> Array:
    """The nearest that never falls along the first axis: the geometric mean of the least such curve above and
    the greatest below. Kernels of more rows may be faster (tiles that fit better), but a planner must not be
    led to add work in order to save time."""
    above = np.maximum.accumulate(seconds)
    below = np.minimum.accumulate(seconds[::-1])[::-1]
    return np.asarray(np.sqrt(above * below))


def _bounds(spec: Gemm, gpu: Gpu) -> tuple[float, float]:
    """m from which arithmetic outlasts memory, and m up to which both are shorter than a launch."""
    of = peaks(gpu, spec.weights, spec.activations)
    compute, memory = _work(_KNOTS, spec.n, spec.k, spec, of)
    above, short = compute > memory, np.maximum(compute, memory) < LAUNCH_S
    return (
        float(_KNOTS[int(np.argmax(above))]) if above.any() else np.inf,
        float(_KNOTS[int(short.sum()) - 1]) if short.any() else 0.0,
    )
