"""Candidate engines: every legal shape and format on every GPU type, and why the others are out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from planc.cost_model import catalogue
from planc.cost_model.catalogue import EngineProfile
from planc.cost_model.formats import fmt
from planc.cost_model.shape import EngineShape, refusals
from planc.cost_model.table import CostTable
from planc.planner.inventory import Group
from planc.planner.plan import Role
from planc.planner.request import Constraints, Slo
from planc.planner.traffic import Traffic

#: engines considered when the request names none, by kind of model: those that planc writes files for, and
#: planc's own executor for what no serving engine loads
DEFAULT_ENGINES = {"causal_lm": ("vllm",), "encoder": ("planc",), "module": ("planc",)}
MAX_PIPELINE = 8
MAX_WORLD = 128

BATCH_LIMITS = (8, 16, 32, 64, 128, 192, 256, 384, 512, 768, 1024)
TOKEN_BUDGETS = (1024, 2048, 4096, 8192, 16384)


@dataclass(frozen=True, slots=True)
class Candidate:
    """One engine shape on one node group. `drop` is the relative accuracy loss of its formats."""

    group: Group
    profile: EngineProfile
    shape: EngineShape
    drop: float

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
        )

    def label(self) -> str:
        """A short name for messages."""
        s = self.shape
        degrees = "".join(f" {n}={getattr(s, n)}" for n in ("pp", "dp", "ep", "cp") if getattr(s, n) > 1)
        return f"{s.gpu} tp={s.tp}{degrees} weights={s.weights} activations={s.activations} kv={s.kv}"


def candidates(
    table: CostTable,
    groups: tuple[Group, ...],
    limits: Constraints,
    slos: tuple[Slo, ...],
    load: Traffic,
    role: Role = "aggregated",
) -> tuple[list[Candidate], Counter[str]]:
    """Legal candidates for a pool of this role in canonical order, and how many were left out for each
    reason."""
    load = load.of(role)
    pruned: Counter[str] = Counter()
    found = []
    for candidate in _all(table, groups, limits, pruned):
        reasons = refusals(candidate.shape, table, candidate.group.gpu, candidate.profile)
        if reasons:
            pruned[f"illegal: {reasons[0].field}"] += 1
        elif limits.max_accuracy_drop is not None and candidate.drop > limits.max_accuracy_drop + 1e-12:
            pruned["loses more accuracy than allowed"] += 1
        elif _too_slow(table, candidate, slos, load):
            pruned["bound: weights cannot be read in time"] += 1
        else:
            found.append(candidate)
    return sorted(found, key=Candidate.key), pruned


def _all(
    table: CostTable, groups: tuple[Group, ...], limits: Constraints, pruned: Counter[str]
) -> Iterator[Candidate]:
    allowed = {catalogue.gpu(name).name for name in limits.gpus} if limits.gpus else None
    for group in groups:
        if allowed is not None and group.gpu.name not in allowed:
            pruned["gpu not allowed"] += 1
            continue
        for engine in limits.engines or DEFAULT_ENGINES[table.model.kind]:
            profile = catalogue.engine(engine)
            kinds = formats(table, group, profile, limits)
            if not kinds:
                pruned["no allowed format runs here"] += 1
            for degrees in _degrees(table, group, limits, pruned):
                for (weights, activations, kv), drop in kinds:
                    tp, pp, dp, ep, cp = degrees
                    yield Candidate(
                        group,
                        profile,
                        EngineShape(engine, group.gpu.name, tp, pp, dp, ep, cp, weights, activations, kv),
                        drop,
                    )


def _degrees(
    table: CostTable, group: Group, limits: Constraints, pruned: Counter[str]
) -> Iterator[tuple[int, int, int, int, int]]:
    """(tp, pp, dp, ep, cp) that can lie in the group. Powers of two unless the request lists degrees."""
    most = min(group.gpus, limits.max_gpus or group.gpus)
    causal = table.model.kind == "causal_lm"
    for tp in limits.tp or _powers(most):
        if tp > max(group.islands):
            pruned["tp leaves the NVLink domain"] += 1
            continue
        for pp in limits.pp or (_powers(MAX_PIPELINE) if causal else (1,)):
            for dp in limits.dp or (_powers(most) if table.model.experts else (1,)):
                if dp > 1 and not table.model.experts:
                    pruned["dp without experts is the same as replicas"] += 1
                    continue
                for ep in sorted({1, tp * dp} if table.model.experts else {1}):
                    for cp in limits.cp or (1,):
                        world = tp * pp * dp * cp
                        if limits.ep is not None and ep not in limits.ep:
                            pruned["ep not allowed"] += 1
                        elif world > most:
                            pruned["more GPUs than there are"] += 1
                        elif world > MAX_WORLD or group.pieces(world) is None:
                            pruned["does not fill whole islands"] += 1
                        else:
                            yield tp, pp, dp, ep, cp


def _powers(most: int) -> tuple[int, ...]:
    return tuple(1 << i for i in range(most.bit_length()) if 1 << i <= most)


Formats = tuple[str, str, str]


def formats(
    table: CostTable, group: Group, profile: EngineProfile, limits: Constraints
) -> list[tuple[Formats, float]]:
    """((weights, activations, kv), accuracy drop) that run on the group's GPU and may be used.

    Without a list: the checkpoint's own weight format and the plain cache; with max_accuracy_drop
    also every narrower format (the budget is checked later, so that it can be counted).
    """
    native = table.model.native_format
    pairs = profile.pairs(group.gpu)
    runs_native = any(weights == native for weights, _ in pairs)
    widest = "fp32" if native == "fp32" else "bf16"
    base = native if runs_native else widest
    open_budget = limits.max_accuracy_drop is not None

    def weights_ok(name: str) -> bool:
        if limits.weights is not None:
            return name in limits.weights
        return name == base or (open_budget and fmt(name).bits < fmt(base).bits)

    def kv_ok(name: str) -> bool:
        if limits.kv is not None:
            return name in limits.kv
        plain = "fp32" if "fp32" in (base,) else "bf16"
        return name == plain or (open_budget and fmt(name).bits < 16)

    found = []
    for weights, activations in pairs:
        if not weights_ok(weights):
            continue
        if limits.activations is not None and activations not in limits.activations:
            continue
        for kv in profile.kv_formats(group.gpu):
            if table.kv_elements_per_token() == 0 and kv != profile.kv_formats(group.gpu)[0]:
                continue
            if table.kv_elements_per_token() == 0 or kv_ok(kv):
                found.append(((weights, activations, kv), accuracy_drop(native, weights, activations, kv)))
    return found


def accuracy_drop(native: str, weights: str, activations: str, kv: str) -> float:
    """Relative loss of the average task score against the published checkpoint: published averages
    per format, added up (`assumed` in the catalogue). The native format and wider ones lose nothing."""
    drop = 0.0
    narrower = weights != native and fmt(weights).bits < fmt(native).bits
    if narrower:
        drop += fmt(weights).accuracy_drop.value
    if activations not in (weights, native) and fmt(activations).bits < 16 and weights != native:
        drop += fmt(activations).accuracy_drop.value
    cache = fmt(kv)
    if cache.bits < 16 and cache.kv_accuracy_drop is not None:
        drop += cache.kv_accuracy_drop.value
    return drop


def _too_slow(table: CostTable, candidate: Candidate, slos: tuple[Slo, ...], load: Traffic) -> bool:
    """A bound without any model: a step reads the active weights once, at full bandwidth (not the input
    embedding, of which it reads a row)."""
    if load.decode_steps == 0:
        return False
    shape = candidate.shape
    model = table.model
    read = model.active_parameters - (0 if model.tied_embeddings else model.vocab * model.hidden)
    least = read * min(fmt(shape.weights).bytes, 2.0)
    seconds = least / (shape.tp * shape.dp * candidate.group.gpu.memory_bytes_s)
    return any(
        (slo.metric == "tpot" and seconds > slo.limit)
        or (slo.metric == "e2e" and slo.quantile is None and seconds * load.decode_steps > slo.limit)
        for slo in slos
    )
