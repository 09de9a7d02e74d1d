"""Links: all-reduce as engines run it, NCCL's collectives, by ranks and bytes.

`custom_allreduce_perf` counts elements of bf16, `nccl_perf` elements of 2 bytes (half) or 1 (int8), both of
the full tensor: with those, large messages reach the same bus bandwidth over all kinds (H100, eight ranks:
335 to 360 GB/s of 450), with bytes half of it.

DeepEP's dispatch and combine (the ranks of a node) were timed by tokens, width and top_k; they are kept
by the bytes a rank sends when a token goes once to each rank that has one of its experts. Throughput kernels
combine in bf16 whatever was dispatched. Up to 256 tokens the faster of the low-latency and the throughput
kernels counts, above that only the latter can run. Rows that take a fifth longer than more tokens of the same
model do are dropped: a benchmark's first calls, up to three times as slow as those after them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from planc.cost_model import catalogue
from planc.cost_model.collectives import Fabric, Kind, Own, alpha_beta
from planc.cost_model.features import Array
from planc.cost_model.fitting import Score, links_physics, sources
from planc.cost_model.fitting.links_physics import Lane, Sample
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

#: bytes per element on the way to the experts and back: as stated, else fp8 and bf16
_WIDTHS = {"bfloat16": 2.0, "fp8": 1.0, "nvfp4": 0.5625, "fp4": 0.5625}
_BY_PHASE = {"dispatch": 1.0, "combine": 2.0}
_NODE = 8
_LOW_LATENCY = 256
_LATE = 1.2


def fit(folder: Path) -> Iterator[Profile]:
    """One profile per GPU that has tables."""
    for name in dict.fromkeys(sources.GPUS.values()):
        tables = [_table(name, item) for item in _measured(folder, name)]
        if tables:
            yield Profile(name, "links", tuple(tables))


def score(folder: Path) -> Iterator[Score]:
    """Held out: every tenth message size of each table; physics: `links_physics`, fitted without this GPU."""
    found = {name: list(_measured(folder, name)) for name in dict.fromkeys(sources.GPUS.values())}
    samples = {name: [_samples(name, item, items) for item in items] for name, items in found.items()}
    for name, items in found.items():
        others = [
            sample for other, each in samples.items() if other != name for mine in each for sample in mine
        ]
        known = links_physics.fit(others)
        for item, mine in zip(items, samples[name], strict=True):
            errors = np.concatenate([sample.errors(known) for sample in mine])
            yield Score(
                family="links",
                gpu=name,
                table=f"{item.kind}/{item.engine}",
                rows=item.seconds.size,
                held_out=_held_out(name, item),
                physics=float(np.median(np.abs(np.expm1(errors)))),
            )


def samples(folder: Path) -> list[Sample]:
    """What physics is fitted to, of all GPUs."""
    found = {name: list(_measured(folder, name)) for name in dict.fromkeys(sources.GPUS.values())}
    return [s for name, items in found.items() for item in items for s in _samples(name, item, items)]


def _samples(gpu: str, item: _Rows, items: Sequence[_Rows]) -> list[Sample]:
    """What physics is fitted to, and scored on: a table's rows by ranks, those that planc believes."""
    library = next((other for other in items if (other.kind, other.engine) == (item.kind, "nccl")), None)
    made = []
    for ranks, timed in zip(item.ranks, item.seconds, strict=True):
        sample = Sample(gpu, _lane(item), item.kind, ranks, item.sizes, timed)
        if library is not None and ranks in library.ranks:
            logs = np.log(library.sizes), np.log(library.seconds[library.ranks.index(ranks)])
            sample = sample.believed(np.exp(np.interp(np.log(item.sizes), *logs)))
        made.append(sample)
    return made


def _lane(item: _Rows) -> Lane:
    if item.kind == "dispatch":
        return "dispatch" if item.engine == "sglang" else "dispatch_call"
    if item.kind == "combine":
        return "combine" if item.engine == "sglang" else "combine_call"
    own: Lane = "lamport" if item.engine == "trtllm" else "barrier"
    return "library" if item.engine == "nccl" else own


@dataclass(frozen=True, slots=True)
class _Rows:
    """One engine's rows of a kind: seconds [ranks, sizes]; how many of its rows were dropped."""

    engine: str
    version: str
    kind: Kind
    ranks: tuple[int, ...]
    sizes: Array
    seconds: Array
    dropped: int = 0


def _measured(folder: Path, gpu: str) -> Iterator[_Rows]:
    served = {name: profile.version for name, profile in catalogue.engines().items()}
    for engine, found in sources.by_engine(folder, "comm", "custom_allreduce_perf", gpu, served).items():
        frames = [source.read() for source in found]
        captured = [frame[~frame["kernel_source"].str.contains("eager|MNNVL")] for frame in frames]
        yield from _square(engine, found[0].version, "all_reduce", captured, "allreduce_dtype")
    for source in sources.by_engine(folder, "comm", "nccl_perf", gpu, {}).get("nccl", [])[:1]:
        for theirs, rows in source.read().groupby("op_name"):
            yield from _square("nccl", source.version, _KINDS[theirs], [rows], "nccl_dtype")
    yield from _exchanges(folder, gpu)


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


def _exchanges(folder: Path, gpu: str) -> Iterator[_Rows]:
    """DeepEP of each engine."""
    import pandas

    for source in sources.tables(folder, "comm", "moe_a2a_perf", gpu=gpu):
        rows = source.read()
        rows = rows[rows["comm_backend"].str.contains("deepep_ht|deepep_ll")]
        low = rows["comm_backend"].str.contains("_ll")
        width = rows["comm_dtype"].map(_WIDTHS).where(low | (rows["phase"] == "dispatch"))
        rows = rows.assign(width=width.fillna(rows["phase"].map(_BY_PHASE)))
        yield from _by_bytes(source, rows[~low | (rows["num_tokens"] <= _LOW_LATENCY)])
    for source in sources.tables(folder, "comm", "wideep_deepep_ll_perf", gpu=gpu):
        frames = []
        for table, column in (("ll", "avg_t_us"), ("normal", "transmit_us")):
            rows = replace(source, path=source.path.with_stem(f"wideep_deepep_{table}_perf")).read()
            rows = rows.rename(columns={"num_token": "num_tokens", "num_topk": "topk"}).assign(ep_size=_NODE)
            if table == "ll":
                rows = rows[rows["num_tokens"] <= _LOW_LATENCY]
            for phase, width in _BY_PHASE.items():
                frames.append(rows.assign(phase=phase, latency=rows[f"{phase}_{column}"], width=width))
        yield from _by_bytes(source, pandas.concat(frames))


def _by_bytes(source: sources.Source, rows: Any) -> Iterator[_Rows]:
    """Seconds by sent bytes, in bins of a factor of two: medians over models of the fastest kernel."""
    model = ["hidden_size", "topk", "width", "ep_size", "phase"]
    best = rows.groupby([*model, "num_tokens"], as_index=False)["latency"].min()
    more = best[::-1].groupby(model)["latency"].cummin()[::-1]  # the least of as many tokens and more
    late = best["latency"] > _LATE * more
    copies = best["ep_size"] * (1.0 - (1.0 - 1.0 / best["ep_size"]) ** best["topk"])
    sent = best["num_tokens"] * best["hidden_size"] * best["width"] * copies
    best = best.assign(bytes=2.0 ** np.round(np.log2(sent)))
    for (phase, ranks), mine in best[~late].groupby(["phase", "ep_size"]):
        times = mine.groupby("bytes")["latency"].median() * 1e-6
        sizes, dropped = times.index.to_numpy(dtype=float), int(late[best["phase"] == phase].sum())
        timed = times.to_numpy()[None, :]
        yield _Rows(source.engine, source.version, phase, (int(ranks),), sizes, timed, dropped)


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
    lane = _lane(item)
    own = Own(kernel="lamport" if lane == "lamport" else "barrier")
    link = Fabric().inner(catalogue.gpu(gpu), 2, own)
    of = getattr(link, links_physics.field(lane))[0].model_copy(update={"share": 1.0})
    ideal = {"alpha_us": of.alpha_us, "per_step_us": of.per_step_us, "bytes_s": link.bytes_s}
    times = [alpha_beta(item.kind, item.sizes, n, of, link.bytes_s) for n in item.ranks]
    return Table(
        TableInfo(
            name=f"{item.kind}/{item.engine}",
            key={"kind": item.kind, "engine": item.engine, "version": item.version},
            axes=("ranks", "bytes"),
            ideal=ideal,
            rows=item.seconds.size,
            dropped=item.dropped,
            error=error,
            source=sources.SOURCE,
            date=sources.DATE,
        ),
        (np.array(item.ranks, dtype=np.float64), item.sizes),
        np.log(item.seconds / np.stack(times)),
    )
