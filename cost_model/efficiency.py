"""Named efficiencies of the roofline, and the bands that go with a provenance."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Literal

from pydantic import Field

from planc.cost_model import overlay
from planc.cost_model.catalogue import Entry, Gpu, Precision, Provenance, read


class Efficiency(Entry):
    """One named number; `by_precision` differs from it by arithmetic, `by_gpu` holds measured overrides."""

    value: float
    source: Provenance
    note: str
    by_precision: Mapping[Precision, float] = Field(default_factory=dict)
    by_gpu: Mapping[str, Mapping[Precision | Literal["any"], float]] = Field(default_factory=dict)


class Band(Entry):
    """Factors on a predicted time within which a measured one is expected."""

    low: float
    high: float
    source: str


class Tile(Entry):
    """An output tile of a GEMM kernel, and the share of the achievable peak that it reaches."""

    rows: float
    columns: float
    share: float


class Efficiencies(Entry):
    """The whole of `data/efficiencies.yaml`."""

    date: str
    bands: Mapping[Provenance, Band]
    values: Mapping[str, Efficiency]
    gemm_tiles: tuple[Tile, ...]

    @property
    def tiles(self) -> tuple[tuple[float, float, float], ...]:
        """Output tiles of GEMM kernels: rows, columns, share of the achievable peak when all SMs run it."""
        return tuple((tile.rows, tile.columns, tile.share) for tile in self.gemm_tiles)

    def value(self, name: str) -> float:
        return self.values[name].value

    def on(self, name: str, gpu: Gpu, precision: Precision | Literal["any"] = "any") -> float:
        """The value for this GPU (and arithmetic): measured there where known, else the general one."""
        entry = self.values[name]
        general = entry.value if precision == "any" else entry.by_precision.get(precision, entry.value)
        return entry.by_gpu.get(gpu.name, {}).get(precision, general)

    def measured(self, name: str, gpu: Gpu) -> float | None:
        """What was measured on this GPU itself, if anything."""
        return self.values[name].by_gpu.get(gpu.name, {}).get("any")

    def band(self, source: Provenance) -> tuple[float, float]:
        return self.bands[source].low, self.bands[source].high


def efficiencies() -> Efficiencies:
    """All of them; with the numbers of the measured profile in use, if any."""
    found = overlay.current()
    return _shipped() if found is None else found.efficiencies


@cache
def _shipped() -> Efficiencies:
    return Efficiencies(**read("efficiencies.yaml"))
