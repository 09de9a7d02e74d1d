"""What a fleet will do, as the numbers of a plan: each with band and provenance."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from planc.cost_model.catalogue import Provenance
from planc.cost_model.energy import watts
from planc.cost_model.memory import MemoryMap
from planc.cost_model.quantity import worst
from planc.planner.levels import running_share
from planc.planner.offers import Deployed
from planc.planner.operating_point import Steady
from planc.planner.plan import Memory, Predicted
from planc.planner.priors import priors
from planc.planner.request import Metric, Slo
from planc.planner.traffic import Traffic

GIB = 1024.0**3
_PERCENTILES = (0.5, 0.9, 0.95, 0.99)


#: roles whose steady state says something about a metric; end-to-end latency is made of these
_FIRST = ("aggregated", "prefill", "decode")
_LATER = ("aggregated", "decode")


@dataclass(frozen=True, slots=True)
class Running:
    """One kind of engine at its load: as predicted, and with every step at the band's ends. `share` of all
    requests pass through these engines."""

    item: Deployed
    share: float
    now: Steady
    best: Steady
    worst: Steady

    def of(self, traffic_class: str) -> Running:
        """What the requests of one class meet; `share` is still that of all requests of this class."""
        now, best, worst = (s.of(traffic_class) for s in (self.now, self.best, self.worst))
        return Running(self.item, self.share, now, best, worst)


def running(items: Sequence[Deployed], load: Traffic) -> tuple[Running, ...]:
    rates = [item.count * item.requests_s(load) for item in items]
    total = sum(rate for item, rate in zip(items, rates, strict=True) if item.role != "decode")
    found = []
    for item, rate in zip(items, rates, strict=True):
        low, high = item.engine.model.band
        share = rate / total
        states = (item.state(load), item.state(load, low), item.state(load, high))
        found.append(Running(item, share, *states))
    return tuple(found)


def predicted(items: Sequence[Deployed], load: Traffic, slos: Sequence[Slo]) -> dict[str, Predicted]:
    """All metrics of a fleet. Means are weighted by traffic; a percentile is that of the engines where
    it is highest, so it never flatters. Without decode steps tokens are input tokens."""
    parts = running(items, load)
    whole = [p for p in parts if p.item.role != "decode"]  # every request passes once through these
    source = worst([part.item.engine.model.source for part in parts])
    closed = load.concurrency is not None
    tokens = load.osl_mean or load.isl_mean
    found = latencies(parts, load, slos)

    def rate(pick: Callable[[Running], Steady]) -> float:
        return sum(p.item.count * p.item.candidate.shape.dp * float(pick(p).rate[0, 0]) for p in whole)

    offered = sum(p.item.count * p.item.load for p in whole)
    if closed:  # users, where loads of halves are requests/s
        offered = sum(p.item.count * _users(p) for p in parts)
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
    capacity = offered * min(p.item.capacity / p.item.load for p in parts)
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


def _users(part: Running) -> float:
    """Users of one engine in a closed loop."""
    if part.item.role == "aggregated":
        return part.item.load
    return part.item.load * float(part.now.e2e[0, 0])


def by_class(
    items: Sequence[Deployed], load: Traffic, slos: Sequence[Slo]
) -> dict[str, dict[str, Predicted]]:
    """Latencies that the requests of each traffic class meet; {} where there is one class."""
    if len(load.names) == 1:
        return {}
    every = running(items, load)
    found: dict[str, dict[str, Predicted]] = {}
    for name, share in zip(load.names, load.shares, strict=True):
        mine = []
        for part in every:
            served = part.now.traffic
            if name in served.names:
                inside = served.shares[served.names.index(name)]
                mine.append(replace(part.of(name), share=part.share * inside / share))
        asked = [slo for slo in slos if slo.traffic_class in ("", name)]
        found[name] = latencies(mine, load.only(name), asked)
    return found


def latencies(parts: Sequence[Running], load: Traffic, slos: Sequence[Slo]) -> dict[str, Predicted]:
    """TTFT, TPOT, inter-token and end-to-end latency over the requests of these engines."""
    source = worst([part.item.engine.model.source for part in parts])
    metrics: tuple[Metric, ...] = ("ttft", "tpot", "itl", "e2e") if load.decode_steps else ("ttft", "e2e")
    return {f"{metric}_ms": _latency(metric, parts, load, slos, source) for metric in metrics}


def _latency(
    metric: Metric, parts: Sequence[Running], load: Traffic, slos: Sequence[Slo], source: Provenance
) -> Predicted:
    """One latency. Requests of disaggregated pools meet a prefill engine and then a decode engine: TTFT and
    end-to-end latency add up over both (percentiles too, which is never less than they are)."""
    roles = _FIRST if metric in ("ttft", "e2e") else _LATER
    mine = [part for part in parts if part.item.role in roles]

    def mean(pick: Callable[[Running], Steady]) -> float:
        return 1e3 * sum(p.share * float(pick(p).mean(metric)[0, 0]) for p in mine)

    def quantile(q: float) -> float:
        most: dict[tuple[int, str], float] = {}
        for part in mine:
            split = part.item.stream.split if part.item.stream is not None else 0
            key = split, part.item.role
            most[key] = max(most.get(key, 0.0), float(part.now.quantile(metric, q)[0, 0]))
        halves: dict[int, float] = {}
        for (split, role), value in most.items():
            if role != "aggregated":
                halves[split] = halves.get(split, 0.0) + value
        whole = [value for (_, role), value in most.items() if role == "aggregated"]
        return 1e3 * max([*whole, *halves.values()], default=0.0)

    asked = {slo.quantile for slo in slos if slo.metric == metric and slo.quantile is not None}
    percentiles = {_percentile_name(q): quantile(q) for q in sorted({*_PERCENTILES, *asked})}
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
