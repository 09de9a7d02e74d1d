"""From a point's labels to engines that can be priced: formats, shapes, memory. Says why where it cannot."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from planc.cost_model import catalogue, checkpoints
from planc.cost_model.catalogue import EngineProfile, Gpu
from planc.cost_model.collectives import Fabric
from planc.cost_model.formats import formats
from planc.cost_model.memory import MemoryMap, memory_map
from planc.cost_model.shape import EngineShape, refusals
from planc.cost_model.table import CostTable
from planc.errors import PlancError
from planc.runtime.validation.harness import Harness
from planc.runtime.validation.names import architecture, model_name
from planc.runtime.validation.points import Point, PoolLabel

#: activations that go with weights which are no format of activations
_BESIDE = {"mxfp4": ("mxfp8",)}

_UTILISATIONS = (0.95, 0.98)  # tried where the stated share leaves no room, since the point did run


class Unpredictable(Exception):
    """Why a point cannot be predicted, in a sentence."""


@dataclass(frozen=True, slots=True)
class Engine:
    """One pool of equal engines: how many, in which shape, with how much cache.

    max_num_seqs, budget   of one scheduler; an engine has shape.dp of them
    """

    workers: int
    shape: EngineShape
    memory: MemoryMap
    max_num_seqs: int
    budget: int


@dataclass(frozen=True, slots=True)
class Setup:
    """A point, ready to be simulated. `prefill` is None where one engine does both phases."""

    point: Point
    harness: Harness
    table: CostTable
    gpu: Gpu
    profile: EngineProfile
    fabric: Fabric
    decode: Engine
    prefill: Engine | None = None


Tables = Callable[[str], CostTable]


def model_folders(models: Sequence[str | Path] = ()) -> tuple[Path, ...]:
    """Where model names are looked up: the folders given, or examples/models here and beside planc."""
    beside = Path(__file__).resolve().parent.parent.parent / "examples" / "models"
    return tuple(Path(folder) for folder in models) or (Path("examples/models"), beside)


def model_tables(folders: tuple[Path, ...]) -> Tables:
    """Cost tables by model name: `<folder>/<name>.json`, the same under another spelling or of the same
    architecture, or a path to a configuration."""
    from planc.passes.tabulate import load_table

    known: dict[str, CostTable] = {}

    def table(name: str) -> CostTable:
        if name not in known:
            known[name] = load_table(_config(name, folders))
        return known[name]

    return table


def _config(name: str, folders: tuple[Path, ...]) -> Path:
    for wanted in dict.fromkeys((name, architecture(name))):
        for folder in folders:
            for path in (folder / f"{wanted}.json", folder / wanted):
                if path.exists():
                    return path
        for path in (path for folder in folders for path in sorted(folder.glob("*.json"))):
            if model_name(path.stem) == wanted:
                return path
    path = Path(name)
    if path.exists() and (path.suffix == ".json" or path.is_dir()):
        return path
    raise Unpredictable(f"model '{name}' has no configuration in {', '.join(map(str, folders))}")


def setup(point: Point, harness: Harness, tables: Tables) -> Setup:
    """Raises Unpredictable with the reason."""
    try:
        gpu, profile = catalogue.gpu(point.gpu), catalogue.engine(point.engine)
        table = tables(point.model)
    except PlancError as error:
        raise Unpredictable(str(error)) from None
    profile = _told(profile, harness)
    fabric = Fabric(gpus_per_node=8)
    table = checkpoints.as_published(table, point.weights)
    make = lambda label, load: _engine(point, harness, table, gpu, profile, label, load)  # noqa: E731
    if point.mode == "agg":
        label = PoolLabel(1, point.tp, point.attention_dp, point.moe_ep)
        engine = make(label, point.concurrency)
        return Setup(point, harness, table, gpu, profile, fabric, engine)
    assert point.prefill is not None
    assert point.decode is not None
    decode, prefill = make(point.decode, point.concurrency), make(_served(point.prefill, harness), 0)
    return Setup(point, harness, table, gpu, profile, fabric, decode, prefill)


def told(harness: Harness) -> tuple[str | None, str | None, int | None]:
    """What a launch script says of an engine's kernels and graphs."""
    return harness.expert_table, harness.fp8_gemm_backend, harness.graphed_rows


def _told(profile: EngineProfile, harness: Harness) -> EngineProfile:
    """The engine's profile with that."""
    table, products, rows = told(harness)
    graphs = profile.cuda_graphs
    if rows is not None:
        graphs = graphs.model_copy(update={"piecewise": rows})
    return profile.model_copy(
        update={"expert_table": table, "fp8_gemm_backend": products, "cuda_graphs": graphs}
    )


def _served(label: PoolLabel, harness: Harness) -> PoolLabel:
    """The prefill pool as its recipe lays it out, on the GPUs that the label gives each worker."""
    each = label.tp * label.dp
    dp = harness.prompt_dp or label.dp
    if each % dp:
        return label
    return replace(label, tp=each // dp, dp=dp, ep=harness.prompt_ep or label.ep)


def _engine(
    point: Point,
    harness: Harness,
    table: CostTable,
    gpu: Gpu,
    profile: EngineProfile,
    label: PoolLabel,
    load: int,
) -> Engine:
    shape = _shape(point, harness, table, gpu, profile, label)
    found = refusals(shape, table, gpu, profile, groups=False)
    if found:
        raise Unpredictable("; ".join(item.reason for item in found))
    each = math.ceil((harness.max_num_seqs or load) / (label.workers * label.dp))
    seqs = min(max(each, 1), max(profile.max_num_seqs, load))
    budget = harness.max_num_batched_tokens or profile.max_num_batched_tokens
    if harness.max_num_batched_tokens is None and harness.budget_beyond_prompt is not None:
        budget = seqs + point.isl + harness.budget_beyond_prompt
    if point.mode == "disagg" and load:  # it decodes, and computes no prompts
        budget = seqs
    elif point.engine == "sglang" and point.mode == "agg":  # its ranks share out chunked-prefill-size
        budget = max(budget // label.dp, 1)
    elif point.engine == "trtllm":  # whole prompts: the budget holds at least one
        budget = max(budget, point.isl)
    memory = _memory(point, harness, table, gpu, profile, shape, seqs, budget)
    return Engine(label.workers, shape, memory, seqs, budget)


def _memory(
    point: Point,
    harness: Harness,
    table: CostTable,
    gpu: Gpu,
    profile: EngineProfile,
    shape: EngineShape,
    seqs: int,
    budget: int,
) -> MemoryMap:
    """The cache that the engine had. It did run, so where the stated share of memory leaves no room for
    one sequence a larger one is taken."""
    stated = harness.gpu_memory_utilization or profile.gpu_memory_utilization
    for share in (stated, *(u for u in _UTILISATIONS if u > stated)):
        found = memory_map(
            table,
            shape,
            gpu,
            profile,
            max_num_seqs=seqs,
            max_num_batched_tokens=budget,
            max_model_len=point.isl + point.osl,
            utilization=share,
        )
        if found.fits:
            return found
    raise Unpredictable(
        f"{found.weights / 2**30:.0f} GiB of weights on each GPU of {gpu.memory_gib:.0f} GiB leave no room "
        f"for one sequence of {point.isl + point.osl} tokens"
    )


def _shape(
    point: Point,
    harness: Harness,
    table: CostTable,
    gpu: Gpu,
    profile: EngineProfile,
    label: PoolLabel,
) -> EngineShape:
    weights, activations = _formats(point.weights, gpu, profile)
    ep = label.ep if table.model.experts and label.ep > 1 else 1
    if harness.expert_parallel and table.model.experts:
        ep = label.tp * label.dp
    if ep > 1 and profile.ep_degrees == "tp_dp":
        ep = label.tp * label.dp
    kinds = profile.kv_formats(gpu)
    kv = harness.kv or (kinds[0] if kinds else "bf16")
    return EngineShape(
        engine=profile.name,
        gpu=gpu.name,
        tp=label.tp,
        pp=point.pp if point.mode == "agg" else 1,
        dp=label.dp,
        ep=ep,
        weights=weights,
        activations=activations,
        kv=kv if kv in kinds or not kinds else kinds[0],
        formats=checkpoints.kept(table, weights),
        copies=_copies(table.model.experts, ep, harness.redundant_experts),
    )


def _copies(experts: int, ep: int, redundant: int) -> int:
    """Slots of a rank beyond an even share: for so many copies, or for experts that ranks do not divide."""
    return math.ceil((experts + redundant) / ep) - experts // ep if ep > 1 else 0


def _formats(weights: str, gpu: Gpu, profile: EngineProfile) -> tuple[str, str]:
    """(weights, activations) as this engine runs such a checkpoint on this GPU: both in the format where
    there are kernels for it, else the narrowest activations that belong to it, else what it lists first."""
    weights = "fp8" if weights == "fp8_block" else weights  # scales are the table's affair
    if weights not in formats():
        raise Unpredictable(f"weights '{weights}' is not a known format; known: {', '.join(formats())}")
    pairs = [pair for pair in profile.pairs(gpu) if pair[0] == weights]
    if not pairs:
        raise Unpredictable(f"{profile.name} has no kernels for {weights} weights on {gpu.arch}")
    wanted = [(weights, weights), *((weights, other) for other in _BESIDE.get(weights, ()))]
    return next((pair for pair in wanted if pair in pairs), pairs[0])
