"""Attention profiles from measured rows: see `planc.cost_model.measured.attention` for what they hold."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse
import scipy.sparse.linalg

from planc.cost_model import catalogue
from planc.cost_model.catalogue import Gpu
from planc.cost_model.features import Array
from planc.cost_model.fitting import Score, sources
from planc.cost_model.measured.attention import Ideal
from planc.cost_model.profile import Grid, Profile, Table, TableInfo

_DATE = "2026-11-21"
_LAUNCH_S = 5e-6
_ROUNDED = 8e-3  # nat; what is finer than repeat measurements only costs bytes
_OUTLIER = 0.7  # nat off the fit: set aside
_TIES = 0.03  # weight of a difference between neighbouring nodes, against 1 of a row

_SHORTEST = 16  # tokens: decode contexts below it cost the same
_HEADS = 2.0 ** np.arange(15)
_GROUPS = 2.0 ** np.arange(7)


@dataclass(frozen=True, slots=True)
class Rows:
    """Measured rows of one kernel: coordinates, work, and milliseconds, all [rows]."""

    name: str
    key: dict[str, str | float | int]
    source: str
    precision: str
    heads: Array
    reach: Array
    group: Array
    flops: Array
    cached: Array
    new: Array
    seconds: Array

    def take(self, mask: Array) -> Rows:
        kept = {name: getattr(self, name)[mask] for name in _COLUMNS}
        return Rows(self.name, self.key, self.source, self.precision, **kept)


_COLUMNS = ("heads", "reach", "group", "flops", "cached", "new", "seconds")


def fit(folder: Path) -> Iterator[Profile]:
    """A profile per GPU with tables."""
    for gpu in dict.fromkeys(sources.GPUS.values()):
        known = catalogue.gpu(gpu)
        tables = []
        for rows in softmax_rows(folder, gpu):
            held = _held_out(rows)
            error = _error(_table(rows.take(~held), known, 0.0), rows.take(held))
            tables.append(_table(rows, known, error))
        if tables:
            yield Profile(gpu, "attention", tuple(tables))


def score(folder: Path) -> Iterator[Score]:
    for gpu in dict.fromkeys(sources.GPUS.values()):
        known = catalogue.gpu(gpu)
        for rows in softmax_rows(folder, gpu):
            held = _held_out(rows)
            error = _error(_table(rows.take(~held), known, 0.0), rows.take(held))
            yield Score("attention", gpu, rows.name, rows.seconds.size, error, float("nan"))


def softmax_rows(folder: Path, gpu: str) -> Iterator[Rows]:
    """Rows of MHA and GQA kernels of every engine, by phase, head dimension, cache format and window."""
    for part, table in (("prefill", "context_attention_perf"), ("decode", "generation_attention_perf")):
        for source in sources.tables(folder, "attention", table, gpu=gpu):
            frame = source.read()
            if "window_size" not in frame:
                frame = frame.assign(window_size=0)
            for (head_dim, window, cache), mine in frame.groupby(
                ["head_dim", "window_size", "kv_cache_dtype"]
            ):
                yield _softmax(source, part, int(head_dim), int(window), str(cache), mine)


def _softmax(source: sources.Source, part: str, head_dim: int, window: int, cache: str, frame: Any) -> Rows:
    arithmetic = frame["attn_dtype"].unique()
    if len(arithmetic) > 1:  # TensorRT-LLM multiplies in the cache's format, others widen it
        frame = frame[frame["attn_dtype"] == ("fp8" if source.engine == "trtllm" else "bfloat16")]
    frame = frame[frame["kernel_source"] == frame["kernel_source"].mode()[0]]
    precision = "fp8" if frame["attn_dtype"].iloc[0] == "fp8" else "bf16"
    batch, q, kv = (frame[c].to_numpy(float) for c in ("batch_size", "num_heads", "num_key_value_heads"))
    kv_bytes = 1.0 if cache == "fp8" else 2.0
    group, decode = q / kv, part == "decode"
    reach = frame["step"].to_numpy(float) + 1.0 if decode else frame["isl"].to_numpy(float)
    span = float(window or np.inf)
    tokens = batch if decode else batch * reach
    seen = np.minimum(reach, span)
    pairs = batch * (seen if decode else seen * (seen + 1) / 2 + (reach - seen) * seen)
    keys = batch * (seen if decode else reach)
    return Rows(
        name=f"{part} {source.engine} {head_dim} {cache} w{window}",
        key={
            "op": "softmax",
            "part": part,
            "engine": source.engine,
            "head_dim": head_dim,
            "kv_bytes": kv_bytes,
            "window": window,
            "precision": precision,
        },
        source=f"{sources.SOURCE}, {source.engine} {source.version}, {frame['kernel_source'].iloc[0]}",
        precision=precision,
        heads=batch * (kv if decode else q),
        reach=reach,
        group=group,
        flops=4.0 * head_dim * q * pairs,
        cached=2.0 * head_dim * kv * keys * kv_bytes,
        new=tokens * head_dim * (2.0 * (2.0 * q + 2.0 * kv) + 2.0 * kv * kv_bytes),
        seconds=frame["latency"].to_numpy(float) * 1e-3,
    )


def _table(rows: Rows, gpu: Gpu, error: float) -> Table:
    ideal = _ideal(rows, gpu)
    residual = np.log(rows.seconds / ideal.seconds(rows.flops, rows.cached, rows.new))
    reach = np.unique(rows.reach)
    groups = np.unique(rows.group)
    if rows.key["part"] == "decode":
        reach = reach[reach >= _SHORTEST]
    axes = (
        _HEADS[_HEADS <= rows.heads.max()],
        reach,
        _GROUPS[np.isin(_GROUPS, groups)] if np.isin(_GROUPS, groups).any() else groups,
    )
    values, dropped = _smooth(axes, (rows.heads, rows.reach, rows.group), residual)
    info = TableInfo(
        name=rows.name,
        key=rows.key,
        axes=("heads", "reach", "group"),
        ideal={"flops_s": ideal.flops_s, "bytes_s": ideal.bytes_s, "launch_s": ideal.launch_s},
        rows=int(rows.seconds.size),
        dropped=dropped,
        error=round(error, 4),
        source=rows.source,
        date=_DATE,
        note=f"dropped: more than {_OUTLIER} nat off the fit",
    )
    return Table(info, axes, values)


def _ideal(rows: Rows, gpu: Gpu) -> Ideal:
    return Ideal(gpu.peak_flops(rows.precision), gpu.memory_bytes_s, _LAUNCH_S)  # type: ignore[arg-type]


def _smooth(axes: tuple[Array, ...], coords: tuple[Array, ...], residual: Array) -> tuple[Array, int]:
    """Node values whose interpolation fits the rows best (least squares, rows off by more than `_OUTLIER`
    set aside), neighbours drawn together where rows say nothing; and the number of rows set aside."""
    shape = tuple(axis.size for axis in axes)
    inside = _weights(axes, coords)
    ties = scipy.sparse.vstack([_TIES * tie for tie in _differences(shape)])
    kept = np.ones(residual.size, dtype=bool)
    for _ in range(2):
        rows = inside[kept]
        normal = (rows.T @ rows + ties.T @ ties).tocsc()
        values = scipy.sparse.linalg.spsolve(normal, rows.T @ residual[kept])
        kept = np.abs(residual - inside @ values) <= _OUTLIER
    return np.round(values.reshape(shape) / _ROUNDED) * _ROUNDED, int(np.sum(~kept))


def _weights(axes: tuple[Array, ...], coords: tuple[Array, ...]) -> scipy.sparse.csr_matrix:
    """[rows, nodes]: shares of the nodes in a multilinear interpolation in the logarithms."""
    found = scipy.sparse.csr_matrix(np.ones((coords[0].size, 1)))
    for axis, at in zip(axes, coords, strict=True):
        position = np.interp(np.log(at), np.log(axis), np.arange(axis.size))
        low = np.minimum(np.floor(position), max(axis.size - 2, 0)).astype(int)
        high, part, row = np.minimum(low + 1, axis.size - 1), position - low, np.arange(at.size)
        one = scipy.sparse.coo_matrix(
            (np.r_[1 - part, part], (np.r_[row, row], np.r_[low, high])), (at.size, axis.size)
        )
        found = scipy.sparse.csr_matrix(_row_kron(found, one.tocsr()))
    return found


def _row_kron(left: scipy.sparse.csr_matrix, right: scipy.sparse.csr_matrix) -> scipy.sparse.csr_matrix:
    """Row by row the Kronecker product of two sparse matrices."""
    spread = scipy.sparse.kron(left, np.ones((1, right.shape[1]))).tocsr()
    tiled = scipy.sparse.kron(np.ones((1, left.shape[1])), right).tocsr()
    return spread.multiply(tiled).tocsr()


def _differences(shape: tuple[int, ...]) -> Iterator[scipy.sparse.csr_matrix]:
    """Between neighbouring nodes along each axis."""
    for axis, size in enumerate(shape):
        if size == 1:
            continue
        step = scipy.sparse.diags([-1.0, 1.0], [0, 1], (size - 1, size))
        before, after = int(np.prod(shape[:axis])), int(np.prod(shape[axis + 1 :]))
        yield scipy.sparse.kron(scipy.sparse.kron(scipy.sparse.eye(before), step), scipy.sparse.eye(after))


def _held_out(rows: Rows) -> Array:
    """A tenth of the rows, by a hash of their coordinates."""
    mixed = rows.heads * 7919.0 + rows.reach * 104729.0 + rows.group * 1299709.0 + rows.seconds.size
    return np.asarray(np.modf(np.abs(np.sin(mixed)) * 43758.5453)[0] < 0.1)


def _error(table: Table, rows: Rows) -> float:
    ideal = Ideal(table.info.ideal["flops_s"], table.info.ideal["bytes_s"], table.info.ideal["launch_s"])
    residual = Grid(table.axes, table.values).at(rows.heads, rows.reach, rows.group)
    found = ideal.seconds(rows.flops, rows.cached, rows.new) * np.exp(residual)
    return float(np.median(np.abs(found / rows.seconds - 1)))
