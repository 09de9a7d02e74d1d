"""Service-level objectives: a latency's mean or percentile, for all requests or for one traffic class."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic_core import PydanticCustomError

Metric = Literal["ttft", "tpot", "itl", "e2e"]

_KEY = re.compile(r"(ttft|tpot|itl|e2e)_(mean|p\d{1,2}(?:\.\d{1,3})?)_ms")


@dataclass(frozen=True, slots=True, order=True)
class Slo:
    """One objective: `metric`'s `quantile` (a fraction like 0.99, None for the mean) <= limit seconds.

    key            as the request names it, e.g. "ttft_p99_ms"; "chat: ttft_p99_ms" for a class of its own
    traffic_class  the class whose requests it is about; "" for all that a pool serves
    """

    key: str
    metric: Metric
    quantile: float | None
    limit: float
    traffic_class: str = ""


def objectives(limits: Mapping[str, float], traffic_class: str = "") -> tuple[Slo, ...]:
    """Objectives of a mapping such as {"ttft_p99_ms": 2000}, in a fixed order."""
    name = f"{traffic_class}: " if traffic_class else ""
    return tuple(
        Slo(f"{name}{key}", key.split("_")[0], _quantile(key), limit / 1e3, traffic_class)  # type: ignore[arg-type]
        for key, limit in sorted(limits.items())
    )


def checked(value: Any) -> Any:
    """Validator of a mapping of objectives: known keys, limits in milliseconds above 0."""
    if not isinstance(value, dict):
        return value
    for key, limit in value.items():
        name = str(key)
        if not _KEY.fullmatch(name) or _quantile(name) == 0.0:
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
