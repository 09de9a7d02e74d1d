"""Key figures, predictions with their bands, and the proof."""

from __future__ import annotations

from dataclasses import dataclass

from planc.codegen.report.draw import number, short
from planc.planner.plan import Plan, Predicted

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

_TILES = ("usd_per_hour", "tpot_ms", "ttft_ms", "output_tok_s", "usd_per_million_tokens")
_INSTEAD = ("e2e_ms", "requests_s")  # where nothing is streamed


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
class Tile:
    value: str
    unit: str
    title: str


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


def tiles(plan: Plan) -> list[Tile]:
    """Five figures that answer most questions."""
    replicas = plan.replicas()
    gpus = sum(len(replica.gpus) for replica in replicas)
    plural = "s" * (len(replicas) != 1)
    found = [Tile(f"{gpus:,}", f"GPU{'s' * (gpus != 1)}", f"in {len(replicas):,} replica{plural}")]
    names = _TILES if "tpot_ms" in plan.predicted else ("usd_per_hour", *_INSTEAD)
    for name in names:
        if name in plan.predicted:
            title, unit = METRICS[name]
            found.append(Tile(_figure(plan.predicted[name].value), unit, title))
    return found


def _figure(value: float) -> str:
    """Three significant digits below a thousand, thousands from a hundred of them on."""
    if value >= 1e5:
        return short(value)
    return f"{value:.3g}" if value < 1000 else number(value)


# -- the proof -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Step:
    """Candidates that left the search at one point; percent of all."""

    reason: str
    count: int
    percent: float


def pruned(plan: Plan) -> list[Step]:
    """Where the candidates went, most first; what is left over was compared by the solver."""
    total = max(plan.solver.candidates, 1)
    gone = sorted(plan.solver.pruned.items(), key=lambda item: (-item[1], item[0]))
    return [Step(reason, count, round(min(100.0 * count / total, 100.0), 2)) for reason, count in gone]


def verdict(plan: Plan) -> str:
    """What the solver's status means, in a sentence."""
    solver = plan.solver
    if solver.status == "optimal":
        return "Proved: of all candidates that were considered, no fleet does better on this objective."
    return f"Not proved: the best fleet found is within {100 * solver.gap:.2g} % of what is possible at most."
