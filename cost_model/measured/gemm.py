"""Dense matrix products."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from planc.cost_model.catalogue import EngineProfile, Gpu
from planc.cost_model.features import Array
from planc.cost_model.kernels import Gemm, Times
from planc.cost_model.roofline import Roofline


def prepare(
    specs: Sequence[Gemm], gpu: Gpu, engine: EngineProfile, roofline: Roofline
) -> Callable[[Array], Times]:
    return roofline.gemm(specs)
