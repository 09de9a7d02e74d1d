"""Attention profiles from measured rows: see `planc.cost_model.measured.attention` for what they hold."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from planc.cost_model import catalogue
from planc.cost_model.catalogue import Gpu
from planc.cost_model.features import Array
from planc.cost_model.fitting import (
    Score,
    attention_append,
    attention_physics,
    attention_rows,
    sources,
    surface,
)
from planc.cost_model.fitting.attention_physics import Sample
from planc.cost_model.fitting.attention_rows import Rows
from planc.cost_model.measured.attention_tables import Ideal
from planc.cost_model.measured.loops import Loop
from planc.cost_model.profile import Profile, Table, TableInfo

_DATE = "2026-11-21"
_LAUNCH_S = 5e-6
_ROUNDED = 5e-3  # nat; what is finer than repeat measurements only costs bytes
_MERGED = (2.0, 8.0)  # tokens: decode contexts that cost what four do
_SLOWER = 1.5  # times another engine's kernel at long loops: not what is served

_FEW, _FEW_SHAPES = 300, 100  # rows, shapes of a table of which each tenth is held out in turn
_BETTER = 0.9

_POWERS: Array = np.exp2(np.arange(15))


def fit(folder: Path) -> Iterator[Profile]:
    """A profile per GPU with tables."""
    for gpu in dict.fromkeys(sources.GPUS.values()):
        tables = [_scored(rows, catalogue.gpu(gpu)) for rows in _rows(folder, gpu)]
        if tables:
            yield Profile(gpu, "attention", _plausible(tables))


def score(folder: Path) -> Iterator[Score]:
    """Physics is scored on softmax attention, as for a GPU without measurements: the kernel is the one that
    `data/attention.yaml` says, its constants are fitted to the other GPUs. nan for the rest."""
    samples = attention_physics.samples_of(folder)
    for gpu in dict.fromkeys(sources.GPUS.values()):
        physics = attention_physics.fit(samples, without=gpu)
        for rows in _rows(folder, gpu):
            table, error = _scored(rows, catalogue.gpu(gpu)), float("nan")
            if rows.key["op"] == "softmax":
                error = float(np.median(np.abs(physics.ratio(Sample.of(rows, gpu, None)) - 1)))
            yield Score("attention", gpu, rows.name, table.info.rows, table.info.error, error)


def _rows(folder: Path, gpu: str) -> Iterator[Rows]:
    for read in (
        attention_rows.softmax,
        attention_rows.latent,
        attention_rows.latent_by_difference,
        attention_rows.absorbed,
        attention_rows.linear,
    ):
        yield from read(folder, gpu)


def _scored(rows: Rows, gpu: Gpu) -> Table:
    """The table of all rows, with the error of one made without a tenth of them on that tenth; where rows or
    shapes are few, of ten such tables on each tenth."""
    shapes = np.unique(np.stack(list(rows.coords.values())), axis=1).shape[1]
    few = rows.seconds.size < _FEW or shapes < _FEW_SHAPES
    tenths = tuple(range(10 if few else 1))
    groups = _groups(rows, gpu)
    return _table(rows, gpu, groups, _held_out(rows, gpu, groups, tenths))


def _held_out(rows: Rows, gpu: Gpu, groups: Array, tenths: tuple[int, ...]) -> float:
    """Median error on these tenths of the rows, each by a table made without it."""
    ratios = []
    for tenth in tenths:
        held = surface.held_out(*rows.coords.values(), tenth=tenth)
        if held.any() and not held.all():
            table = _table(rows.take(~held), gpu, groups, 0.0)
            ratios.append(attention_append.seconds(table, rows.take(held)) / rows.seconds[held])
    return float(np.median(np.abs(np.concatenate(ratios) - 1)))


def _groups(rows: Rows, gpu: Gpu) -> Array:
    """Nodes of the third axis: powers of two that the rows span, or all query heads per KV head that were
    measured where that predicts one tenth (another than is scored) better by `_BETTER`: kernels that pack
    the heads of a group into their tiles are slower where these do not divide."""
    measured = np.unique(rows.coords.get("group", _POWERS[:1]))
    powers = _powers(measured)
    if rows.seconds.size < _FEW or np.isin(measured, powers).all():
        return powers
    plain, every = (_held_out(rows, gpu, nodes, (1,)) for nodes in (powers, measured))
    return measured if every < _BETTER * plain else powers


def _table(rows: Rows, gpu: Gpu, groups: Array, error: float) -> Table:
    ideal = Ideal(gpu.peak_flops(rows.precision), gpu.memory_bytes_s, _LAUNCH_S, _loop(rows, gpu))
    axes = tuple(_axis(name, values, rows, groups) for name, values in rows.coords.items())
    values, dropped, append = attention_append.fitted(
        rows, axes, ideal.looped(rows.flops, rows.cached, rows.new)
    )
    info = TableInfo(
        name=rows.name,
        key=rows.key,
        axes=tuple(rows.coords),
        ideal=ideal.stated(),
        rows=int(rows.seconds.size),
        dropped=dropped,
        error=round(error, 4),
        source=rows.source,
        date=_DATE,
        note="dropped: off the surface by more than a factor of two",
    )
    return Table(info, axes, np.round(values / _ROUNDED) * _ROUNDED, append.extra())


def _loop(rows: Rows, gpu: Gpu) -> Loop | None:
    """What the benchmark's loop read from the cache, where that is faster: keys and values in decode, states
    of recurrences; not latents, which decode multiplies by more heads than their bytes take."""
    if rows.key.get("part") != "decode" or rows.key["op"] == "latent":
        return None
    loop = Loop.on(gpu) if rows.key["op"] == "softmax" else Loop.updating(gpu)
    return loop if loop.near_bytes_s > loop.bytes_s else None


def _axis(name: str, values: Array, rows: Rows, groups: Array) -> Array:
    """Powers of two that the rows span; of loop lengths all measured ones, of groups as `_groups` says."""
    measured = np.unique(values)
    if name == "group":
        return groups
    if name == "reach":
        return np.setdiff1d(measured, _MERGED) if rows.key["part"] == "decode" else measured
    return _powers(measured)


def _powers(measured: Array) -> Array:
    """Powers of two from the one below the least to the one above the greatest."""
    if measured[-1] <= _POWERS[0]:
        return _POWERS[:1]
    first = np.searchsorted(_POWERS, measured[0], side="right")
    last = np.searchsorted(_POWERS, measured[-1], side="left")
    return _POWERS[first - 1 : last + 1]


def _plausible(tables: list[Table]) -> tuple[Table, ...]:
    """Without latent kernels that take far longer than another engine's in the same place: those engines
    serve with another kernel (FlashAttention-3 with an fp8 cache, or prompts with absorbed products). Whole
    modules are what is served."""
    kept = []
    for table in tables:
        alone = table.info.key.get("of") == "kernel"
        rivals = [t for t in tables if alone and t is not table and _work(t) == _work(table)]
        if not any(_slowdown(table, rival) > _SLOWER for rival in rivals):
            kept.append(table)
    return tuple(kept)


def _work(table: Table) -> dict[str, str | float | int]:
    return {name: value for name, value in table.info.key.items() if name not in ("engine", "of")}


def _slowdown(table: Table, rival: Table) -> float:
    """Median ratio of times at loops of 1024 keys and more."""
    heads, reach, group = np.meshgrid(*table.axes, indexing="ij")
    apart = (table.values - rival.grid.at(heads, reach, group))[reach >= 1024]
    return float(np.exp(np.median(apart)))
