"""From a fleet to the parts of a plan: replicas on physical GPUs, decisions per layer class, coverage."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from functools import cache
from importlib import resources

from planc.cost_model import overlay
from planc.cost_model.fused import chosen
from planc.cost_model.local import activation_format, stages, unquantized, weight_format
from planc.cost_model.parts import module_of, ranges, split
from planc.cost_model.shape import EngineShape
from planc.cost_model.table import CostTable, Row
from planc.errors import CheckFailed
from planc.planner import priors, techniques
from planc.planner.candidates import Candidate
from planc.planner.inventory import Group, place
from planc.planner.offers import Deployed, Fleet
from planc.planner.plan import Coverage, LayerDecisions, LayerPlan, Pool, Replica, Role
from planc.planner.predict import memory
from planc.planner.referee import Judgement
from planc.planner.search import Search


def pools(search: Search, fleet: Fleet, homes: list[list[str]] | None = None) -> list[Pool]:
    """The replicas, placed: a pool for each role and set of traffic classes, identical ones together."""
    if homes is None:
        homes = placement(search.groups, [i.candidate for i in fleet.items for _ in range(i.count)])
    rates = {id(item): item.requests_s(search.traffic) for item in fleet.items}
    total = sum(item.count * rates[id(item)] for item in fleet.items if item.role != "decode")
    found: dict[tuple[Role, tuple[str, ...]], list[Replica]] = {}
    position = 0
    for item in fleet.items:
        classes = item.stream.classes if item.stream is not None else search.traffic.names
        role: Role = item.role if search.table.model.kind == "causal_lm" else "encoder"
        mine = found.setdefault((role, classes if classes != search.traffic.names else ()), [])
        for _ in range(item.count):
            mine.append(replica(search, item, homes[position], rates[id(item)] / total))
            position += 1
    return [
        Pool(role=role, classes=list(classes), replicas=replicas)
        for (role, classes), replicas in found.items()
    ]


def replica(search: Search, item: Deployed, gpus: list[str], share: float) -> Replica:
    """One engine as the plan states it."""
    shape, limits = item.candidate.shape, item.limits
    room = (item.stream or search.main).room(item.candidate)
    found = room.memory(limits.max_num_seqs, limits.budget)
    profile, allowed = item.candidate.profile, search.request.constraints
    return Replica(
        engine=shape.engine,
        gpu=shape.gpu,
        gpus=gpus,
        tp=shape.tp,
        pp=shape.pp,
        dp=shape.dp,
        ep=shape.ep,
        cp=shape.cp,
        weights=shape.weights,
        activations=shape.activations,
        kv=shape.kv,
        formats=dict(shape.formats),
        max_num_seqs=limits.max_num_seqs,
        max_num_batched_tokens=limits.budget,
        max_model_len=search.max_model_len,
        block_size=found.block_size,
        kv_blocks=found.kv_blocks,
        cuda_graph_sizes=list(found.graph_sizes),
        gpu_memory_utilization=allowed.gpu_memory_utilization or profile.gpu_memory_utilization,
        pipeline_layers=pipeline_layers(search.table, shape),
        expert_copies=shape.copies,
        chunked_prefill=search.table.model.kind == "causal_lm",
        prefix_caching=search.traffic.hit_rate > 0,
        speculative=techniques.stated(item.candidate.speculation),
        kv_offload=techniques.offload(item.engine.reuse, item.candidate.group, shape.world),
        traffic_share=share,
        memory=memory(found),
    )


def pipeline_layers(table: CostTable, shape: EngineShape) -> list[int]:
    """Layers of each stage."""
    return [len(stage.layers) for stage in stages(table, shape)]


def placement(groups: tuple[Group, ...], wanted: list[Candidate]) -> list[list[str]]:
    """Physical GPUs of each engine, rank by rank. Each piece lies inside one island."""
    homes: list[list[str]] = [[] for _ in wanted]
    for group in groups:
        mine = [i for i, candidate in enumerate(wanted) if candidate.group.index == group.index]
        pieces = [
            (i, candidate.pieces[1])
            for i in mine
            for candidate in (wanted[i],)
            for _ in range(candidate.pieces[0])
        ]
        found = place([size for _, size in pieces], group.islands)
        if found is None:
            raise CheckFailed(
                what="placement",
                reason="the chosen engines do not fit into the nodes",
                mend="Please report the request.",
            )
        for (owner, size), (island, start) in sorted(
            zip(pieces, found, strict=True), key=lambda both: (both[0][0], both[1])
        ):
            homes[owner] += group.island_gpus(island)[start : start + size]
    return homes


# -- layers ------------------------------------------------------------------------------


def layers(table: CostTable, fleet: Fleet) -> list[LayerPlan]:
    """What is decided for each layer class. A fleet of several shapes is described by its first one;
    formats and sharding of the others follow from their own replica entries."""
    item = fleet.items[0]
    shape = item.candidate.shape
    table = split(table, shape.formats)
    offers = chosen(table, item.candidate.profile, None)
    found = []
    for cls in table.classes:
        rows = [row for rows in table.rows.values() for row in rows if row.layer_class == cls.name]
        usual, others = _formats(rows, shape)
        mine = [offer for offer in offers if offer.layer_class == cls.name]
        fused = {site: offer.name for offer in reversed(mine) for site in offer.sites}
        kernels = {row.site: row.op.split("::")[-1] for row in rows if row.work.family != "view"} | fused
        decisions = LayerDecisions(
            format=usual,
            formats=others,
            sharding={
                row.site: row.shard.kind
                for row in rows
                if row.shard.kind != "replicated" and (shape.tp > 1 or shape.dp > 1)
            },
            fusions=sorted({offer.name for offer in mine}),
            kernel=dict(sorted(kernels.items())),
        )
        named = ranges(cls.layers) if shape.formats else ""
        entry = {"class": cls.name, "count": cls.count, "layers": named, "decisions": decisions}
        found.append(LayerPlan.model_validate(entry))
    return found


def _formats(rows: list[Row], shape: EngineShape) -> tuple[str, dict[str, str]]:
    """The weight format of most of a class's quantized matrices, and "weights/activations" of the modules
    whose own differs."""
    elements: Counter[tuple[str, str]] = Counter()
    modules: dict[str, tuple[str, str]] = {}
    for row in rows:
        if row.work.weights and "weight" in row.quantizable:
            found = weight_format(row, shape), activation_format(row, shape)
            elements[found] += row.work.weights * row.calls
            modules[module_of(row.site, row.work.family)] = found
    if not shape.formats:
        narrow = sorted({weights for weights, _ in elements} - {unquantized(shape)})
        return (narrow[0] if narrow else unquantized(shape)), {}
    most = max(elements, key=lambda one: (elements[one], one), default=(unquantized(shape), ""))
    return most[0], {name: "/".join(found) for name, found in sorted(modules.items()) if found != most}


# -- coverage and fingerprints -----------------------------------------------------------

_MODELLED = (
    "roofline of every traced op, with kernel launch and host time",
    "collectives by size, ranks and link",
    "continuous batching with chunked prefill in steady state",
    "waiting for the prompt queue and for a seat (queueing formulas)",
    "memory: weights, cache, activations, CUDA graphs, engine overhead",
    "placement on nodes and NVLink domains",
)
_NOT_MODELLED = (
    "the start burst of closed-loop benchmarks",
    "cold starts, failures and autoscaling",
)


def coverage(search: Search, judgement: Judgement | None = None) -> Coverage:
    """What the numbers hold, and what they leave out."""
    modelled, missing = list(_MODELLED), list(_NOT_MODELLED)
    if judgement is None:
        missing.append("a simulation of the scheduler (percentiles are closed-form approximations)")
        missing.append("preemption and recomputation when the cache overflows")
    elif judgement.accepted:
        modelled.append("the workload played against the plan by the scheduler's own rules")
    else:
        missing.append(f"all objectives kept: it misses {judgement.missed}")
    if len(search.streams) > 1:
        modelled.append("pools for sets of traffic classes, and prefill and decode pools with hand-over")
    facts, load = search.table.model, search.traffic
    missing += _not_searched(search)
    if search.request.constraints.speculative:
        modelled.append(
            "speculative decoding: verified rows by the step model, drafts as layers of the model"
        )
        missing.append("how acceptance rates differ between requests and fall with the position of a draft")
    else:
        missing.append("speculative decoding")
    allowed = search.request.constraints
    if allowed.max_accuracy_drop is not None or allowed.formats:
        modelled.append("accuracy of formats: the sum of what their parts lose, as if independent")
    if allowed.sensitivities is None:
        missing.append("accuracy of formats on this model (published averages are used)")
    else:
        modelled.append("where formats hurt this model, by measured divergences")
        missing.append("how much they hurt its tasks (published averages, unless the measurements state it)")
    if load.hit_rate > 0:
        modelled.append(f"prefix cache hits of {100 * load.hit_rate:.3g} % of the input tokens")
        if load.prefix_tokens is None:
            missing.append("memory that the prefix cache needs to reach its hit rate")
        else:
            modelled.append("what each memory holds of the prefixes that recur, loaded or computed again")
            missing.append(
                "prefixes that are wanted more often than others, and what heeding caches in routing saves"
            )
    if search.request.workload.trace is not None:
        modelled.append("length distribution, arrival rate and burstiness of the trace")
        missing.append("correlation and drift of the trace's arrivals")
    if search.table.expert_load is not None:
        modelled.append("how often experts are chosen, as counted, and where they lie")
        missing.append("what moving experts costs while an engine runs")
    elif facts.experts:
        missing.append("imbalance between experts of this model (a log-normal law is assumed)")
    if facts.generic_ops:
        missing.append("arithmetic of ops costed by their bytes only: " + ", ".join(facts.generic_ops))
    if any(not group.priced for group in search.groups):
        missing.append("your own GPU prices (list prices of the catalogue were assumed)")
    return Coverage(modelled=modelled, not_modelled=missing)


def _not_searched(search: Search) -> Iterator[str]:
    """Fleets that the objective leaves out."""
    by_level = search.request.objective in ("min_latency", "min_energy")
    closed = search.traffic.concurrency is not None
    if by_level:
        yield "loads of engines between simple fractions of their pool's"
    if by_level and closed:
        yield "prefill and decode pools (latency and energy in a closed loop)"
    if closed and len(search.traffic.names) > 1:
        yield "pools for some of the traffic classes (closed loop)"


def profile_fingerprint() -> str:
    """Hash of every data file that predictions rest on, and of the measured profile in use."""
    found, shipped = overlay.current(), _data_fingerprint()
    return (
        shipped
        if found is None
        else hashlib.sha256(f"{shipped}{found.fingerprint}".encode()).hexdigest()[:16]
    )


@cache
def _data_fingerprint() -> str:
    digest = hashlib.sha256(priors.text().encode())
    for name, text in sorted(_data_files()):
        digest.update(f"{name}\0{text}\0".encode())
    return digest.hexdigest()[:16]


def _data_files() -> Iterator[tuple[str, str]]:
    root = resources.files("planc.cost_model.data")
    for folder in (root, root.joinpath("engines")):
        for file in folder.iterdir():
            if file.name.endswith((".yaml", ".json", ".csv")):
                yield f"{folder.name}/{file.name}", file.read_text(encoding="utf-8")
