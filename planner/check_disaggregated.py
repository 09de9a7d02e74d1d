"""Prefill and decode pools of a plan, evaluated again by other means than the search's.

Prompts go through a first-come-first-served queue, arrival by arrival; decoding is a fixed point on scalars;
what crosses the links is counted from the model's heads.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from planc.cost_model import catalogue
from planc.cost_model.catalogue import EngineProfile
from planc.cost_model.collectives import Fabric
from planc.cost_model.formats import fmt
from planc.cost_model.parts import split
from planc.cost_model.shape import handover_refusals
from planc.cost_model.step import StepLoad, StepModel
from planc.cost_model.table import CostTable
from planc.planner.check import shape_of
from planc.planner.plan import Plan, Pool, Replica, Role
from planc.planner.priors import way
from planc.planner.request import Request
from planc.planner.traffic import Traffic, traffic

#: what two ways to the same TPOT, and a queue of so many arrivals to the same TTFT, may differ by; and by how
#: much two prices of a step may: a queue that is nearly full makes 1 / (1 - busy) times as much of that
_TPOT, _TTFT, _STEP = 0.06, 0.15, 0.02
_ARRIVALS = 20_000
_BEHIND = 0.03  # of the time; a queue that ends so far behind has no steady state
_GRAIN = 64  # tokens to which the queue rounds a step


def check_disaggregated(plan: Plan, request: Request, table: CostTable) -> list[str]:
    """Everything that is wrong with a plan's prefill and decode pools, one sentence each.

    TTFT and TPOT are compared where all requests take this way; a plan may promise more than is found, never
    less. Users of a closed loop are counted, and its requests taken to come at random.
    """
    if not any(pool.role in ("prefill", "decode") for pool in plan.pools):
        return []
    found = [*_partners(plan), *_roles(plan, table)]
    load = traffic(request, table.model.kind)
    if found:
        return found
    pairs = [_Pair(plan, request, table, load, classes) for classes in _sets(plan)]
    for pair in pairs:
        found += pair.problems()
    whole = sum(pair.share for pair in pairs)
    if not found and abs(whole - 1) < 1e-6:
        found += _promises(plan, pairs)
    return found or list(_users(plan, load))


def _sets(plan: Plan) -> list[tuple[str, ...]]:
    """Sets of traffic classes that prefill pools serve."""
    return list(dict.fromkeys(tuple(pool.classes) for pool in plan.pools if pool.role == "prefill"))


def _partners(plan: Plan) -> Iterator[str]:
    """What one pool prefills another decodes: the same requests, at the same rate, in the same formats."""
    sides: dict[tuple[str, ...], dict[Role, list[Pool]]] = {}
    for pool in plan.pools:
        if pool.role in ("prefill", "decode"):
            sides.setdefault(tuple(pool.classes), {}).setdefault(pool.role, []).append(pool)
    for classes, roles in sides.items():
        name = f"pools for {', '.join(classes)}" if classes else "pools"
        if len(roles) != 2:
            yield f"{name}: {' and '.join(roles)} without the other half"
            continue
        replicas = {role: [r for pool in pools for r in pool.replicas] for role, pools in roles.items()}
        given, taken = (sum(r.traffic_share for r in replicas[role]) for role in ("prefill", "decode"))
        if abs(given - taken) > 1e-6:
            yield f"{name}: {given:.6g} of the requests are prefilled and {taken:.6g} decoded"
        kinds = {(r.engine, r.weights, r.kv, r.block_size) for side in replicas.values() for r in side}
        if len(kinds) > 1:
            yield f"{name}: caches of unlike engines or formats cannot be handed over"


def _roles(plan: Plan, table: CostTable) -> Iterator[str]:
    for pool in plan.pools:
        for replica in {r.model_dump_json(exclude={"gpus"}): r for r in pool.replicas}.values():
            for no in handover_refusals(
                shape_of(replica), table, catalogue.engine(replica.engine), pool.role
            ):
                yield no.reason


class _Pair:
    """A prefill and a decode pool that serve the same requests."""

    def __init__(
        self, plan: Plan, request: Request, table: CostTable, load: Traffic, classes: tuple[str, ...]
    ) -> None:
        self.request, self.table = request, table
        self.load = load.only(*classes) if classes else load
        self.rate = plan.predicted["requests_s"].value
        mine = [pool for pool in plan.pools if tuple(pool.classes) == classes]
        self.prefill = [r for pool in mine if pool.role == "prefill" for r in pool.replicas]
        self.decode = [r for pool in mine if pool.role == "decode" for r in pool.replicas]
        self.share = sum(r.traffic_share for r in self.prefill)
        self._fabric = {
            catalogue.gpu(n.gpu).name: Fabric(n.gpus_per_node, request.inventory.inter_node_gbps)
            for n in request.inventory.nodes
        }
        ends = [{_kind(r): r for r in side}.values() for side in (self.prefill, self.decode)]
        self.wire_s = max(self._transfer(a, b) for a in ends[0] for b in ends[1])
        self.busy = 0.0
        self.queues = {kind: self._queue(r) for kind, r in {_kind(r): r for r in self.prefill}.items()}
        self.tpot_s = {kind: self._tpot(r) for kind, r in {_kind(r): r for r in self.decode}.items()}

    # -- what is wrong ----------------------------------------------------------------------

    def problems(self) -> Iterator[str]:
        for replica in {_kind(r): r for r in self.prefill}.values():
            if self.queues[_kind(replica)] is None:
                yield f"a prefill replica ({_shape(replica)}) cannot take {self._at(replica):.4g} requests/s"
        for replica in {_kind(r): r for r in self.decode}.values():
            held = self.tpot_s[_kind(replica)] * self.load.decode_steps + self.wire_s
            running = self._at(replica) / replica.dp * held
            cached = running * self._tokens(replica)
            room = replica.kv_blocks * replica.block_size * replica.cp
            if running > replica.max_num_seqs * (1 + _TPOT) or cached > room * (1 + _TPOT):
                yield f"a decode replica ({_shape(replica)}) has no room for {running:.4g} sequences at once"
        for role, replicas in (("prefill", self.prefill), ("decode", self.decode)):
            for replica in {_kind(r): r for r in replicas}.values():
                bytes_s = self._at(replica) * self._cache(replica) * replica.tp * replica.pp
                wire = self._wire(replica) * len(replica.gpus)
                if bytes_s > wire:
                    yield f"{role}: caches at {bytes_s / 1e9:.4g} GB/s exceed links of {wire / 1e9:.4g} GB/s"

    # -- the prefill pool ---------------------------------------------------------------------

    def _queue(self, replica: Replica) -> NDArray[np.float64] | None:
        """Seconds from arrival to the end of the prompt, of a stream of requests at one scheduler; None where
        more come than go."""
        load, model = self.load.of("prefill"), self._model(replica)
        rate = self._at(replica) / replica.dp
        draw = np.random.default_rng(1)
        shape = 1 / max(load.arrival_cv2, 1e-6)
        at = np.cumsum(draw.gamma(shape, 1 / (rate * shape), _ARRIVALS))
        prompts = draw.choice(load.isl, _ARRIVALS, p=load.weight) * (1 - load.hit_rate)
        budget, known = float(replica.max_num_batched_tokens), {}

        def step(tokens: float) -> float:
            grain = max(round(tokens / _GRAIN), 1)
            if grain not in known:
                whole = max(grain * _GRAIN / load.new_tokens, 1.0)
                chunk = min(load.new_tokens, budget)
                cached = max(load.prefill_context - chunk / 2, 0.0)
                known[grain] = float(model.seconds(StepLoad(0.0, 0.0, grain * _GRAIN, whole, cached)))
            return known[grain]

        done, now, first, left, idle = np.empty(_ARRIVALS), 0.0, 0, 0.0, 0.0
        while first < _ARRIVALS:
            idle += max(at[first] - now, 0.0)
            now = max(now, at[first])
            room, last = budget, first
            while last < _ARRIVALS and at[last] <= now and room > 0 and last - first < replica.max_num_seqs:
                left = left if last == first and left > 0 else float(prompts[last])
                taken = min(left, room)
                room, left = room - taken, left - taken
                if left > 0:
                    break
                last += 1
            now += step(budget - room)
            done[first:last] = now + step(budget - room) * (replica.pp - 1)
            first = last
        self.busy = max(self.busy, 1 - idle / now)
        behind = done[-1] - at[-1]
        return None if behind > _BEHIND * at[-1] else (done - at)[_ARRIVALS // 10 :]

    # -- the decode pool ----------------------------------------------------------------------

    def _tpot(self, replica: Replica) -> float:
        """Seconds per output token of a pool whose steps carry no prompts: B <- rate S D(B), damped."""
        load, model = self.load, self._model(replica)
        rate, steps = self._at(replica) / replica.dp, load.decode_steps + self._again(replica)
        batch, tpot = 1.0, math.inf
        for _ in range(400):
            met = min(batch + 1.0, float(replica.max_num_seqs)) / replica.pp
            tpot = replica.pp * float(model.seconds(StepLoad(max(met, 1.0), load.decode_context)))
            following = min(rate * steps * tpot, float(replica.max_num_seqs))
            if abs(following - batch) < 1e-7 * batch:
                break
            batch = 0.5 * (batch + following)
        return tpot

    def handover_s(self, replica: Replica) -> float:
        """From the end of a prompt to the next token, where seats are free."""
        request_s, _ = way(self._profile(replica))
        step = self.tpot_s[_kind(replica)]
        again = self._again(replica)
        return self.wire_s + step / (2 * replica.pp) + again * (step + request_s)

    # -- arithmetic ---------------------------------------------------------------------------

    def _at(self, replica: Replica) -> float:
        """Requests/s of one replica."""
        return self.rate * replica.traffic_share

    def _again(self, replica: Replica) -> int:
        return int(self._profile(replica).serving.first_token == "again")

    def _profile(self, replica: Replica) -> EngineProfile:
        return catalogue.engine(replica.engine)

    def _model(self, replica: Replica) -> StepModel:
        gpu = catalogue.gpu(replica.gpu)
        return StepModel(self.table, shape_of(replica), gpu, self._fabric[gpu.name], self._profile(replica))

    def _tokens(self, replica: Replica) -> float:
        """Tokens in the cache of a running sequence, as layers that forget none would hold."""
        whole = self.load.decode_context
        kept = sum(c.count * c.kv_elements * min(whole, _span(c.kv_span)) for c in self.table.classes)
        per_token = sum(c.count * c.kv_elements for c in self.table.classes)
        return kept / per_token if per_token else 0.0

    def _cache(self, replica: Replica) -> float:
        """Bytes of a usual prompt's cache on one GPU of a replica, stages alike."""
        shape = shape_of(replica)
        held = sum(
            c.count * c.kv_elements / (min(replica.tp, c.kv_units) if c.kv_units else 1)
            * min(self.load.isl_mean, _span(c.kv_span)) * fmt(shape.kv_format(c.name)).bytes
            for c in split(self.table, shape.formats).classes
        )  # fmt: skip
        return held / replica.pp / replica.cp

    def _wire(self, replica: Replica) -> float:
        """Bytes/s of one GPU's link to other nodes, or inside its node where there is but one."""
        gpu = catalogue.gpu(replica.gpu)
        fabric = self._fabric[gpu.name]
        if sum(n.count for n in self.request.inventory.nodes) == 1:
            return fabric.inner(gpu, fabric.gpus_per_node).bytes_s
        return fabric.outer(gpu).bytes_s

    def _transfer(self, source: Replica, target: Replica) -> float:
        """Seconds at the full rate of the slower link."""
        arriving = self._cache(target)
        spread = target.tp * target.pp / (source.tp * source.pp)
        return arriving * max(spread, 1.0) / min(self._wire(source), self._wire(target))


def _users(plan: Plan, load: Traffic) -> Iterator[str]:
    """In a closed loop requests/s times seconds per request make as many users as were asked for (Little's
    law)."""
    if load.concurrency is None:
        return
    held = plan.predicted["requests_s"].value * plan.predicted["e2e_ms"].value / 1e3
    asked = min(float(load.concurrency), plan.predicted["capacity_users"].value)
    if held < asked * (1 - _TPOT):
        yield f"{held:.4g} users have requests on their way, of {asked:.4g}"


def _promises(plan: Plan, pairs: Sequence[_Pair]) -> Iterator[str]:
    """Mean TPOT and TTFT over all pairs against the plan's."""
    ttft = tpot = 0.0
    for pair in pairs:
        for replica in pair.decode:
            early = pair._profile(replica).serving.first_token == "prefill"
            handover, steps = pair.handover_s(replica), max(pair.load.decode_steps, 1.0)
            tpot += replica.traffic_share * (pair.tpot_s[_kind(replica)] + early * handover / steps)
            ttft += replica.traffic_share * (not early) * handover
        for replica in pair.prefill:
            request_s, _ = way(pair._profile(replica))
            waits = pair.queues[_kind(replica)]
            assert waits is not None
            ttft += replica.traffic_share * (request_s + float(waits.mean()))
    played = "ttft_ms" in plan.simulated
    busy = min(max(pair.busy for pair in pairs), 0.98)
    for name, found, tolerance in (("TPOT", tpot, _TPOT), ("TTFT", ttft, _TTFT + _STEP / (1 - busy))):
        stated = plan.predicted[f"{name.lower()}_ms"].value / 1e3
        if played and name == "TTFT":
            stated = max(stated, plan.simulated["ttft_ms"]["mean"] / 1e3)
        if found > stated * (1 + tolerance):
            yield f"{name} is {1e3 * found:.4g} ms when evaluated again, not {1e3 * stated:.4g}"


def _kind(replica: Replica) -> str:
    return replica.model_dump_json(exclude={"gpus"})


def _shape(replica: Replica) -> str:
    return f"{len(replica.gpus)} x {replica.gpu}"


def _span(text: str) -> float:
    """Tokens that a layer keeps: a window's or chunk's width."""
    return float(text[1:]) if text[:1] in ("w", "c") and text[1:].isdigit() else math.inf
