"""Collectives inside and across nodes."""

from __future__ import annotations

from collections.abc import Callable

from planc.cost_model.catalogue import EngineProfile, Gpu
from planc.cost_model.collectives import Fabric, Kind
from planc.cost_model.features import Array
from planc.cost_model.roofline import Roofline


def prepare(
    kind: Kind, ranks: int, fabric: Fabric, gpu: Gpu, engine: EngineProfile, roofline: Roofline
) -> Callable[[Array], Array]:
    return roofline.collective(kind, ranks, fabric)
