"""Pointwise kernels: one curve of seconds over bytes per GPU and engine.

Made from `scale_matrix` rows, a static cast of [m, k] from bf16 to fp8: the plainest streaming kernel there
is, 3 bytes per element moved. Rows of SGLang are left out (they time a cast in Python, 3-20 times slower than
the other engines' kernels), rows with k below 2,048 or above 16,384 (one block per row, so that narrow rows
take by their number and not by their bytes, up to eight times as long; few models' activations), and rows
faster than the others of the same size by more than half (latency 0 and the like).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from planc.cost_model import catalogue
from planc.cost_model.features import Array
from planc.cost_model.fitting import Score, sources
from planc.cost_model.measured.pointwise import LAUNCH_S, ideal_seconds
from planc.cost_model.profile import Grid, Profile, Table, TableInfo
from planc.cost_model.roofline import Roofline

#: bytes moved at which curves are stored
NODES = np.array([2.0**power for power in range(10, 34)])
BYTES_PER_ELEMENT = 3.0
NARROWEST, WIDEST = 2048, 16384


def fit(folder: Path) -> Iterator[Profile]:
    for gpu in dict.fromkeys(sources.GPUS.values()):
        tables = [
            _table(source, size, seconds, dropped) for source, size, seconds, dropped in _rows(folder, gpu)
        ]
        if tables:
            yield Profile(gpu, "pointwise", tuple(tables))


def score(folder: Path) -> Iterator[Score]:
    """`physics` is the roofline, whose two pointwise numbers are the same for all GPUs, on the rows that take
    longer than its floor; a bare cast has a lower one than the kernels that it stands for."""
    for gpu in dict.fromkeys(sources.GPUS.values()):
        roofline = Roofline(catalogue.gpu(gpu))
        price = roofline.elementwise(np.ones((1, 1)))
        for source, size, seconds, _ in _rows(folder, gpu):
            error = np.abs(price(size[None]).seconds[0] / seconds - 1.0)[seconds > roofline.elementwise_floor]
            name = f"{source.engine}/stream"
            yield Score(
                "pointwise",
                gpu,
                name,
                size.size,
                _held_out(catalogue.gpu(gpu), size, seconds),
                float(np.median(error)),
            )


def _rows(folder: Path, gpu: str) -> Iterator[tuple[sources.Source, Array, Array, int]]:
    """(source, bytes [rows], seconds [rows], rows set aside)."""
    for source in sources.tables(folder, "quantize", "scale_matrix_perf", gpu=gpu):
        if source.engine == "sglang":
            continue
        frame: Any = source.read()
        every = len(frame)
        frame = frame[frame["k"].between(NARROWEST, WIDEST) & (frame["latency"] > 0)]
        size = (frame["m"] * frame["k"]).to_numpy() * BYTES_PER_ELEMENT
        seconds = frame["latency"].to_numpy() * 1e-3
        typical = _at(catalogue.gpu(gpu), size, _curve(catalogue.gpu(gpu), size, seconds))
        kept = seconds > 0.5 * typical
        yield source, size[kept], seconds[kept], every - int(kept.sum())


def _table(source: sources.Source, size: Array, seconds: Array, dropped: int) -> Table:
    gpu = catalogue.gpu(source.gpu)
    info = TableInfo(
        name=f"{source.engine}/stream",
        key={"engine": source.engine},
        axes=("bytes",),
        ideal={"bytes_s": gpu.memory_bytes_s, "launch_s": LAUNCH_S},
        rows=size.size,
        dropped=dropped,
        error=_held_out(gpu, size, seconds),
        source=f"{sources.SOURCE}, {source.engine} {source.version}",
        date=sources.DATE,
        note="static cast of bf16 to fp8 (scale_matrix)",
    )
    return Table(info, (NODES,), _curve(gpu, size, seconds))


def _curve(gpu: catalogue.Gpu, size: Array, seconds: Array) -> Array:
    """ln(seconds / ideal) at NODES: medians of the rows within half an octave, gaps interpolated."""
    logs = np.log(seconds / ideal_seconds(size, gpu.memory_bytes_s))
    octave = np.clip(np.round(np.log2(size / NODES[0])), 0, NODES.size - 1)
    found = np.array(
        [np.median(logs[octave == i]) if (octave == i).any() else np.nan for i in range(NODES.size)]
    )
    known = ~np.isnan(found)
    return np.asarray(np.interp(np.log(NODES), np.log(NODES[known]), found[known]))


def _at(gpu: catalogue.Gpu, size: Array, curve: Array) -> Array:
    return np.asarray(np.exp(Grid((NODES,), curve).at(size)) * ideal_seconds(size, gpu.memory_bytes_s))


def _held_out(gpu: catalogue.Gpu, size: Array, seconds: Array) -> float:
    """Median error on every tenth row, by size, which the curve is made without."""
    out = np.zeros(size.size, dtype=bool)
    out[np.argsort(size, kind="stable")[::10]] = True
    predicted = _at(gpu, size[out], _curve(gpu, size[~out], seconds[~out]))
    return float(np.median(np.abs(predicted / seconds[out] - 1.0)))
