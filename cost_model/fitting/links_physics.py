"""The constants of `data/links.yaml`, fitted to measured collectives by wire, architecture and protocol.

    python -m planc.cost_model.fitting.links_physics [TABLES]

prints them as that file has them. A wire's constants are those of its kernels at one clock (`at_mhz`), so
that GPUs of several generations share them; Blackwell's two dies start later than one and have their own.
What a PCIe host lets through is not fitted: it stands in the catalogue. Two things are not as they seem:

    rows of an engine's own kernel that take more than 1.75 times as long as NCCL's (its benchmark's ranks
    were no neighbours, or its algorithm was a wrong choice) are not looked at, for planc does not believe
    them either (`measured.links`)
    DeepEP was timed alone for SGLang, and as whole calls from Python for vLLM and TensorRT-LLM; these have
    lanes of their own ("call"), which are scored and not shipped, for a step's host time is priced elsewhere
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from planc.cost_model import catalogue
from planc.cost_model.collectives import Constants, Fabric, Kind, Protocols, reference_mhz, seconds
from planc.cost_model.features import Array
from planc.cost_model.fitting import sources
from planc.cost_model.measured.links import DEFECT

Lane = Literal["library", "barrier", "lamport", "dispatch", "combine", "dispatch_call", "combine_call"]
#: (wire, architecture, lane)
Key = tuple[str, str, Lane]

#: protocols of a lane, where the fit starts: start and step in us, share of the wire
_STARTS: Mapping[Lane, tuple[tuple[float, float, float], ...]] = {
    "library": ((5.0, 0.7, 0.3), (10.0, 2.0, 0.6), (50.0, 2.0, 0.9)),
    "barrier": ((4.5, 0.1, 0.5),),
    "lamport": ((3.0, 0.1, 0.4),),
    "dispatch": ((10.0, 0.0, 0.05), (25.0, 0.0, 0.4)),
    "combine": ((10.0, 0.0, 0.05), (25.0, 0.0, 0.4)),
    "dispatch_call": ((80.0, 0.0, 0.3),),
    "combine_call": ((60.0, 0.0, 0.3),),
}
_OWN = ("barrier", "lamport")
#: engines' own kernels take messages up to this
_UP_TO = 8 * 1024.0**2
_FAR = 1.0  # nat; a row that is further off counts no more


@dataclass(frozen=True, slots=True)
class Sample:
    """Rows of one table at one number of ranks: bytes and seconds."""

    gpu: str
    lane: Lane
    kind: Kind
    ranks: int
    sizes: Array
    seconds: Array

    @property
    def key(self) -> Key:
        gpu = catalogue.gpu(self.gpu)
        wire = Fabric().inner(gpu, self.ranks).name
        two_dies = wire == "nvlink" and gpu.arch in ("sm_100", "sm_103")
        return wire, "blackwell" if two_dies else "other", self.lane

    def where(self, kept: Any) -> Sample:
        return replace(self, sizes=self.sizes[kept], seconds=self.seconds[kept])

    def believed(self, library: Array) -> Sample:
        """Without rows that take `DEFECT` times what the library does, [rows]."""
        return self.where(self.seconds <= DEFECT * library)

    def errors(self, known: Mapping[Key, Protocols]) -> Array:
        """ln(predicted / measured) [rows], predicted as `collectives.seconds` does."""
        gpu, (wire, arch, lane) = catalogue.gpu(self.gpu), self.key
        takes_own = lane in _OWN and not (wire == "pcie" and self.ranks > 2)
        lanes: dict[str, Any] = {"own_up_to": _UP_TO if takes_own else 0.0}
        for each in ("library", lane):
            found = known.get((wire, arch, each))
            if found is not None:
                slower = reference_mhz(wire) / gpu.clock_mhz
                lanes[field(each)] = tuple(one.at_clock(slower) for one in found)
        link = replace(Fabric().inner(gpu, self.ranks), **lanes)
        return np.asarray(np.log(seconds(self.kind, self.sizes, self.ranks, link) / self.seconds))


def field(lane: Lane) -> str:
    """Of a `Link`."""
    return "own" if lane in _OWN else lane.removesuffix("_call")


def fit(samples: Sequence[Sample]) -> dict[Key, Protocols]:
    """Constants with the least mean |ln(predicted / measured)| (no row counting more than 1), every sample
    weighing the same: of libraries first, which take over where own kernels end."""
    known: dict[Key, Protocols] = {}
    for key in sorted({sample.key for sample in samples}, key=lambda key: (key[2] != "library", key)):
        known[key] = _fit(list(_deciding(samples, key)), key, known)
    return known


def _deciding(samples: Sequence[Sample], key: Key) -> Iterator[Sample]:
    """Those that depend on the lane's constants: own kernels' up to the size that they take."""
    for sample in samples:
        used = sample.where(sample.sizes <= (_UP_TO if key[2] in _OWN else np.inf))
        if sample.key == key and used.sizes.size:
            yield used


def _fit(samples: Sequence[Sample], key: Key, known: Mapping[Key, Protocols]) -> Protocols:
    from scipy.optimize import minimize

    starts = np.maximum(_STARTS[key[2]], 1e-2)

    def at(logs: Array) -> Protocols:
        rows = np.exp(np.clip(logs, -8.0, 8.0)).reshape(starts.shape)
        return tuple(
            Constants(alpha_us=_short(alpha), per_step_us=_short(step), share=_short(share))
            for alpha, step, share in rows
        )

    def loss(logs: Array) -> float:
        now = {**known, key: at(logs)}
        return float(np.mean([np.minimum(np.abs(s.errors(now)), _FAR).mean() for s in samples]))

    found = np.log(starts).reshape(-1)
    for _ in range(2):
        options = {"maxiter": 400, "xatol": 1e-3, "fatol": 1e-5}
        found = minimize(loss, found, method="Nelder-Mead", options=options).x
    return at(found)


def _short(value: float) -> float:
    return float(f"{value:.3g}")


def main(folder: Path) -> None:
    from planc.cost_model.fitting import links

    for (wire, arch, lane), protocols in fit(links.samples(folder)).items():
        if not lane.endswith("_call"):
            sys.stdout.write(f"{wire} {arch} {lane}: {[one.model_dump() for one in protocols]}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else sources.root())
