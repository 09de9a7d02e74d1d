"""An independent checker of plans: it shares no shortcut with the search.

Reads the plan document and the cost table only, counts GPUs, memory and formats again by plain
arithmetic, and finds the operating point of each kind of replica by fixed-point iteration on scalars
(the search solves it in closed form on interpolated arrays).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from planc.cost_model import catalogue
from planc.cost_model.collectives import Fabric
from planc.cost_model.formats import fmt
from planc.cost_model.parts import KV, scheme
from planc.cost_model.shape import EngineShape, refusals
from planc.cost_model.speculative import drafting
from planc.cost_model.step import StepLoad, StepModel
from planc.cost_model.table import CostTable
from planc.planner import techniques
from planc.planner.expert_load import with_expert_load
from planc.planner.formats import accuracy
from planc.planner.plan import Plan, Replica
from planc.planner.request import Request, make_request
from planc.planner.traffic import Traffic, traffic

#: step times jump where kernels change tiles and graphs are padded; two ways to the operating point may
#: land on different sides of a jump
_TOLERANCE = 0.06
#: where batches around a mean one are looked at, in standard deviations
_PLACES = np.array([-1.3, -0.8, -0.3, 0.3, 0.8, 1.3])
#: a batch a little below the one that a plan's mean TPOT implies
_BELOW = 0.97
GIB = 1024.0**3


def check(plan: Plan, table: CostTable, request: Request | None = None) -> list[str]:
    """Everything that is wrong with a plan, one sentence each; [] when nothing is.

    request   the request with its folder, needed where it names files (histograms, traces); else the
              one inside the plan is used and such workloads are not evaluated again
    """
    from planc.planner.check_disaggregated import check_disaggregated

    found = request or make_request(plan.request)
    table = with_expert_load(request, table) if request else table
    return [
        *_placement(plan, found),
        *_limits(plan, found, table),
        *_experts(plan, table),
        *_memory(plan, table),
        *_objectives(plan, found),
        *(_operating_points(plan, found, table) if request or not found.files() else ()),
        *(check_disaggregated(plan, found, table) if request or not found.files() else ()),
    ]


# -- placement ---------------------------------------------------------------------------


def _placement(plan: Plan, request: Request) -> Iterator[str]:
    """Every GPU exists, is used once and is of the stated type; engines lie inside a node (or an NVLink
    rack) or take whole ones, tensor-parallel groups always inside."""
    homes: dict[str, tuple[str, str, int]] = {}
    number = 0
    prefix = (
        "node"
        if not any(str(n.name).startswith("node") for n in request.inventory.nodes if n.name)
        else "unnamed"
    )
    for nodes in request.inventory.nodes:
        gpu = catalogue.gpu(nodes.gpu)
        rack = max(gpu.nvlink_domain // nodes.gpus_per_node, 1) if gpu.nvlink_domain > 8 else 1
        for i in range(nodes.count):
            name = f"{nodes.name}-{i}" if nodes.name else f"{prefix}{number}"
            number += 0 if nodes.name else 1
            home = f"{nodes.name or ''}{nodes.gpu}:{i // rack}:{id(nodes)}"
            homes |= {f"{name}/{k}": (gpu.name, home, 0) for k in range(nodes.gpus_per_node)}
    used = Counter(gpu for replica in plan.replicas() for gpu in replica.gpus)
    for place, times in used.items():
        if place not in homes:
            yield f"{place} is not in the inventory"
        elif times > 1:
            yield f"{place} is used {times} times"
    sizes = Counter(home for _, home, _ in homes.values())
    for number, replica in enumerate(plan.replicas()):
        known = [homes[gpu] for gpu in replica.gpus if gpu in homes]
        world = replica.tp * replica.pp * replica.dp
        if len(replica.gpus) != world:
            yield f"replica {number} has {len(replica.gpus)} GPUs for tp*pp*dp = {world}"
        if any(name != replica.gpu for name, _, _ in known):
            yield f"replica {number} is planned for {replica.gpu} but lies on another type"
        spread = Counter(home for _, home, _ in known)
        if len(spread) > 1 and any(spread[home] != sizes[home] for home in spread):
            yield f"replica {number} spans nodes without taking them whole"
        for start in range(0, len(known), replica.tp):
            if len({home for _, home, _ in known[start : start + replica.tp]}) > 1:
                yield f"replica {number}: a tensor-parallel group leaves its NVLink domain"


# -- limits of the request and of the engine ---------------------------------------------


def _limits(plan: Plan, request: Request, table: CostTable) -> Iterator[str]:
    allowed, replicas = request.constraints, plan.replicas()
    gpus = sum(len(replica.gpus) for replica in replicas)
    if allowed.max_gpus is not None and gpus > allowed.max_gpus:
        yield f"{gpus} GPUs exceed max_gpus = {allowed.max_gpus}"
    if allowed.max_replicas is not None and len(replicas) > allowed.max_replicas:
        yield f"{len(replicas)} replicas exceed max_replicas = {allowed.max_replicas}"
    yield from _shares(plan, request)
    losses = accuracy(request, table)
    for number, replica in enumerate(replicas):
        for name in ("weights", "activations", "kv", "tp", "pp", "dp", "ep", "cp"):
            listed = getattr(allowed, name)
            if listed is not None and getattr(replica, name) not in listed:
                yield f"replica {number}: {name}={getattr(replica, name)} is not among {listed}"
        for part, taken in replica.formats.items():
            names = ("kv",) if part.endswith(f":{KV}") else ("weights", "activations")
            for name, value in zip(names, scheme(taken), strict=False):
                listed = getattr(allowed, name)
                if listed is not None and value not in listed and part not in (allowed.formats or {}):
                    yield f"replica {number}: {name}={value} of {part} is not among {listed}"
        shape = shape_of(replica)
        drop = losses.of((shape.weights, shape.activations, shape.kv), shape.formats)
        if allowed.max_accuracy_drop is not None and drop > allowed.max_accuracy_drop + 1e-12:
            yield f"replica {number}: formats lose {drop:.4g}, more than {allowed.max_accuracy_drop}"
        if sum(replica.pipeline_layers) != table.model.layers and replica.pp > 1:
            yield f"replica {number}: pipeline stages hold {sum(replica.pipeline_layers)} layers"
        if table.model.kind == "causal_lm" and replica.max_num_seqs > replica.max_num_batched_tokens:
            yield f"replica {number}: max_num_batched_tokens is below max_num_seqs"
        profile = catalogue.engine(replica.engine)
        for refusal in refusals(shape, table, catalogue.gpu(replica.gpu), profile):
            yield f"replica {number}: {refusal.reason}"


def _experts(plan: Plan, table: CostTable) -> Iterator[str]:
    """Every layer's map holds all experts, as many slots on every rank, and none twice on one."""
    for experts in plan.experts:
        for number, row in enumerate(experts.physical_to_logical):
            slots = len(row) // experts.ranks
            ranks = [row[i : i + slots] for i in range(0, len(row), slots)]
            whole = table.model.experts + experts.ranks * experts.copies
            if set(row) != set(range(table.model.experts)) or len(row) != whole:
                yield f"experts on {experts.ranks} ranks: layer {number} does not hold each of them"
            elif any(len(set(rank)) < slots for rank in ranks):
                yield f"experts on {experts.ranks} ranks: layer {number} has one twice on a rank"
        if experts.imbalance < experts.bound * (1 - 1e-6):
            yield f"experts on {experts.ranks} ranks: imbalance {experts.imbalance:.4g} is below its bound"


def _shares(plan: Plan, request: Request) -> Iterator[str]:
    """Every request is served once by each part of the work; spot machines carry no more than they may; a
    pool has more replicas than may fail."""
    allowed = request.constraints
    spot = {catalogue.gpu(n.gpu).name for n in request.inventory.nodes if n.spot}
    firm = {catalogue.gpu(n.gpu).name for n in request.inventory.nodes if not n.spot}
    for half in ("prefill", "decode"):
        mine = [pool for pool in plan.pools if pool.role in ("aggregated", "encoder", half)]
        shares = [(r.gpu, r.traffic_share) for pool in mine for r in pool.replicas]
        if abs(sum(share for _, share in shares) - 1) > 1e-6:
            yield f"traffic shares of aggregated and {half} pools do not sum to 1"
        lent = sum(share for gpu, share in shares if gpu in spot - firm)
        if allowed.max_spot_share is not None and lent > allowed.max_spot_share + 1e-5:
            yield f"machines that may be taken away carry {lent:.4g}, more than {allowed.max_spot_share}"
    for pool in plan.pools:
        if len(pool.replicas) <= (allowed.spare_replicas or 0):
            yield f"a pool of {len(pool.replicas)} {pool.role} replicas cannot lose {allowed.spare_replicas}"


def shape_of(replica: Replica) -> EngineShape:
    return EngineShape(
        replica.engine,
        replica.gpu,
        replica.tp,
        replica.pp,
        replica.dp,
        replica.ep,
        replica.cp,
        replica.weights,
        replica.activations,
        replica.kv,
        tuple(sorted(replica.formats.items())),
        tuple(replica.pipeline_layers) if replica.pp > 1 else (),
        replica.expert_copies,
    )


# -- memory ------------------------------------------------------------------------------


def _memory(plan: Plan, table: CostTable) -> Iterator[str]:
    """Parts sum up and stay within the engine's share; the cache's blocks weigh what the model's heads
    say; the weights are no lighter than all parameters in the narrowest format, spread over all ranks."""
    for number, replica in enumerate(plan.replicas()):
        m, shape = replica.memory, shape_of(replica)
        total = m.weights_gib + m.kv_cache_gib + m.activations_gib + m.graphs_gib + m.overhead_gib
        if abs(total - m.total_gib) > 1e-3 * m.capacity_gib:
            yield f"replica {number}: memory parts sum to {total:.2f} GiB, not {m.total_gib:.2f}"
        of_all = catalogue.engine(replica.engine).utilization_of == "all"
        allowed = m.capacity_gib * (replica.gpu_memory_utilization if of_all else 1.0)
        if total > allowed * (1 + 1e-9):
            yield f"replica {number}: {total:.2f} GiB do not fit into {m.capacity_gib:.2f} GiB"
        gpu = catalogue.gpu(replica.gpu)
        if abs(m.capacity_gib - gpu.memory_gib) > 1e-6:
            yield f"replica {number}: {replica.gpu} has {gpu.memory_gib} GiB"
        ranks = replica.tp * replica.dp
        least = (
            _lightest(table, replica) * min(*(fmt(w).bytes for w, _ in shape.schemes()), 2.0) / ranks / GIB
        )
        if m.weights_gib < least * 0.98:
            yield f"replica {number}: weights of {m.weights_gib:.2f} GiB are below {least:.2f} GiB"
        tokens = replica.kv_blocks * replica.block_size
        speculation = techniques.read(replica.speculative)
        drafts = speculation.layers(table) if speculation else 0  # they have caches too
        longest = max(replica.pipeline_layers) + drafts
        held = sum(
            _cache_share(cls.kv_units, replica.tp) * cls.count * cls.kv_elements for cls in table.classes
        )
        if held and table.model.layers:
            whole = held * fmt(replica.kv).bytes * tokens / table.model.layers / GIB
            # the map is that of the fullest stage, which need not be the one of most layers
            few, most = (whole * layers for layers in (min(replica.pipeline_layers) + drafts, longest))
            uneven = len({(c.kv_elements, c.kv_units) for c in table.classes if c.layers}) > 1
            uneven = uneven or len(shape.kv_formats()) > 1
            if (
                not uneven
                and m.kv_cache_gib > 0
                and not few * 0.98 <= m.kv_cache_gib <= most * 1.02
                and not _states(table)
            ):
                yield f"replica {number}: the cache weighs {most:.2f} GiB, not {m.kv_cache_gib:.2f}"
            keeps_all = all(cls.kv_span in ("", "full", "both") for cls in table.classes)
            if keeps_all and tokens * replica.cp < replica.max_model_len:
                yield f"replica {number}: the cache holds {tokens} tokens, less than max_model_len"


def _lightest(table: CostTable, replica: Replica) -> float:
    """Parameters of a pipeline stage at least: its map is that of the stage with the least room for cache,
    which need not be the heaviest."""
    if replica.pp == 1:
        return float(table.model.parameters)
    each = sorted(cls.parameters for cls in table.classes for _ in cls.layers)
    return float(sum(each[: min(replica.pipeline_layers)]))


def _cache_share(units: int, tp: int) -> float:
    return 1.0 / min(tp, units) if units else 1.0


def _states(table: CostTable) -> bool:
    return any(cls.state_elements for cls in table.classes)


# -- objectives --------------------------------------------------------------------------


def _objectives(plan: Plan, request: Request) -> Iterator[str]:
    """The plan's own numbers meet the request's objectives."""
    for slo in request.slos():
        of = plan.predicted_by_class.get(slo.traffic_class, plan.predicted)
        found = of.get(f"{slo.metric}_ms")
        if found is None:
            continue
        value = found.value
        if slo.quantile is not None:
            value = found.percentiles.get(f"p{slo.quantile * 100:.10g}", math.inf)
        if value > slo.limit * 1e3 * (1 + 1e-6):
            yield f"{slo.key} is {value:.4g}, above {slo.limit * 1e3:g}"


def _operating_points(plan: Plan, request: Request, table: CostTable) -> Iterator[str]:
    """Mean TPOT of each distinct aggregated replica, by fixed-point iteration, against the plan's figure; and
    that the replicas left after the failures that are planned for still keep a mean TPOT objective."""
    load = traffic(request, table.model.kind)
    if not load.decode_steps or load.concurrency is not None:
        return
    if any(pool.role == "decode" for pool in plan.pools):
        return  # `check_disaggregated` evaluates those
    rate = plan.predicted["requests_s"].value
    nodes = {catalogue.gpu(n.gpu).name: n for n in request.inventory.nodes}
    if any(replica.gpu not in nodes for replica in plan.replicas()):
        return  # already reported by the placement
    mean = 0.0
    for pool in plan.pools:
        served = load.only(*pool.classes) if pool.classes else load
        of = [plan.predicted_by_class.get(name, plan.predicted)["tpot_ms"].value for name in served.names]
        stated = sum(share * value for share, value in zip(served.shares, of, strict=True)) / 1e3
        whole = sum(r.traffic_share for r in pool.replicas)
        spare = request.constraints.spare_replicas or 0
        lost = sum(sorted((r.traffic_share for r in pool.replicas), reverse=True)[:spare])
        limits = [s.limit for s in request.slos() if s.key == "tpot_mean_ms"]
        kinds = Counter(_kind(replica) for replica in pool.replicas)
        for replica in {_kind(r): r for r in pool.replicas}.values():
            home = nodes[replica.gpu]
            fabric = Fabric(home.gpus_per_node, request.inventory.inter_node_gbps)
            profile = catalogue.engine(replica.engine)
            model = StepModel(table, shape_of(replica), catalogue.gpu(replica.gpu), fabric, profile)
            if replica.kv_offload:
                served = replace(served, hit_rate=replica.kv_offload["hit_rate"])
            share = replica.traffic_share / replica.dp
            running = rate * share * served.decode_steps * stated  # Little's law
            tpot = _tpot(model, replica, served, rate * share, running)
            mean += tpot * replica.traffic_share * kinds[_kind(replica)]
            if lost and limits and whole > lost:
                more = whole / (whole - lost)
                tpot = _tpot(model, replica, served, rate * share * more, running * more)
                if tpot > limits[0] * (1 + _TOLERANCE):
                    yield f"with {spare} replicas lost, TPOT is {1e3 * tpot:.4g} ms"
    stated = plan.predicted["tpot_ms"].value / 1e3
    if not abs(mean / stated - 1) <= _TOLERANCE:
        yield f"TPOT is {1e3 * mean:.4g} ms when evaluated again, not {1e3 * stated:.4g}"


def _kind(replica: Replica) -> str:
    return replica.model_dump_json(exclude={"gpus"})


def _tpot(model: StepModel, replica: Replica, load: Traffic, rate: float, running: float) -> float:
    """Seconds per output token of one scheduler at `rate`: B <- rate S TPOT(B), damped.

    CUDA graphs are captured at some batch sizes and others are padded to the next, so D(B) is a staircase
    and several batches can sustain themselves at one rate. It starts from the batch that the plan's own TPOT
    implies (`running`): is that one of them? A mean TPOT is a little more than the time average, so the batch
    may be one that is just below the end of a step of the staircase.
    """
    stated = running / (rate * load.decode_steps) if rate else 0.0
    found = (_settled(model, replica, load, rate, start) for start in (running, _BELOW * running))
    return min(found, key=lambda tpot: abs(tpot - stated))


def _settled(model: StepModel, replica: Replica, load: Traffic, rate: float, running: float) -> float:
    steps, fresh, context = load.decode_steps, load.new_tokens, load.decode_context
    batch, tpot = max(running, 1.0), math.inf
    speculation = techniques.read(replica.speculative)
    rows = speculation.rows if speculation else 1
    pace = sum(speculation.acceptance**i for i in range(rows)) if speculation else 1.0
    draft = drafting(speculation, model) if speculation else None
    steps /= pace

    def seconds(load: StepLoad) -> NDArray[np.float64]:
        return model.seconds(load) + (draft.seconds(load) if draft else 0.0)

    lengths, weight = load.isl * fresh / load.isl_mean, load.weight
    before = load.isl - lengths

    def around(met: float, sd: float) -> tuple[NDArray[np.float64], ...]:
        """Seconds of a step without prompts, of a prompt's steps by itself, and of one full of prompts,
        beside batches around `met`."""
        seqs = np.clip(met + _PLACES * sd, 1.0, replica.max_num_seqs)[:, None] / replica.pp
        seqs = np.maximum(seqs, 1.0)
        cut = lengths >= room  # into full pieces, and half of one on average
        middle = np.where(cut, before + (lengths - room / 2) / 2, before)
        first = seconds(StepLoad(seqs, context, np.where(cut, room / 2, lengths), 1.0, middle))
        cached = max(load.prefill_context - min(fresh, room) / 2, 0.0)
        full = seconds(StepLoad(seqs, context, room, max(room / fresh, 1.0), cached))
        alone = (first + np.where(cut, lengths / room - 0.5, 0.0) * full) @ weight
        return seconds(StepLoad(seqs, context))[:, 0], alone, full[:, 0]

    more = 0.0
    for _ in range(60):
        met, sd = min(batch + 1.0, float(replica.max_num_seqs)), math.sqrt(batch)
        room = max(replica.max_num_batched_tokens - rows * met / replica.pp, 1.0)
        found = around(met, sd)
        growth = max(float(np.polyfit(_PLACES, found[0], 1)[0]), 0.0)
        plain, alone, full = (float(part.mean()) for part in found)
        each = float(weight @ np.where(lengths >= room, lengths / room + 0.5, 1.0))
        longer = more * growth
        plain, alone, full = plain + longer, alone + each * longer, full + longer
        crowd, chunk = fresh / room * full, alone / each
        apart = 1 - min(rate * crowd, 1.0)
        if fresh < room:  # prompts that come during one step share the next
            any_, none = 1 - math.exp(-rate * plain), math.exp(-rate * chunk)
            share = any_ / (any_ + none)
            apart = share / (rate * (plain + share * (chunk - plain)))
        stall = apart * (alone - each * plain) + (1 - apart) * (crowd - fresh / room * plain)
        free = max(1 - rate * max(stall, 0.0), 1e-9) ** replica.dp
        base = replica.pp * plain / free
        # a batch that fluctuates by more than a Poisson variable does is met longer than it is
        noise = (load.arrival_cv2 + load.isl_cv2 * (1 - free) ** 2) / max(free, 0.02) ** 2
        pull = 1 - growth / max(sd, 1e-9) * met / plain
        more = min(max(((1 + noise) / 2 / max(pull, 0.1) - 1) / max(sd, 1.0), 0.0), 1.0)
        # prompts that came while this one was computed hold it up; those behind its last token do not
        waiting = rate * crowd**2 / 2 * (load.arrival_cv2 + load.isl_cv2) / max(1 - rate * crowd, 1e-9)
        taken = min(rate * (stall + each * plain), 1.0)
        left = waiting * stall / crowd / (taken + (1 - taken) * chunk / plain)
        behind = max((1 - free) * (waiting + alone) - left, 0.0) / free
        tpot = base + behind / steps * load.step_spread
        following = min(rate * steps * tpot, float(replica.max_num_seqs))
        if abs(following - batch) < 1e-4 * batch:
            break
        batch = 0.5 * (batch + following)
    return tpot / pace
