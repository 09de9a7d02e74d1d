"""What lies in the memory of one GPU of a replica, and how many cache blocks are left."""

from __future__ import annotations

import math
from dataclasses import dataclass

from planc.cost_model.catalogue import GIB, EngineProfile, Gpu
from planc.cost_model.formats import fmt
from planc.cost_model.local import factors, stages, unquantized, weight_format
from planc.cost_model.shape import EngineShape
from planc.cost_model.table import CostTable, LayerClass, Row


@dataclass(frozen=True, slots=True)
class MemoryMap:
    """Bytes on the fullest GPU. `kv_cache` is what the blocks take; `reserve` is left unused.

    kv_bytes_per_token   on that GPU, over its layers, when every layer keeps every token
    kv_tokens            kv_blocks * block_size: tokens that one scheduler's cache holds
    kv_blocks            of the stage with the least room; 0 when weights and the rest do not fit
    """

    capacity: float
    weights: float
    activations: float
    graphs: float
    overhead: float
    states: float
    kv_cache: float
    reserve: float
    kv_bytes_per_token: float
    block_size: int
    kv_blocks: int
    graph_sizes: tuple[int, ...]

    @property
    def kv_tokens(self) -> int:
        return self.kv_blocks * self.block_size

    @property
    def total(self) -> float:
        """Everything that is taken; `reserve` is what remains of `capacity`."""
        return self.weights + self.activations + self.graphs + self.overhead + self.states + self.kv_cache

    @property
    def fits(self) -> bool:
        return self.kv_blocks > 0


def memory_map(
    table: CostTable,
    shape: EngineShape,
    gpu: Gpu,
    profile: EngineProfile,
    *,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    max_model_len: int,
    block_size: int | None = None,
    utilization: float | None = None,
) -> MemoryMap:
    """The memory of the GPU that has the least room for cache, over the pipeline stages.

    Blocks are counted as the engines do: what `utilization` allows, less weights, the activation
    peak of a full step, graphs and overhead, divided by the bytes of one block. A cache needs a block
    for one sequence of `max_model_len` at least, or the engine would refuse to start: then
    `kv_blocks` is 0.
    """
    size = block_size or profile.block_size
    share = profile.gpu_memory_utilization if utilization is None else utilization
    rows = tuple(row for row in table.rows.get("prefill", ()))
    held = [weight_bytes(table, shape, stage.counts) for stage in stages(table, shape)]
    maps = []
    for stage, weights in zip(stages(table, shape), held, strict=True):
        per_token = kv_bytes_per_token(table, shape, stage.counts)
        state = state_bytes(table, shape, stage.counts) * max_num_seqs
        activations = activation_bytes(
            table, rows, shape, profile, max_num_batched_tokens, max_num_seqs if stage.last else 0
        )
        sizes = () if shape.eager or gpu.vendor == "cpu" else profile.cuda_graphs.sizes(max_num_seqs)
        rule = profile.cuda_graphs
        graphs = (rule.mib_fixed + rule.mib_per_size * len(sizes)) * 1024**2 if sizes else 0.0
        overhead = (profile.framework_gib + (profile.communicator_gib if shape.world > 1 else 0.0)) * GIB
        room = gpu.memory_bytes * share - weights - activations - graphs - overhead - state
        blocks = math.floor(room / (per_token * size)) if per_token and room > 0 else 0
        if per_token and blocks * size * shape.cp < max_model_len and not _bounded(table):
            blocks = 0
        cache = blocks * per_token * size
        taken = weights + activations + graphs + overhead + state + cache
        maps.append(
            MemoryMap(
                capacity=gpu.memory_bytes,
                weights=weights,
                activations=activations,
                graphs=graphs,
                overhead=overhead,
                states=state,
                kv_cache=cache,
                reserve=gpu.memory_bytes - taken,
                kv_bytes_per_token=per_token,
                block_size=size,
                kv_blocks=blocks,
                graph_sizes=sizes,
            )
        )
    return min(maps, key=lambda found: (found.kv_blocks, found.reserve))


def weight_bytes(table: CostTable, shape: EngineShape, counts: tuple[int, ...]) -> float:
    """Weights of one rank that holds `counts` layers of each class.

    Rows say which parameters divide and which take another format; parameters that no row reads
    (a class's remainder) are kept whole and unquantized.
    """
    total, wide = 0.0, fmt(unquantized(shape)).bytes
    for cls, count in zip(table.classes, counts, strict=True):
        if not count:
            continue
        seen, held = 0.0, 0.0
        for row in _once(table, cls):
            elements = float(row.work.weights * row.calls)
            seen += elements
            held += elements * factors(row, shape).weights * fmt(weight_format(row, shape)).bytes
        rest = max(cls.parameters - seen, 0.0)
        held = held * (cls.parameters / seen if seen > cls.parameters else 1.0)
        total += count * (held + rest * wide)
    return total


def kv_bytes_per_token(table: CostTable, shape: EngineShape, counts: tuple[int, ...]) -> float:
    """Cache bytes per token on one rank; KV heads are replicated where tp exceeds them."""
    per_element = fmt(shape.kv).bytes
    total = 0.0
    for cls, count in zip(table.classes, counts, strict=True):
        divided = min(shape.tp, cls.kv_units) if cls.kv_units else 1
        total += count * cls.kv_elements * per_element / divided
    return total


def state_bytes(table: CostTable, shape: EngineShape, counts: tuple[int, ...]) -> float:
    """Recurrent state bytes per sequence on one rank (fp32, heads divided by tp)."""
    return sum(
        count * cls.state_elements * 4.0 / shape.tp for cls, count in zip(table.classes, counts, strict=True)
    )


def activation_bytes(
    table: CostTable,
    rows: tuple[Row, ...],
    shape: EngineShape,
    profile: EngineProfile,
    tokens: int,
    logits_rows: int,
) -> float:
    """Peak of live activations in a step of `tokens`: the residual and the widest op's operands.

    `activation_factor` covers what an allocator keeps beside them. Logits are fp32 for sampling, of
    one row per sequence.
    """
    wide = fmt(unquantized(shape)).bytes
    widest = 0.0
    for row in rows:
        part = factors(row, shape)
        reads, writes = row.work.reads.terms, row.work.writes.terms
        live = reads.get("T", 0.0) * part.reads + writes.get("T", 0.0) * part.writes
        widest = max(widest, live * part.tokens)
    hidden = table.model.hidden
    logits = logits_rows * table.model.vocab * (4.0 + wide) if table.model.vocab else 0.0
    return profile.activation_factor * ((widest + 2 * hidden) * tokens * wide / shape.cp + logits)


def _once(table: CostTable, cls: LayerClass) -> list[Row]:
    """Rows of a class with weights, each site once over both phases."""
    found: dict[tuple[str, str], Row] = {}
    for rows in table.rows.values():
        for row in rows:
            if row.layer_class == cls.name and row.work.weights:
                found.setdefault((row.site, row.op), row)
    return list(found.values())


def _bounded(table: CostTable) -> bool:
    """No layer keeps every token (windows and states only)."""
    return all(cls.kv_span[:1] in ("", "w", "c") for cls in table.classes)
