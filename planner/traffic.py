"""Traffic: a workload as numbers. Lengths become a small weighted sample, traces become statistics.

The sample is deterministic: 64 equally likely quantiles per spread-out length, input and output
paired by a fixed low-discrepancy order (they are taken as independent unless a trace pairs them).
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from planc.errors import FileUnreadable, InvalidField
from planc.planner.plan import Role
from planc.planner.request import Request, read_bytes
from planc.planner.trace import read
from planc.planner.workload import Lengths

Array = NDArray[np.float64]
#: the work on a request, or a part of it
Part = Role
_POINTS = 64
_GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True, slots=True)
class Traffic:
    """A stationary stream of requests.

    isl, osl      tokens of each sample point; weight sums to 1
    hit_rate      cached share of the input tokens
    rate          requests/s offered, None when the workload says "max" or is a closed loop
    concurrency   users of a closed loop, None when open
    arrival_cv2   squared coefficient of variation of the times between arrivals
    role          the part of the work that is meant: all of it, prompts, or decoding
    prefix_tokens of all prefixes that recur; None: caches hold them all
    names, label  traffic classes, and the class of each sample point; hits: cached share of each class
    """

    isl: Array
    osl: Array
    weight: Array
    hit_rate: float = 0.0
    rate: float | None = None
    concurrency: int | None = None
    arrival_cv2: float = 1.0
    role: Part = "aggregated"
    names: tuple[str, ...] = ("",)
    label: NDArray[np.intp] | None = None
    hits: tuple[float, ...] = ()
    prefix_tokens: float | None = None

    def key(self) -> tuple[object, ...]:
        """Names what requests are like; not how many come."""
        label = None if self.label is None else self.label.tobytes()
        drawn = self.isl.tobytes(), self.osl.tobytes(), self.weight.tobytes(), label
        known = self.hit_rate, self.hits, self.prefix_tokens, self.arrival_cv2
        return *drawn, *known, self.names, self.role, self.concurrency is None

    @property
    def shares(self) -> tuple[float, ...]:
        """Share of the requests of each traffic class."""
        if self.label is None:
            return (1.0,)
        return tuple(float(self.weight[self.label == i].sum()) for i in range(len(self.names)))

    def only(self, *names: str) -> Traffic:
        """The requests of some traffic classes, at the rate at which they come."""
        if self.label is None or set(names) == set(self.names):
            return self
        numbers = [i for i, name in enumerate(self.names) if name in names]
        mine = np.isin(self.label, numbers)
        share = float(self.weight[mine].sum())
        kept = replace(
            self,
            isl=self.isl[mine],
            osl=self.osl[mine],
            weight=self.weight[mine] / share,
            rate=None if self.rate is None else self.rate * share,
            names=tuple(self.names[i] for i in numbers),
            label=np.searchsorted(numbers, self.label[mine]),
            hits=tuple(self.hits[i] for i in numbers),
        )
        return replace(kept, hit_rate=kept._hit_rate())

    def _hit_rate(self) -> float:
        assert self.label is not None
        tokens = self.weight * self.isl
        return float(np.dot(tokens, np.array(self.hits)[self.label]) / tokens.sum())

    def mean(self, values: Array) -> float:
        return float(np.dot(self.weight, values))

    @property
    def isl_mean(self) -> float:
        return self.mean(self.isl)

    @property
    def osl_mean(self) -> float:
        return self.mean(self.osl)

    @property
    def new_tokens(self) -> float:
        """Input tokens per request that are computed, not found in the prefix cache. At least one is, except
        where prompts arrive computed."""
        if self.role == "decode":
            return 0.0
        return max(self.isl_mean * (1 - self.hit_rate), 1.0)

    @property
    def prompts(self) -> tuple[tuple[float, float], ...]:
        """(share, computed tokens) of one or two kinds of prompts that stand for all: Gauss's quadrature,
        which keeps mean, variance and skewness of the lengths."""
        mean = self.isl_mean
        off = self.isl - mean
        sd = math.sqrt(max(self.mean(off**2), 0.0))
        if self.role == "decode" or sd <= 1e-3 * mean:
            return ((1.0, self.new_tokens),)
        skew = self.mean(off**3) / sd**3
        root = math.sqrt(1 + skew * skew / 4)
        fresh = self.new_tokens / mean
        return tuple(
            ((1 - side * skew / 2 / root) / 2, max((mean + sd * (skew / 2 + side * root)) * fresh, 1.0))
            for side in (-1, 1)
        )

    @property
    def isl_cv2(self) -> float:
        """Squared coefficient of variation of the input length."""
        mean = self.isl_mean
        return max(self.mean(self.isl**2) / mean**2 - 1.0, 0.0) if mean else 0.0

    @property
    def prefill_context(self) -> float:
        """Mean position of a computed input token, i.e. how many keys it attends to."""
        squares = self.mean(self.isl**2)
        return (1 + self.hit_rate) / 2 * squares / max(self.isl_mean, 1.0)

    @property
    def decode_steps(self) -> float:
        """Decode steps per request: the first output token comes from the prefill."""
        return 0.0 if self.role == "prefill" else max(self.osl_mean - 1.0, 0.0)

    @property
    def step_spread(self) -> float:
        """Mean decode steps over their harmonic mean: at least 1, and more the more answers differ."""
        steps = np.maximum(self.osl - 1, 1.0)
        return self.mean(steps) * self.mean(1 / steps)

    @property
    def decode_context(self) -> float:
        """Mean context of a decoding sequence at a random step (long outputs weigh more)."""
        steps = np.maximum(self.osl - 1, 0)
        total = self.mean(steps)
        if total == 0:
            return self.isl_mean
        return self.mean(steps * (self.isl + self.osl / 2)) / total

    @property
    def resident_sd(self) -> float:
        """Standard deviation of the cache tokens that one running sequence holds at a random moment.

        Holding grows evenly from isl to isl + osl, so its second moment is isl^2 + isl osl + osl^2/3.
        """
        steps = np.maximum(self.osl - 1, 0)
        total = self.mean(steps)
        if total == 0:
            return 0.0
        second = self.mean(steps * (self.isl**2 + self.isl * self.osl + self.osl**2 / 3)) / total
        return math.sqrt(max(second - self.decode_context**2, 0.0))

    @property
    def longest(self) -> int:
        """Tokens of the longest request."""
        return math.ceil(float(np.max(self.isl + self.osl)))

    def quantile(self, values: Array, q: float) -> float:
        """Weighted quantile of per-sample values."""
        order = np.argsort(values, kind="stable")
        cumulative = np.cumsum(self.weight[order])
        position = int(np.searchsorted(cumulative, q - 1e-12))
        return float(values[order][min(position, len(values) - 1)])

    def of(self, role: Part) -> Traffic:
        """What a pool of this role sees of it. A pool that does one part of the work is offered a rate, never
        a closed loop: its requests come from clients or from the other pool, whoever waits for them there."""
        if role == self.role or role not in ("prefill", "decode"):
            return self
        users = self.concurrency
        spread = self.arrival_cv2 if users is None else (users - 1) / users
        return replace(self, role=role, concurrency=None, arrival_cv2=spread)

    def scaled(self, *, isl: float = 1.0, osl: float = 1.0) -> Traffic:
        """The same traffic with longer or shorter inputs or outputs."""
        return replace(self, isl=self.isl * isl, osl=np.maximum(self.osl * osl, 1.0))


def class_names(request: Request) -> tuple[str, ...]:
    """Names of the workload's traffic classes: as given, else class0, class1 ...; "" for a lone one."""
    classes = request.workload.classes
    if len(classes) <= 1:
        return tuple(c.name or "" for c in classes) or ("",)
    return tuple(c.name or f"class{i}" for i, c in enumerate(classes))


def traffic(request: Request, kind: str) -> Traffic:
    """The request's workload as numbers, for a model of this kind ("causal_lm", "encoder", "module").

    Raises InvalidField where the model needs lengths that the request lacks.
    """
    workload = request.workload
    if workload.trace is not None:
        found = _from_trace(request)
    else:
        parts = [
            _class_sample(request, c.isl, c.osl, kind, f"workload.classes[{i}]" if many else "workload")
            for i, c in enumerate(workload.classes)
            for many in (len(workload.classes) > 1,)
        ]
        shares = np.array([c.request_rate or c.weight for c in workload.classes], dtype=np.float64)
        shares /= shares.sum()
        sizes = [len(isl) for isl, _ in parts]
        isl = np.concatenate([isl for isl, _ in parts])
        osl = np.concatenate([osl for _, osl in parts])
        weight = np.concatenate([np.full(n, share / n) for n, share in zip(sizes, shares, strict=True)])
        rates = [c.request_rate for c in workload.classes if c.request_rate is not None]
        found = Traffic(
            isl,
            osl,
            weight,
            rate=sum(rates) if rates else None,
            names=class_names(request),
            label=np.repeat(np.arange(len(sizes)), sizes),
            hits=tuple(c.prefix_hit_rate for c in workload.classes),
        )
        found = replace(found, hit_rate=found._hit_rate())
    found = replace(found, prefix_tokens=workload.prefix_tokens)
    if workload.request_rate is not None:
        found = replace(found, rate=workload.request_rate)
    if workload.rate == "max":
        found = replace(found, rate=None)
    if workload.concurrency is not None:
        found = replace(found, rate=None, concurrency=workload.concurrency, arrival_cv2=0.0)
    elif workload.arrival_cv != 1.0:
        found = replace(found, arrival_cv2=workload.arrival_cv**2)
    return found


def _class_sample(
    request: Request, isl: Lengths | None, osl: Lengths | None, kind: str, where: str
) -> tuple[Array, Array]:
    for field, lengths, needed in (
        ("isl", isl, kind != "module"),
        ("osl", osl, kind == "causal_lm"),
    ):
        if lengths is None and needed:
            raise InvalidField(
                where="request",
                field=f"{where}.{field}",
                value=None,
                reason=f"missing, and a {kind} model needs it",
                mend=f"Add {field}: the number of {'input' if field == 'isl' else 'output'} tokens.",
            )
    inputs = np.array([1.0]) if isl is None else _sample(request, isl, f"{where}.isl")
    outputs = np.array([1.0]) if osl is None or kind != "causal_lm" else _sample(request, osl, f"{where}.osl")
    for field, found, needed in (("isl", inputs, kind != "module"), ("osl", outputs, kind == "causal_lm")):
        if needed and found.mean() < 1:
            raise InvalidField(
                where="request",
                field=f"{where}.{field}",
                value=float(found.mean()),
                reason="must be at least 1 token",
                mend="Give the mean number of tokens per request.",
            )
    inputs = np.maximum(inputs, 1.0)
    outputs = np.maximum(outputs, 1.0) if kind == "causal_lm" else np.zeros_like(outputs)
    count = max(len(inputs), len(outputs))
    if len(inputs) == 1 or len(outputs) == 1:
        return np.resize(inputs, count), np.resize(outputs, count)
    order = np.argsort([(i * _GOLDEN) % 1.0 for i in range(count)], kind="stable")
    return inputs, outputs[order]


def _sample(request: Request, lengths: Lengths, field: str) -> Array:
    """Equally likely lengths, ascending: one point for a fixed length, else 64 quantile midpoints."""
    levels = [(i + 0.5) / _POINTS for i in range(_POINTS)]
    if lengths.histogram is not None:
        tokens, counts = _histogram(request.path(lengths.histogram))
        edges = np.cumsum(counts) / counts.sum()
        return np.asarray(tokens[np.searchsorted(edges, np.array(levels))], dtype=np.float64)
    if not lengths.percentiles:
        assert lengths.mean is not None
        return np.array([float(lengths.mean)])
    quantile = _quantile_function(lengths)
    found = np.array([quantile(level) for level in levels])
    if lengths.mean is None:
        return found
    if len(lengths.percentiles) == 1:
        return np.asarray(found * (lengths.mean / found.mean()))
    return _with_mean(found, lengths, field)


def _quantile_function(lengths: Lengths) -> Callable[[float], float]:
    """Log length as a piecewise linear function of the normal score; one percentile and a mean make a
    lognormal (mean / p50 = exp(sigma^2 / 2))."""
    normal = NormalDist()
    points = sorted((normal.inv_cdf(float(k[1:]) / 100), math.log(v)) for k, v in lengths.percentiles.items())
    if len(points) == 1:
        z, log_value = points[0]
        sigma = _lognormal_sigma(z, log_value, math.log(lengths.mean)) if lengths.mean else 0.0
        return lambda q: math.exp(log_value + sigma * (normal.inv_cdf(q) - z))

    def quantile(q: float) -> float:
        x = normal.inv_cdf(q)
        left = max(0, min(len(points) - 2, sum(z <= x for z, _ in points) - 1))
        (z0, v0), (z1, v1) = points[left], points[left + 1]
        return math.exp(v0 + (v1 - v0) * (x - z0) / (z1 - z0))

    return quantile


def _lognormal_sigma(z: float, log_value: float, log_mean: float) -> float:
    """sigma with log_mean = mu + sigma^2/2 and log_value = mu + sigma z; the smaller root that is >= 0."""
    inside = z * z - 2 * (log_value - log_mean)
    if inside < 0:
        return max(z, 0.0)
    roots = [z - math.sqrt(inside), z + math.sqrt(inside)]
    return min((r for r in roots if r >= 0), default=0.0)


def _with_mean(found: Array, lengths: Lengths, field: str) -> Array:
    """Stretches the tail above the highest percentile given, so that the mean is as stated."""
    assert lengths.mean is not None
    top = max(lengths.percentiles, key=lambda name: float(name[1:]))
    tail = found > lengths.percentiles[top]
    wanted = lengths.mean * len(found) - found[~tail].sum()
    if abs(found.mean() / lengths.mean - 1) <= 0.02 or not tail.any():
        return (
            found * (lengths.mean / found.mean())
            if abs(found.mean() / lengths.mean - 1) <= 0.1
            else _no(field, lengths)
        )
    factor = wanted / found[tail].sum()
    if factor * found[tail].min() < lengths.percentiles[top] * 0.999 or factor > 20:
        gap = lengths.mean / found.mean()
        return found * gap if 0.8 <= gap <= 1.25 else _no(field, lengths)
    out = found.copy()
    out[tail] *= factor
    return out


def _no(field: str, lengths: Lengths) -> Array:
    raise InvalidField(
        where="request",
        field=field,
        value=lengths.model_dump(),
        reason="no distribution with these percentiles has this mean",
        mend="Check the numbers, leave one out, or give a histogram file.",
    )


# -- files -------------------------------------------------------------------------------


def _text(path: Path, what: str) -> str:
    try:
        return read_bytes(path, what).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _unreadable(path, "text", str(error)) from None


def _unreadable(path: Path, form: str, reason: str) -> FileUnreadable:
    return FileUnreadable(
        what="workload",
        path=path,
        format=form,
        reason=reason,
        mend="Check the file against docs/requests.md.",
    )


def _histogram(path: Path) -> tuple[Array, Array]:
    """`tokens,count` lines; a header line is allowed. Ascending."""
    rows: list[tuple[float, float]] = []
    for number, row in enumerate(csv.reader(StringIO(_text(path, "histogram")))):
        cells = [cell.strip() for cell in row if cell.strip()]
        if not cells or cells[0].startswith("#"):
            continue
        try:
            tokens, count = (float(cell) for cell in cells)
        except ValueError:
            if number == 0:
                continue
            raise _unreadable(path, "a histogram", f"line {number + 1} is not tokens,count") from None
        if tokens < 0 or count < 0 or not math.isfinite(tokens + count):
            raise _unreadable(path, "a histogram", f"line {number + 1} has a negative number")
        rows.append((tokens, count))
    if not rows or sum(count for _, count in rows) <= 0:
        raise _unreadable(path, "a histogram", "it has no counts")
    rows.sort()
    return np.array([r[0] for r in rows]), np.array([r[1] for r in rows])


def _from_trace(request: Request) -> Traffic:
    """Lengths, rate and burstiness of a trace, and the hits of a prefix cache of unlimited size: a block
    counts as found when an earlier request had the same hash."""
    trace = request.workload.trace
    assert trace is not None
    path = request.path(trace.file)
    columns: list[tuple[float, int, int]] = []
    seen: set[int] = set()
    blocks = found = 0
    for row in read(path, trace.format):
        columns.append(row[:3])
        blocks += len(row.blocks)
        found += sum(block in seen for block in row.blocks)
        seen.update(row.blocks)
    if len(columns) < 2:
        raise _unreadable(path, f"a {trace.format} trace", "it has fewer than two requests")
    arrivals, isl, osl = np.array(columns, dtype=np.float64).T
    span = float(arrivals[-1] - arrivals[0])
    if span <= 0:
        raise _unreadable(path, f"a {trace.format} trace", "all requests arrive at one moment")
    gaps = np.diff(arrivals)
    hit_rate = found / blocks if blocks else 0.0
    hits = trace.prefix_hit_rate if trace.prefix_hit_rate is not None else hit_rate
    count = len(isl)
    return Traffic(
        isl=isl,
        osl=osl,
        weight=np.full(count, 1.0 / count),
        hit_rate=min(hits, 0.999),
        rate=(count - 1) / span,
        arrival_cv2=float(gaps.var() / gaps.mean() ** 2),
    )
