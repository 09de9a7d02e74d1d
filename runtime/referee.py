"""The simulator as referee: do the engines of a fleet keep their objectives when its workload is played?

Engines that do all the work on a request are simulated one of each kind, with its share of the traffic;
prefill and decode pools together (of large ones a part), with the caches handed over between them.
Latencies are those of a system that has been running for a while: requests that meet it filling up or
running empty do not count.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache

import numpy as np
from numpy.typing import NDArray

from planc.cost_model import catalogue
from planc.cost_model.table import CostTable
from planc.planner import assemble
from planc.planner.disaggregated import transfer_seconds
from planc.planner.offers import Deployed, Fleet
from planc.planner.plan import Policy, Pool
from planc.planner.referee import Judgement, Verdict
from planc.planner.search import Search
from planc.planner.slo import Slo
from planc.planner.traffic import Traffic
from planc.runtime.routing import behind
from planc.runtime.simulator import Load, Records, Rules, Server, closed_loop, open_loop, simulate
from planc.runtime.simulator.deployment import sites, speculation
from planc.runtime.simulator.disaggregated import simulate_disaggregated
from planc.runtime.simulator.load import gamma, lengths, shared_prefix

Floats = NDArray[np.float64]

#: requests of a simulation, and at least so many generations of the requests that are in the system at once
_REQUESTS, _GENERATIONS, _MOST = 2000, 5, 12_000
#: schedulers of two pools that are simulated together; larger fleets are represented by as many
_SCHEDULERS = 24
#: transfers are priced by so many tokens
_TOKENS = 64
#: lengths are spread by this much around the workload's: equal ones would march in step
_SPREAD = 0.1
_PERCENTILES = (50, 90, 95, 99)


@dataclass(frozen=True, slots=True)
class Played:
    """Requests that met a settled system: seconds, and the traffic class of each."""

    ttft: Floats
    tpot: Floats
    e2e: Floats
    itl: Records
    label: NDArray[np.intp]
    names: tuple[str, ...]

    def value(self, slo: Slo) -> float:
        """What the requests that an objective is about found."""
        mine = np.ones(self.label.size, dtype=bool)
        if slo.traffic_class:
            mine = self.label == self.names.index(slo.traffic_class)
        if slo.metric == "itl":
            gaps = self.itl.gaps
            return gaps.mean if slo.quantile is None else gaps.quantile(slo.quantile)
        values = getattr(self, slo.metric)[mine]
        values = values[np.isfinite(values)]
        if not values.size:
            return 0.0
        return float(values.mean() if slo.quantile is None else np.quantile(values, slo.quantile))


@dataclass(slots=True)
class Simulation:
    """A `planc.planner.referee.Referee`. The same seed gives the same verdicts.

    tolerance   share by which a simulated value may exceed its limit
    """

    seed: int = 0
    tolerance: float = 0.02
    _seen: dict[tuple[object, ...], Played] = field(default_factory=dict)
    _known: dict[tuple[object, ...], list[Server]] = field(default_factory=dict)
    _tables: dict[int, CostTable] = field(default_factory=dict)

    def judge(self, search: Search, fleet: Fleet) -> Judgement:
        """Plays the workload against every kind of engine."""
        found: list[tuple[Verdict, Played, float]] = []
        flow = search.traffic
        whole = sum(item.count * item.requests_s(flow) for item in fleet.items if item.role != "decode")
        for items in _together(fleet.items):
            assert items[0].stream is not None
            slos = _objectives(search, items)
            key = tuple(
                (self._key(search, i), i.load, i.count if i.role != "aggregated" else 1) for i in items
            )
            played = self._seen.get(key) or self._seen.setdefault(key, self._play(search, items))
            values = {slo.key: played.value(slo) for slo in slos}
            broken = [slo for slo in slos if values[slo.key] > slo.limit * (1 + self.tolerance)]
            excess = max((values[slo.key] / slo.limit for slo in broken), default=1.0)
            verdict = Verdict(tuple(items), values, not broken, excess, _failing(items, broken))
            part = sum(item.count * item.requests_s(flow) for item in items if item.role != "decode")
            found.append((verdict, played, part / whole))
        return Judgement(tuple(v for v, _, _ in found), _latencies([(p, share) for _, p, share in found]))

    def _play(self, search: Search, items: Sequence[Deployed]) -> Played:
        stream = items[0].stream
        assert stream is not None
        flow = stream.traffic
        if items[0].role == "aggregated":
            one = items[0]
            server = self._servers(search, one)[0]
            if one.engine.reuse is not None:
                flow = replace(flow, hit_rate=one.engine.reuse.hit_rate)
            ranks = one.candidate.shape.dp
            load, label = _load(flow, one.load / ranks, server, self.seed)
            return _settled(simulate(server, load, seed=self.seed), label, flow)
        first = [item for item in items if item.role == "prefill"]
        second = [item for item in items if item.role == "decode"]
        ranks = sum(item.count * item.candidate.shape.dp for item in items)
        part = min(_SCHEDULERS / ranks, 1.0)
        prefill, first_weights, most = self._pool(search, first, part)
        decode, second_weights, more = self._pool(search, second, part)
        rate = min(most, more)
        if flow.concurrency is None:
            load, label = _load(flow, rate, prefill[0], self.seed)
        else:
            load, label = _load(flow, rate * _answer_seconds(items), decode[0], self.seed)
        source, target = first[0].candidate, second[0].candidate

        @cache
        def whole(blocks: int) -> float:
            tokens = blocks * _TOKENS
            return transfer_seconds(
                search.table, source.shape, target.shape, tokens, source.group, target.group
            )

        records = simulate_disaggregated(
            prefill,
            decode,
            load,
            transfer_s=lambda tokens: whole(math.ceil(tokens / _TOKENS)),
            weights=(first_weights, second_weights),
            first_token=source.profile.serving.first_token,
            keeps_seat=source.profile.serving.keeps_seat,
            seed=self.seed,
        )
        return _settled(records, label, flow)

    def routes(
        self, search: Search, fleet: Fleet, policies: Sequence[Policy]
    ) -> dict[Policy, dict[str, float]]:
        """A `planc.planner.routing.Routes`: the whole fleet behind each router."""
        flow, items = search.traffic, [item for item in fleet.items for _ in range(item.count)]
        servers = [self._servers(search, item)[0] for item in items]
        running = [float(item.state(flow).batch[0, 0]) * flow.decode_context for item in items]
        weights = [item.load for item in items]
        found: dict[Policy, dict[str, float]] = {}
        for policy in policies:
            records, filled, label = behind(policy, servers, weights, running, flow, sum(weights), self.seed)
            times = records.ttft_s[filled], records.tpot_s[filled], records.e2e_s[filled]
            played = Played(*times, records, label[filled], flow.names)
            means = zip(("ttft_ms", "tpot_ms", "e2e_ms"), times, strict=True)
            found[policy] = {
                "hit_rate": float(records.hit[filled].sum() / records.prompt[filled].sum()),
                **{name: 1e3 * float(np.nanmean(values)) for name, values in means},
                "excess": max([1.0, *(played.value(slo) / slo.limit for slo in search.slos)]),
            }
        return found

    def _key(self, search: Search, item: Deployed) -> tuple[object, ...]:
        """Names engines of whatever search that do the same work in steps that take as long."""
        assert item.stream is not None
        one, table = item.candidate, self._tables.setdefault(id(search.table), search.table)
        hardware = catalogue.gpu(one.group.gpu.name).memory_gib, catalogue.engine(one.profile.name).fusions
        room = search.max_model_len, search.request.constraints.gpu_memory_utilization
        how = one.shape, one.speculation, one.group.fabric, item.limits, item.role, item.engine.reuse
        return id(table), *hardware, *room, *how, item.stream.traffic.key()

    def _servers(self, search: Search, item: Deployed) -> list[Server]:
        key = self._key(search, item)
        if key not in self._known:
            self._known[key] = _servers(search, item)
        return self._known[key]

    def _pool(
        self, search: Search, items: Sequence[Deployed], part: float
    ) -> tuple[list[Server], list[float], float]:
        """Schedulers of a part of some engines (at least one of each kind), their shares of the traffic, and
        requests/s."""
        servers: list[Server] = []
        weights: list[float] = []
        rate = 0.0
        for item in items:
            mine, count = self._servers(search, item), max(round(item.count * part), 1)
            servers += mine * count
            weights += [item.load / len(mine)] * (len(mine) * count)
            rate += item.load * count
        return servers, weights, rate


def _together(items: Sequence[Deployed]) -> list[list[Deployed]]:
    """Engines that are simulated together: each aggregated kind alone, the two halves of a split as one."""
    found: dict[tuple[object, ...], list[Deployed]] = {}
    for number, item in enumerate(items):
        key: tuple[object, ...] = (number,)
        if item.role in ("prefill", "decode") and item.stream is not None:
            key = ("split", item.stream.split)
        found.setdefault(key, []).append(item)
    return list(found.values())


def _objectives(search: Search, items: Sequence[Deployed]) -> list[Slo]:
    """Objectives of the requests that these engines serve."""
    stream = items[0].stream
    assert stream is not None
    return [s for s in search.slos if not s.traffic_class or s.traffic_class in stream.classes]


def _failing(items: Sequence[Deployed], broken: Sequence[Slo]) -> tuple[Deployed, ...]:
    """Whose load is too high: of two pools, the one that the broken objectives are about."""
    if items[0].role == "aggregated":
        return tuple(items) if broken else ()
    roles = {"ttft": ("prefill",), "tpot": ("decode",), "itl": ("decode",), "e2e": ("prefill", "decode")}
    blamed = {role for slo in broken for role in roles[slo.metric]}
    return tuple(item for item in items if item.role in blamed)


def _servers(search: Search, item: Deployed) -> list[Server]:
    """The schedulers of one engine."""
    assert item.stream is not None
    flow = item.stream.traffic
    home = item.candidate.group.island_gpus(0)[:1]
    replica = assemble.replica(search, item, home * item.candidate.shape.world, 1.0)
    context = flow.isl_mean + flow.osl_mean
    pool = Pool(role="aggregated", replicas=[replica])
    found = sites([pool], search.table, search.groups, context)
    rules = Rules.of(
        catalogue.engine(replica.engine),
        replica.max_num_seqs,
        # a step with decoding sequences is a cycle of pp micro-batches
        replica.max_num_batched_tokens * (1 if item.role == "prefill" else replica.pp),
        prefix_caching=flow.hit_rate > 0,
        speculative=speculation(found[0]),
    )
    if item.engine.reuse is not None:  # what it finds elsewhere comes before its first step
        rules = replace(rules, request_ms=rules.request_ms + 1e3 * item.engine.reuse.load_s)
    return [Server(site.clock, rules, site.kv_blocks, replica.block_size) for site in found]


def _answer_seconds(items: Sequence[Deployed]) -> float:
    """From a request to the end of its answer on prefill and decode pools, by formulas."""
    users = sum(i.count * i.load * float(i.state(i.stream.traffic).e2e[0, 0]) for i in items if i.stream)
    return users / sum(i.count * i.load for i in items if i.role == "decode")


def _load(flow: Traffic, amount: float, server: Server, seed: int) -> tuple[Load, NDArray[np.intp]]:
    """Requests at a rate (or of so many users of a closed loop), and the traffic class of each."""
    users = amount
    if flow.concurrency is None:
        step = server.clock.line(server.rules.max_num_seqs, flow.decode_context).seconds
        users = min(amount * flow.osl_mean * step, server.rules.max_num_seqs) + 1
    count = min(max(_REQUESTS, math.ceil(_GENERATIONS * users)), _MOST)
    which, prompt, output = lengths(flow, count, 1 - _SPREAD, 1 + _SPREAD, seed)
    label = np.zeros(count, dtype=np.intp) if flow.label is None else flow.label[which]
    prefix = shared_prefix(prompt, flow.hit_rate, server.block_size)
    if flow.concurrency is not None:
        clients = max(round(amount), 1)
        together = min(clients, server.rules.max_num_seqs)
        answer = flow.osl_mean * server.clock.line(together, flow.decode_context).seconds
        load = closed_loop(clients, count, prompt, output, burst=False, ramp_s=answer)
        return replace(load, **prefix), label
    arrivals = gamma(amount, count, math.sqrt(flow.arrival_cv2), seed)
    return open_loop(arrivals, prompt, output, **prefix), label


def _settled(records: Records, label: NDArray[np.intp], flow: Traffic) -> Played:
    """Without the requests that came while the system filled, or were answered after the last had come."""
    begun = float(np.quantile(records.e2e_s, 0.99)) + float(records.arrival_s.min())
    over = float(records.arrival_s.max())
    mine = (records.arrival_s >= begun) & (records.finish_s <= over)
    if mine.sum() < label.size / 4:
        mine = records.arrival_s >= np.quantile(records.arrival_s, 0.25)
    return Played(
        records.ttft_s[mine], records.tpot_s[mine], records.e2e_s[mine], records, label[mine], flow.names
    )


def _latencies(parts: Sequence[tuple[Played, float]]) -> dict[str, dict[str, float]]:
    """Mean and percentiles over the requests of all engines, weighted by their shares of the traffic (ms)."""
    found = {}
    for metric in ("ttft", "tpot", "e2e"):
        values = np.concatenate([getattr(played, metric) for played, _ in parts])
        weight = np.concatenate([np.full(played.label.size, s / played.label.size) for played, s in parts])
        known = np.isfinite(values)
        if not known.any():
            continue
        values, weight = values[known], weight[known] / weight[known].sum()
        order = np.argsort(values, kind="stable")
        reached = np.cumsum(weight[order])
        found[f"{metric}_ms"] = {
            "mean": 1e3 * float(np.dot(values, weight)),
            **{
                f"p{p}": 1e3 * float(values[order][min(np.searchsorted(reached, p / 100), values.size - 1)])
                for p in _PERCENTILES
            },
        }
    return found
