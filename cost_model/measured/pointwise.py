"""Norms, rotary, activation functions, quantization: kernels that move elements.

A table is the seconds of the plainest streaming kernel over the bytes it moves, launch included: out of the
cache while the working set fits there, at the bandwidth of memory beyond. No kernel is shorter than the
floor of `efficiencies.yaml`, which stands for what others than a plain cast do (reductions over a row).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from planc.cost_model.catalogue import EngineProfile, Gpu, Provenance
from planc.cost_model.features import Array
from planc.cost_model.kernels import LAUNCH, MEMORY, Priced, Times
from planc.cost_model.profile import Table, shipped
from planc.cost_model.roofline import Roofline

#: launch in the ideal, s
LAUNCH_S = 2e-6


def ideal_seconds(size: Array, bandwidth: float) -> Array:
    """bytes / bandwidth + launch, s."""
    return np.asarray(size / bandwidth + LAUNCH_S)


def prepare(launches: Array, gpu: Gpu, engine: EngineProfile, roofline: Roofline) -> Callable[[Array], Times]:
    table = find(gpu, engine)
    if table is None:
        return roofline.elementwise(launches)
    axis, of = table.axes[0], table.info.ideal
    knots = np.concatenate([[0.0], axis])
    seconds = np.exp(table.values) * (axis / of["bytes_s"] + of["launch_s"])
    seconds = np.maximum.accumulate(np.concatenate([seconds[:1], seconds]))
    slope = (seconds[-1] - seconds[-2]) / (knots[-1] - knots[-2])
    floor = launches * roofline.elementwise_floor
    rides = seconds[0] * np.maximum(1.0 - launches, 0.0)  # the launch that a fused kernel has not

    def price(nbytes: Array) -> Times:
        stream = np.interp(nbytes, knots, seconds) + np.maximum(nbytes - knots[-1], 0.0) * slope - rides
        found = np.where(nbytes > 0, np.maximum(stream, floor), 0.0)
        return Times(found, np.where(stream >= floor, MEMORY, LAUNCH).astype(np.int8))

    source: Provenance = "fitted"
    return Priced(price, (source,) * len(launches))


def find(gpu: Gpu, engine: EngineProfile) -> Table | None:
    """The engine's own curve on this GPU, else another engine's."""
    profile = shipped("pointwise", gpu.name)
    if profile is None:
        return None
    return next(iter(profile.find(engine=engine.name) or profile.tables), None)
