"""The few numbers of `Roofline.gemm`, fitted over all GPUs but one, and what they predict for that one.

`fitted` minimises the mean |ln(predicted / measured)|, cut at 1, over a fixed random sample of the rows of
all tables; every table weighs the same. It starts at the values that planc ships.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from planc.cost_model import catalogue
from planc.cost_model.efficiency import Efficiencies, efficiencies
from planc.cost_model.features import Array
from planc.cost_model.fitting.gemm_rows import IN_SESSION, Cube, read
from planc.cost_model.kernels import Gemm
from planc.cost_model.roofline import Roofline

#: what is fitted: names of efficiencies, or of one for an arithmetic
NAMES = ("gemm_kcycles", "gemm_depth_cycles", "gemm_memory", "gemm_overlap", "gemm_peak", "fp8", "fp4")
#: rows of each table that are fitted to, and that are scored
FITTED, SCORED = 120, 3000


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """Sampled rows of one table."""

    gpu: str
    table: str
    m: Array
    specs: Sequence[Gemm]
    seconds: Array

    def errors(self, named: Efficiencies) -> Array:
        """ln(predicted / measured)."""
        price = Roofline(catalogue.gpu(self.gpu), named).gemm(self.specs)
        return np.asarray(np.log(price(self.m[:, None]).seconds[:, 0] / self.seconds))


def held_out_gpu(folder: Path, gpus: Iterable[str]) -> Mapping[tuple[str, str], float]:
    """Median error of the roofline by (GPU, table), its numbers fitted without that GPU's rows; table "all"
    is the median over a GPU's rows."""
    cubes = {gpu: [cube for cube in read(folder, gpu) if cube.format not in IN_SESSION] for gpu in gpus}
    rows = [sample(cube, FITTED) for each in cubes.values() for cube in each]
    found: dict[tuple[str, str], float] = {}
    for gpu, mine in cubes.items():
        if not mine:
            continue
        named = with_values(fitted([each for each in rows if each.gpu != gpu]))
        errors = [np.abs(np.expm1(sample(cube, SCORED).errors(named))) for cube in mine]
        found.update({(gpu, c.name): float(np.median(e)) for c, e in zip(mine, errors, strict=True)})
        found[gpu, "all"] = float(np.median(np.concatenate(errors)))
    return found


def sample(cube: Cube, size: int) -> Rows:
    """A fixed random sample of a table's rows."""
    seconds = cube.seconds
    known = np.flatnonzero(np.isfinite(seconds))
    chosen = np.random.default_rng(0).choice(known, min(size, known.size), replace=False)
    m, n, k = (axis.reshape(-1)[chosen] for axis in np.meshgrid(cube.m, cube.n, cube.k, indexing="ij"))
    specs = [Gemm(width, depth, *cube.spec) for width, depth in zip(n, k, strict=True)]
    return Rows(cube.gpu, cube.name, m, specs, seconds.reshape(-1)[chosen])


def fitted(rows: Sequence[Rows]) -> dict[str, float]:
    """The best values of NAMES."""
    from scipy.optimize import minimize

    start = shipped_values()
    scale = np.array([start[name] for name in NAMES])

    def loss(x: Array) -> float:
        named = with_values(dict(zip(NAMES, np.clip(x, 0.5, 2.0) * scale, strict=True)))
        return float(np.mean([np.minimum(np.abs(each.errors(named)), 1.0).mean() for each in rows]))

    options = {"maxfev": 250, "xatol": 3e-3, "fatol": 3e-5, "adaptive": True}
    found = minimize(loss, np.ones(len(NAMES)), method="Nelder-Mead", options=options)
    return dict(zip(NAMES, np.clip(found.x, 0.5, 2.0) * scale, strict=True))


def shipped_values() -> dict[str, float]:
    """NAMES as planc ships them."""
    named = efficiencies()
    peaks = named.values["gemm_peak"].by_precision
    return {name: named.value(name) for name in NAMES[:5]} | {"fp8": peaks["fp8"], "fp4": peaks["fp4"]}


def with_values(values: Mapping[str, float]) -> Efficiencies:
    """The shipped efficiencies with other values of NAMES, and nothing measured on single GPUs."""
    named = efficiencies()
    changed = {}
    for name in NAMES[:5]:
        update = {"value": values[name], "by_gpu": {}}
        if name == "gemm_peak":
            update["by_precision"] = {"fp8": values["fp8"], "int8": values["fp8"], "fp4": values["fp4"]}
        changed[name] = named.values[name].model_copy(update=update)
    return named.model_copy(update={"values": {**named.values, **changed}})
