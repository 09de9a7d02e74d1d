"""Candidate engines: every legal shape and format on every GPU type, and why the others are out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from planc.cost_model import catalogue
from planc.cost_model.catalogue import EngineProfile
from planc.cost_model.formats import fmt
from planc.cost_model.parts import Exceptions
from planc.cost_model.shape import EngineShape, handover_refusals, refusals
from planc.cost_model.speculative import Speculation
from planc.cost_model.table import CostTable
from planc.planner.formats import Accuracy, Formats, allowed
from planc.planner.inventory import Group
from planc.planner.mixtures import mixtures
from planc.planner.plan import Role
from planc.planner.request import Constraints, Slo
from planc.planner.techniques import speculations
from planc.planner.traffic import Traffic

#: engines considered when the request names none, by kind of model: those that planc writes files for, and
#: planc's own executor for what no serving engine loads
DEFAULT_ENGINES = {"causal_lm": ("vllm",), "encoder": ("planc",), "module": ("planc",)}
MAX_PIPELINE = 8
#: tokens of a decoding sequence's cache from which on engines are offered that spread it over ranks: below,
#: the exchanges cost more than shorter reads of the cache save (docs/techniques.md has the figures)
LONG_CONTEXT = 16_384
MAX_WORLD = 128

#: formats of checkpoints that any other can be made of
_WIDE = ("bf16", "fp16", "fp32")

BATCH_LIMITS = (8, 16, 32, 64, 128, 192, 256, 384, 512, 768, 1024)
TOKEN_BUDGETS = (1024, 2048, 4096, 8192, 16384)


@dataclass(frozen=True, slots=True)
class Candidate:
    """One engine shape on one node group. `drop` is the relative accuracy loss of its formats; `speculation`,
    if any, says how it drafts tokens."""

    group: Group
    profile: EngineProfile
    shape: EngineShape
    drop: float
    speculation: Speculation | None = None

    @property
    def usd(self) -> float:
        """Per hour."""
        return self.group.usd * self.shape.world

    @property
    def pieces(self) -> tuple[int, int]:
        """(pieces, GPUs each) as they lie in islands."""
        found = self.group.pieces(self.shape.world)
        assert found is not None, "candidates are only made where they can lie"
        return found

    @property
    def layout(self) -> tuple[int, ...]:
        """Where and how it is cut, whatever its formats."""
        s = self.shape
        return (self.group.index, s.tp, s.pp, s.dp, s.ep, s.cp)

    def key(self) -> tuple[object, ...]:
        """Canonical order: ties between equal plans are broken by it."""
        s = self.shape
        return (
            s.engine,
            self.group.index,
            s.world,
            s.pp,
            s.dp,
            s.tp,
            s.ep,
            s.cp,
            s.weights,
            s.activations,
            s.kv,
            s.formats,
            s.pipeline_layers,
            s.copies,
            self.speculation.label if self.speculation else "",
        )

    @property
    def family(self) -> str:
        """Its formats: engines of one family answer alike."""
        s = self.shape
        return " ".join([f"{s.weights}/{s.kv}", *(f"{part}={taken}" for part, taken in s.formats)])

    def label(self) -> str:
        """A short name for messages."""
        s = self.shape
        degrees = "".join(f" {n}={getattr(s, n)}" for n in ("pp", "dp", "ep", "cp") if getattr(s, n) > 1)
        if s.pipeline_layers:
            degrees += " stages=" + "/".join(map(str, s.pipeline_layers))
        if s.copies:
            degrees += f" copies={s.copies}"
        formats = f"weights={s.weights} activations={s.activations} kv={s.kv}"
        drafts = [f"speculative={self.speculation.label}"] if self.speculation else []
        return " ".join(
            [f"{s.gpu} tp={s.tp}{degrees} {formats}", *(f"{p}={taken}" for p, taken in s.formats), *drafts]
        )


def candidates(
    table: CostTable,
    groups: tuple[Group, ...],
    limits: Constraints,
    slos: tuple[Slo, ...],
    load: Traffic,
    role: Role = "aggregated",
    accuracy: Accuracy | None = None,
) -> tuple[list[Candidate], Counter[str]]:
    """Legal candidates for a pool of this role in canonical order, and how many were left out for each
    reason. `accuracy`: what formats cost this model, published averages if left out."""
    load = load.of(role)
    accuracy = accuracy or Accuracy(table)
    pruned: Counter[str] = Counter()
    found = []
    long = load.decode_steps > 0 and load.decode_context >= LONG_CONTEXT
    for candidate in _all(accuracy, groups, limits, pruned, long):
        reasons = refusals(candidate.shape, table, candidate.group.gpu, candidate.profile)
        reasons = reasons or handover_refusals(candidate.shape, table, candidate.profile, role)
        if reasons:
            pruned[f"illegal: {reasons[0].field}"] += 1
            continue
        if limits.max_accuracy_drop is not None and candidate.drop > limits.max_accuracy_drop + 1e-12:
            pruned["loses more accuracy than allowed"] += 1
            continue
        for one in _drafting(candidate, limits, role):
            if _too_slow(table, one, slos, load):
                pruned["bound: weights cannot be read in time"] += 1
            else:
                found.append(one)
    return sorted(found, key=Candidate.key), pruned


def _drafting(candidate: Candidate, limits: Constraints, role: Role) -> Iterator[Candidate]:
    """The engine, and the same with each way of speculation that is offered: where it does all the work on a
    request, without pipeline stages or context parallelism. Engines have more, but not all of them, nor do
    the formulas."""
    yield candidate
    if role == "aggregated" and candidate.shape.pp == candidate.shape.cp == 1:
        yield from (replace(candidate, speculation=way) for way in speculations(limits))


def _all(
    accuracy: Accuracy, groups: tuple[Group, ...], limits: Constraints, pruned: Counter[str], long: bool
) -> Iterator[Candidate]:
    table = accuracy.table
    gpus = {catalogue.gpu(name).name for name in limits.gpus} if limits.gpus else None
    for group in groups:
        if gpus is not None and group.gpu.name not in gpus:
            pruned["gpu not allowed"] += 1
            continue
        for engine in limits.engines or DEFAULT_ENGINES[table.model.kind]:
            profile = catalogue.engine(engine)
            cuts = [
                EngineShape(engine, group.gpu.name, *degrees)
                for degrees in _degrees(table, group, profile, limits, pruned, long)
            ]
            kinds = _kinds(accuracy, group, profile, cuts, limits)
            if not kinds:
                pruned["no allowed format runs here"] += 1
            for cut in cuts:
                for (weights, activations, kv), exceptions, drop in kinds:
                    shape = replace(cut, weights=weights, activations=activations, kv=kv, formats=exceptions)
                    yield Candidate(group, profile, shape, drop)


def _kinds(
    accuracy: Accuracy,
    group: Group,
    profile: EngineProfile,
    cuts: Sequence[EngineShape],
    limits: Constraints,
) -> list[tuple[Formats, Exceptions, float]]:
    """What engines on a group's GPUs may store: one format throughout with the exceptions that the request
    states, and under an accuracy budget also mixtures. Matrices of a checkpoint that is quantized already
    are not mixed: no engine file could say how to come from the one to the other."""
    schemes, caches = allowed(accuracy.table, group, profile, limits)
    stated = tuple(sorted((limits.formats or {}).items()))
    found: list[tuple[Formats, Exceptions]] = [((w, a, kv), stated) for w, a in schemes for kv in caches]
    budget = limits.max_accuracy_drop
    if budget is not None and not stated and len(found) > 1:
        wide = accuracy.table.model.native_format in _WIDE
        for together in [schemes] if wide else [[one] for one in schemes]:
            found += mixtures(accuracy, group, profile, cuts, together, caches, budget)
    return [(kinds, exceptions, accuracy.of(kinds, exceptions)) for kinds, exceptions in found]


def _degrees(
    table: CostTable,
    group: Group,
    profile: EngineProfile,
    limits: Constraints,
    pruned: Counter[str],
    long: bool,
) -> Iterator[tuple[int, int, int, int, int]]:
    """(tp, pp, dp, ep, cp) that can lie in the group. Powers of two unless the request lists degrees; caches
    are spread over ranks where contexts are `long`."""
    most = min(group.gpus, limits.max_gpus or group.gpus)
    causal = table.model.kind == "causal_lm"
    for tp in limits.tp or _powers(most):
        if tp > max(group.islands):
            pruned["tp leaves the NVLink domain"] += 1
            continue
        if group.gpu.slice_of and tp > 1:
            pruned["MIG slices do not reach each other"] += 1
            continue
        for pp in limits.pp or (_powers(MAX_PIPELINE) if causal else (1,)):
            for dp in limits.dp or (_powers(most) if table.model.experts else (1,)):
                if dp > 1 and not table.model.experts:
                    pruned["dp without experts is the same as replicas"] += 1
                    continue
                for ep in _expert_groups(table, profile, tp * dp, limits):
                    for cp in limits.cp or (_powers(tp) if long and profile.context_parallel else (1,)):
                        world = tp * pp * dp
                        if limits.ep is not None and ep not in limits.ep:
                            pruned["ep not allowed"] += 1
                        elif group.gpu.slice_of and world > 1:
                            pruned["MIG slices do not reach each other"] += 1
                        elif world > most:
                            pruned["more GPUs than there are"] += 1
                        elif world > MAX_WORLD or group.pieces(world) is None:
                            pruned["does not fill whole islands"] += 1
                        else:
                            yield tp, pp, dp, ep, cp


def _expert_groups(
    table: CostTable, profile: EngineProfile, ranks: int, limits: Constraints
) -> tuple[int, ...]:
    """Expert-parallel degrees: experts cut over all ranks, whole on each, and in engines that are free in it
    what lies between, each of `ep` groups of ranks cutting its own experts."""
    if not table.model.experts:
        return (1,)
    between = (limits.ep or _powers(ranks)) if profile.ep_degrees == "free" else ()
    return tuple(sorted({1, ranks, *(ep for ep in between if ranks % ep == 0)}))


def _powers(most: int) -> tuple[int, ...]:
    return tuple(1 << i for i in range(most.bit_length()) if 1 << i <= most)


def _too_slow(table: CostTable, candidate: Candidate, slos: tuple[Slo, ...], load: Traffic) -> bool:
    """A bound without any model: a step reads the active weights once, at full bandwidth (not the input
    embedding, of which it reads a row)."""
    if load.decode_steps == 0:
        return False
    shape = candidate.shape
    model = table.model
    read = model.active_parameters - (0 if model.tied_embeddings else model.vocab * model.hidden)
    least = read * min(*(fmt(weights).bytes for weights, _ in shape.schemes()), 2.0)
    pace = candidate.speculation.pace if candidate.speculation else 1.0
    seconds = least / (shape.tp * shape.dp * candidate.group.gpu.memory_bytes_s) / pace
    return any(
        (slo.metric == "tpot" and seconds > slo.limit)
        or (slo.metric == "e2e" and slo.quantile is None and seconds * load.decode_steps > slo.limit)
        for slo in slos
    )
