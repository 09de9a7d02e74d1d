"""What lies in the memory of one GPU of a replica, and how many cache blocks are left."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from planc.cost_model.catalogue import GIB, EngineProfile, Gpu
from planc.cost_model.features import Array, ArrayLike
from planc.cost_model.formats import fmt
from planc.cost_model.local import Stage, factors, stages, unquantized, weight_format
from planc.cost_model.parts import split
from planc.cost_model.shape import EngineShape
from planc.cost_model.table import CostTable, LayerClass, Row

MIB = 1024.0**2

#: tokens that fused kernels of routed experts take at once: CHUNK_SIZE of SGLang's, twice vLLM's
_CHUNK = 65536


@dataclass(frozen=True, slots=True)
class Kept:
    """Cache of some layers on one GPU: bytes per token, of which at most `limit` tokens are kept."""

    bytes_per_token: float
    limit: float


@dataclass(frozen=True, slots=True)
class MemoryMap:
    """Bytes on the GPU of a replica that has the least room for cache.

    states               recurrent states of `max_num_seqs` sequences
    kv_cache             kv_blocks * block_size * kv_bytes_per_token
    reserve              what remains of `capacity`: left to others by the engine's setting, or rounding
    overhead             of the framework, its communicators, and the rotary table
    limit                of `capacity`, what the engine's setting lets it take
    kv_bytes_per_token   exact, over the GPU's layers, when every layer keeps every token
    kv_blocks            0 when weights and the rest leave no room for one sequence of `max_model_len`
    kept                 per kind of layer, for models whose layers forget (sliding windows)
    graph_sizes          decode batches that get a CUDA graph
    """

    capacity: float
    weights: float
    activations: float
    graphs: float
    overhead: float
    states: float
    kv_cache: float
    reserve: float
    limit: float
    kv_bytes_per_token: float
    block_size: int
    kv_blocks: int
    kept: tuple[Kept, ...]
    graph_sizes: tuple[int, ...]

    @property
    def kv_tokens(self) -> int:
        """Tokens that the cache holds when every layer keeps every token."""
        return self.kv_blocks * self.block_size

    @property
    def total(self) -> float:
        """Everything that is taken."""
        return self.capacity - self.reserve

    @property
    def fits(self) -> bool:
        """Whether the engine would start: room for one sequence at least."""
        return self.kv_blocks > 0 or (not self.kept and self.total <= self.limit)

    def sequence_bytes(self, context: ArrayLike) -> Array:
        """Cache bytes of one sequence with `context` tokens, whole blocks, forgetting layers capped."""
        return _sequence_bytes(self.kept, context, self.block_size)

    def sequences(self, context: ArrayLike) -> Array:
        """Sequences of `context` tokens that the cache holds; infinite without a cache."""
        with np.errstate(divide="ignore"):
            found: Array = np.where(self.kept != (), self.kv_cache / self.sequence_bytes(context), np.inf)
        return found


@dataclass(frozen=True, slots=True)
class Contents:
    """What a shape puts on its GPUs whatever the batch limits.

    stages   of each pipeline stage: bytes of weights, cache by kind of layer, state bytes per sequence
    widest   elements per token that the widest op holds at once, routed experts apart
    routed   elements per token that routed experts hold at once, the tokens of all attention ranks counted
    angles   bytes of the table of rotary sines and cosines
    """

    stages: tuple[tuple[Stage, float, tuple[Kept, ...], float], ...]
    widest: float
    routed: float = 0.0
    angles: float = 0.0


def contents(table: CostTable, shape: EngineShape) -> Contents:
    """Of one rank of each stage."""
    table = split(table, shape.formats)
    found = tuple(
        (
            stage,
            weight_bytes(table, shape, stage.counts),
            kept_by(table, shape, stage.counts),
            state_bytes(table, shape, stage.counts),
        )
        for stage in stages(table, shape)
    )
    live: dict[bool, float] = {False: 0.0, True: 0.0}
    for row in table.rows.get("prefill", ()):
        routed = row.work.family == "grouped_gemm"
        live[routed] = max(live[routed], _live(row, shape))
    return Contents(found, live[False], live[True], rotary_bytes(table))


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
    held: Contents | None = None,
) -> MemoryMap:
    """The memory of the GPU with the least room for cache, over the pipeline stages.

    held   `contents` of the shape, where they are known

    Blocks are counted as the engines do: what `utilization` allows, divided by the bytes of one block.
    What it is a share of differs (`EngineProfile.utilization_of`): of all memory, less weights, the
    activation peak of a full step, graphs, states and overhead; of all memory, for weights, states and cache
    alone, while the rest lives in what is left; or of what is free once everything else has its place.
    """
    held = contents(table, shape) if held is None else held
    size = block_size or profile.block_size_on(gpu)
    share = profile.gpu_memory_utilization if utilization is None else utilization
    sizes = () if shape.eager or gpu.vendor == "cpu" else profile.cuda_graphs.sizes(max_num_seqs)
    rule = profile.cuda_graphs
    graphs = (rule.mib_fixed + rule.mib_per_size * len(sizes)) * MIB if sizes else 0.0
    overhead = (profile.framework_gib + (profile.communicator_gib if shape.world > 1 else 0.0)) * GIB
    overhead += held.angles

    def of(stage: Stage, weights: float, kept: tuple[Kept, ...], state: float) -> MemoryMap:
        per_token = sum(k.bytes_per_token for k in kept)
        states = state * max_num_seqs
        logits = max_num_seqs if stage.last else 0
        activations = activation_bytes(table, shape, profile, held, max_num_batched_tokens, logits)
        fixed = weights + activations + graphs + overhead + states
        limit = gpu.memory_bytes * share
        if profile.utilization_of == "free":
            limit = fixed + max(gpu.memory_bytes - fixed, 0.0) * share
        elif profile.utilization_of == "static":
            limit = min(
                (gpu.memory_bytes - overhead) * share + activations + graphs + overhead, gpu.memory_bytes
            )
        room = limit - fixed
        blocks = math.floor(room / (per_token * size)) if per_token and room > 0 else 0
        one = float(_sequence_bytes(kept, max_model_len / shape.cp, size))
        if blocks * per_token * size < one:
            blocks = 0
        cache = blocks * per_token * size
        return MemoryMap(
            capacity=gpu.memory_bytes,
            weights=weights,
            activations=activations,
            graphs=graphs,
            overhead=overhead,
            states=states,
            kv_cache=cache,
            reserve=gpu.memory_bytes - fixed - cache,
            limit=limit,
            kv_bytes_per_token=per_token,
            block_size=size,
            kv_blocks=blocks,
            kept=kept,
            graph_sizes=sizes,
        )

    return min((of(*stage) for stage in held.stages), key=_room)


def _room(found: MemoryMap) -> tuple[float, float]:
    """Stages without any cache (no attention in them) don't bound the sequences."""
    return (found.kv_blocks if found.kept else math.inf), found.reserve


def _sequence_bytes(kept: tuple[Kept, ...], context: ArrayLike, block: int) -> Array:
    tokens = np.ceil(np.asarray(context, dtype=np.float64) / block) * block
    total = np.zeros_like(tokens)
    for part in kept:
        total = total + part.bytes_per_token * np.minimum(tokens, part.limit + block)
    return total


def weight_bytes(table: CostTable, shape: EngineShape, counts: tuple[int, ...]) -> float:
    """Weights of one rank that holds `counts` layers of each class.

    Rows say which parameters divide and which take another format. Parameters of a class that no row
    reads whole stay unquantized: tables that are looked up, with their vocabulary divided, and small
    vectors. Where rows read more than the class owns (an embedding tied to the head on the same rank, a
    projection read twice) they are held once; a last pipeline stage copies a tied embedding.
    """
    total, wide = 0.0, fmt(unquantized(shape)).bytes
    tables = any(count and cls.name == "embedding" for cls, count in zip(table.classes, counts, strict=True))
    for cls, count in zip(table.classes, counts, strict=True):
        if not count:
            continue
        copied = cls.name == "head" and table.model.tied_embeddings and not tables
        seen, held = 0.0, 0.0
        for row in _with_weights(table, cls):
            elements = float(row.work.weights * row.calls)
            seen += elements
            held += elements * factors(row, shape).weights * fmt(weight_format(row, shape)).bytes
        if seen > cls.parameters and not copied:
            held *= cls.parameters / seen
        rest = max(cls.parameters - seen, 0.0) / _looked_up_by(table, cls, shape)
        total += count * (held + rest * wide)
    return total


def kept_by(table: CostTable, shape: EngineShape, counts: tuple[int, ...]) -> tuple[Kept, ...]:
    """Cache of one rank, by how many tokens its layers keep; KV heads are copied where tp exceeds them.

    Layers that attend to chunks keep all: vLLM turns its hybrid cache off there, TensorRT-LLM has one pool.
    """
    found: dict[float, float] = {}
    for cls, count in zip(table.classes, counts, strict=True):
        if count and cls.kv_elements:
            limit = float(cls.kv_span[1:]) if cls.kv_span[:1] == "w" else math.inf
            divided = min(shape.tp, cls.kv_units) if cls.kv_units else 1
            per_element = fmt(shape.kv_format(cls.name)).bytes
            found[limit] = found.get(limit, 0.0) + count * cls.kv_elements * per_element / divided
    return tuple(Kept(size, limit) for limit, size in sorted(found.items()))


def state_bytes(table: CostTable, shape: EngineShape, counts: tuple[int, ...]) -> float:
    """Recurrent state bytes per sequence on one rank (fp32, heads divided by tp)."""
    return sum(
        count * cls.state_elements * 4.0 / shape.tp for cls, count in zip(table.classes, counts, strict=True)
    )


def activation_bytes(
    table: CostTable, shape: EngineShape, profile: EngineProfile, held: Contents, tokens: int, logits: int
) -> float:
    """Peak of live activations in a step of `tokens`: two residuals and the widest op's operands. Routed
    experts get the tokens of all attention ranks, and work on at most `_CHUNK` of them at once.

    `activation_factor` covers what an allocator keeps beside them. Logits are fp32 for sampling, one
    row for each of `logits` sequences, besides the head's own result.
    """
    wide = fmt(unquantized(shape)).bytes
    gathered = table.model.hidden * tokens * shape.dp if shape.dp > 1 and held.routed else 0.0
    routed = held.routed * min(tokens * shape.dp, _CHUNK) + gathered
    elements = max(held.widest * tokens, routed) + 2 * table.model.hidden * tokens
    sampled = logits * table.model.vocab * (4.0 + wide)
    return profile.activation_factor * (elements * wide + sampled)


def rotary_bytes(table: CostTable) -> float:
    """Sines and cosines that engines look up, in fp32, for every position that the configuration names
    whatever the deployment's limit: 5 GB where those are ten million."""
    rows = [row for rows in table.rows.values() for row in rows]
    width = max((row.work.dims.get("qk_dim", 0) for row in rows if row.work.family == "attention"), default=0)
    return 4.0 * table.model.max_position * width


def _live(row: Row, shape: EngineShape) -> float:
    """Elements per token that an op holds at once."""
    part, work = factors(row, shape), row.work
    if work.family == "grouped_gemm":  # the first product's rows, then the second's in their place
        pairs = work.dims["top_k"]  # were they all for these experts
        width = work.dims["n"] * part.n
        return pairs * (max(width, work.dims["k"]) + width / 2)
    own = work.reads.terms.get("T", 0.0) * part.reads + work.writes.terms.get("T", 0.0) * part.writes
    return own * shape.cp if work.family == "attention" else own  # queries and results of all cp ranks


def _looked_up_by(table: CostTable, cls: LayerClass, shape: EngineShape) -> int:
    """Ranks over which a class's tables are divided: engines split the vocabulary of an embedding."""
    rows = (row for rows in table.rows.values() for row in rows if row.layer_class == cls.name)
    split = any(row.work.family == "gather" and row.shard.kind == "vocab" for row in rows)
    return shape.tp if split else 1


def _with_weights(table: CostTable, cls: LayerClass) -> list[Row]:
    """Rows of a class that read weights, each site once over both phases."""
    found: dict[tuple[str, str], Row] = {}
    for rows in table.rows.values():
        for row in rows:
            if row.layer_class == cls.name and row.work.weights:
                found.setdefault((row.site, row.op), row)
    return list(found.values())
