"""GEMM tables: one per GPU, engine and number format, from the rows that `gemm_rows` cleans.

1. *Padding envelope.* A product of m rows can always be padded, so a latency above
   envelope(m) = min over m' >= m of latency(m') is odd. What a row has in excess that its eight neighbours
   in n and k have too (their median) is a step of the kernel's tiles, and stays: engines don't pad there.
   What they have not is a spike of the measurement, and goes. Up to m = 16, one tile of any kernel,
   what exceeds the median of these rows by a fifth is cut to it (on Blackwell vLLM's fp8 rows of m = 1 lie
   17 us above those of m = 2).
2. Logarithms of latency / ideal are brought onto fewer m by least squares on hat functions, and made to
   never fall with m.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from planc.cost_model import catalogue
from planc.cost_model.features import Array
from planc.cost_model.fitting import Score, sources
from planc.cost_model.fitting.gemm_rows import STAYS, Cube, read
from planc.cost_model.measured.gemm import ascending, peaks
from planc.cost_model.profile import Grid, Profile, Table, TableInfo

#: rows of the left operand that tables keep: both sides of the steps that tiles make
NODES = np.array(
    [
        *(1, 2, 4, 8, 16, 17, 32, 33, 48, 64, 65, 80, 96, 97, 112, 128, 129, 160, 192, 193, 224, 256, 257),
        *(512, 513, 768, 769, 1024, 1025, 1280, 1281, 1536, 1537, 1792, 1793, 2048, 2049, 2560, 2561),
        *(3072, 3073, 3584, 3585, 4096, 4097, 8192, 16384, 32768),
    ],
    dtype=np.float64,
)
#: nats that values are rounded to; repeat measurements differ by more
STEP = 0.004
#: rows that fit one tile of any kernel: fewer take no longer
ONE_TILE = 16


def fit(folder: Path) -> Iterator[Profile]:
    """A profile per GPU. `error` of a table is that of its held-out points, see `score`."""
    for gpu in dict.fromkeys(sources.GPUS.values()):
        tables = tuple(_table(cube) for cube in read(folder, gpu))
        if tables:
            yield Profile(gpu, "gemm", tables)


def score(folder: Path) -> Iterator[Score]:
    """Each table fitted without a tenth of its points, and the roofline fitted without the GPU; at the end of
    each GPU's tables "all" is the median of the former, and of the latter over all rows."""
    from planc.cost_model.fitting.gemm_physics import held_out_gpu

    gpus = list(dict.fromkeys(sources.GPUS.values()))
    physics = held_out_gpu(folder, gpus)
    for gpu in gpus:
        cubes = read(folder, gpu)
        errors, rows = [held_out(cube) for cube in cubes], [cube.rows for cube in cubes]
        for cube, error in zip(cubes, errors, strict=True):
            yield Score("gemm", gpu, cube.name, cube.rows, error, physics.get((gpu, cube.name), math.nan))
        if cubes:
            yield Score("gemm", gpu, "all", sum(rows), float(np.median(errors)), physics[gpu, "all"])


def held_out(cube: Cube, share: int = 10) -> float:
    """Median error of whole layers (the product and what was timed besides) on a tenth of the (m, n, k),
    which the table is fitted without."""
    m, n, k = np.meshgrid(cube.m, cube.n, cube.k, indexing="ij")
    out = (_hash(m, n, k) % share == 0) & np.isfinite(cube.measured)
    grid = Grid((nodes_of(cube), cube.n, cube.k), _values(cube.without(out)))
    alone = np.exp(grid.at(m, n, k)) * cube.ideal()
    whole = alone + np.minimum(cube.besides, (1 - STAYS) * cube.measured)
    return float(np.median(np.abs(whole[out] / cube.measured[out] - 1.0)))


def _hash(*axes: Array) -> Any:
    """A deterministic number per point, whatever the order of rows (Fibonacci hashing)."""
    mixed = np.zeros(axes[0].shape, dtype=np.uint64)
    for axis in axes:
        mixed = (mixed ^ axis.astype(np.uint64)) * np.uint64(0x9E3779B97F4A7C15)
        mixed ^= mixed >> np.uint64(29)
    return mixed >> np.uint64(33)


def _table(cube: Cube) -> Table:
    weights, activations = cube.spec
    info = TableInfo(
        name=cube.name,
        key={"engine": cube.engine, "weights": weights, "activations": activations},
        axes=("m", "n", "k"),
        ideal=peaks(catalogue.gpu(cube.gpu), weights, activations),
        rows=cube.rows,
        dropped=cube.dropped,
        error=held_out(cube),
        source=f"{sources.SOURCE}, {cube.engine} {cube.version}",
        date=sources.DATE,
        note=cube.note,
    )
    return Table(info, (nodes_of(cube), cube.n, cube.k), _values(cube))


def _values(cube: Cube) -> Array:
    """ln(seconds / ideal) at NODES: without spikes, gaps filled, hat functions over m by least squares."""
    with np.errstate(invalid="ignore"):
        logs = np.log(_without_spikes(cube.m, cube.seconds) / cube.ideal())
    logs = _filled((np.log(cube.m), np.log(cube.n), np.log(cube.k)), logs)
    nodes = nodes_of(cube)
    hats = np.stack([np.interp(np.log(cube.m), np.log(nodes), row) for row in np.eye(nodes.size)], axis=1)
    fitted = np.einsum("im,mnk->ink", np.linalg.pinv(hats), logs)
    ideal = replace(cube, m=nodes).ideal()
    fitted = np.log(ascending(np.exp(fitted) * ideal) / ideal)
    return np.asarray(np.round(fitted / STEP) * STEP)


def nodes_of(cube: Cube) -> Array:
    """The table's m axis: those of NODES that were measured."""
    return NODES[np.isin(NODES, cube.m)]


def _without_spikes(m: Array, seconds: Array) -> Array:
    """Excess over the padding envelope cut to the median excess of the neighbours in n and k."""
    known = np.where(np.isnan(seconds), np.inf, seconds)
    envelope = np.minimum.accumulate(known[::-1])[::-1]
    with np.errstate(invalid="ignore"):
        excess = seconds / envelope
    padded = np.pad(excess, ((0, 0), (1, 1), (1, 1)), constant_values=np.nan)
    rows, columns = excess.shape[1:]
    around = [
        padded[:, i : i + rows, j : j + columns] for i in range(3) for j in range(3) if (i, j) != (1, 1)
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # no neighbour was measured
        cut = envelope * np.fmin(excess, np.nanmedian(around, axis=0))
        few = seconds[m <= ONE_TILE]
        usual = np.nanmedian(few, axis=0)
        cut[m <= ONE_TILE] = np.where(few > 1.2 * usual, usual, few)
    return np.where(np.isnan(seconds), np.nan, cut)


def _filled(axes: tuple[Array, ...], values: Array) -> Array:
    """Gaps take the mean of what interpolation along n and along k gives, for tiles step in m; where neither
    has neighbours on both sides, interpolation along m, then the nearest value along any axis."""
    every = range(len(axes))
    for numbers, inside in ((every[1:], True), (every[:1], True), (every, False)):
        while np.isnan(values).any():
            found = [_along(axes[number], values, number, inside) for number in numbers]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)  # all of them unknown
                better = np.where(np.isnan(values), np.nanmean(found, axis=0), values)
            done = np.isnan(better).sum() == np.isnan(values).sum()
            values = better
            if done:
                break
    return values


def _along(axis: Array, values: Array, number: int, inside: bool) -> Array:
    """Gaps interpolated along one axis; beyond its known ends NaN, or (not `inside`) the end's value."""
    lines = np.moveaxis(values, number, 0).reshape(axis.size, -1).copy()
    for column in np.flatnonzero(np.isnan(lines).any(axis=0)):
        line = lines[:, column]
        known = ~np.isnan(line)
        if known.any():
            ends = np.nan if inside else None
            line[~known] = np.interp(axis[~known], axis[known], line[known], ends, ends)
    shape = np.moveaxis(values, number, 0).shape
    return np.moveaxis(lines.reshape(shape), 0, number)
