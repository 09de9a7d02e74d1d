"""What a fleet will do, as the numbers of a plan: each with band and provenance."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from planc.cost_model.catalogue import Provenance
from planc.cost_model.energy import watts
from planc.cost_model.memory import MemoryMap
from planc.cost_model.quantity import worst
from planc.planner.levels import running_share
from planc.planner.offers import Deployed
from planc.planner.plan import Memory, Predicted
from planc.planner.priors import priors
from planc.planner.request import Metric, Slo
from planc.planner.steady_state import Steady
from planc.planner.traffic import Traffic

GIB = 1024.0**3
_PERCENTILES = (0.5, 0.9, 0.95, 0.99)


@dataclass(frozen=True, slots=True)
class Running:
    """One kind of engine at its load: as predicted, and with every step at the band's ends."""

    item: Deployed
    share: float
    now: Steady
    best: Steady
    worst: Steady


def running(items: Sequence[Deployed], load: Traffic) -> tuple[Running, ...]:
    total = sum(item.count * item.load for item in items)
    found = []
    for item in items:
        low, high = item.engine.model.band
        share = item.count * item.load / total
        states = (item.state(load), item.state(load, low), item.state(load, high))
        found.append(Running(item, share, *states))
    return tuple(found)


def predicted(items: Sequence[Deployed], load: Traffic, slos: Sequence[Slo]) -> dict[str, Predicted]:
    """All metrics of a fleet. Means are weighted by traffic; a percentile is that of the engines where
    it is highest, so it never flatters. Without decode steps tokens are input tokens."""
    parts = running(items, load)
    source = worst([part.item.engine.model.source for part in parts])
    closed = load.concurrency is not None
    tokens = load.osl_mean or load.isl_mean
    found: dict[str, Predicted] = {}
    metrics: tuple[Metric, ...] = ("ttft", "tpot", "itl", "e2e") if load.decode_steps else ("ttft", "e2e")
    for metric in metrics:
        found[f"{metric}_ms"] = _latency(metric, parts, slos, source)

    def rate(pick: Callable[[Running], Steady]) -> float:
        return sum(p.item.count * p.item.candidate.shape.dp * float(pick(p).rate[0, 0]) for p in parts)

    offered = sum(p.item.count * p.item.load for p in parts)
    if closed:
        requests = _band(rate(lambda p: p.now), rate(lambda p: p.worst), rate(lambda p: p.best), source)
    else:
        requests = _band(offered, offered, offered, source)
    gpus = sum(p.item.count * p.item.candidate.shape.world for p in parts)
    usd = sum(p.item.count * p.item.candidate.usd for p in parts)
    stated = all(p.item.candidate.group.priced for p in parts)
    found["requests_s"] = requests
    found["output_tok_s"] = _times(requests, tokens)
    found["output_tok_s_per_gpu"] = _times(requests, tokens / gpus)
    found["usd_per_hour"] = Predicted(
        value=usd, low=usd, high=usd, source="measured" if stated else "assumed"
    )
    money = _inverse(found["output_tok_s"], usd / 3600 * 1e6)
    found["usd_per_million_tokens"] = money.model_copy(update={"source": source if stated else "assumed"})
    joules = _inverse(found["output_tok_s"], _power(parts))
    less, more = priors().power_band
    found["joules_per_token"] = _band(joules.value, joules.low * less, joules.high * more, "assumed")
    low, high = (part.item.engine.model.band for part in (parts[0], parts[-1]))
    capacity = sum(p.item.count * p.item.capacity for p in parts)
    name = "capacity_users" if closed else "capacity_requests_s"
    found[name] = _band(capacity, capacity / high[1], capacity / low[0], source)
    users = [
        sum(
            p.item.count * p.item.candidate.shape.dp * float(s.users[0, 0])
            for p, s in zip(parts, side, strict=True)
        )
        for side in ([p.now for p in parts], [p.best for p in parts], [p.worst for p in parts])
    ]
    found["concurrency"] = _band(users[0], users[1], users[2], source)
    return dict(sorted(found.items()))


def _latency(metric: Metric, parts: Sequence[Running], slos: Sequence[Slo], source: Provenance) -> Predicted:
    def mean(pick: Callable[[Running], Steady]) -> float:
        return 1e3 * sum(p.share * float(pick(p).mean(metric)[0, 0]) for p in parts)

    asked = {slo.quantile for slo in slos if slo.metric == metric and slo.quantile is not None}
    levels = sorted({*_PERCENTILES, *asked})
    percentiles = {
        _percentile_name(q): 1e3 * max(float(p.now.quantile(metric, q)[0, 0]) for p in parts) for q in levels
    }
    value, low, high = mean(lambda p: p.now), mean(lambda p: p.best), mean(lambda p: p.worst)
    if metric == "ttft":
        low, high = low * priors().ttft_band[0], high * priors().ttft_band[1]
    return Predicted(
        value=value, low=min(low, value), high=max(high, value), source=source, percentiles=percentiles
    )


def _percentile_name(q: float) -> str:
    return f"p{q * 100:.10g}"


def _power(parts: Sequence[Running]) -> float:
    """Watts of the fleet."""
    total = 0.0
    for part in parts:
        one = watts(part.item.candidate.group.gpu, running_share(part.now))
        total += part.item.count * part.item.candidate.shape.world * float(np.ravel(one)[0])
    return total


def _band(value: float, low: float, high: float, source: Provenance) -> Predicted:
    return Predicted(value=value, low=min(low, high, value), high=max(low, high, value), source=source)


def _times(of: Predicted, factor: float) -> Predicted:
    return _band(of.value * factor, of.low * factor, of.high * factor, of.source)


def _inverse(of: Predicted, factor: float) -> Predicted:
    return _band(factor / of.value, factor / of.high, factor / of.low, of.source)


def memory(found: MemoryMap) -> Memory:
    """The memory map of one GPU, GiB. Recurrent states count as cache."""
    return Memory(
        weights_gib=found.weights / GIB,
        kv_cache_gib=(found.kv_cache + found.states) / GIB,
        activations_gib=found.activations / GIB,
        graphs_gib=found.graphs / GIB,
        overhead_gib=found.overhead / GIB,
        reserve_gib=found.reserve / GIB,
        total_gib=found.total / GIB,
        capacity_gib=found.capacity / GIB,
    )
