"""A load test of one configuration, simulated: what its generator would report, and what of that is due to
the burst of requests with which it starts.

One of the equal schedulers (replicas x data-parallel ranks) is simulated with its share of the clients or
arrivals. Open loops report what follows a warm-up of a tenth of the requests; `rate: max` submits all
requests at once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from planc.cost_model import catalogue
from planc.cost_model.catalogue import Provenance
from planc.cost_model.table import CostTable
from planc.planner.inventory import groups
from planc.planner.plan import Pool, Replica
from planc.planner.priors import priors
from planc.planner.request import Request
from planc.planner.traffic import Traffic, traffic
from planc.planner.workload import LoadTest
from planc.runtime.simulator import Load, Records, Rules, Server, closed_loop, open_loop, simulate
from planc.runtime.simulator.deployment import sites, speculation
from planc.runtime.simulator.load import gamma, lengths, shared_prefix

Kind = Literal["closed loop", "open loop", "offline"]

#: requests of an open loop, and fillings of the seats by an offline run, where the request names none
_OPEN, _FILLINGS = 2000, 4
_WARM_UP = 0.1
_FLAGS = ("stream_interval", "recv_interval", "prompts_per_step", "request_ms", "lag_steps")
_METRICS = ("ttft_ms", "tpot_ms", "itl_ms", "e2e_ms")


@dataclass(frozen=True, slots=True)
class Simulated:
    """What a simulated load test finds, for all replicas together.

    load, engine   inputs, defaults resolved: the generator's, and the flags that clients feel
    steady         latencies without the start burst or warm-up: metric -> mean, p50 ... (ms)
    load_test      latencies over all requests, as a generator reports them
    bands          (low, high) of the means in `load_test` and of throughput
    rates          requests and tokens per second, utilisation, occupancy of the cache
    """

    load: Mapping[str, Any]
    engine: Mapping[str, Any]
    steady: Mapping[str, Mapping[str, float]]
    load_test: Mapping[str, Mapping[str, float]]
    rates: Mapping[str, float]
    bands: Mapping[str, tuple[float, float]]
    source: Provenance

    @property
    def burst_ttft_ms(self) -> float:
        """What the start burst adds to the mean TTFT of the whole test."""
        return self.load_test["ttft_ms"]["mean"] - self.steady["ttft_ms"]["mean"]

    def to_json(self) -> dict[str, Any]:
        return {
            "load": dict(self.load),
            "engine": dict(self.engine),
            "steady": self.steady,
            "load_test": self.load_test,
            "burst_ttft_ms": self.burst_ttft_ms,
            "rates": dict(self.rates),
            "bands": {name: list(band) for name, band in self.bands.items()},
            "source": self.source,
        }


def load_test(request: Request, table: CostTable, replica: Replica, replicas: int) -> Simulated:
    """Simulates the request's workload on `replicas` engines like `replica`."""
    test = request.workload.load_test or LoadTest()
    flow = traffic(request, table.model.kind)
    context = flow.isl_mean + flow.osl_mean
    pools, offline = [Pool(role="aggregated", replicas=[replica])], flow.rate is None and not flow.concurrency
    site = sites(pools, table, groups(request), context, offline=offline)[0]
    flags = {name: value for name in _FLAGS if (value := getattr(test, name)) is not None}
    rules = Rules.of(
        catalogue.engine(replica.engine),
        replica.max_num_seqs,
        replica.max_num_batched_tokens * replica.pp,  # a step is a cycle of pp micro-batches
        prefix_caching=flow.hit_rate > 0,
        speculative=speculation(site),
        asynchronous=site.clock.model.asynchronous,
        **flags,
    )
    rules = replace(rules.offline(), **flags) if offline else rules
    server = Server(site.clock, rules, site.kv_blocks, replica.block_size)
    share = replicas * replica.dp
    kind, load = _load(flow, test, server, share)
    records = simulate(server, load, seed=test.seed)
    steady = records.steady() if kind == "closed loop" else _warm(records) if kind == "open loop" else records
    whole, settled = records.summary(), steady.summary()
    source = site.clock.model.source
    rates = {
        "requests_s": share * whole["requests_s"],
        "output_tok_s": share * whole["output_tok_s"],
        "output_tok_s_per_gpu": share * whole["output_tok_s"] / (replicas * len(replica.gpus)),
        "prompt_tok_s": share * whole["prompt_tok_s"],
        **{name: whole[name] for name in ("utilisation", "kv_occupancy", "preemptions", "duration_s")},
    }
    factors = priors().serving_bands(source)
    means = {
        "ttft_ms": (factors["ttft"], whole["ttft_ms"]["mean"]),
        "tpot_ms": (factors["tpot"], whole["tpot_ms"]["mean"]),
        "output_tok_s": (factors["throughput"], rates["output_tok_s"]),
    }
    return Simulated(
        load={
            "kind": kind,
            "concurrency": flow.concurrency,
            "request_rate": flow.rate,
            "requests": share * load.requests,
            "burst": test.burst if kind == "closed loop" else None,
            "requests_per_client": test.requests_per_client if kind == "closed loop" else None,
            "length_low": test.length_low,
            "length_high": test.length_high,
            "seed": test.seed,
        },
        engine={
            "max_num_seqs": rules.max_num_seqs,
            "max_num_batched_tokens": replica.max_num_batched_tokens,
            **{name: getattr(rules, name) for name in _FLAGS},
        },
        steady={name: settled[name] for name in _METRICS},
        load_test={name: whole[name] for name in _METRICS},
        rates=rates,
        bands={name: (low * value, high * value) for name, ((low, high), value) in means.items()},
        source=source,
    )


def _load(flow: Traffic, test: LoadTest, server: Server, share: int) -> tuple[Kind, Load]:
    """What one of `share` equal schedulers is sent."""
    clock, rules = server.clock, server.rules
    spread = test.length_low, test.length_high, test.seed
    if flow.concurrency is not None:
        clients = math.ceil(flow.concurrency / share)
        asked = test.requests or test.requests_per_client * flow.concurrency
        prompt, output = lengths(flow, max(math.ceil(asked / share), clients), *spread)[1:]
        answer = flow.osl_mean * clock.line(min(clients, rules.max_num_seqs), flow.decode_context).seconds
        loop = closed_loop(clients, len(prompt), prompt, output, burst=test.burst, ramp_s=answer)
        return "closed loop", replace(loop, **shared_prefix(prompt, flow.hit_rate, server.block_size))
    if flow.rate is not None:
        count = math.ceil((test.requests or _OPEN * share) / share)
        arrivals = gamma(flow.rate / share, count, math.sqrt(flow.arrival_cv2), test.seed)
    else:
        held = server.kv_blocks * server.block_size / max(flow.isl_mean + flow.osl_mean, 1.0)
        seats = max(min(rules.max_num_seqs, int(held)), 1)
        count = math.ceil((test.requests or _FILLINGS * seats * share) / share)
        arrivals = np.zeros(count)
    prompt, output = lengths(flow, count, *spread)[1:]
    load = open_loop(arrivals, prompt, output, **shared_prefix(prompt, flow.hit_rate, server.block_size))
    return "offline" if flow.rate is None else "open loop", load


def _warm(records: Records) -> Records:
    """Without the first requests, which find an empty engine."""
    return records.only(np.arange(records.prompt.size) >= _WARM_UP * records.prompt.size)
