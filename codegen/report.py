"""The bundle's report: one self-contained page, no script, everything escaped."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import jinja2

from planc.planner.plan import Memory, Plan, Predicted, Replica
from planc.version import __version__

#: name in a plan -> what it is and its unit
METRICS = {
    "ttft_ms": ("Time to first token", "ms"),
    "tpot_ms": ("Time per output token", "ms"),
    "itl_ms": ("Inter-token latency", "ms"),
    "e2e_ms": ("End to end", "ms"),
    "output_tok_s": ("Output tokens", "1/s"),
    "output_tok_s_per_gpu": ("Output tokens per GPU", "1/s"),
    "requests_s": ("Requests", "1/s"),
    "capacity_requests_s": ("Requests it could take", "1/s"),
    "concurrency": ("Requests in flight", ""),
    "capacity_users": ("Requests in flight it could take", ""),
    "usd_per_hour": ("Price per hour", "USD"),
    "usd_per_million_tokens": ("Price per million tokens", "USD"),
    "joules_per_token": ("Energy per token", "J"),
    "memory_gib": ("Memory per GPU", "GiB"),
}

_MEMORY = {
    "weights_gib": "weights",
    "kv_cache_gib": "KV cache",
    "activations_gib": "activations",
    "graphs_gib": "CUDA graphs",
    "overhead_gib": "overhead",
    "reserve_gib": "reserve",
}


@dataclass(frozen=True, slots=True)
class Band:
    """A prediction as drawn: percentages of the axis, which runs from 0 to the band's high end."""

    title: str
    unit: str
    predicted: Predicted
    left: float
    width: float
    mark: float


@dataclass(frozen=True, slots=True)
class Slice:
    """One part of a memory bar, as a percentage of the GPU's capacity."""

    name: str
    gib: float
    percent: float
    index: int


@dataclass(frozen=True, slots=True)
class Group:
    """Replicas of one role and shape."""

    role: str
    replica: Replica
    count: int
    share: float
    placements: tuple[tuple[str, ...], ...]
    memory: tuple[Slice, ...]


def html(plan: Plan) -> str:
    """The page. The same plan gives the same text."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        undefined=jinja2.StrictUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = number
    page = environment.get_template("report.html.jinja").render(
        plan=plan,
        version=__version__,
        bands=bands(plan),
        groups=groups(plan),
        gpus=sum(len(replica.gpus) for replica in plan.replicas()),
    )
    return page + "\n"


def bands(plan: Plan) -> list[Band]:
    """Predictions in the order people read them, then whatever else the plan predicts."""
    order = [name for name in METRICS if name in plan.predicted]
    order += sorted(set(plan.predicted) - set(order))
    return [_band(name, plan.predicted[name]) for name in order]


def _band(name: str, predicted: Predicted) -> Band:
    title, unit = METRICS.get(name, (name, ""))
    largest = max(predicted.high, predicted.value, 1e-30)
    left = 100.0 * max(predicted.low, 0.0) / largest
    return Band(
        title=title,
        unit=unit,
        predicted=predicted,
        left=round(left, 2),
        width=round(max(100.0 * predicted.high / largest - left, 0.5), 2),
        mark=round(100.0 * max(predicted.value, 0.0) / largest, 2),
    )


def groups(plan: Plan) -> list[Group]:
    """Replicas by role and shape, in the plan's order."""
    found: dict[str, list[tuple[str, Replica]]] = {}
    for pool in plan.pools:
        for replica in pool.replicas:
            same = replica.model_copy(update={"gpus": [], "traffic_share": 0.0})
            found.setdefault(pool.role + same.model_dump_json(), []).append((pool.role, replica))
    return [
        Group(
            role=members[0][0],
            replica=members[0][1],
            count=len(members),
            share=sum(replica.traffic_share for _, replica in members),
            placements=tuple(tuple(replica.gpus) for _, replica in members),
            memory=slices(members[0][1].memory),
        )
        for members in found.values()
    ]


def slices(memory: Memory) -> tuple[Slice, ...]:
    """The memory map as parts of a bar; what they leave is free."""
    capacity = max(memory.capacity_gib, 1e-30)
    sizes = [(name, float(getattr(memory, field))) for field, name in _MEMORY.items()]
    return tuple(
        Slice(name, gib, round(100.0 * gib / capacity, 3), index)
        for index, (name, gib) in enumerate(sizes)
        if gib > 0
    )


def number(value: float) -> str:
    """Four significant digits, thousands separated."""
    if abs(value) >= 1e4:
        return f"{value:,.0f}"
    return f"{value:,.4g}"
