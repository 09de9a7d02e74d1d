"""Kernel costs from measured profiles, family by family; the roofline where nothing was measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from planc.cost_model import overlay
from planc.cost_model.catalogue import EngineProfile, Gpu, Provenance
from planc.cost_model.collectives import Fabric, Kind, Own
from planc.cost_model.features import Array
from planc.cost_model.kernels import (
    Attention,
    AttentionLoad,
    Gemm,
    GroupedGemm,
    KernelCosts,
    Times,
)
from planc.cost_model.measured import attention, experts, gemm, links, pointwise
from planc.cost_model.measured.device import OnDevice
from planc.cost_model.roofline import Roofline


@dataclass(frozen=True)
class Measured:
    """Implements `KernelCosts` for one GPU and engine.

    Each family's module has one function of the same signature: it takes the GPU, the engine's profile
    and the roofline to fall back to, and returns the roofline's own answer for kernels that no table covers.
    It says which those are in the `sources` of the `Priced` that it returns.
    """

    gpu: Gpu
    engine: EngineProfile

    @cached_property
    def roofline(self) -> Roofline:
        own = Own(self.engine.custom_all_reduce_max_mib * 1024**2, self.engine.custom_all_reduce)
        return Roofline(self.gpu, own=own, engine=self.engine.name)

    @property
    def source(self) -> Provenance:
        return self.roofline.source

    def gemm(self, specs: Sequence[Gemm]) -> Callable[[Array], Times]:
        return gemm.prepare(specs, self.gpu, self.engine, self.roofline)

    def grouped_gemm(self, specs: Sequence[GroupedGemm]) -> Callable[[Array], Times]:
        return experts.prepare(specs, self.gpu, self.engine, self.roofline)

    def attention(self, specs: Sequence[Attention]) -> Callable[[AttentionLoad], Times]:
        return attention.prepare(specs, self.gpu, self.engine, self.roofline)

    def collective(self, kind: Kind, ranks: int, fabric: Fabric) -> Callable[[Array], Array]:
        return links.prepare(kind, ranks, fabric, self.gpu, self.engine, self.roofline)

    def elementwise(self, launches: Array) -> Callable[[Array], Times]:
        return pointwise.prepare(launches, self.gpu, self.engine, self.roofline)


def costs_for(gpu: Gpu, engine: EngineProfile) -> KernelCosts:
    """What kernels cost on this GPU as this engine runs them, by the best that is known."""
    known, mine = Measured(gpu, engine), overlay.current()
    return OnDevice(mine.tables, known) if mine and mine.tables and mine.gpu == gpu.name else known
