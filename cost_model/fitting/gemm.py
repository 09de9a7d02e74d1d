"""GEMM tables: one per GPU, engine and number format, from kernels that were timed alone.

What is done to the rows, in this order:

1. Rows with n or k below 128 are left out; narrower products take the residual of 128.
2. *Quantization comes off.* The collectors time a whole linear layer, so rows of formats with quantized
   activations hold the kernel that quantizes them: at small m they sit the time of that kernel above bf16, at
   large m and small n they grow with m k as it does, and without it every engine's fp8 row is 0.5-0.8 of its
   bf16 row. planc prices quantization as a kernel of its own (or as fused), so it is taken off here: for
   per-token fp8 the engine's own `computescale` + `scale_matrix` rows, for blocks one pass over the
   activations (`scale_matrix`), and where an engine's rows are void (SGLang times a cast in Python) the
   cheapest other engine's. At least a quarter of a row stays.
3. *Padding envelope.* A product of m rows can always be padded, so a latency above
   envelope(m) = min over m' >= m of latency(m') is odd. What a row has in excess that its eight neighbours
   in n and k have too (their median) is a step of the kernel's tiles, and stays: engines don't pad there.
   What they have not is a spike of the measurement, and goes. Up to m = 16, one tile of any kernel,
   what exceeds the median of these rows by a fifth is cut to it (on Blackwell vLLM's fp8 rows of m = 1 lie
   17 us above those of m = 2).
4. *Defects.* A table whose median row with m <= 128 takes more than 1.5 times the cheapest engine's is a
   defect of the collector, not a kernel (vLLM's `fp8_block`), and is left out whole; so are single rows
   more than 3 times the cheapest engine's, and rows faster than their weights come from memory: they lay
   in the cache, where a model's layers evict each other (GPUs with slow memory and a large L2).
5. Logarithms of latency / ideal are brought onto fewer m by least squares on hat functions, and made to
   never fall with m.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from planc.cost_model import catalogue
from planc.cost_model.features import Array
from planc.cost_model.fitting import Score, sources
from planc.cost_model.formats import fmt
from planc.cost_model.kernels import Gemm
from planc.cost_model.measured.gemm import ascending, ideal_seconds, peaks
from planc.cost_model.profile import Grid, Profile, Table, TableInfo

#: collectors' names of formats -> (weights, activations)
FORMATS = {
    "bfloat16": ("bf16", "bf16"),
    "fp8": ("fp8", "fp8"),
    "fp8_block": ("fp8_block", "fp8"),
    "nvfp4": ("nvfp4", "nvfp4"),
    "int8_wo": ("int8", "bf16"),
    "int4_wo": ("w4a16", "bf16"),
    "sq": ("int8", "int8"),
}

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
#: narrower products are not tabulated
LEAST = 128
#: rows that fit one tile of any kernel: fewer take no longer
ONE_TILE = 16
#: a table is a defect beyond this multiple of the cheapest engine's, at small m
DEFECT_TABLE, DEFECT_ROW = 1.5, 3.0
#: of a row that stays when quantization comes off
STAYS = 0.25


@dataclass(frozen=True, slots=True, eq=False)
class Cube:
    """One table on the full grid [m, n, k] of its axes.

    measured       seconds of the whole layer as the collector timed it; NaN where it did not
    quantization   seconds of it that go to quantizing the activations, [m, 1, k]; 0 where none do
    """

    gpu: str
    engine: str
    version: str
    format: str
    m: Array
    n: Array
    k: Array
    measured: Array
    quantization: Array | float = 0.0

    @property
    def rows(self) -> int:
        """Measured ones."""
        return int(np.isfinite(self.measured).sum())

    @property
    def seconds(self) -> Array:
        """Of the product alone."""
        return np.maximum(self.measured - self.quantization, STAYS * self.measured)

    @property
    def name(self) -> str:
        return f"{self.engine}/{self.format}"

    @property
    def spec(self) -> tuple[str, str]:
        return FORMATS[self.format]

    def read_seconds(self) -> Array:
        """[n, k]: reading the weights once at the full bandwidth of memory."""
        size = self.n[:, None] * self.k * fmt(self.spec[0]).bytes
        return np.asarray(size / catalogue.gpu(self.gpu).memory_bytes_s)

    def without(self, rows: Any) -> Cube:
        """The same less the rows where `rows` [m, n, k] (or what broadcasts to it) is true."""
        return replace(self, measured=np.where(rows, np.nan, self.measured))

    def ideal(self) -> Array:
        """Seconds of the ideal on the same grid."""
        weights, activations = self.spec
        of = peaks(catalogue.gpu(self.gpu), weights, activations)
        grids = np.meshgrid(self.m, self.n, self.k, indexing="ij")
        return ideal_seconds(*grids, Gemm(1, 1, weights, activations), of)


def fit(folder: Path) -> Iterator[Profile]:
    """A profile per GPU. `error` of a table is that of its held-out shapes, see `score`."""
    for gpu in dict.fromkeys(sources.GPUS.values()):
        kept, dropped = read(folder, gpu)
        tables = [_table(cube, note, dropped.get(cube.name, 0)) for cube, note in kept]
        if tables:
            yield Profile(gpu, "gemm", tuple(tables))


def score(folder: Path) -> Iterator[Score]:
    """Each table fitted without a tenth of its points, and the roofline fitted without the GPU; at the end of
    each GPU's tables "all" is the median of the former, and of the latter over all rows."""
    from planc.cost_model.fitting.gemm_physics import held_out_gpu

    gpus = list(dict.fromkeys(sources.GPUS.values()))
    physics = held_out_gpu(folder, gpus)
    for gpu in gpus:
        cubes = [cube for cube, _ in read(folder, gpu)[0]]
        errors, rows = [held_out(cube) for cube in cubes], [cube.rows for cube in cubes]
        for cube, error in zip(cubes, errors, strict=True):
            yield Score("gemm", gpu, cube.name, cube.rows, error, physics.get((gpu, cube.name), math.nan))
        if cubes:
            yield Score("gemm", gpu, "all", sum(rows), float(np.median(errors)), physics[gpu, "all"])


def read(folder: Path, gpu: str) -> tuple[list[tuple[Cube, str]], Mapping[str, int]]:
    """Cubes of one GPU, net of quantization and without defects, each with a note on what was done to it;
    and rows set aside by table."""
    raw = [cube for source in sources.tables(folder, "gemm", "gemm_perf", gpu=gpu) for cube in _cubes(source)]
    casts = _quantization(folder, gpu)
    net = [(_net(cube, casts), _said(cube, casts)) for cube in raw]
    return _without_defects(net)


def held_out(cube: Cube, share: int = 10) -> float:
    """Median error of whole layers (product and quantization) on a tenth of the (m, n, k), which the table
    is fitted without."""
    m, n, k = np.meshgrid(cube.m, cube.n, cube.k, indexing="ij")
    out = (_hash(m, n, k) % share == 0) & np.isfinite(cube.measured)
    grid = Grid((nodes_of(cube), cube.n, cube.k), _values(cube.without(out)))
    alone = np.exp(grid.at(m, n, k)) * cube.ideal()
    whole = alone + np.minimum(cube.quantization, (1 - STAYS) * cube.measured)
    return float(np.median(np.abs(whole[out] / cube.measured[out] - 1.0)))


def _hash(*axes: Array) -> Any:
    """A deterministic number per point, whatever the order of rows (Fibonacci hashing)."""
    mixed = np.zeros(axes[0].shape, dtype=np.uint64)
    for axis in axes:
        mixed = (mixed ^ axis.astype(np.uint64)) * np.uint64(0x9E3779B97F4A7C15)
        mixed ^= mixed >> np.uint64(29)
    return mixed >> np.uint64(33)


def _table(cube: Cube, note: str, dropped: int) -> Table:
    weights, activations = cube.spec
    info = TableInfo(
        name=cube.name,
        key={"engine": cube.engine, "weights": weights, "activations": activations},
        axes=("m", "n", "k"),
        ideal=peaks(catalogue.gpu(cube.gpu), weights, activations),
        rows=cube.rows,
        dropped=dropped,
        error=held_out(cube),
        source=f"{sources.SOURCE}, {cube.engine} {cube.version}",
        date="2026-11",
        note=note,
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


# -- reading and cleaning ----------------------------------------------------------------


def _cubes(source: sources.Source) -> Iterator[Cube]:
    frame = source.read()
    frame = frame[(frame["n"] >= LEAST) & (frame["k"] >= LEAST) & (frame["latency"] > 0)]
    for name, rows in frame.groupby("gemm_dtype"):
        if name not in FORMATS or rows[["n", "k"]].drop_duplicates().shape[0] < 50:
            continue
        m, n, k = (np.sort(rows[axis].unique()).astype(np.float64) for axis in ("m", "n", "k"))
        seconds = np.full((m.size, n.size, k.size), np.nan)
        at = tuple(np.searchsorted(axis, rows[name]) for axis, name in ((m, "m"), (n, "n"), (k, "k")))
        seconds[at] = rows["latency"].to_numpy() * 1e-3
        yield Cube(source.gpu, source.engine, source.version, str(name), m, n, k, seconds)


def _quantization(folder: Path, gpu: str) -> dict[str, tuple[Any, Any]]:
    """By engine: seconds of (finding scales, casting) as series over (m, k). Void tables are left out."""
    found: dict[str, tuple[Any, Any]] = {}
    for scales, casts in zip(
        sources.tables(folder, "quantize", "computescale_perf", gpu=gpu),
        sources.tables(folder, "quantize", "scale_matrix_perf", gpu=gpu),
        strict=True,
    ):
        one, two = (s.read().groupby(["m", "k"])["latency"].median() * 1e-3 for s in (scales, casts))
        if float(one.median()) > 0:
            found[scales.engine] = one, two
    return found


def _net(cube: Cube, casts: Mapping[str, tuple[Any, Any]]) -> Cube:
    off = _overhead(cube, casts)
    return cube if off is None else replace(cube, quantization=off)


def _overhead(cube: Cube, casts: Mapping[str, tuple[Any, Any]]) -> Array | None:
    """[m, 1, k] seconds of the quantization inside a row; None where there is none or it is not known."""
    if cube.format not in ("fp8", "fp8_block", "nvfp4") or not casts:
        return None
    engines = [cube.engine] if cube.engine in casts else sorted(casts)
    grids = []
    for engine in engines:
        scales, cast = casts[engine]
        total = scales + cast if cube.format == "fp8" else cast
        wide = total.unstack().reindex(index=cube.m, columns=cube.k)
        wide = wide.interpolate(axis=0, limit_direction="both").interpolate(axis=1, limit_direction="both")
        grids.append(wide.to_numpy())
    return np.asarray(np.min(grids, axis=0))[:, None, :]


def _said(cube: Cube, casts: Mapping[str, tuple[Any, Any]]) -> str:
    if _overhead(cube, casts) is None:
        return ""
    whose = "its own" if cube.engine in casts else "the cheapest other engine's"
    what = "computescale + scale_matrix" if cube.format == "fp8" else "scale_matrix"
    return f"net of activation quantization, by {whose} {what} rows"


def _without_defects(cubes: list[tuple[Cube, str]]) -> tuple[list[tuple[Cube, str]], Mapping[str, int]]:
    kept: list[tuple[Cube, str]] = []
    dropped: dict[str, int] = {}
    for cube, note in cubes:
        others = [_aligned(other, cube) for other, _ in cubes if other.format == cube.format]
        with np.errstate(invalid="ignore", all="ignore"):
            ratio = cube.seconds / np.fmin.reduce(others)
            small = float(np.nanmedian(ratio[cube.m <= 128]))
            bad = (ratio > DEFECT_ROW) | (cube.seconds < cube.read_seconds())
        if small > DEFECT_TABLE:
            continue
        dropped[cube.name] = int(bad.sum())
        if bad.any():
            said = f"rows over {DEFECT_ROW:g} times the cheapest engine's, or read from cache, dropped"
            note = f"{note}; " * bool(note) + said
        kept.append((cube.without(bad), note))
    return kept, dropped


def _aligned(other: Cube, cube: Cube) -> Array:
    """Another engine's seconds on this cube's grid; infinite where it has no such row."""
    out = np.full(cube.seconds.shape, np.inf)
    common = [
        np.intersect1d(a, b, return_indices=True)[1:]
        for a, b in ((cube.m, other.m), (cube.n, other.n), (cube.k, other.k))
    ]
    mine, theirs = np.ix_(*(c[0] for c in common)), np.ix_(*(c[1] for c in common))
    found = other.seconds[theirs]
    out[mine] = np.where(np.isnan(found), np.inf, found)
    return out
