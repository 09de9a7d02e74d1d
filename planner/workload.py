"""The workload part of a request: lengths, traffic classes, traces, and how much of them."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_serializer, model_validator
from pydantic_core import PydanticCustomError

from planc.planner.slo import checked

_PERCENTILE = re.compile(r"p(\d{1,2}(?:\.\d{1,3})?)")


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def mistake(reason: str, mend: str) -> PydanticCustomError:
    """A validator's refusal, with its mend; `planner.mistakes` words it."""
    return PydanticCustomError("planc", "{reason}", {"reason": reason, "mend": mend})


def plain(value: float) -> float:
    """4000.0 is written 4000."""
    return int(value) if value == int(value) else value


class Lengths(Part):
    """Token counts: a fixed number, a mean with percentiles, or a histogram file (tokens,count)."""

    mean: float | None = Field(default=None, ge=0, le=1e8)
    percentiles: dict[str, float] = Field(default_factory=dict)
    histogram: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _forms(cls, value: Any) -> Any:
        if isinstance(value, bool | str | list):
            raise mistake(
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
            raise mistake("a histogram stands alone", "Leave out the mean and the percentiles.")
        if self.histogram is None and self.mean is None and not self.percentiles:
            raise mistake("no length given", "Write a number of tokens.")
        ordered = sorted(self.percentiles.items(), key=lambda item: float(item[0][1:]))
        values = [v for _, v in ordered]
        if any(v <= 0 for v in values) or values != sorted(values):
            raise mistake("percentiles must be positive and ascend", "Check p50 <= p95 <= p99.")
        return self

    @model_serializer
    def _short(self) -> Any:
        if self.histogram is not None:
            return {"histogram": self.histogram}
        if not self.percentiles:
            return plain(self.mean or 0.0)
        named = {key: plain(value) for key, value in self.percentiles.items()}
        return ({"mean": plain(self.mean)} if self.mean is not None else {}) | named


class TrafficClass(Part):
    """One kind of request. `isl` and `osl` count tokens; `prefix_hit_rate` is the cached share of isl;
    `slo` holds objectives of its own (the class then needs a name).

    For encoders `osl` is left out; for plain modules both may be (a request is one item then).
    """

    name: str | None = None
    weight: float = Field(default=1.0, gt=0)
    isl: Lengths | None = None
    osl: Lengths | None = None
    prefix_hit_rate: float = Field(default=0.0, ge=0, lt=1)
    request_rate: float | None = Field(default=None, gt=0)
    slo: Annotated[dict[str, float], BeforeValidator(checked)] = Field(default_factory=dict)


class Trace(Part):
    """Recorded traffic: lengths, arrival rate, burstiness and prefix hits are taken from the file."""

    file: str
    format: Literal["mooncake", "azure", "vllm"]
    prefix_hit_rate: float | None = Field(default=None, ge=0, lt=1)


class LoadTest(Part):
    """How a load generator sends the workload, and the engine's flags that its clients feel. What is left
    out of the flags is the engine profile's.

    burst                all clients of a closed loop start at once; else evenly over one answer's time
    requests_per_client  in a closed loop: requests of the whole run over its concurrency
    requests             of the whole run; wins over requests_per_client
    length_low, _high    lengths are drawn evenly between these shares of the workload's; where all are equal,
                         requests that start together stay together and prompts queue for ever
    stream_interval      tokens per message: a client sees the first with the n-th
    recv_interval        steps between two looks at new arrivals
    prompts_per_step     most prompts that begin in one step
    request_ms           a request's way to the scheduler: network, tokenizer, admission
    lag_steps            steps from a token's kernels to its client
    """

    burst: bool = True
    requests_per_client: float = Field(default=10.0, ge=1, le=10_000)
    requests: int | None = Field(default=None, ge=1, le=10_000_000)
    length_low: float = Field(default=0.9, gt=0, le=10)
    length_high: float = Field(default=1.1, gt=0, le=10)
    stream_interval: int | None = Field(default=None, ge=1, le=10_000)
    recv_interval: int | None = Field(default=None, ge=1, le=10_000)
    prompts_per_step: int | None = Field(default=None, ge=1)
    request_ms: float | None = Field(default=None, ge=0)
    lag_steps: float | None = Field(default=None, ge=0)
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _range(self) -> LoadTest:
        if self.length_low > self.length_high:
            raise mistake("length_low lies above length_high", "Give shares such as 0.8 and 1.0.")
        return self


_CLASS_KEYS = ("name", "weight", "isl", "osl", "prefix_hit_rate", "slo")


class Workload(Part):
    """Traffic classes or a trace, and how much of it: exactly one of request_rate (requests/s),
    concurrency (closed loop) or `rate: max`. A trace brings its own rate.

    arrival_cv   coefficient of variation of the times between arrivals; 1 is Poisson
    prefix_tokens  tokens of all prefixes that recur: prefix_hit_rate is then what a cache that holds them all
                 would find, and engines find what theirs hold; left out: they hold them all
    expert_load  a file with the tokens of each expert in each layer; left out, a log-normal law is assumed
    load_test    how it is sent where `planc estimate` simulates it; plans do not depend on it
    """

    classes: list[TrafficClass] = Field(default_factory=list)
    trace: Trace | None = None
    request_rate: float | None = Field(default=None, gt=0)
    concurrency: int | None = Field(default=None, ge=1, le=10_000_000)
    rate: Literal["max"] | None = None
    arrival_cv: float = Field(default=1.0, ge=0, le=100)
    prefix_tokens: float | None = Field(default=None, gt=0)
    expert_load: str | None = None
    load_test: LoadTest | None = None

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
            raise mistake("a trace and lengths at once", "Leave out isl and osl: the trace has them.")
        names = [c.name for c in self.classes]
        if any(c.slo for c in self.classes) and (None in names or len(set(names)) < len(names)):
            raise mistake(
                "classes with objectives of their own need names", "Give each class a name of its own."
            )
        if self.trace is None and not self.classes:
            raise mistake("no traffic", "Give isl and osl, a list of classes, or a trace.")
        given = [k for k in ("request_rate", "concurrency", "rate") if getattr(self, k) is not None]
        per_class = [c.request_rate is not None for c in self.classes]
        if any(per_class):
            if given or not all(per_class):
                raise mistake(
                    "the rate is given twice or only for some classes",
                    "Give a request_rate for every class, or one for the whole workload.",
                )
            return self
        if len(given) > 1:
            raise mistake(f"{' and '.join(given)} at once", "Keep exactly one of them.")
        if not given and self.trace is None:
            raise mistake("no rate", "Add request_rate: N (requests/s), concurrency: N, or rate: max.")
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
            out["request_rate"] = plain(self.request_rate)
        for key in ("concurrency", "rate"):
            if getattr(self, key) is not None:
                out[key] = getattr(self, key)
        if self.arrival_cv != 1.0:
            out["arrival_cv"] = self.arrival_cv
        if self.prefix_tokens is not None:
            out["prefix_tokens"] = plain(self.prefix_tokens)
        if self.expert_load is not None:
            out["expert_load"] = self.expert_load
        if self.load_test is not None:
            out["load_test"] = self.load_test.model_dump(mode="json", exclude_unset=True)
        return out
