"""Norms, rotary, activation functions, quantization: kernels that move elements."""

from __future__ import annotations

from collections.abc import Callable

from planc.cost_model.catalogue import EngineProfile, Gpu
from planc.cost_model.features import Array
from planc.cost_model.kernels import Times
from planc.cost_model.roofline import Roofline


def prepare(launches: Array, gpu: Gpu, engine: EngineProfile, roofline: Roofline) -> Callable[[Array], Times]:
    return roofline.elementwise(launches)
