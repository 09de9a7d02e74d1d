"""The plan: one typed, versioned, diffable JSON document. This file is its schema.

Canonical form: keys sorted, floats rounded to nine significant digits, two-space indent, one
trailing newline. The same request, profile and version give the same bytes, so wall-clock
times are not part of a saved plan.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError

from planc.errors import FileMissing, InvalidBundle, NewerSchema
from planc.version import SCHEMA_VERSION, __version__

if TYPE_CHECKING:
    from planc.planner.evidence import Evidence
    from planc.planner.front import Front

Provenance = Literal["measured", "fitted", "roofline", "assumed"]
Role = Literal["aggregated", "prefill", "decode", "encoder"]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def _none(value: object) -> bool:
    return value is None


def _zero(value: int) -> bool:
    return value == 0


def _no_maps(value: list[ExpertMap]) -> bool:
    return not value


def _empty(value: dict[str, str] | str) -> bool:
    return not value


class Predicted(_Part):
    """A number, its band, and where it comes from. `percentiles` keys are "p50", "p99", ..."""

    value: float
    low: float
    high: float
    source: Provenance
    percentiles: dict[str, float] = Field(default_factory=dict)


class Fingerprint(_Part):
    request: str
    model: str
    profile: str
    plan: str = ""


class Solver(_Part):
    """`seconds` is 0 in a saved plan (see the module docstring); the command line reports it."""

    status: Literal["optimal", "feasible", "infeasible"]
    objective: str
    value: float
    bound: float
    gap: float
    seconds: float = 0.0
    candidates: int
    pruned: dict[str, int]


class Memory(_Part):
    """Bytes on one GPU of a replica, GiB. `reserve` is what the engine leaves unused."""

    weights_gib: float
    kv_cache_gib: float
    activations_gib: float
    graphs_gib: float
    overhead_gib: float
    reserve_gib: float
    total_gib: float
    capacity_gib: float


class Replica(_Part):
    """One engine instance. `gpus` are "node/index", rank by rank (tp fastest, then pp, then dp). `formats`:
    parts of the model that take another than `weights`, `activations` or `kv`, as
    `planc.cost_model.parts` writes them ("decoder:self_attn": "bf16/bf16"); left out where none does.
    `kv_offload`: what the engine finds of prompts that recur, and where (`planner.techniques`)."""

    engine: str
    gpu: str
    gpus: list[str]
    tp: int
    pp: int
    dp: int
    ep: int
    cp: int
    weights: str
    activations: str
    kv: str
    formats: dict[str, str] = Field(default_factory=dict, exclude_if=_empty)
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    block_size: int
    kv_blocks: int
    cuda_graph_sizes: list[int]
    gpu_memory_utilization: float
    pipeline_layers: list[int]
    expert_copies: int = Field(default=0, exclude_if=_zero)
    chunked_prefill: bool = True
    prefix_caching: bool = False
    speculative: dict[str, Any] | None = None
    kv_offload: dict[str, Any] | None = Field(default=None, exclude_if=_none)
    traffic_share: float
    memory: Memory


class Pool(_Part):
    """Replicas that do the same work for the same requests. `classes` names the traffic classes they serve;
    empty: all of them. A request is counted once in the shares of all aggregated and prefill (or encoder)
    replicas, and once in those of all aggregated and decode replicas."""

    role: Role
    classes: list[str] = Field(default_factory=list)
    replicas: list[Replica]


class LayerDecisions(_Part):
    """What was decided for one layer class. `format` is that of most of its matrices, `formats` that of the
    modules which have another; `sharding` maps a site to "column", "row", ..."""

    format: str
    formats: dict[str, str] = Field(default_factory=dict, exclude_if=_empty)
    sharding: dict[str, str]
    fusions: list[str]
    kernel: dict[str, str]


class LayerPlan(_Part):
    """`layers`: numbers of the class's layers ("0-7,72-79"), given where formats differ between parts."""

    layer_class: str = Field(alias="class")
    count: int
    layers: str = Field(default="", exclude_if=_empty)
    decisions: LayerDecisions

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


class Rejected(_Part):
    decision: str
    reason: str
    predicted: dict[str, float] = Field(default_factory=dict)


class Coverage(_Part):
    modelled: list[str]
    not_modelled: list[str]


class ModelSummary(_Part):
    """What the plan is for. `source` is as in the request; `config` lies in the bundle too."""

    name: str
    source: str
    architecture: str
    kind: Literal["causal_lm", "encoder", "module"]
    parameters: int
    active_parameters: int
    kv_bytes_per_token: int


class ExpertMap(_Part):
    """Where routed experts lie on `ranks` ranks: per layer the expert in each slot, rank after rank (a single
    layer stands for all).

    copies      slots of a rank beyond its share of the experts
    imbalance   the fullest rank over the mean, averaged over layers; no placement gets below `bound`
    """

    ranks: int
    copies: int = 0
    imbalance: float
    bound: float
    physical_to_logical: list[list[int]]


Policy = Literal["least_loaded", "round_robin", "power_of_two", "prefix_aware"]


class Routing(_Part):
    """How requests are spread over replicas, by traffic shares: `reason` says how that was decided.

    compared   policy -> hit_rate, mean ttft_ms, tpot_ms and e2e_ms, and excess (the largest objective as a
               multiple of its limit) of this fleet, simulated; {} where nothing told policies apart
    """

    policy: Policy
    reason: str
    compared: dict[Policy, dict[str, float]] = Field(default_factory=dict)


class Plan(_Part):
    """`simulated`: latencies of the workload played against the plan, metric -> mean, p50, p90, p95, p99."""

    schema_version: int = SCHEMA_VERSION
    planc_version: str = __version__
    fingerprint: Fingerprint
    model: ModelSummary
    request: dict[str, Any]
    solver: Solver
    predicted: dict[str, Predicted]
    predicted_by_class: dict[str, dict[str, Predicted]] = Field(default_factory=dict)
    simulated: dict[str, dict[str, float]] = Field(default_factory=dict)
    pools: list[Pool]
    routing: Routing | None = Field(default=None, exclude_if=_none)
    layers: list[LayerPlan]
    experts: list[ExpertMap] = Field(default_factory=list, exclude_if=_no_maps)
    rejected: list[Rejected]
    coverage: Coverage

    #: where the model lies on this machine; known to whoever compiled or loaded the plan, never written
    _model: str | Path | None = PrivateAttr(default=None)
    #: the Pareto front it was chosen from, and what is known of it besides its decisions: files of their own
    _front: Front | None = PrivateAttr(default=None)
    _evidence: Evidence | None = PrivateAttr(default=None)

    def __eq__(self, other: object) -> bool:
        """Plans are equal when their documents are."""
        return isinstance(other, Plan) and self.canonical() == other.canonical()

    def __hash__(self) -> int:
        return hash(self.canonical())

    @property
    def front(self) -> tuple[Plan, ...]:
        """The plans of the Pareto front that this one was chosen from, itself among them, cheapest first;
        () unless the objective was `pareto`."""
        return self._front.plans if self._front is not None else ()

    def replicas(self) -> list[Replica]:
        return [replica for pool in self.pools for replica in pool.replicas]

    def canonical(self) -> str:
        """The document as it is written to `plan.json`."""
        raw = self.model_dump(mode="json", by_alias=True)
        raw["solver"]["seconds"] = 0.0
        return canonical_json(raw)

    def sealed(self) -> Plan:
        """The plan with its own content hash filled in (taken with that field empty)."""
        blank = self.model_copy(update={"fingerprint": self.fingerprint.model_copy(update={"plan": ""})})
        digest = hashlib.sha256(blank.canonical().encode()).hexdigest()[:16]
        return self.model_copy(update={"fingerprint": self.fingerprint.model_copy(update={"plan": digest})})

    def save(self, bundle: str | Path) -> None:
        """Writes the whole bundle folder (plan, kernels, engine configurations, report)."""
        from importlib import import_module

        import_module("planc.api").write_bundle(self, bundle)


def load_plan(path: str | Path) -> Plan:
    """Reads a bundle folder or a `plan.json`.

    Raises FileMissing, InvalidBundle (not JSON, truncated, a key missing or unknown) or NewerSchema.
    """
    place = Path(path)
    file = place / "plan.json" if place.is_dir() else place
    if place.is_dir() and not file.exists() and (place / "fleet.json").is_file():
        names = sorted(found.parent.name for found in place.glob("*/plan.json"))
        raise InvalidBundle(
            path=path,
            reason="it holds the plans of several models",
            mend=f"Name one of them: {', '.join(str(place / name) for name in names)}.",
        )
    if not file.is_file():
        raise FileMissing(what="bundle", path=path, mend="Name a folder that `planc compile -o` wrote.")
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InvalidBundle(
            path=path, reason=f"plan.json is not JSON ({error})", mend="It may be truncated; compile again."
        ) from None
    except OSError as error:
        raise InvalidBundle(
            path=path, reason=f"plan.json cannot be read ({error.strerror})", mend="Check who may read it."
        ) from None
    found = raw.get("schema_version") if isinstance(raw, dict) else None
    if not isinstance(found, int):
        raise InvalidBundle(
            path=path, reason="plan.json has no schema_version", mend="This is not a plan of planc's."
        )
    if found > SCHEMA_VERSION:
        raise NewerSchema(path=path, found=found, supported=SCHEMA_VERSION, version=__version__)
    try:
        plan = Plan.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InvalidBundle(
            path=path, reason=f"plan.json: {where}: {first['msg']}", mend="Compile the request again."
        ) from None
    home = file.parent.parent if file.parent.name == "front" else file.parent  # a point of a front
    config = home / "model" / "config.json"
    plan._model = config if config.is_file() else None
    if file.name == "plan.json":
        from planc.planner import evidence, front

        plan._front, plan._evidence = front.read(file.parent, plan), evidence.read(file.parent)
    return plan


def canonical_json(raw: Any) -> str:
    """JSON of one form: keys sorted, floats of nine significant digits, two-space indent, a newline last."""
    return json.dumps(_rounded(raw), indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def _rounded(node: Any) -> Any:
    if isinstance(node, float):
        return float(f"{node:.9g}")
    if isinstance(node, dict):
        return {key: _rounded(item) for key, item in node.items()}
    if isinstance(node, list):
        return [_rounded(item) for item in node]
    return node
