"""What a report is drawn from, gathered while the search is still at hand: see `planc.planner.evidence`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from planc.cost_model import catalogue
from planc.cost_model.step import StepLoad, StepPart
from planc.planner.evaluate import Bench, Engine
from planc.planner.evidence import Curve, Evidence, Op, Phase, Roof, Seen, Step
from planc.planner.offers import Deployed, Fleet, Offer
from planc.planner.plan import Plan
from planc.planner.predict import latencies, running
from planc.planner.request import Metric
from planc.planner.search import Search
from planc.planner.slo import Slo

#: shares of the requests at which latencies are read off
LEVELS = (0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999)

_KINDS = 6  # kinds of engines whose steps are taken apart, those with the most traffic
_SEEN = 400  # fleets that are kept, the cheapest
_BELOW = 0.99  # of a load: right at its highest, latencies depend on the last digit


def observe(search: Search, fleet: Fleet, plan: Plan) -> Evidence:
    """The evidence for a plan that this search found. The same search gives the same evidence."""
    return Evidence(
        steps=list(_steps(search, fleet)),
        roofs=[_roof(name) for name in dict.fromkeys(replica.gpu for replica in plan.replicas())],
        latency=list(_latency(search, fleet)),
        seen=list(_seen(search)),
    )


def _steps(search: Search, fleet: Fleet) -> Iterator[Step]:
    order = sorted(range(len(fleet.items)), key=lambda i: -fleet.items[i].count * fleet.items[i].load)
    for item in (fleet.items[i] for i in sorted(order[:_KINDS])):
        for phase, load, words in _loads(search, item):
            ops = [_op(part) for part in item.engine.model.breakdown(load)]
            yield Step(
                role=item.role if search.table.model.kind == "causal_lm" else "encoder",
                engine=_label(item) + _served(search, item),
                gpu=item.candidate.group.gpu.name,
                phase=phase,
                load=words,
                ms=sum(op.ms for op in ops),
                ops=ops,
            )


def _served(search: Search, item: Deployed) -> str:
    """The traffic classes of an engine that does not serve all."""
    mine = item.stream.classes if item.stream is not None else search.traffic.names
    return "" if set(mine) == set(search.traffic.names) else f" for {', '.join(mine)}"


def _loads(search: Search, item: Deployed) -> Iterator[tuple[Phase, StepLoad, str]]:
    """Typical steps of one scheduler of an engine at its load, in words too: the sequences that decode there
    at once (with pipeline stages: of a micro-batch), and a prompt's next chunk."""
    flow = item.stream.traffic if item.stream is not None else search.traffic
    limits, shape = item.limits, item.candidate.shape
    chunk = float(min(limits.budget, max(flow.new_tokens, 1.0)))
    if search.table.model.kind != "causal_lm":
        tokens = chunk * limits.max_num_seqs
        yield "prefill", StepLoad(0.0, 0.0, tokens, limits.max_num_seqs, 0.0), f"{tokens:,.0f} input tokens"
        return
    if item.role != "prefill":
        batch = float(item.state(search.traffic).batch[0, 0])
        seqs, context = max(min(batch, limits.max_num_seqs) / shape.pp, 1.0), flow.decode_context
        words = f"{seqs:.3g} sequences decode, each with {context:,.0f} tokens in its cache"
        yield "decode", StepLoad(seqs, context), words
    if item.role != "decode":
        yield "prefill", StepLoad(0.0, 0.0, chunk, 1.0, flow.prefill_context), f"{chunk:,.0f} prompt tokens"


def _op(part: StepPart) -> Op:
    done = part.done
    return Op(
        layer_class=part.layer_class,
        site=part.site,
        op=part.op,
        ms=1e3 * part.seconds,
        bound=part.bound,  # type: ignore[arg-type]
        source=part.source,
        flops=part.calls * done.flops if done else 0.0,
        nbytes=part.calls * done.nbytes if done else 0.0,
        precision=done.precision if done and done.flops else "",
    )


def _label(item: Deployed) -> str:
    shape = item.candidate.shape
    degrees = ("tp", "pp", "dp", "ep", "cp")
    layout = " ".join(f"{n.upper()}{getattr(shape, n)}" for n in degrees if getattr(shape, n) > 1)
    return f"{shape.world} x {shape.gpu} {layout}".strip()


def _roof(name: str) -> Roof:
    gpu = catalogue.gpu(name)
    return Roof(
        gpu=name,
        bytes_s=gpu.memory_bytes_s,
        flops_s={precision: tflops * 1e12 for precision, tflops in sorted(gpu.peak_tflops.items())},
    )


def _latency(search: Search, fleet: Fleet) -> Iterator[Curve]:
    load = search.traffic
    metrics: tuple[Metric, ...] = ("ttft", "tpot", "e2e") if load.decode_steps else ("e2e",)
    asked = [Slo(f"{m}_p{100 * q:g}_ms", m, q, math.inf) for m in metrics for q in LEVELS]
    for key, found in latencies(running(fleet.items, load), load, asked).items():
        metric = key.removesuffix("_ms")
        curve = sorted((float(name[1:]) / 100, ms) for name, ms in found.percentiles.items())
        if metric in metrics and all(math.isfinite(ms) for _, ms in curve):
            yield Curve(
                metric=metric,  # type: ignore[arg-type]
                of="all requests",
                levels=[level for level, _ in curve],
                ms=[ms for _, ms in curve],
            )


# -- what else was looked at ---------------------------------------------------------------


def _seen(search: Search) -> Iterator[Seen]:
    """Fleets of one kind of engine, as many as carry the demand (or as there is room for), by the
    interpolated step times: each engine with the limits that the search offers it with, or, where it misses
    an objective at any load, with its largest. Cheapest first."""
    bench, demand = search.bench, search.demand
    if bench.times is None:
        return
    offered = {id(offer.engine): offer for offer in search.offers}
    rows = [_row(bench, number, offered.get(id(engine))) for number, engine in enumerate(bench.engines)]
    bench = bench.only(rows)
    free, _ = bench.capacities(())
    counts = []
    for engine, most in zip(bench.engines, free, strict=True):
        offer = offered.get(id(engine))
        capacity = float(most) if offer is None else offer.capacity
        room = _room(search, engine)
        counts.append(room if demand is None else min(math.ceil(demand / max(capacity, 1e-9) - 1e-9), room))
    share = [
        (offered[id(e)].capacity if id(e) in offered else float(most))
        if demand is None
        else demand / max(n, 1)
        for e, most, n in zip(bench.engines, free, counts, strict=True)
    ]
    state = bench.at_load(_BELOW * np.array(share)[:, None])
    good = state.meets(tuple(replace(slo, limit=slo.limit / _BELOW) for slo in search.slos))[:, 0]
    tokens = search.traffic.osl_mean or search.traffic.isl_mean
    found = []
    for i, (engine, count) in enumerate(zip(bench.engines, counts, strict=True)):
        candidate, latency = engine.candidate, state.e2e[i, 0]
        if count < 1 or not math.isfinite(latency):
            continue
        rate = count * candidate.shape.dp * float(state.rate[i, 0])
        values = {
            "usd_per_hour": count * candidate.usd,
            "usd_per_million_tokens": count * candidate.usd / 3600 / (rate * tokens) * 1e6,
            "gpus": float(count * candidate.shape.world),
            "ttft_ms": 1e3 * float(state.ttft[i, 0]),
            "e2e_ms": 1e3 * float(latency),
        }
        if search.traffic.decode_steps:
            values["tpot_ms"] = 1e3 * float(state.tpot[i, 0])
        offer = offered.get(id(engine))
        meets = bool(good[i]) and offer is not None and share[i] <= offer.capacity * (1 + 1e-9)
        found.append(Seen(label=f"{count} x {candidate.label()}", values=values, meets=meets))
    price = "usd_per_hour" if demand is not None else "usd_per_million_tokens"
    yield from sorted(found, key=lambda one: (one.values[price], one.label))[:_SEEN]


def _row(bench: Bench, number: int, offer: Offer | None) -> int:
    """The row of an engine with the limits of its offer, else with its largest ones."""
    mine = np.flatnonzero(bench.owner == number)
    if offer is not None:
        return next(int(row) for row in mine if bench.limits[row] == offer.limits)
    return max(
        (int(row) for row in mine), key=lambda row: (bench.limits[row].seats, bench.limits[row].budget)
    )


def _room(search: Search, engine: Engine) -> int:
    """How many of an engine fit into the inventory and the constraints."""
    candidate, allowed = engine.candidate, search.request.constraints
    pieces, size = candidate.pieces
    room = sum(island // size for island in candidate.group.islands) // pieces
    return min(room, (allowed.max_gpus or 10**9) // candidate.shape.world, allowed.max_replicas or room)
