"""The request: what a user writes. Models exactly for the YAML of the public contract.

`load_request` turns every mistake into one `PlancError` that names the field, the value and the
mend. Paths inside a request are relative to the request file.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    model_serializer,
    model_validator,
)
from pydantic_core import PydanticCustomError

from planc.cost_model import catalogue, formats
from planc.errors import FileMissing, FileUnreadable, InvalidField
from planc.planner.mistakes import translated

Metric = Literal["ttft", "tpot", "itl", "e2e"]
Objective = Literal["min_cost", "max_goodput", "min_latency", "min_energy", "pareto"]

_SLO_KEY = re.compile(r"(ttft|tpot|itl|e2e)_(mean|p\d{1,2}(?:\.\d{1,3})?)_ms")
_PERCENTILE = re.compile(r"p(\d{1,2}(?:\.\d{1,3})?)")


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def _mistake(reason: str, mend: str) -> PydanticCustomError:
    """A validator's refusal, with its mend; `planner.mistakes` words it."""
    return PydanticCustomError("planc", "{reason}", {"reason": reason, "mend": mend})


def _listed(value: Any) -> Any:
    """`tp: 4` means `tp: [4]`."""
    return value if value is None or isinstance(value, list | tuple) else [value]


def _plain(value: float) -> float:
    """4000.0 is written 4000."""
    return int(value) if value == int(value) else value


Names = Annotated[list[str] | None, BeforeValidator(_listed), Field(min_length=1)]
Degrees = Annotated[list[Annotated[int, Field(ge=1, le=4096)]] | None, BeforeValidator(_listed)]


# -- inventory -------------------------------------------------------------------------


class Nodes(_Part):
    """`count` identical machines. `usd_per_gpu_hour` defaults to the catalogue's list price."""

    gpu: str
    gpus_per_node: int = Field(ge=1, le=1024)
    count: int = Field(default=1, ge=1, le=100_000)
    usd_per_gpu_hour: float | None = Field(default=None, ge=0)
    name: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")


class Inventory(_Part):
    """`inter_node_gbps` is the network per GPU, one direction, Gbit/s; default the catalogue's."""

    nodes: list[Nodes] = Field(min_length=1)
    inter_node_gbps: float | None = Field(default=None, gt=0)


# -- workload --------------------------------------------------------------------------


class Lengths(_Part):
    """Token counts: a fixed number, a mean with percentiles, or a histogram file (tokens,count)."""

    mean: float | None = Field(default=None, ge=0, le=1e8)
    percentiles: dict[str, float] = Field(default_factory=dict)
    histogram: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _forms(cls, value: Any) -> Any:
        if isinstance(value, bool | str | list):
            raise _mistake(
                "not a length", "Write a number of tokens, {mean, p50, p95, ...} or {histogram: FILE}."
            )
        if isinstance(value, int | float):
            return {"mean": value}
        if isinstance(value, dict) and "percentiles" not in value:
            named = {k: v for k, v in value.items() if _PERCENTILE.fullmatch(str(k))}
            rest = {k: v for k, v in value.items() if k not in named}
            return {**rest, "percentiles": named} if named else rest
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Lengths:
        if self.histogram is not None and (self.mean is not None or self.percentiles):
            raise _mistake("a histogram stands alone", "Leave out the mean and the percentiles.")
        if self.histogram is None and self.mean is None and not self.percentiles:
            raise _mistake("no length given", "Write a number of tokens.")
        ordered = sorted(self.percentiles.items(), key=lambda item: float(item[0][1:]))
        values = [v for _, v in ordered]
        if any(v <= 0 for v in values) or values != sorted(values):
            raise _mistake("percentiles must be positive and ascend", "Check p50 <= p95 <= p99.")
        return self

    @model_serializer
    def _short(self) -> Any:
        if self.histogram is not None:
            return {"histogram": self.histogram}
        if not self.percentiles:
            return _plain(self.mean or 0.0)
        named = {key: _plain(value) for key, value in self.percentiles.items()}
        return ({"mean": _plain(self.mean)} if self.mean is not None else {}) | named


class TrafficClass(_Part):
    """One kind of request. `isl` and `osl` count tokens; `prefix_hit_rate` is the cached share of isl.

    For encoders `osl` is left out; for plain modules both may be (a request is one item then).
    """

    name: str | None = None
    weight: float = Field(default=1.0, gt=0)
    isl: Lengths | None = None
    osl: Lengths | None = None
    prefix_hit_rate: float = Field(default=0.0, ge=0, lt=1)
    request_rate: float | None = Field(default=None, gt=0)


class Trace(_Part):
    """Recorded traffic: lengths, arrival rate, burstiness and prefix hits are taken from the file."""

    file: str
    format: Literal["mooncake", "azure", "vllm"]
    prefix_hit_rate: float | None = Field(default=None, ge=0, lt=1)


_CLASS_KEYS = ("name", "weight", "isl", "osl", "prefix_hit_rate")


class Workload(_Part):
    """Traffic classes or a trace, and how much of it: exactly one of request_rate (requests/s),
    concurrency (closed loop) or `rate: max`. A trace brings its own rate.

    arrival_cv   coefficient of variation of the times between arrivals; 1 is Poisson
    """

    classes: list[TrafficClass] = Field(default_factory=list)
    trace: Trace | None = None
    request_rate: float | None = Field(default=None, gt=0)
    concurrency: int | None = Field(default=None, ge=1, le=10_000_000)
    rate: Literal["max"] | None = None
    arrival_cv: float = Field(default=1.0, ge=0, le=100)

    @model_validator(mode="before")
    @classmethod
    def _forms(cls, value: Any) -> Any:
        if isinstance(value, list):
            value = {"classes": value}
            rates = [c.get("rate") for c in value["classes"] if isinstance(c, dict)]
            if rates and all(r == "max" for r in rates):
                plain = [{k: v for k, v in c.items() if k != "rate"} for c in value["classes"]]
                value = {"classes": plain, "rate": "max"}
        if not isinstance(value, dict):
            return value
        value = dict(value)
        if value.get("request_rate") == "max" and "rate" not in value:
            value["rate"] = value.pop("request_rate")
        if "trace" in value and isinstance(value["trace"], str):
            inner = {"file": value.pop("trace")}
            for key in ("format", "prefix_hit_rate"):
                if key in value:
                    inner[key] = value.pop(key)
            value["trace"] = inner
        elif "trace" not in value and "classes" not in value:
            own = {k: value.pop(k) for k in _CLASS_KEYS if k in value}
            value["classes"] = [own]
        return value

    @model_validator(mode="after")
    def _one_rate(self) -> Workload:
        if self.trace is not None and self.classes:
            raise _mistake("a trace and lengths at once", "Leave out isl and osl: the trace has them.")
        if self.trace is None and not self.classes:
            raise _mistake("no traffic", "Give isl and osl, a list of classes, or a trace.")
        given = [k for k in ("request_rate", "concurrency", "rate") if getattr(self, k) is not None]
        per_class = [c.request_rate is not None for c in self.classes]
        if any(per_class):
            if given or not all(per_class):
                raise _mistake(
                    "the rate is given twice or only for some classes",
                    "Give a request_rate for every class, or one for the whole workload.",
                )
            return self
        if len(given) > 1:
            raise _mistake(f"{' and '.join(given)} at once", "Keep exactly one of them.")
        if not given and self.trace is None:
            raise _mistake("no rate", "Add request_rate: N (requests/s), concurrency: N, or rate: max.")
        return self

    @model_serializer
    def _flat(self) -> dict[str, Any]:
        out: dict[str, Any] = {}
        shown = [c.model_dump(mode="json", exclude_none=True, exclude_defaults=True) for c in self.classes]
        if self.trace is not None:
            out |= {"trace": self.trace.file, "format": self.trace.format}
            if self.trace.prefix_hit_rate is not None:
                out["prefix_hit_rate"] = self.trace.prefix_hit_rate
        elif len(shown) == 1 and "request_rate" not in shown[0]:
            out |= shown[0]
        else:
            out["classes"] = shown
        if self.request_rate is not None:
            out["request_rate"] = _plain(self.request_rate)
        for key in ("concurrency", "rate"):
            if getattr(self, key) is not None:
                out[key] = getattr(self, key)
        if self.arrival_cv != 1.0:
            out["arrival_cv"] = self.arrival_cv
        return out


# -- objectives and constraints ----------------------------------------------------------


@dataclass(frozen=True, slots=True, order=True)
class Slo:
    """One service-level objective: `metric`'s `stat` ("mean" or a fraction like 0.99) <= limit seconds."""

    key: str
    metric: Metric
    quantile: float | None
    limit: float


def _slo(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    for key, limit in value.items():
        name = str(key)
        if not _SLO_KEY.fullmatch(name) or _quantile(name) == 0.0:
            raise PydanticCustomError("planc_slo", "unknown objective", {"key": name})
        if isinstance(limit, bool) or not isinstance(limit, int | float):
            raise PydanticCustomError(
                "planc_at", "not a number", {"key": name, "value": limit, "mend": "Give milliseconds."}
            )
        if not 0 < limit < 1e12:
            raise PydanticCustomError(
                "planc_at",
                "a latency objective must be above 0",
                {"key": name, "value": limit, "mend": "Give milliseconds, or leave the objective out."},
            )
    return value


def _quantile(key: str) -> float | None:
    stat = key.split("_")[1]
    return None if stat == "mean" else float(stat[1:]) / 100


class Constraints(_Part):
    """What the plan may use. A list that is left out allows the engine's own; see each field.

    weights, activations, kv   allowed formats. Weights left out: the checkpoint's own format, or,
                               when max_accuracy_drop is given, every format within it
    tp, pp, dp, ep, cp         allowed degrees
    max_accuracy_drop          relative loss of the average task score, e.g. 0.01
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


class Request(_Part):
    """A whole request. Build it with `load_request` or `Request.model_validate(mapping)`."""

    model: str = Field(min_length=1)
    inventory: Inventory
    workload: Workload
    slo: Annotated[dict[str, float], BeforeValidator(_slo)] = Field(default_factory=dict)
    objective: Objective = "min_cost"
    constraints: Constraints = Field(default_factory=Constraints)

    _base: Path | None = PrivateAttr(default=None)

    def slos(self) -> tuple[Slo, ...]:
        """The objectives, in a fixed order, limits in seconds."""
        return tuple(
            Slo(key, key.split("_")[0], _quantile(key), limit / 1e3)  # type: ignore[arg-type]
            for key, limit in sorted(self.slo.items())
        )

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
        raw["slo"] = {key: _plain(value) for key, value in sorted(self.slo.items())}
        return {key: value for key, value in raw.items() if value not in ({}, [])}

    def fingerprint(self) -> str:
        """Hash of the canonical form and of the files it names (histograms, traces)."""
        digest = hashlib.sha256(json.dumps(self.dump(), sort_keys=True).encode())
        for name in self.files():
            digest.update(read_bytes(self.path(name), "workload"))
        return digest.hexdigest()[:16]

    def files(self) -> tuple[str, ...]:
        """Data files the workload names."""
        lengths = [x for c in self.workload.classes for x in (c.isl, c.osl) if x is not None]
        named = [x.histogram for x in lengths if x.histogram is not None]
        return tuple(named + ([self.workload.trace.file] if self.workload.trace else []))

    def changed(self, **changes: Any) -> Request:
        """A copy with some fields replaced (already validated parts), same base folder."""
        copy = self.model_copy(update=changes)
        copy._base = self._base
        return copy


# -- loading -----------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """Safe YAML that refuses a key written twice."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if isinstance(key, str) and key in seen:
            raise yaml.constructor.ConstructorError(
                None, None, f"the key '{key}' is written twice", key_node.start_mark
            )
        if isinstance(key, str):
            seen.add(key)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


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


def load_request(path: str | Path, overrides: Mapping[str, Any] | Iterable[str] = ()) -> Request:
    """Reads a request file (YAML or JSON).

    overrides   "path=value" strings or a mapping, e.g. "slo.tpot_mean_ms=20",
                "inventory.nodes[0].count=2"; values are read as YAML

    Raises FileMissing, FileUnreadable, UnknownField, UnknownName or InvalidField.
    """
    file = Path(path)
    if not file.is_file():
        raise FileMissing(what="request", path=path, mend="Name a request file (YAML).")
    try:
        raw = yaml.load(read_bytes(file, "request").decode("utf-8"), Loader=_Loader)
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
    from planc.planner.overrides import apply_overrides

    request = make_request(apply_overrides(raw, overrides), where=f"request '{path}'")
    request._base = file.parent
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
