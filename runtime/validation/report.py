"""Errors of predictions, by group and in total.

With r = predicted / measured - 1, over the points of a group that have both values:

    mape         mean of |r|, %           median_ape   median of |r|, %         bias   median of r, %
    within_band  share of measured values inside the prediction's own low-high, over all three metrics
    ttft_burst   median part of the predicted TTFT that a load test's start adds to the steady state's, %

A *family* is all points of one (model, GPU, engine, weights) with one pair of lengths. Over families with at
least three points and two parallel shapes:

    spearman       median over families of the rank correlation of predicted and measured TPOT
    pick_meets_slo share of families in which the point that is predicted to yield most tokens per GPU at
                   TPOT <= 30 ms is measured to have TPOT <= 30 ms
    pick_regret    mean share of the best measured throughput per GPU at TPOT <= 30 ms that those picks
                   which meet it leave on the table
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from planc.runtime.validation.points import Point, Rejected
from planc.runtime.validation.predict import Prediction

METRICS = ("tpot", "ttft", "throughput")
SLO_MS = 30.0


@dataclass(frozen=True, slots=True)
class Row:
    """A point with its prediction, the measured values, and the lint rules that it breaks."""

    point: Point
    prediction: Prediction
    measured: Mapping[str, float | None]
    lint: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ValidationReport:
    """The outcome of a validation. `linted` are the same figures over rows that break no rule."""

    rows: tuple[Row, ...]
    unpredicted: tuple[Rejected, ...]
    by: tuple[str, ...]
    blind: bool
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def total(self) -> dict[str, Any]:
        return {**summary(self.rows), "n_unpredicted": len(self.unpredicted)}

    @property
    def linted(self) -> dict[str, Any]:
        return {**summary([row for row in self.rows if not row.lint]), "n_unpredicted": len(self.unpredicted)}

    def groups(self) -> list[dict[str, Any]]:
        """One summary per value of the `by` columns."""
        found: dict[tuple[str, ...], list[Row]] = defaultdict(list)
        for row in self.rows:
            found[self._key(row.point)].append(row)
        missed: dict[tuple[str, ...], int] = defaultdict(int)
        for item in self.unpredicted:
            missed[item.labels(self.by)] += 1
        return [
            {
                **dict(zip(self.by, key, strict=True)),
                **summary(found.get(key, [])),
                "n_unpredicted": missed[key],
            }
            for key in sorted({*found, *missed})
        ]

    def _key(self, point: Point) -> tuple[str, ...]:
        return tuple(str(getattr(point, name)) for name in self.by)

    def to_json(self) -> dict[str, Any]:
        rules: dict[str, int] = defaultdict(int)
        for row in self.rows:
            for name in row.lint:
                rules[name] += 1
        return {
            **self.total,
            "total": self.total,
            "blind": self.blind,
            "by": list(self.by),
            "groups": self.groups(),
            "linted": self.linted,
            "lint": {
                "n_flagged": sum(bool(row.lint) for row in self.rows),
                "share_passed": _share([not row.lint for row in self.rows]),
                "rules": dict(sorted(rules.items())),
                "rows": {row.point.id: list(row.lint) for row in self.rows if row.lint},
            },
            "repairs": {row.point.id: list(row.point.repairs) for row in self.rows if row.point.repairs},
            "unpredicted": [asdict(item) for item in self.unpredicted],
            "settings": dict(self.settings),
        }


def summary(rows: Sequence[Row]) -> dict[str, Any]:
    """The figures of some rows; None where there is nothing to tell."""
    found: dict[str, Any] = {"n": len(rows)}
    inside: list[bool] = []
    for metric in METRICS:
        pairs = _pairs(rows, metric)
        errors = np.array([p / m - 1 for p, m in pairs]) * 100
        found[f"{metric}_n"] = len(pairs)
        found[f"{metric}_mape"] = _number(np.mean, np.abs(errors))
        found[f"{metric}_median_ape"] = _number(np.median, np.abs(errors))
        found[f"{metric}_bias"] = _number(np.median, errors)
        held = [
            row.prediction.bands[metric][0] <= measured <= row.prediction.bands[metric][1]
            for row in rows
            if (measured := row.measured[metric]) is not None
        ]
        found[f"{metric}_within_band"] = _share(held)
        inside.extend(held)
    found["within_band"] = _share(inside)
    times = ((row.prediction.ttft_ms, row.prediction.ttft_steady_ms) for row in rows)
    found["ttft_burst"] = _number(np.median, [100 * (1 - steady / whole) for whole, steady in times])
    return {**found, **_ranking(rows)}


def _pairs(rows: Iterable[Row], metric: str) -> list[tuple[float, float]]:
    return [
        (row.prediction.value(metric), measured)
        for row in rows
        if (measured := row.measured[metric]) is not None
    ]


def _number(of: Any, values: Any) -> float | None:
    return round(float(of(values)), 3) if len(values) else None


def _share(held: Sequence[bool]) -> float | None:
    return round(sum(held) / len(held), 4) if held else None


def _ranking(rows: Sequence[Row]) -> dict[str, Any]:
    families: dict[object, list[Row]] = defaultdict(list)
    for row in rows:
        if row.measured["tpot"] is not None and row.measured["throughput"] is not None:
            families[row.point.cell, row.point.workload, row.point.mode].append(row)
    ranks, meets, regrets = [], [], []
    for family in families.values():
        if len(family) < 3 or len({row.point.layout for row in family}) < 2:
            continue
        pairs = _pairs(family, "tpot")
        ranks.append(spearman([p for p, _ in pairs], [m for _, m in pairs]))
        picked = _pick(family)
        if picked is not None:
            good, regret = picked
            meets.append(good)
            if good:
                regrets.append(regret)
    return {
        "n_families": len(ranks),
        "spearman": _number(np.median, ranks),
        "spearman_mean": _number(np.mean, ranks),
        "n_picks": len(meets),
        "pick_meets_slo": _share(meets),
        "pick_regret": round(float(np.mean(regrets)), 4) if regrets else None,
    }


def _pick(family: Sequence[Row]) -> tuple[bool, float] | None:
    """Whether the pick meets the objective, and its regret; None where nothing is predicted to meet it, or
    nothing is measured to."""
    able = [row for row in family if row.prediction.tpot_ms <= SLO_MS]
    best = [row.measured["throughput"] or 0.0 for row in family if (row.measured["tpot"] or 0.0) <= SLO_MS]
    if not able or not best:
        return None
    pick = max(able, key=lambda row: row.prediction.value("throughput"))
    meets = (pick.measured["tpot"] or 0.0) <= SLO_MS
    return meets, 1.0 - (pick.measured["throughput"] or 0.0) / max(best)


def spearman(one: Sequence[float], two: Sequence[float]) -> float:
    """Rank correlation, mean ranks for ties (Spearman 1904)."""
    a, b = _ranks(one), _ranks(two)
    a, b = a - a.mean(), b - b.mean()
    size = float(np.sqrt((a * a).sum() * (b * b).sum()))
    return float((a * b).sum() / size) if size > 0 else 1.0


def _ranks(values: Sequence[float]) -> Any:
    _, inverse, counts = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]
