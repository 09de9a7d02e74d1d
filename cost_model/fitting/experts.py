"""Routed experts: each engine's kernels in each format, from the rows that `experts_rows` cleans."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from planc.cost_model.catalogue import Gpu, Precision
from planc.cost_model.efficiency import efficiencies
from planc.cost_model.experts import STARTS, ExpertKernel
from planc.cost_model.features import Array
from planc.cost_model.fitting import Score, sources
from planc.cost_model.fitting.experts_rows import DISTRIBUTION, KEPT, Rows, peaks, precision, read, solve
from planc.cost_model.measured.experts import SHAPE, nearest
from planc.cost_model.profile import Profile, Table, TableInfo

#: residuals are rounded to this, which noise exceeds and compression thanks for
_GRAIN = 0.005

#: rows that each table brings to the constants of all
_PER_TABLE = 400


def fit(folder: Path) -> Iterator[Profile]:
    """One profile per GPU that has tables."""
    for name, found in read(folder).items():
        tables = [_table(rows, rows.solved, _held_out(rows)) for rows in found]
        if tables:
            yield Profile(name, "experts", tuple(tables))


def score(folder: Path) -> Iterator[Score]:
    """Held out: each tenth of a table's shapes in turn; physics: one set of constants, this GPU left out."""
    found = read(folder)
    for name in found:
        known = physics([rows for other in found if other != name for rows in found[other]])
        for rows in found[name]:
            times = rows.ideal(known[precision(rows)].at_clock(_slower(rows.gpu)))
            yield Score(
                family="experts",
                gpu=name,
                table=rows.name,
                rows=int(np.isfinite(rows.seconds).sum()),
                held_out=_held_out(rows),
                physics=float(np.nanmedian(np.abs(times / rows.seconds - 1.0))),
            )


def physics(found: Sequence[Rows]) -> dict[Precision, ExpertKernel]:
    """Constants per arithmetic over all the tables, each weighing the same, at the clock of `expert_mhz`."""
    kernels: dict[Precision, ExpertKernel] = {}
    for name in {precision(rows) for rows in found}:
        mine = [rows for rows in found if precision(rows) == name]
        thin = [_thin(rows) for rows in mine]
        terms = np.concatenate([_clocked(rows)[at] for rows, at in zip(mine, thin, strict=True)])
        seconds = np.concatenate([rows.seconds[at] for rows, at in zip(mine, thin, strict=True)])
        kernels[name] = solve(terms, seconds, np.ones(seconds.size))
    return kernels


def _clocked(rows: Rows) -> Array:
    """Terms whose starts are per cycle of the clock that the physics is stated at."""
    scale = np.ones(rows.terms.shape[-1])
    scale[: len(STARTS)] = _slower(rows.gpu)
    return rows.terms * scale


def _slower(gpu: Gpu) -> float:
    return efficiencies().value("expert_mhz") / gpu.clock_mhz


def _thin(rows: Rows) -> tuple[npt.NDArray[np.intp], ...]:
    """Where `_PER_TABLE` of the timed rows are, evenly spread."""
    found = np.argwhere(np.isfinite(rows.seconds))
    return tuple(found[np.linspace(0, len(found) - 1, min(_PER_TABLE, len(found))).astype(int)].T)


def _held_out(rows: Rows) -> float:
    """Median error over ten folds of shapes, each predicted from the other nine."""
    fold = np.random.default_rng(0).permutation(len(rows.specs)) % 10
    errors, kernel = [], rows.solved
    for number in range(10):
        out, kept = np.flatnonzero(fold == number), np.flatnonzero(fold != number)
        if not out.size or not kept.size:
            continue
        table = _table(rows.take(kept), kernel, 0.0)
        found = [nearest(table, rows.specs[i]) for i in out]
        ratio = np.exp([weights @ table.values[near] for near, weights, _ in found])
        times = rows.take(out).ideal(kernel) * ratio
        errors.append(np.abs(times / rows.seconds[out] - 1.0).reshape(-1))
    return float(np.nanmedian(np.concatenate(errors)))


def _table(rows: Rows, kernel: ExpertKernel, error: float) -> Table:
    size, bytes_s, flops_s = peaks(rows.gpu, rows.format)
    ideal = {name: getattr(kernel, name) for name in ExpertKernel.names()}
    ideal |= {"weight_bytes": size, "bytes_s": bytes_s, "flops_s": flops_s}
    off = np.log(rows.seconds / rows.ideal(kernel))
    for row in off:
        gap = np.isnan(row)
        row[gap] = np.interp(np.log(KEPT[gap]), np.log(KEPT[~gap]), row[~gap])
    shape = {"total": "total_experts"}
    return Table(
        TableInfo(
            name=rows.name,
            key={
                "engine": rows.engine,
                "format": rows.format,
                "library": rows.library,
                "versions": " ".join(rows.versions),
            },
            axes=("shape", "tokens"),
            ideal=ideal,
            rows=int(np.isfinite(rows.seconds).sum()),
            dropped=rows.dropped,
            error=error,
            source=sources.SOURCE,
            date=sources.DATE,
            note=f"routing {DISTRIBUTION}; kernels that stream weights too slowly, mistuned shapes dropped",
        ),
        (np.arange(1.0, len(rows.specs) + 1), KEPT),
        np.round(off / _GRAIN) * _GRAIN,
        {
            name: np.array([getattr(s, shape.get(name, name)) for s in rows.specs], dtype=float)
            for name in SHAPE
        },
    )
