"""From samples to tables: logarithms of measured time over an ideal, on the grid that was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from planc.cost_model.calibration import TableDocument
from planc.cost_model.features import Array
from planc.cost_model.formats import fmt
from planc.cost_model.measured.device import ideal
from planc.cost_model.profile import Grid, OpFamily, Table, TableInfo
from planc.runtime.calibrate.samples import Run, Sample


@dataclass(frozen=True, slots=True)
class Peaks:
    """What ideals are computed with: FLOP/s, bytes/s, seconds."""

    flops_s: float
    bytes_s: float
    launch_s: float

    def entries(self) -> dict[str, float]:
        return {"flops_s": self.flops_s, "bytes_s": self.bytes_s, "launch_s": self.launch_s}


def products(run: Run, precision: str, peaks: Peaks, source: str, date: str) -> TableDocument | None:
    """The table of products in one precision; None where none was measured."""
    found = run.of("gemm", dtype=precision)
    width = fmt(precision).bytes
    out = 2.0 if width < 2 else width

    def work(case: Mapping[str, Any]) -> tuple[float, float]:
        m, n, k = case["m"], case["n"], case["k"]
        return 2.0 * m * n * k, width * (n * k + m * k) + out * m * n

    axes = {"m": "m", "n": "n", "k": "k"}
    return _table(
        "gemm", f"gemm {precision}", {"precision": precision}, found, axes, work, peaks, source, date
    )


def attention(
    run: Run, heads: tuple[int, int, int], part: str, peaks: Peaks, source: str, date: str
) -> TableDocument | None:
    """Decode or prefill of one shape of heads; peaks.flops_s is replaced by the best rate seen."""
    q_heads, kv_heads, dim = heads
    shape = {"q_heads": q_heads, "kv_heads": kv_heads, "dim": dim}
    found = [s for s in run.of("attention", **shape) if (s.case["new"] == 1) == (part == "decode")]
    if not found:
        return None

    def work(case: Mapping[str, Any]) -> tuple[float, float]:
        new, cached, sequences = case["new"], case["cached"], case["sequences"]
        pairs = sequences * (new * cached + new * (new + 1) / 2)
        moved = 2.0 * kv_heads * dim * sequences * (cached + 2 * new)
        return 4.0 * q_heads * dim * pairs, moved * fmt(case["dtype"]).bytes

    rate = max(work(sample.case)[0] / sample.seconds for sample in found)
    peaks = Peaks(rate, peaks.bytes_s, peaks.launch_s)
    key: dict[str, str | float] = {"part": part, "dim": dim, "group": q_heads / kv_heads}
    if part == "decode":
        axes = {"sequences": "sequences", "context": "cached"}
    else:
        axes = {"new": "new", "context": "cached"}
    name = f"attention {part} {q_heads}/{kv_heads} heads of {dim}"
    return _table("attention", name, key, found, axes, work, peaks, source, date)


def _table(
    family: OpFamily,
    name: str,
    key: Mapping[str, str | float | int],
    samples: Sequence[Sample],
    axes: Mapping[str, str],
    work: Any,
    peaks: Peaks,
    source: str,
    date: str,
) -> TableDocument | None:
    """axes: name of the axis -> field of the case ("cached" counts from 1). Cells that were not measured
    take their nearest neighbour's ratio along the first axis."""
    if not samples:
        return None
    at = lambda sample, field: sample.case[field] + (1 if field == "cached" else 0)  # noqa: E731
    ticks = [sorted({float(at(sample, field)) for sample in samples}) for field in axes.values()]
    info = TableInfo(
        name=name,
        key=dict(key),
        axes=tuple(axes),
        ideal=peaks.entries(),
        rows=len(samples),
        error=0.0,
        source=source,
        date=date,
    )
    values = np.full([len(axis) for axis in ticks], np.nan)
    bare = Table(info, tuple(np.array(axis) for axis in ticks), values)
    for sample in samples:
        where = tuple(axis.index(at(sample, field)) for axis, field in zip(ticks, axes.values(), strict=True))
        flops, nbytes = work(sample.case)
        values[where] = np.log(sample.seconds / float(ideal(bare, np.array(flops), np.array(nbytes))))
    filled = _filled(values)
    error = _left_out(bare.axes, filled)
    return TableDocument(
        family=family,
        info=info.model_copy(update={"error": round(error, 4)}),
        axes=dict(zip(axes, (tuple(axis) for axis in ticks), strict=True)),
        values=tuple(round(float(value), 4) for value in filled.reshape(-1)),
    )


def _filled(values: Array) -> Array:
    """NaNs replaced by the nearest known value along the first axis, else by the mean."""
    columns = values.reshape(values.shape[0], -1).copy()
    for column in columns.T:  # views: written in place
        known = np.flatnonzero(~np.isnan(column))
        for index in np.flatnonzero(np.isnan(column)) if known.size else ():
            column[index] = column[known[np.argmin(np.abs(known - index))]]
    return np.where(np.isnan(columns), np.nanmean(values), columns).reshape(values.shape)


def _left_out(axes: Sequence[Array], values: Array) -> float:
    """Median relative error of each inner point when its neighbours along an axis alone are interpolated."""
    errors: list[float] = []
    for axis, ticks in enumerate(axes):
        for i in range(1, ticks.size - 1):
            pair = Grid((ticks[[i - 1, i + 1]],), np.array([0.0, 1.0]))
            share = float(pair.at(ticks[i]))
            low, high, true = (np.take(values, j, axis) for j in (i - 1, i + 1, i))
            errors.extend(np.abs(np.expm1(low + share * (high - low) - true)).reshape(-1).tolist())
    return float(np.median(errors)) if errors else 0.0
