"""Rows of the dense-product tables, read and cleaned.

The tables time a whole linear layer, and hold defects. What is done to the rows, in this order:

1. Rows with n or k below 128 are left out; narrower products take the residual of 128.
2. *Quantization comes off.* Rows of formats with quantized activations hold the kernel that quantizes them:
   at small m they sit the time of that kernel above what half the bytes of bf16 should take, and at large m
   and small n they grow with m k as it does; without it the engines agree. planc prices quantization as a
   kernel of its own (or as fused), so it is taken off here: for per-token fp8 the engine's own `computescale`
   + `scale_matrix` rows, for blocks and fp4 one pass over the activations (`scale_matrix`), and where an
   engine's rows are void (SGLang times a cast in Python) the cheapest other engine's. Tables of weight-only
   formats and int8 were timed in a TensorRT session: what their smallest products take longer than bf16's
   comes off too. At least a quarter of a row stays.
3. *Defects.* A table whose median row with m <= 128 takes more than 1.5 times the cheapest engine's is a
   defect of the collector, not a kernel (vLLM's `fp8_block`), and is left out whole; so are single rows
   more than 3 times the cheapest engine's, and rows faster than their weights come from memory: they lay
   in the cache, where a model's layers evict each other (GPUs with slow memory and a large L2).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from planc.cost_model import catalogue
from planc.cost_model.features import Array
from planc.cost_model.fitting import sources
from planc.cost_model.formats import fmt
from planc.cost_model.kernels import Gemm
from planc.cost_model.measured.gemm import ideal_seconds, peaks

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
#: formats whose rows hold the quantization of the activations, and those timed in a TensorRT session
QUANTIZES, IN_SESSION = ("fp8", "fp8_block", "nvfp4"), ("int8_wo", "int4_wo", "sq")
#: narrower products are not tabulated
LEAST = 128
#: a table is a defect beyond this multiple of the cheapest engine's, at small m; a row at any m
DEFECT_TABLE, DEFECT_ROW = 1.5, 3.0
#: of a row that stays when what is not the product comes off
STAYS = 0.25


@dataclass(frozen=True, slots=True, eq=False)
class Cube:
    """One table on the full grid [m, n, k] of its axes.

    measured   seconds of the whole layer as the collector timed it; NaN where it did not
    besides    seconds of it that are not the product, [m, 1, k] or one number
    dropped    rows set aside; `note` says why, and what came off
    """

    gpu: str
    engine: str
    version: str
    format: str
    m: Array
    n: Array
    k: Array
    measured: Array
    besides: Array | float = 0.0
    dropped: int = 0
    note: str = ""

    @property
    def name(self) -> str:
        return f"{self.engine}/{self.format}"

    @property
    def spec(self) -> tuple[str, str]:
        return FORMATS[self.format]

    @property
    def rows(self) -> int:
        """Measured ones."""
        return int(np.isfinite(self.measured).sum())

    @property
    def seconds(self) -> Array:
        """Of the product alone."""
        return np.maximum(self.measured - self.besides, STAYS * self.measured)

    def without(self, rows: Any) -> Cube:
        """The same less the rows where `rows` [m, n, k] (or what broadcasts to it) is true."""
        return replace(self, measured=np.where(rows, np.nan, self.measured))

    def saying(self, what: str) -> Cube:
        return replace(self, note=f"{self.note}; {what}" if self.note else what)

    def ideal(self) -> Array:
        """Seconds of the ideal on the same grid."""
        weights, activations = self.spec
        of = peaks(catalogue.gpu(self.gpu), weights, activations)
        grids = np.meshgrid(self.m, self.n, self.k, indexing="ij")
        return ideal_seconds(*grids, Gemm(1, 1, weights, activations), of)

    def read_seconds(self) -> Array:
        """[n, k]: reading the weights once at the full bandwidth of memory."""
        size = self.n[:, None] * self.k * fmt(self.spec[0]).bytes
        return np.asarray(size / catalogue.gpu(self.gpu).memory_bytes_s)


def read(folder: Path, gpu: str) -> list[Cube]:
    """The tables of one GPU: products alone, without defects."""
    raw = [cube for source in sources.tables(folder, "gemm", "gemm_perf", gpu=gpu) for cube in _cubes(source)]
    casts = _casts(folder, gpu)
    return _without_defects([_alone(cube, raw, casts) for cube in raw])


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


def _casts(folder: Path, gpu: str) -> dict[str, tuple[Any, Any]]:
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


def _alone(cube: Cube, cubes: Sequence[Cube], casts: Mapping[str, tuple[Any, Any]]) -> Cube:
    """With what is not the product set apart."""
    if cube.format in QUANTIZES and casts:
        whose = "its own" if cube.engine in casts else "the cheapest other engine's"
        what = "computescale + scale_matrix" if cube.format == "fp8" else "scale_matrix"
        net = replace(cube, besides=_quantization(cube, casts))
        return net.saying(f"net of activation quantization, by {whose} {what} rows")
    plain = [c for c in cubes if (c.engine, c.format) == (cube.engine, "bfloat16")]
    if cube.format in IN_SESSION and plain:
        least = [
            float(np.nanmedian(c.measured[c.m <= 16][:, c.n <= 512][:, :, c.k <= 512]))
            for c in (cube, plain[0])
        ]
        session = max(least[0] - least[1], 0.0)
        return replace(cube, besides=session).saying(f"net of {1e6 * session:.1f} us around the kernel")
    return cube


def _quantization(cube: Cube, casts: Mapping[str, tuple[Any, Any]]) -> Array:
    """[m, 1, k] seconds of quantizing the activations."""
    grids = []
    for engine in [cube.engine] if cube.engine in casts else sorted(casts):
        scales, cast = casts[engine]
        total = scales + cast if cube.format == "fp8" else cast
        wide = total.unstack().reindex(index=cube.m, columns=cube.k)
        wide = wide.interpolate(axis=0, limit_direction="both").interpolate(axis=1, limit_direction="both")
        grids.append(wide.to_numpy())
    return np.asarray(np.min(grids, axis=0))[:, None, :]


def _without_defects(cubes: Sequence[Cube]) -> list[Cube]:
    kept: list[Cube] = []
    gone: list[tuple[Cube, float]] = []
    for cube in cubes:
        others = [_aligned(other, cube) for other in cubes if other.format == cube.format]
        with np.errstate(all="ignore"):
            ratio = cube.seconds / np.fmin.reduce(others)
            small = float(np.nanmedian(ratio[cube.m <= 128]))
            bad = (ratio > DEFECT_ROW) | (cube.seconds < cube.read_seconds())
        if small > DEFECT_TABLE:
            gone.append((cube, small))
            continue
        if bad.any():
            said = f"rows over {DEFECT_ROW:g} times the cheapest engine's, or read from cache, dropped"
            cube = replace(cube.without(bad), dropped=int(bad.sum())).saying(said)
        kept.append(cube)
    for out, small in gone:
        said = f"{out.name} left out: {out.rows} rows, {small:.1f} times the cheapest engine's at m <= 128"
        kept = [cube.saying(said) if cube.format == out.format else cube for cube in kept]
    return kept


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
