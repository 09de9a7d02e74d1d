"""An attribution as a table to print: a row for each plan and decision, a column for each metric.

Figures are rounded to the digits that are shown so that what is printed adds up, too: parts are rounded to
the nearest, and those that were rounded most take what is then missing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from planc.planner.diff_attribution import Attribution, Part
from planc.planner.plan import Plan

#: metrics that are shown, in this order, and their heads; objectives' percentiles follow their metric
METRICS = {
    "ttft_ms": ("TTFT", "ms"),
    "tpot_ms": ("TPOT", "ms"),
    "e2e_ms": ("E2E", "ms"),
    "output_tok_s": ("output", "tok/s"),
    "usd_per_hour": ("price", "USD/h"),
    "usd_per_million_tokens": ("price", "USD/1M"),
    "joules_per_token": ("energy", "J/tok"),
    "memory_gib": ("memory", "GiB/GPU"),
}
#: where more is better; it is neither better nor worse for those of _NEUTRAL
_MORE = ("requests_s", "output_tok_s", "output_tok_s_per_gpu", "capacity_requests_s", "capacity_users")
_NEUTRAL = ("memory_gib", "concurrency")
_DIGITS = 4


@dataclass(frozen=True, slots=True)
class Column:
    """One metric, in whole numbers of 10^-decimals: old + sum(parts) = new."""

    metric: str
    decimals: int
    old: int
    new: int
    parts: tuple[int, ...]

    @property
    def head(self) -> tuple[str, str]:
        """(short name, unit)."""
        name, _, percentile = self.metric.partition(".")
        words, unit = METRICS[name]
        return f"{words} {percentile}".strip(), unit

    @property
    def change(self) -> int:
        return self.new - self.old

    def text(self, count: int, *, signed: bool = False) -> str:
        """A figure of the column; changes with a sign, none as "0"."""
        if signed and not count:
            return "0"
        value = count / 10**self.decimals
        return f"{value:{'+' if signed else ''},.{max(self.decimals, 0)}f}"

    def better(self, count: int) -> bool | None:
        """Whether a change is for the better; None where nobody can say."""
        if not count or self.metric in _NEUTRAL:
            return None
        return (count > 0) == (self.metric in _MORE)


@dataclass(frozen=True, slots=True)
class Sheet:
    """Columns over the parts that change any of them; `idle` are the parts that change none."""

    columns: tuple[Column, ...]
    parts: tuple[Part, ...]
    idle: tuple[Part, ...]

    @property
    def moved(self) -> tuple[Column, ...]:
        """Columns that some part changes, be it there and back."""
        return tuple(column for column in self.columns if any(column.parts))


def percentiles(plans: Iterable[Plan]) -> list[str]:
    """Figures that the plans' requests set objectives for, other than means: "ttft_ms.p99"."""
    keys = {key for plan in plans for key in plan.request.get("slo", {})}
    parts = (key.split("_") for key in sorted(keys))
    return [f"{metric}_ms.{stat}" for metric, stat, _ in parts if stat != "mean"]


def sheet(found: Attribution, asked: Sequence[str] = ()) -> Sheet:
    """The table of an attribution. `asked`: percentiles to show, too, such as "ttft_ms.p99"."""
    names = [n for metric in METRICS for n in (metric, *(a for a in asked if a.startswith(f"{metric}.")))]
    columns = [_column(found, name) for name in names if name in found.old]
    moving = [i for i in range(len(found.parts)) if any(column.parts[i] for column in columns)]
    idle = [part for i, part in enumerate(found.parts) if i not in moving and part is not found.unseen]
    return Sheet(
        tuple(Column(c.metric, c.decimals, c.old, c.new, tuple(c.parts[i] for i in moving)) for c in columns),
        tuple(found.parts[i] for i in moving),
        tuple(idle),
    )


def _column(found: Attribution, metric: str) -> Column:
    old, new = found.old[metric], found.new[metric]
    largest = max(abs(old), abs(new))
    decimals = max(_DIGITS - 1 - math.floor(math.log10(largest)), 0) if largest > 0 else 0
    decimals = min(decimals, 2 + _DIGITS)
    ends = round(old * 10**decimals), round(new * 10**decimals)
    parts = [part.changes[metric] * 10**decimals for part in found.parts]
    return Column(metric, decimals, *ends, _rounded(parts, ends[1] - ends[0]))


def _rounded(parts: Sequence[float], total: int) -> tuple[int, ...]:
    """Whole numbers near the parts that add up to the total. Negated parts give negated numbers."""
    found = [round(part) for part in parts]
    missing = total - sum(found)
    sign = 1 if missing > 0 else -1
    order = sorted(range(len(parts)), key=lambda i: (parts[i] == 0, -sign * (parts[i] - found[i])))
    for i in order[: abs(missing)]:
        found[i] += sign
    return tuple(found)
