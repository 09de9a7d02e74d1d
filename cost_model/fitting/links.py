"""Links: all-reduce as engines run it, NCCL's collectives, by ranks and bytes.

`custom_allreduce_perf` counts elements of bf16, `nccl_perf` elements of 2 bytes (half) or 1 (int8), both of
the full tensor: with those, large messages reach the same bus bandwidth over all kinds (H100, eight ranks:
335 to 360 GB/s of 450), with bytes half of it.

DeepEP's dispatch and combine (eight ranks of a node) were timed by tokens, width and top_k; they are kept
by the bytes a rank sends when a token goes once to each rank that has one of its experts. Up to 256 tokens
the faster of the low-latency and the throughput kernels counts, above that only the latter can run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from planc.cost_model import catalogue
from planc.cost_model.collectives import Constants, Fabric, Kind, alpha_beta, steps
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

#: bytes per element on the way to the experts and back: as stated, else fp8 and bf16
_WIDTHS = {"bfloat16": 2.0, "fp8": 1.0, "nvfp4": 0.5625, "fp4": 0.5625}
_BY_PHASE = {"dispatch": 1.0, "combine": 2.0}
_NODE = 8
_LOW_LATENCY = 256

#: engines' own kernels take messages up to this
_CUSTOM_UP_TO = 8 * 1024.0**2


def fit(folder: Path) -> Iterator[Profile]:
    """One profile per GPU that has tables."""
    for name in dict.fromkeys(sources.GPUS.values()):
        tables = [_table(name, item) for item in _measured(folder, name)]
        if tables:
            yield Profile(name, "links", tuple(tables))


def score(folder: Path) -> Iterator[Score]:
    """Held out: every tenth message size of each table; physics: constants for each wire and architecture,
    fitted without this GPU."""
    names = list(dict.fromkeys(sources.GPUS.values()))
    found = {name: list(_measured(folder, name)) for name in names}
    for name in names:
        known = physics([(n, item) for n in names if n != name for item in found[n]])
        for item in found[name]:
            near = [of for key, of in known.items() if key[0] == _wire(name) and key[2] == _lane(item)]
            of = known.get((_wire(name), _arch(name), _lane(item))) or near[0]
            bytes_s = Fabric().inner(catalogue.gpu(name), 2).bytes_s
            alone = np.stack([alpha_beta(item.kind, item.sizes, n, of, bytes_s) for n in item.ranks])
            yield Score(
                family="links",
                gpu=name,
                table=f"{item.kind}/{item.engine}",
                rows=item.seconds.size,
                held_out=_held_out(name, item),
                physics=float(np.median(np.abs(alone / item.seconds - 1.0))),
            )


def physics(found: Sequence[tuple[str, _Rows]]) -> dict[tuple[str, str, str], Constants]:
    """Constants by (wire, architecture, lane) from (GPU, rows): what `data/links.yaml` has."""
    from scipy.optimize import lsq_linear

    grouped: dict[tuple[str, str, str], list[tuple[str, _Rows]]] = {}
    for gpu, item in found:
        grouped.setdefault((_wire(gpu), _arch(gpu), _lane(item)), []).append((gpu, item))
    made = {}
    for key, mine in sorted(grouped.items()):
        terms = np.concatenate([_terms(gpu, item) for gpu, item in mine])
        weight = np.ones(len(terms))
        low, high = [0.0, 0.0, 1.0, 0.0], [np.inf, np.inf, 2.5, np.inf]
        for _ in range(6):
            x = lsq_linear(terms * weight[:, None], weight, (low, high)).x
            weight = np.maximum(np.abs(terms @ x - 1.0), 0.05) ** -0.5
        alpha, step, wire, chunk = map(float, x)
        made[key] = Constants(
            alpha_us=round(alpha, 2),
            per_step_us=round(step, 2),
            share=round(1.0 / wire, 3),
            chunk_us=round(chunk**2 / wire / 4.0, 3),
        )
    return made


def _terms(gpu: str, item: _Rows) -> Array:
    """What alpha, a step, the wire and the root of it add, as shares of the measured time, [rows, 4]."""
    link = Fabric().inner(catalogue.gpu(gpu), 2)
    plain = Constants(alpha_us=0.0, per_step_us=0.0, share=1.0)
    rows = []
    for ranks, timed in zip(item.ranks, item.seconds, strict=True):
        wire = alpha_beta(item.kind, item.sizes, ranks, plain, link.bytes_s)
        one = np.ones_like(wire)
        parts = 1e-6 * one, 1e-6 * steps(item.kind, ranks) * one, wire, np.sqrt(1e-6 * wire)
        used = item.sizes <= _CUSTOM_UP_TO if _lane(item) == "custom" else one > 0
        rows.append((np.stack(parts, axis=1) / timed[:, None])[used])
    return np.concatenate(rows)


def _wire(gpu: str) -> str:
    return Fabric().inner(catalogue.gpu(gpu), 2).name


def _arch(gpu: str) -> str:
    """Blackwell's kernels start later than Hopper's and Ampere's; PCIe hides that."""
    return "blackwell" if catalogue.gpu(gpu).arch in ("sm_100", "sm_103") else "other"


def _lane(item: _Rows) -> str:
    if item.kind in ("dispatch", "combine"):
        return "exchange"
    return "library" if item.engine == "nccl" else "custom"


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
        rows = rows.assign(width=rows["comm_dtype"].map(_WIDTHS).fillna(rows["phase"].map(_BY_PHASE)))
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
    shape = ["hidden_size", "topk", "num_tokens", "width", "ep_size", "phase"]
    best = rows.groupby(shape, as_index=False)["latency"].min()
    copies = best["ep_size"] * (1.0 - (1.0 - 1.0 / best["ep_size"]) ** best["topk"])
    sent = best["num_tokens"] * best["hidden_size"] * best["width"] * copies
    best = best.assign(bytes=2.0 ** np.round(np.log2(sent)))
    for phase, mine in best.groupby("phase"):
        times = mine.groupby("bytes")["latency"].median() * 1e-6
        sizes = times.index.to_numpy(dtype=float)
        yield _Rows(source.engine, source.version, phase, (_NODE,), sizes, times.to_numpy()[None, :])


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
    of = getattr(link, _lane(item)).model_copy(update={"chunk_us": 0.0, "share": 1.0})
    ideal = {"alpha_us": of.alpha_us, "per_step_us": of.per_step_us, "bytes_s": link.bytes_s}
    times = [alpha_beta(item.kind, item.sizes, n, of, link.bytes_s) for n in item.ranks]
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
