"""Shared pieces: step models of sample tables on catalogue GPUs."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from planc.cost_model import catalogue
from planc.cost_model.collectives import Fabric
from planc.cost_model.kernels import KernelCosts
from planc.cost_model.shape import EngineShape
from planc.cost_model.step import StepModel
from planc.cost_model.table import CostTable


@pytest.fixture
def model() -> Callable[..., StepModel]:
    def make(
        table: CostTable,
        gpu: str = "h100_sxm",
        engine: str = "vllm",
        *,
        nodes_of: int = 8,
        costs: KernelCosts | None = None,
        **shape: object,
    ) -> StepModel:
        profile = catalogue.engine(engine)
        made = EngineShape(engine, gpu, **shape)  # type: ignore[arg-type]
        return StepModel(table, made, catalogue.gpu(gpu), Fabric(nodes_of), profile, costs=costs)

    return make
