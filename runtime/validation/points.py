"""Measured serving points: the columns of the CSV, one `Point` per row, labels repaired by stated rules.

A row that cannot be a measurement is kept as `Rejected` with its reason; none is dropped in silence.
"""

from __future__ import annotations

import csv
import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from planc.errors import FileMissing, FileUnreadable, InvalidField, UnknownField
from planc.runtime.validation.names import engine_name, format_name, gpu_name, model_name

Mode = Literal["agg", "disagg"]

#: what the harness and the engine were told, where a file says it; see `planc.runtime.validation.harness`
FLAGS: Mapping[str, type] = {
    "burst": bool,
    "requests_per_client": float,
    "length_low": float,
    "length_high": float,
    "distinct_prompts": int,
    "keeps_connections": bool,
    "asynchronous": bool,
    "stream_interval": int,
    "recv_interval": int,
    "batch_wait_steps": int,
    "prompts_per_step": int,
    "scheduling": str,
    "max_num_batched_tokens": int,
    "budget_beyond_prompt": int,
    "max_num_seqs": int,
    "kv": str,
    "gpu_memory_utilization": float,
    "speculative": str,
    "expert_parallel": bool,
    "prompt_dp": int,
    "prompt_seats": int,
    "prompt_router": str,
    "prompt_ep": int,
    "graphed_rows": int,
    "expert_table": str,
    "redundant_experts": int,
    "fp8_gemm_backend": str,
    "dependent_launch": bool,
}

_REQUIRED = ("model", "gpu", "engine", "weights", "isl", "osl", "concurrency")
_POOLED = ("workers", "tp", "dp", "ep")
_COUNTS = ("isl", "osl", "concurrency", "tp", "pp", "attention_dp", "moe_tp", "moe_ep", "gpus")
_TEXT = ("id", "model", "gpu", "engine", "engine_version", "weights", "mode", "source")
_TIMES = ("ttft_ms", "tpot_ms")
_POOLS = tuple(f"{role}_{name}" for role in ("prefill", "decode") for name in _POOLED)
_MODES: Mapping[str, Mode] = {
    "agg": "agg",
    "aggregated": "agg",
    "disagg": "disagg",
    "disaggregated": "disagg",
}
COLUMNS = (*_TEXT, *_COUNTS, *_POOLS, *_TIMES, *FLAGS)


@dataclass(frozen=True, slots=True)
class PoolLabel:
    """`workers` engines of one role, each tp x dp GPUs, experts spread over ep of them."""

    workers: int
    tp: int
    dp: int
    ep: int

    @property
    def gpus(self) -> int:
        return self.workers * self.tp * self.dp


@dataclass(frozen=True, slots=True)
class Point:
    """One measured point. `row` counts from 1 below the header; times in ms, None where not measured.

    flags      harness and engine flags that the file states
    repairs    what was put right in the labels, in words
    """

    row: int
    id: str
    model: str
    gpu: str
    engine: str
    engine_version: str
    weights: str
    mode: Mode
    isl: int
    osl: int
    concurrency: int
    tp: int
    pp: int
    attention_dp: int
    moe_tp: int
    moe_ep: int
    gpus: int
    prefill: PoolLabel | None
    decode: PoolLabel | None
    ttft_ms: float | None
    tpot_ms: float | None
    source: str = ""
    flags: Mapping[str, Any] = field(default_factory=dict)
    repairs: tuple[str, ...] = ()

    @property
    def cell(self) -> tuple[str, str, str, str]:
        """What a fit leaves out as a whole: (model, GPU, engine, weights)."""
        return self.model, self.gpu, self.engine, self.weights

    @property
    def layout(self) -> tuple[object, ...]:
        """The parallel shape."""
        return (
            self.mode,
            self.tp,
            self.pp,
            self.attention_dp,
            self.moe_tp,
            self.moe_ep,
            self.gpus,
            self.prefill,
            self.decode,
        )

    @property
    def workload(self) -> tuple[int, int]:
        return self.isl, self.osl


@dataclass(frozen=True, slots=True)
class Rejected:
    """A row without a prediction, and why; `cells` are what it says, as text."""

    row: int
    id: str
    reason: str
    cells: Mapping[str, str] = field(default_factory=dict)

    def labels(self, columns: Sequence[str]) -> tuple[str, ...]:
        """The values of some columns, "" where the row has none."""
        return tuple(self.cells.get(name, "") for name in columns)


def read_points(path: str | Path) -> tuple[list[Point], list[Rejected]]:
    """The rows of a CSV file.

    Raises FileMissing, FileUnreadable for a file that is empty or no CSV, UnknownField for a column that
    is not among `COLUMNS`, InvalidField where a required column is absent.
    """
    path = Path(path)
    mend = "It needs the columns of the measured serving points; see `planc validate --help`."
    if not path.is_file():
        raise FileMissing(what="points", path=path, mend=mend)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            header = [name.strip().lower() for name in reader.fieldnames or ()]
            reader.fieldnames = header
            rows = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise FileUnreadable(what="points", path=path, format="CSV", reason=error, mend=mend) from None
    _check_header(path, header, mend)
    if not rows:
        raise FileUnreadable(what="points", path=path, format="points", reason="it has no rows", mend=mend)
    points: list[Point] = []
    rejected: list[Rejected] = []
    for number, raw in enumerate(rows, 1):
        name = (raw.get("id") or "").strip() or f"row {number}"
        try:
            points.append(repaired(_parsed(number, name, raw)))
        except _Impossible as error:
            cells = {key: str(value).strip() for key, value in raw.items() if key is not None and value}
            rejected.append(Rejected(number, name, str(error), cells))
    return points, rejected


def _check_header(path: Path, header: list[str], mend: str) -> None:
    if not header:
        raise FileUnreadable(what="points", path=path, format="CSV", reason="it is empty", mend=mend)
    unknown = [name for name in header if name not in COLUMNS]
    if unknown:
        near = difflib.get_close_matches(unknown[0], COLUMNS, n=3, cutoff=0.6)
        known = f"Did you mean {' or '.join(near)}?" if near else f"Known: {', '.join(COLUMNS)}."
        raise UnknownField(where=f"points '{path}'", field=unknown[0], mend=known)
    twice = [name for name in header if header.count(name) > 1]
    missing = [name for name in _REQUIRED if name not in header]
    if twice or missing:
        raise InvalidField(
            where=f"points '{path}'",
            field="columns",
            value=", ".join(twice[:1] or missing),
            reason="named twice" if twice else "missing",
            mend=mend,
        )


class _Impossible(ValueError):
    """A row that is no measurement; its message is the reason."""


def _parsed(number: int, name: str, raw: Mapping[str | None, Any]) -> Point:
    if None in raw or None in raw.values():
        raise _Impossible("its number of cells is not the header's")
    text = {key: str(value).strip() for key, value in raw.items() if key is not None}
    for column in _REQUIRED:
        if not text.get(column):
            raise _Impossible(f"{column} is empty")
    counts = {column: _count(column, text.get(column, "")) for column in _COUNTS}
    mode = _MODES.get((text.get("mode") or "agg").lower())
    if mode is None:
        raise _Impossible(f"mode {text['mode']!r} is neither agg nor disagg")
    pools = {role: _pool(role, text) if mode == "disagg" else None for role in ("prefill", "decode")}
    if mode == "disagg":
        taken = sum(pool.gpus for pool in pools.values() if pool is not None)
    else:
        taken = (counts["tp"] or 1) * (counts["pp"] or 1) * (counts["attention_dp"] or 1)
    times = {column: _time(column, text.get(column, "")) for column in _TIMES}
    model = model_name(text["model"])
    return Point(
        row=number,
        id=name,
        model=model,
        gpu=gpu_name(text["gpu"]),
        engine=engine_name(text["engine"]),
        engine_version=text.get("engine_version", ""),
        weights=format_name(text["weights"], model),
        mode=mode,
        isl=counts["isl"] or 0,
        osl=counts["osl"] or 0,
        concurrency=counts["concurrency"] or 0,
        tp=counts["tp"] or 1,
        pp=counts["pp"] or 1,
        attention_dp=counts["attention_dp"] or 1,
        moe_tp=counts["moe_tp"] or 1,
        moe_ep=counts["moe_ep"] or 1,
        gpus=counts["gpus"] or taken,
        prefill=pools["prefill"],
        decode=pools["decode"],
        ttft_ms=times["ttft_ms"],
        tpot_ms=times["tpot_ms"],
        source=text.get("source", ""),
        flags={key: flag_value(key, text[key]) for key in FLAGS if text.get(key)},
    )


def _number(column: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise _Impossible(f"{column} = {text!r} is not a number")
    return value


def _count(column: str, text: str) -> int | None:
    if not text:
        return None
    value = _number(column, text)
    if value < 1 or value != int(value):
        raise _Impossible(f"{column} = {text} is not a whole number above 0")
    return int(value)


def _time(column: str, text: str) -> float | None:
    if not text:
        return None
    value = _number(column, text)
    if value <= 0:
        raise _Impossible(f"{column} = {text} is not above 0")
    return value


def _pool(role: str, text: Mapping[str, str]) -> PoolLabel:
    found = {name: _count(f"{role}_{name}", text.get(f"{role}_{name}", "")) for name in _POOLED}
    if not any(found.values()):
        raise _Impossible(f"mode is disagg and no {role}_ column says what the {role} pool is")
    return PoolLabel(**{name: value or 1 for name, value in found.items()})


def flag_value(name: str, text: str) -> Any:
    """A flag from its text. Raises ValueError with the reason."""
    kind = FLAGS[name]
    if kind is str:
        return text.lower()
    if kind is bool:
        known = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}
        if text.lower() not in known:
            raise _Impossible(f"{name} = {text!r} is neither true nor false")
        return known[text.lower()]
    value = _number(name, text)
    if value < 0 or (kind is int and value != int(value)):
        raise _Impossible(f"{name} = {text} is not a {'whole ' if kind is int else ''}number from 0 up")
    return kind(value)


# -- labels ----------------------------------------------------------------------------


def repaired(point: Point) -> Point:
    """The point with its labels put right, by these rules and no other:

    squared experts    tp > 8 and moe_tp = moe_ep > 1 and tp = moe_tp * moe_ep: sources that multiply the
                       degrees of one group; tp and ep are that degree, moe_tp is 1, GPUs follow
    data parallel      attention_dp > 1 divides tp and the GPUs are tp * pp: labels of engines that count
                       attention's ranks among tp's (of a pool: the two pools take tp GPUs a worker); tp is
                       divided by them
    GPUs               must then be tp * pp * attention_dp (or what the two pools take)

    Raises ValueError with the reason where labels still contradict each other.
    """
    squared = point.moe_tp == point.moe_ep > 1 and point.tp == point.moe_tp * point.moe_ep
    if point.mode == "agg" and point.tp > 8 and squared:
        degree, world = point.moe_ep, point.moe_ep * point.pp * point.attention_dp
        text = f"tp {point.tp} and moe_tp {point.moe_tp} count one group twice: tp = ep = {degree}"
        point = replace(point, tp=degree, moe_tp=1, gpus=world, repairs=(*point.repairs, text))
    point = _dp_apart(point)
    if point.mode == "agg":
        wanted = point.tp * point.pp * point.attention_dp
        if point.gpus != wanted:
            raise _Impossible(f"gpus = {point.gpus}, and tp x pp x attention_dp is {wanted}")
        return point
    assert point.prefill is not None
    assert point.decode is not None
    wanted = point.prefill.gpus + point.decode.gpus
    if point.gpus != wanted:
        raise _Impossible(f"gpus = {point.gpus}, and the two pools take {wanted}")
    return point


def _dp_apart(point: Point) -> Point:
    if point.mode == "agg":
        within = point.attention_dp > 1 and point.tp % point.attention_dp == 0
        if not within or point.gpus != point.tp * point.pp:
            return point
        tp = point.tp // point.attention_dp
        text = f"tp {point.tp} counts {point.attention_dp} attention ranks too: tp = {tp}"
        return replace(point, tp=tp, repairs=(*point.repairs, text))
    pools = [pool for pool in (point.prefill, point.decode) if pool is not None]
    if all(pool.dp == 1 for pool in pools) or any(pool.tp % pool.dp for pool in pools):
        return point
    if point.gpus != sum(pool.workers * pool.tp for pool in pools):
        return point
    prefill, decode = (replace(pool, tp=pool.tp // pool.dp) for pool in pools)
    text = f"the pools' tp count attention ranks too: tp = {prefill.tp} and {decode.tp}"
    return replace(point, prefill=prefill, decode=decode, repairs=(*point.repairs, text))
