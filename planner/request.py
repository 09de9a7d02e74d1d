"""The request: what a user writes. Models exactly for the YAML of the public contract.

`load_request` turns every mistake into one `PlancError` that names the field, the value and the
mend. Paths inside a request are relative to the request file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, Field, PrivateAttr, ValidationError, model_validator

from planc.cost_model import catalogue, formats
from planc.cost_model.parts import parse, scheme
from planc.errors import FileMissing, FileUnreadable, InvalidField
from planc.planner.mistakes import translated
from planc.planner.overrides import apply_overrides
from planc.planner.slo import Metric as Metric
from planc.planner.slo import Slo as Slo
from planc.planner.slo import checked, objectives
from planc.planner.workload import Part, Workload, mistake, plain
from planc.planner.yaml_text import parsed_yaml

Objective = Literal["min_cost", "max_goodput", "min_latency", "min_energy", "pareto"]


def _listed(value: Any) -> Any:
    """`tp: 4` means `tp: [4]`."""
    return value if value is None or isinstance(value, list | tuple) else [value]


Names = Annotated[list[str] | None, BeforeValidator(_listed), Field(min_length=1)]
Degrees = Annotated[list[Annotated[int, Field(ge=1, le=4096)]] | None, BeforeValidator(_listed)]


# -- inventory -------------------------------------------------------------------------


class Nodes(Part):
    """`count` identical machines. `usd_per_gpu_hour` defaults to the catalogue's list price.

    gpu    a name of the catalogue, or a slice of one: "h100_sxm:3g.40gb" (then gpus_per_node counts slices)
    spot   the machines may be taken away; see `max_spot_share`

    host_memory_gib, nvme_gib    of a machine, for caches that do not fit on its GPUs
    nvme_gbytes_s                at which a machine reads its drives
    """

    gpu: str
    gpus_per_node: int = Field(ge=1, le=1024)
    count: int = Field(default=1, ge=1, le=100_000)
    usd_per_gpu_hour: float | None = Field(default=None, ge=0)
    spot: bool | None = None
    host_memory_gib: float | None = Field(default=None, gt=0)
    nvme_gib: float | None = Field(default=None, gt=0)
    nvme_gbytes_s: float | None = Field(default=None, gt=0)
    name: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")


class Inventory(Part):
    """`inter_node_gbps` is the network per GPU, one direction, Gbit/s; default the catalogue's.
    `cache_store_gib`: a store on that network for caches, shared by all machines."""

    nodes: list[Nodes] = Field(min_length=1)
    inter_node_gbps: float | None = Field(default=None, gt=0)
    cache_store_gib: float | None = Field(default=None, gt=0)


# -- objectives and constraints ----------------------------------------------------------


class Speculative(Part):
    """One way of speculative decoding that engines may use.

    num_speculative_tokens   tokens drafted per step, or a list to choose from
    acceptance_rate          chance that a drafted token is accepted, given that those before it were
    draft_model              the draft's checkpoint, for draft_model, eagle and eagle3
    draft_parameters         of a draft model, in number
    """

    method: Literal["ngram", "draft_model", "mtp", "eagle", "eagle3"]
    num_speculative_tokens: Annotated[
        list[Annotated[int, Field(ge=1, le=32)]], BeforeValidator(_listed), Field(min_length=1)
    ]
    acceptance_rate: float = Field(ge=0, le=1)
    draft_model: str | None = Field(default=None, min_length=1)
    draft_parameters: float | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _complete(self) -> Speculative:
        if self.method in ("draft_model", "eagle", "eagle3") and self.draft_model is None:
            raise mistake(f"{self.method} needs a draft", "Name its checkpoint as draft_model.")
        if self.method == "draft_model" and self.draft_parameters is None:
            raise mistake("the size of the draft model is missing", "Give draft_parameters, e.g. 0.6e9.")
        return self


class Constraints(Part):
    """What the plan may use. A list that is left out allows the engine's own; see each field.

    weights, activations, kv   allowed formats. Weights left out: the checkpoint's own format, or,
                               when max_accuracy_drop is given, every format within it
    tp, pp, dp, ep, cp         allowed degrees
    max_accuracy_drop          relative loss of the average task score, e.g. 0.01
    serving                    "aggregated", "disaggregated": which may be used; left out: both
    spare_replicas             replicas of each pool that may fail while the rest still carries the load
    formats                    parts that take a format of their own in every engine, whatever the rest takes:
                               {"decoder:self_attn": bf16, "decoder[0-3]:mlp": fp8/fp8, "sliding:kv": fp8}
    sensitivities              file of measured sensitivities that an accuracy budget is shared out by
    max_spot_share             most of any traffic class that machines marked `spot` may carry
    speculative                ways of speculative decoding that may be used; left out: none
    """

    weights: Names = None
    activations: Names = None
    kv: Names = None
    engines: Names = None
    gpus: Names = None
    tp: Degrees = None
    pp: Degrees = None
    dp: Degrees = None
    ep: Degrees = None
    cp: Degrees = None
    max_num_seqs: Degrees = None
    max_num_batched_tokens: Annotated[
        list[Annotated[int, Field(ge=1, le=1_048_576)]] | None, BeforeValidator(_listed)
    ] = None
    max_model_len: int | None = Field(default=None, ge=1)
    max_gpus: int | None = Field(default=None, ge=1)
    max_replicas: int | None = Field(default=None, ge=1)
    max_accuracy_drop: float | None = Field(default=None, ge=0, le=1)
    max_power_kw: float | None = Field(default=None, gt=0)
    gpu_memory_utilization: float | None = Field(default=None, gt=0, le=1)
    serving: Annotated[
        list[Literal["aggregated", "disaggregated"]] | None, BeforeValidator(_listed), Field(min_length=1)
    ] = None
    formats: dict[str, str] | None = None
    sensitivities: str | None = None
    spare_replicas: int | None = Field(default=None, ge=0, le=64)
    max_spot_share: float | None = Field(default=None, ge=0, le=1)
    speculative: list[Speculative] | None = Field(default=None, min_length=1)


class Request(Part):
    """A whole request. Build it with `load_request` or `Request.model_validate(mapping)`."""

    model: str = Field(min_length=1)
    inventory: Inventory
    workload: Workload
    slo: Annotated[dict[str, float], BeforeValidator(checked)] = Field(default_factory=dict)
    objective: Objective = "min_cost"
    constraints: Constraints = Field(default_factory=Constraints)

    _base: Path | None = PrivateAttr(default=None)

    def slos(self) -> tuple[Slo, ...]:
        """The objectives, in a fixed order, limits in seconds. A class's own objective takes the place of
        the request's of that name, which then holds for each of the other classes."""
        own = {c.name: c.slo for c in self.workload.classes if c.name and c.slo}
        if not own:
            return objectives(self.slo)
        taken = {key for limits in own.values() for key in limits}
        found = list(objectives({key: v for key, v in self.slo.items() if key not in taken}))
        for c in self.workload.classes:
            shared = {key: v for key, v in self.slo.items() if key in taken}
            found += objectives({**shared, **c.slo}, c.name or "")
        return tuple(found)

    def path(self, name: str) -> Path:
        """A path of the request, relative to the request's own file."""
        return (self._base / name) if self._base is not None else Path(name)

    def model_path(self) -> str | Path:
        """The model source for `planc.ir.trace.trace`: a path, or "package.module:factory" unchanged."""
        if ":" in self.model and not self.path(self.model).exists():
            return self.model
        return self.path(self.model)

    def dump(self) -> dict[str, Any]:
        """The request in canonical form: what is at its default is left out."""
        raw: dict[str, Any] = self.model_dump(mode="json", exclude_none=True)
        raw["slo"] = {key: plain(value) for key, value in sorted(self.slo.items())}
        return {key: value for key, value in raw.items() if value not in ({}, [])}

    def fingerprint(self) -> str:
        """Hash of the canonical form and of the files it names (histograms, traces)."""
        digest = hashlib.sha256(json.dumps(self.dump(), sort_keys=True).encode())
        for name in self.files():
            digest.update(read_bytes(self.path(name), "workload"))
        return digest.hexdigest()[:16]

    def files(self) -> tuple[str, ...]:
        """Data files the request names."""
        lengths = [x for c in self.workload.classes for x in (c.isl, c.osl) if x is not None]
        named = [x.histogram for x in lengths if x.histogram is not None]
        measured = self.constraints.sensitivities
        traces = [self.workload.trace.file] if self.workload.trace else []
        counted = self.workload.expert_load
        return tuple(named + traces + [name for name in (measured, counted) if name])

    def changed(self, **changes: Any) -> Request:
        """A copy with some fields replaced (already validated parts), same base folder."""
        copy = self.model_copy(update=changes)
        copy._base = self._base
        return copy

    def overridden(self, overrides: Mapping[str, Any]) -> Request:
        """A copy with "path: value" pairs put in place, validated anew; raises as `load_request` does."""
        found = make_request(apply_overrides(self.dump(), overrides))
        found._base = self._base
        return found


# -- loading -----------------------------------------------------------------------------


def read_bytes(path: Path, what: str) -> bytes:
    """A file's bytes. Raises FileMissing or FileUnreadable."""
    if not path.is_file():
        raise FileMissing(what=what, path=path, mend="Paths in a request are relative to the request file.")
    try:
        return path.read_bytes()
    except OSError as error:
        raise FileUnreadable(
            what=what, path=path, format="a file", reason=error.strerror, mend="Check its permissions."
        ) from None


def read_mapping(path: str | Path) -> dict[str, Any]:
    """A request file as it is written, not yet checked. Raises FileMissing or FileUnreadable."""
    file = Path(path)
    if not file.is_file():
        raise FileMissing(what="request", path=path, mend="Name a request file (YAML).")
    try:
        raw = parsed_yaml(read_bytes(file, "request").decode("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise FileUnreadable(
            what="request", path=path, format="YAML", reason=reason, mend="See examples/requests."
        ) from None
    if not isinstance(raw, dict):
        raise FileUnreadable(
            what="request",
            path=path,
            format="a request",
            reason=f"it holds {'nothing' if raw is None else f'a {type(raw).__name__}'}, not a mapping",
            mend="A request has the keys model, inventory and workload; see examples/requests.",
        )
    return raw


def load_request(path: str | Path, overrides: Mapping[str, Any] | Iterable[str] = ()) -> Request:
    """Reads a request file (YAML or JSON).

    overrides   "path=value" strings or a mapping, e.g. "slo.tpot_mean_ms=20",
                "inventory.nodes[0].count=2"; values are read as YAML

    Raises FileMissing, FileUnreadable, UnknownField, UnknownName or InvalidField.
    """
    raw = read_mapping(path)
    if "models" in raw and "model" not in raw:
        raise InvalidField(
            where=f"request '{path}'",
            field="models",
            value=f"{len(raw['models'])} of them" if isinstance(raw["models"], list) else raw["models"],
            reason="one model is wanted here; files that list several are for `planc compile`",
            mend="Name the file of one model.",
        )
    request = make_request(apply_overrides(raw, overrides), where=f"request '{path}'")
    request._base = Path(path).parent
    return request


def make_request(raw: Mapping[str, Any], where: str = "request") -> Request:
    """A request from a mapping, with the same errors as `load_request`."""
    try:
        request = Request.model_validate(raw)
    except ValidationError as error:
        raise translated(error, Request, raw, where) from None
    _check_names(request, where)
    return request


def _check_names(request: Request, where: str) -> None:
    """Every name must be known to a catalogue; a node name must not stand for two groups."""
    for position, nodes in enumerate(request.inventory.nodes):
        catalogue.gpu(nodes.gpu, field=f"inventory.nodes[{position}].gpu")
    limits = request.constraints
    for key in ("weights", "activations", "kv"):
        for name in getattr(limits, key) or ():
            known = formats.fmt(name, field=f"constraints.{key}")
            role = "weight" if key == "weights" else "activation" if key == "activations" else "kv"
            if role not in known.roles:
                usable = [n for n, f in formats.formats().items() if role in f.roles]
                raise InvalidField(
                    where=where,
                    field=f"constraints.{key}",
                    value=name,
                    reason=f"{name} is no {role} format",
                    mend=f"Use one of {', '.join(usable)}.",
                )
    for part, taken in (limits.formats or {}).items():
        if parse(part) is None:
            raise InvalidField(
                where=where,
                field="constraints.formats",
                value=part,
                reason="no part of a model",
                mend="Parts are written class:module or class[layers]:module, e.g. decoder:self_attn.",
            )
        for name in scheme(taken):
            formats.fmt(name, field=f"constraints.formats.{part}")
    for name in limits.engines or ():
        catalogue.engine(name, field="constraints.engines")
    for name in limits.gpus or ():
        catalogue.gpu(name, field="constraints.gpus")
    names = [nodes.name for nodes in request.inventory.nodes if nodes.name is not None]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InvalidField(
            where=where,
            field="inventory.nodes.name",
            value=twice[0],
            reason="two node groups have this name",
            mend="Give each group a name of its own, or none.",
        )
