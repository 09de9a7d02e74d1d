"""One fixed configuration, evaluated without search."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from planc.cost_model import catalogue
from planc.cost_model.formats import fmt
from planc.cost_model.shape import EngineShape, Refusal, refusals
from planc.cost_model.table import CostTable
from planc.errors import Infeasible, InvalidField
from planc.planner.plan import Predicted, Replica
from planc.planner.request import Request, Speculative
from planc.planner.settings import parsed
from planc.planner.stages import UNEVEN

if TYPE_CHECKING:
    from planc.planner.candidates import Candidate
    from planc.planner.evaluate import Limits
    from planc.planner.search import Search

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
    own limits, even pipeline stages, no speculation, and as few replicas as carry the load within the
    objectives (else as many as fit).

    Raises UnknownField or InvalidField for a setting that cannot be, Infeasible when the model does not
    fit into memory.
    """
    from planc.planner import assemble
    from planc.planner.evaluate import Precise
    from planc.planner.offers import Deployed
    from planc.planner.predict import predicted

    chosen = parsed(settings)
    search, candidate, limits = _one(request, table, chosen)
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
    search, candidate, limits = _one(request, table, chosen)
    count = chosen.get("replicas", 1)
    _held(count, _most(candidate))
    engine = search.room(candidate).engine(search.model(candidate), (limits,))
    item = Deployed(engine, limits, count, 0.0, 0.0)
    homes = assemble.placement(search.groups, [candidate] * count)
    return [assemble.replica(search, item, gpus, 1.0 / count) for gpus in homes]


def _one(request: Request, table: CostTable, chosen: Mapping[str, Any]) -> tuple[Search, Candidate, Limits]:
    """A search for what is chosen, the one candidate, and its limits. Raises Infeasible without room."""
    from planc.planner.evaluate import Limits
    from planc.planner.search import Search

    fixed = _fixed(request, table, chosen)
    search = Search(fixed, table, bench=False)
    if not search.found:
        raise _refused(fixed, table, search)
    candidate = _chosen(search, table, chosen)
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
    return search, candidate, Limits(cap[0], budget[0], seats)


def _chosen(search: Search, table: CostTable, chosen: Mapping[str, Any]) -> Candidate:
    """Of a search that was left one shape, with the pipeline cut and the speculation that are named."""
    wanted = bool(chosen.get("speculative"))
    found = [one for one in search.found if (one.speculation is not None) == wanted]
    if not found:
        raise InvalidField(
            where="estimate",
            field="speculative",
            value=chosen["speculative"]["method"],
            reason="it is not planned with pipeline stages or context parallelism",
            mend="Leave pp and cp at 1.",
        )
    sizes = tuple(chosen.get("pipeline_layers", ()))
    if sizes and (found[0].shape.pp > 1 or sizes != (table.model.layers,)):
        shape = replace(found[0].shape, pipeline_layers=sizes)
        wrong = refusals(shape, table, found[0].group.gpu, found[0].profile)
        if not wrong and shape.engine not in UNEVEN:
            wrong = [Refusal("pipeline_layers", f"{shape.engine} cannot be told its stages")]
        if wrong:
            raise _refusal(wrong[0].field, "/".join(map(str, sizes)), wrong[0].reason)
        return replace(found[0], shape=shape)
    return found[0]


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
    if "pp" not in chosen and len(chosen.get("pipeline_layers", ())) > 1:
        one["pp"] = [len(chosen["pipeline_layers"])]
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
            "speculative": [Speculative(**chosen["speculative"])] if chosen.get("speculative") else None,
            **{k: chosen[k] for k in ("max_model_len", "gpu_memory_utilization", "formats") if k in chosen},
        }
    )
    return request.changed(constraints=limits)


def _refused(request: Request, table: CostTable, search: Any) -> InvalidField:
    """Why no candidate is left, in the words of the cost model."""
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
    return _refusal(field, value, reason)


def _refusal(field: str, value: Any, reason: str) -> InvalidField:
    return InvalidField(
        where="estimate", field=field, value=value, reason=reason, mend="Choose values that go together."
    )
