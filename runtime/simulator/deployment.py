"""From a plan's replicas to schedulers that can be simulated, one per data-parallel rank."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from planc.cost_model import catalogue
from planc.cost_model.catalogue import Gpu
from planc.cost_model.collectives import Fabric
from planc.cost_model.memory import MemoryMap, memory_map
from planc.cost_model.shape import EngineShape
from planc.cost_model.speculative import drafting, with_draft
from planc.cost_model.step import StepModel
from planc.cost_model.table import CostTable
from planc.errors import InvalidField
from planc.planner import techniques
from planc.planner.estimate import configured
from planc.planner.inventory import Group
from planc.planner.plan import Pool, Replica, Role
from planc.planner.request import Request
from planc.planner.trace import Scan
from planc.planner.workload import Workload
from planc.runtime.simulator.clock import Clock
from planc.runtime.simulator.rules import Speculation


@dataclass(frozen=True, slots=True)
class Site:
    """One scheduler of a deployment: a data-parallel rank of a replica.

    replica     number over all pools            rank   within the replica
    gpus        that step together with it       weight its share of the traffic
    kv_blocks   whole-context blocks that its cache holds for requests of the usual length
    """

    role: Role
    replica: int
    rank: int
    plan: Replica
    gpu: Gpu
    gpus: int
    weight: float
    clock: Clock
    kv_blocks: int
    kv_bytes_per_token: float
    home: tuple[int, int]

    @property
    def name(self) -> str:
        return f"{self.replica}" if self.plan.dp == 1 else f"{self.replica}.{self.rank}"


def sites(
    pools: Sequence[Pool], table: CostTable, groups: Sequence[Group], context: float, *, offline: bool = False
) -> list[Site]:
    """The schedulers of a plan, in its order; equal replicas share their step times.

    context   mean tokens of a request, prompt and output: layers that forget hold less than that
    offline   the engines have no server before them
    """
    clocks: dict[tuple[EngineShape, Fabric, int, int], Clock] = {}
    memories: dict[str, MemoryMap] = {}
    homes = _homes(groups)
    found: list[Site] = []
    number = 0
    for pool in pools:
        for replica in pool.replicas:
            gpu, profile = catalogue.gpu(replica.gpu), catalogue.engine(replica.engine)
            profile = profile.offline(replica.pp) if offline else profile
            group, island = homes[replica.gpus[0]]
            shape = shape_of(replica)
            key = (shape, group.fabric, replica.max_num_seqs, replica.max_num_batched_tokens)
            if key not in clocks:
                model = StepModel(table, shape, gpu, group.fabric, profile, max_num_seqs=replica.max_num_seqs)
                clocks[key] = Clock(model, replica.max_num_batched_tokens)
            same = replica.model_dump_json(exclude={"gpus", "traffic_share"})
            if same not in memories:
                memories[same] = memory_map(
                    with_draft(table, techniques.read(replica.speculative)),
                    shape,
                    gpu,
                    profile,
                    max_num_seqs=replica.max_num_seqs,
                    max_num_batched_tokens=replica.max_num_batched_tokens,
                    max_model_len=replica.max_model_len,
                    block_size=replica.block_size,
                    utilization=replica.gpu_memory_utilization,
                )
            memory = memories[same]
            found += [
                Site(
                    role=pool.role,
                    replica=number,
                    rank=rank,
                    plan=replica,
                    gpu=gpu,
                    gpus=len(replica.gpus) // replica.dp,
                    weight=replica.traffic_share / replica.dp,
                    clock=clocks[key],
                    kv_blocks=_blocks(replica, memory, context),
                    kv_bytes_per_token=memory.kv_bytes_per_token,
                    home=(group.index, island),
                )
                for rank in range(replica.dp)
            ]
            number += 1
    return found


def requested(request: Request, table: CostTable, trace: Scan, settings: Mapping[str, Any]) -> list[Pool]:
    """The engines that `settings` name, for a trace in place of the request's own workload.

    As for `planner.estimate`, `replicas` (1) among them; `prefill_replicas` of these only prefill. Sequences
    may be as long as the trace's longest request, as far as the model goes, unless max_model_len is given.
    """
    rest = dict(settings)
    prefill = _count(rest.pop("prefill_replicas", 0), "prefill_replicas")
    longest = _count(rest.get("max_model_len", request.constraints.max_model_len or 0), "max_model_len")
    if not longest:
        most = table.model.max_position or trace.longest
        longest = min(max(1 << (trace.longest - 1).bit_length(), 2048), most)
    rest["max_model_len"] = longest
    average = {"isl": min(trace.prompt, longest / 2), "osl": min(trace.output, longest / 2)}
    hits = 0.5 if trace.shares else 0.0  # more than none: the engine keeps prefixes
    workload = Workload.model_validate({**average, "prefix_hit_rate": hits, "rate": "max"})
    replicas = configured(request.changed(workload=workload), table, **rest)
    if not prefill:
        return [Pool(role="aggregated", replicas=replicas)]
    if prefill >= len(replicas):
        raise InvalidField(
            where="replay",
            field="prefill_replicas",
            value=prefill,
            reason=f"of {len(replicas)} replicas none is left to decode",
            mend=f"Raise replicas, e.g. --set replicas={prefill + 1}.",
        )
    return [
        Pool(role="prefill", replicas=replicas[:prefill]),
        Pool(role="decode", replicas=replicas[prefill:]),
    ]


def speculation(site: Site) -> Speculation | None:
    """How a scheduler's engine drafts tokens; None where it does not."""
    way = techniques.read(site.plan.speculative)
    if way is None:
        return None
    draft = drafting(way, site.clock.model)
    return Speculation(way.draft, way.acceptance, draft.fixed_s, draft.per_sequence_s)


def _count(value: object, field: str) -> int:
    text = str(value).strip()
    if not text.isdigit():
        raise InvalidField(
            where="replay",
            field=field,
            value=value,
            reason="not a whole number",
            mend="Write e.g. 1.",
        )
    return int(text)


def shape_of(replica: Replica) -> EngineShape:
    names = ("engine", "gpu", "tp", "pp", "dp", "ep", "cp", "weights", "activations", "kv")
    formats = tuple(sorted(replica.formats.items()))
    cut = tuple(replica.pipeline_layers) if replica.pp > 1 else ()
    return EngineShape(
        **{name: getattr(replica, name) for name in names},
        formats=formats,
        pipeline_layers=cut,
        copies=replica.expert_copies,
    )


def _blocks(replica: Replica, memory: MemoryMap, context: float) -> int:
    """Blocks of the cache if every layer kept every token; more where layers forget, none limit where
    nothing is kept."""
    if not memory.kept:
        return replica.max_num_seqs * math.ceil(replica.max_model_len / replica.block_size)
    whole = memory.kv_bytes_per_token * math.ceil(context / replica.block_size) * replica.block_size
    saved = whole / float(memory.sequence_bytes(context))
    return int(replica.kv_blocks * max(saved, 1.0)) * replica.cp


def _homes(groups: Sequence[Group]) -> Mapping[str, tuple[Group, int]]:
    """ "node/index" of every GPU -> its group and island."""
    return {
        gpu: (group, island)
        for group in groups
        for island in range(len(group.islands))
        for gpu in group.island_gpus(island)
    }
