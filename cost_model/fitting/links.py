"""Links: all-reduce as engines run it, NCCL's collectives, by ranks and bytes.

`custom_allreduce_perf` counts elements of bf16, `nccl_perf` elements of 2 bytes (half) or 1 (int8), both of
the full tensor: with those, large messages reach the same bus bandwidth over all kinds (H100, eight ranks:
335 to 360 GB/s of 450), with bytes half of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from planc.cost_model import catalogue
from planc.cost_model.collectives import Fabric, Kind, Link, alpha_beta, seconds
from planc.cost_model.features import Array
from planc.cost_model.fitting import Score, sources
from planc.cost_model.measured.links import curve
from planc.cost_model.profile import Profile, Table, TableInfo

#: names of the tables -> ours
_KINDS: dict[str, Kind] = {
    "all_reduce": "all_reduce",
    "all_gather": "all_gather",
    "reduce_scatter": "reduce_scatter",
    "alltoall": "all_to_all",
}
_BYTES = {"half": 2, "int8": 1, "bfloat16": 2}


def fit(folder: Path) -> Iterator[Profile]:
    """One profile per GPU that has tables."""
    for name in dict.fromkeys(sources.GPUS.values()):
        tables = [_table(name, item) for item in _measured(folder, name)]
        if tables:
            yield Profile(name, "links", tuple(tables))


def score(folder: Path) -> Iterator[Score]:
    """Held out: every tenth message size of each table; physics: the constants of `data/links.yaml` alone."""
    for name in dict.fromkeys(sources.GPUS.values()):
        for item in _measured(folder, name):
            link = _link(catalogue.gpu(name), item.engine)
            alone = np.stack([seconds(item.kind, item.sizes, n, link) for n in item.ranks])
            yield Score(
                family="links",
                gpu=name,
                table=f"{item.kind}/{item.engine}",
                rows=item.seconds.size,
                held_out=_held_out(name, item),
                physics=float(np.median(np.abs(alone / item.seconds - 1.0))),
            )


@dataclass(frozen=True, slots=True)
class _Rows:
    """One engine's rows of a kind: seconds [ranks, sizes]."""

    engine: str
    version: str
    kind: Kind
    ranks: tuple[int, ...]
    sizes: Array
    seconds: Array


def _measured(folder: Path, gpu: str) -> Iterator[_Rows]:
    served = {name: profile.version for name, profile in catalogue.engines().items()}
    for engine, found in sources.by_engine(folder, "comm", "custom_allreduce_perf", gpu, served).items():
        frames = [source.read() for source in found]
        captured = [frame[~frame["kernel_source"].str.contains("eager|MNNVL")] for frame in frames]
        yield from _square(engine, found[0].version, "all_reduce", captured, "allreduce_dtype")
    for source in sources.by_engine(folder, "comm", "nccl_perf", gpu, {}).get("nccl", [])[:1]:
        for theirs, rows in source.read().groupby("op_name"):
            yield from _square("nccl", source.version, _KINDS[theirs], [rows], "nccl_dtype")


def _square(engine: str, version: str, kind: Kind, frames: list[Any], dtype: str) -> Iterator[_Rows]:
    """Rows of the first frame, of later ones for ranks it lacks; equal sizes of several formats agree."""
    have: dict[int, Any] = {}
    for frame in frames:
        rows = frame.assign(bytes=frame["message_size"] * frame[dtype].map(_BYTES))
        for ranks, mine in rows.groupby("num_gpus"):
            have.setdefault(int(ranks), mine.groupby("bytes")["latency"].median() * 1e-3)
    if not have:
        return
    sizes = sorted(set.intersection(*(set(times.index) for times in have.values())))
    ranks = tuple(sorted(have))
    times = np.stack([have[n].loc[sizes].to_numpy() for n in ranks])
    yield _Rows(engine, version, kind, ranks, np.array(sizes, dtype=np.float64), times)


def _link(gpu: catalogue.Gpu, engine: str) -> Link:
    """What physics knows: kernels of an engine that has its own, the library's otherwise."""
    found = catalogue.engines().get(engine)
    return Fabric().inner(gpu, 2, found.custom_all_reduce_max_mib * 1024**2 if found else 0.0)


def _held_out(gpu: str, item: _Rows) -> float:
    """Median error on every tenth size (ends excepted), predicted from the others."""
    errors = []
    for start in range(1, 11):
        out = np.arange(start, item.sizes.size - 1, 10)
        kept = np.setdiff1d(np.arange(item.sizes.size), out)
        table = _made(gpu, replace(item, sizes=item.sizes[kept], seconds=item.seconds[:, kept]), 0.0)
        for row, ranks in enumerate(item.ranks):
            found = curve(table, item.kind, ranks)(item.sizes[out])
            errors.extend(np.abs(found / item.seconds[row, out] - 1.0))
    return float(np.median(errors))


def _table(gpu: str, item: _Rows) -> Table:
    return _made(gpu, item, _held_out(gpu, item))


def _made(gpu: str, item: _Rows, error: float) -> Table:
    link = Fabric().inner(catalogue.gpu(gpu), 2)
    alpha, step, _ = link.custom
    ideal = {"alpha_us": alpha, "per_step_us": step, "bytes_s": link.bytes_s}
    times = [alpha_beta(item.kind, item.sizes, n, alpha, step, link.bytes_s) for n in item.ranks]
    return Table(
        TableInfo(
            name=f"{item.kind}/{item.engine}",
            key={"kind": item.kind, "engine": item.engine, "version": item.version},
            axes=("ranks", "bytes"),
            ideal=ideal,
            rows=item.seconds.size,
            error=error,
            source=sources.SOURCE,
            date=sources.DATE,
        ),
        (np.array(item.ranks, dtype=np.float64), item.sizes),
        np.log(item.seconds / np.stack(times)),
    )
