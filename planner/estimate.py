"""One fixed configuration, evaluated without search."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from planc.cost_model import catalogue
from planc.cost_model.formats import fmt
from planc.cost_model.parts import parse, scheme
from planc.cost_model.table import CostTable
from planc.errors import Infeasible, InvalidField, UnknownField
from planc.planner.plan import Predicted, Replica
from planc.planner.request import Request
from planc.planner.workload import LoadTest

if TYPE_CHECKING:
    from planc.planner.candidates import Candidate
    from planc.planner.evaluate import Limits
    from planc.planner.search import Search

_COUNTS = (
    "tp",
    "pp",
    "dp",
    "ep",
    "cp",
    "max_num_seqs",
    "max_num_batched_tokens",
    "max_model_len",
    "replicas",
)
_NAMES = ("weights", "activations", "kv", "engine", "gpu")
#: what can be set, by the names of a plan's replica
SETTINGS = (*_COUNTS, *_NAMES, "gpu_memory_utilization", "formats")

_NEARLY = 0.97  # share of the highest load that an overloaded configuration is shown at


@dataclass(frozen=True, slots=True)
class Estimate:
    """What one configuration does under the request's workload.

    replica     one of the `replicas` identical engines (its GPUs are those of the first)
    capacity    what they could carry within the objectives (requests/s, or users of a closed loop)
    notes       what a reader must know: objectives that are missed, overload
    simulated   what a simulated load test of it finds, as `planc.runtime.load_test` words it; None without
    """

    replica: Replica
    replicas: int
    capacity: float
    meets_slo: bool
    predicted: dict[str, Predicted]
    notes: tuple[str, ...]
    simulated: Mapping[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "replica": self.replica.model_dump(mode="json"),
            "replicas": self.replicas,
            "capacity": self.capacity,
            "meets_slo": self.meets_slo,
            "predicted": {name: found.model_dump(mode="json") for name, found in self.predicted.items()},
            "notes": list(self.notes),
            "simulated": self.simulated,
        }


def estimate(request: Request, table: CostTable, **settings: Any) -> Estimate:
    """Evaluates `settings` (names as in a plan's replica, plus `replicas`), no search.

    What is left out takes its usual value: one GPU per degree, the checkpoint's formats, the engine's
    own limits, and as few replicas as carry the load within the objectives (else as many as fit).

    Raises UnknownField or InvalidField for a setting that cannot be, Infeasible when the model does not
    fit into memory.
    """
    from planc.planner import assemble
    from planc.planner.evaluate import Precise
    from planc.planner.offers import Deployed
    from planc.planner.predict import predicted

    chosen = parsed(settings)
    search, limits = _one(request, table, chosen)
    candidate = search.found[0]
    engine = search.room(candidate).engine(search.model(candidate), (limits,))
    one = Precise(engine, limits, search.traffic)
    capacity = one.capacity(search.slos)
    carried = capacity or one.capacity(())
    fits = _most(candidate)
    wanted = chosen.get("replicas")
    if wanted is None:
        wanted = fits if search.demand is None else min(fits, max(1, -int(-search.demand // carried)))
    _held(wanted, fits)
    demand = search.demand if search.demand is not None else wanted * carried
    notes = []
    most = one.capacity(())
    load = demand / wanted
    if load > most:
        notes.append(
            f"overloaded: {wanted} x {most:.4g} is the most that can be carried, of {demand:.4g}; "
            f"the figures are those at {_NEARLY:.0%} of it, since queues have no end at the limit itself"
        )
        load = _NEARLY * most
    item = Deployed(engine, limits, wanted, load, max(capacity, 0.0))
    numbers = predicted((item,), search.traffic, search.slos)
    state = item.state(search.traffic)
    meets = capacity > 0 and not notes
    for slo in search.slos:
        value = float(state.value(slo)[0, 0])
        if value > slo.limit * (1 + 1e-9):
            meets = False
            notes.append(f"{slo.key} is {1e3 * value:.4g}, above the objective of {1e3 * slo.limit:g}")
    homes = assemble.placement(search.groups, [candidate] * wanted)
    replica = assemble.replica(search, item, homes[0], 1.0 / wanted)
    total = replica.memory.total_gib
    numbers["memory_gib"] = Predicted(value=total, low=total, high=total, source="assumed")
    return Estimate(replica, wanted, wanted * capacity, meets, dict(sorted(numbers.items())), tuple(notes))


def configured(request: Request, table: CostTable, **settings: Any) -> list[Replica]:
    """The engines that `settings` describe, placed but not evaluated: `replicas` of them, one if left out.

    Raises as `estimate` does.
    """
    from planc.planner import assemble
    from planc.planner.offers import Deployed

    chosen = parsed(settings)
    search, limits = _one(request, table, chosen)
    candidate = search.found[0]
    count = chosen.get("replicas", 1)
    _held(count, _most(candidate))
    engine = search.room(candidate).engine(search.model(candidate), (limits,))
    item = Deployed(engine, limits, count, 0.0, 0.0)
    homes = assemble.placement(search.groups, [candidate] * count)
    return [assemble.replica(search, item, gpus, 1.0 / count) for gpus in homes]


def _one(request: Request, table: CostTable, chosen: Mapping[str, Any]) -> tuple[Search, Limits]:
    """A search that has the chosen candidate only, and its limits. Raises Infeasible without room."""
    from planc.planner.evaluate import Limits
    from planc.planner.search import Search

    fixed = _fixed(request, table, chosen)
    search = Search(fixed, table, bench=False)
    if not search.found:
        raise _refused(fixed, table, search)
    candidate = search.found[0]
    cap, budget = fixed.constraints.max_num_seqs, fixed.constraints.max_num_batched_tokens
    assert cap is not None
    assert budget is not None
    room = search.room(candidate)
    seats = room.seats(cap[0], budget[0])
    if seats < 1:
        found = room.memory(cap[0], budget[0])
        raise Infeasible(
            reason=(
                f"{candidate.label()} needs {found.weights / 2**30:.1f} GiB of weights on each GPU of "
                f"{found.capacity / 2**30:.1f} GiB and leaves no room for one sequence"
            ),
            relaxations="",
        )
    return search, Limits(cap[0], budget[0], seats)


def _most(candidate: Candidate) -> int:
    """Engines like this that the inventory holds."""
    pieces, size = candidate.pieces
    return max(sum(island // size for island in candidate.group.islands) // pieces, 1)


def _held(wanted: int, fits: int) -> None:
    if wanted > fits:
        raise InvalidField(
            where="estimate",
            field="replicas",
            value=wanted,
            reason=f"the inventory holds {fits}",
            mend="Ask for fewer.",
        )


def parsed(
    settings: Mapping[str, Any], where: str = "estimate", also: Iterable[str] = LoadTest.model_fields
) -> dict[str, Any]:
    """Settings of an engine with the types they should have.

    where, also   for messages: who asks, and what else may be named there

    Raises UnknownField or InvalidField.
    """
    found: dict[str, Any] = {}
    for name, value in settings.items():
        if name not in SETTINGS:
            mend = f"Known: {', '.join((*SETTINGS, *also))}."
            raise UnknownField(where=where, field=name, mend=mend)
        if name in _COUNTS:
            try:
                number = int(value)
            except (TypeError, ValueError):
                number = 0
            if number < 1 or str(number) != str(value).strip():
                raise InvalidField(
                    where=where,
                    field=name,
                    value=value,
                    reason="not a whole number above 0",
                    mend="Write e.g. 4.",
                )
            found[name] = number
        elif name in _NAMES:
            found[name] = str(value)
        elif name == "formats":
            found[name] = _formats(value, where)
        else:
            try:
                found[name] = float(value)
            except (TypeError, ValueError):
                found[name] = -1.0
            if not 0 < found[name] <= 1:
                raise InvalidField(
                    where=where,
                    field=name,
                    value=value,
                    reason="not a share between 0 and 1",
                    mend="Write 0.9.",
                )
    return found


def _formats(value: Any, where: str) -> dict[str, str]:
    """Formats of parts: a mapping, or text like "decoder:self_attn=bf16/bf16 decoder:kv=fp8"."""
    pairs = [item.partition("=")[::2] for item in value.split()] if isinstance(value, str) else value
    found = dict(pairs)
    for part, taken in found.items():
        if parse(part) is None or not taken:
            raise InvalidField(
                where=where,
                field="formats",
                value=part,
                reason="not a part with what it takes",
                mend="Write e.g. decoder:self_attn=bf16/bf16.",
            )
        for name in scheme(taken):
            fmt(name, field=f"formats.{part}")
    return found


def _fixed(request: Request, table: CostTable, chosen: Mapping[str, Any]) -> Request:
    """The request with exactly one candidate left."""
    names = [catalogue.gpu(nodes.gpu).name for nodes in request.inventory.nodes]
    gpu = catalogue.gpu(chosen["gpu"], field="gpu").name if "gpu" in chosen else names[0]
    if gpu not in names:
        raise InvalidField(
            where="estimate",
            field="gpu",
            value=gpu,
            reason="not in the inventory",
            mend=f"Use {' or '.join(names)}.",
        )
    engine = chosen.get("engine", (request.constraints.engines or ["vllm"])[0])
    profile = catalogue.engine(engine, field="engine")
    pairs = profile.pairs(catalogue.gpu(gpu))
    native = table.model.native_format
    base = native if any(weights == native for weights, _ in pairs) else "bf16"
    weights = fmt(chosen.get("weights", base), field="weights").name
    own = [activations for w, activations in pairs if w == weights]
    activations = fmt(chosen["activations"], field="activations").name if "activations" in chosen else None
    if activations is None:
        activations = weights if weights in own else (own[0] if own else "bf16")
    kinds = profile.kv_formats(catalogue.gpu(gpu))
    kv = fmt(chosen["kv"], field="kv").name if "kv" in chosen else ("bf16" if "bf16" in kinds else kinds[0])
    ep = chosen.get("ep", 1)
    one = {name: [chosen.get(name, 1)] for name in ("tp", "pp", "dp", "cp")}
    budget = chosen.get("max_num_batched_tokens", profile.max_num_batched_tokens)
    limits = request.constraints.model_copy(
        update={
            **one,
            "ep": [ep],
            "gpus": [gpu],
            "engines": [engine],
            "weights": [weights],
            "activations": [activations],
            "kv": [kv],
            "max_num_seqs": [chosen.get("max_num_seqs", min(profile.max_num_seqs, budget))],
            "max_num_batched_tokens": [budget],
            "max_gpus": None,
            "max_accuracy_drop": None,
            **{k: chosen[k] for k in ("max_model_len", "gpu_memory_utilization", "formats") if k in chosen},
        }
    )
    return request.changed(constraints=limits)


def _refused(request: Request, table: CostTable, search: Any) -> InvalidField:
    """Why no candidate is left, in the words of the cost model."""
    from planc.cost_model.shape import EngineShape, refusals

    limits = request.constraints
    first = {
        name: getattr(limits, name)[0]
        for name in ("tp", "pp", "dp", "ep", "cp", "weights", "activations", "kv")
    }
    group = next(g for g in search.groups if g.gpu.name == limits.gpus[0])  # type: ignore[index]
    formats = tuple(sorted((limits.formats or {}).items()))
    shape = EngineShape(limits.engines[0], group.gpu.name, **first, formats=formats)  # type: ignore[index]
    reasons = refusals(shape, table, group.gpu, catalogue.engine(shape.engine))
    if reasons:
        field, reason = reasons[0].field, reasons[0].reason
    else:
        field = "tp" if shape.tp > max(group.islands) else "gpus"
        reason = next(iter(search.pruned), "no candidate is left")
    value = getattr(shape, field, shape.world)
    return InvalidField(
        where="estimate", field=field, value=value, reason=reason, mend="Choose values that go together."
    )
