"""Serving constants of one deployment from a few measured points: what `planc calibrate --points` does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from planc.cost_model import catalogue
from planc.cost_model.calibration import Constant, Device, Number, ProfileDocument
from planc.cost_model.features import Array
from planc.errors import InvalidField
from planc.runtime.validation.constants import NAMES, Constants
from planc.runtime.validation.fit import Linear, calibrated, linearised
from planc.runtime.validation.lint import lint
from planc.runtime.validation.points import Point, Rejected, read_points
from planc.runtime.validation.predict import Predictor
from planc.runtime.validation.setups import Tables, model_folders, model_tables
from planc.runtime.validation.validate import prepare
from planc.version import __version__

#: constants that a profile keeps under "serving"; the others are an engine's own fields
_SERVING: tuple[Constant, ...] = ("request_ms", "lag_steps")

#: fitted constants cannot pass these
_LEAST: Mapping[str, float] = {
    "step_us": 0.0,
    "per_sequence_us": 0.0,
    "kernel_factor": 0.5,
    "prefill_factor": 0.5,
    "request_ms": 0.0,
    "lag_steps": 0.0,
}


def from_points(
    path: str | Path,
    profile: ProfileDocument | None,
    *,
    date: str,
    tables: Tables | None = None,
    progress: Callable[[str], None] | None = None,
) -> ProfileDocument:
    """The profile (or an empty one of the points' GPU) with each engine's constants fitted to its points,
    shrunk to the shipped ones; rows that break a lint rule are left out where enough others remain.

    Raises the errors of `read_points`, InvalidField where points are of several GPUs, of another one than the
    profile's, or none of them can be predicted.
    """
    points, rejected = read_points(path)
    name = _one_gpu(points, rejected, path, profile)
    predictor = Predictor()
    setups, refused = prepare(points, tables or model_tables(model_folders()), {}, True, predictor)
    if not setups:
        reason = (*refused, *rejected)[0].reason
        raise InvalidField(
            where=f"points '{path}'",
            field="rows",
            value=len(refused) + len(rejected),
            reason=f"none can be predicted; the first: {reason}",
            mend="Correct them, or validate first: planc validate POINTS.csv.",
        )
    flagged = lint(setups)
    whole = linearised(setups, predictor, progress)
    base = profile or ProfileDocument(
        kind="planc.profile",
        schema_version=1,
        planc_version=__version__,
        date=date,
        source="planc calibrate --points",
        device=Device(name=name),
    )
    engines = {engine: dict(fields) for engine, fields in base.engines.items()}
    serving = {engine: dict(fields) for engine, fields in base.serving.items()}
    for engine in sorted({s.profile.name for s in setups}):
        mine = [i for i, s in enumerate(setups) if s.profile.name == engine]
        clean = [i for i in mine if setups[i].point.row not in flagged]
        chosen = clean if len(clean) >= min(3, len(mine)) else mine
        found = _numbers(whole.rows(np.isin(np.arange(len(setups)), chosen)))
        own = {n: number for n, number in found.items() if n not in _SERVING}
        engines[engine] = {**engines.get(engine, {}), **own}
        serving[engine] = {**serving.get(engine, {}), **{n: found[n] for n in _SERVING}}
    return base.model_copy(update={"engines": engines, "serving": serving})


def _numbers(linear: Linear) -> dict[str, Number]:
    """The constants of one engine's rows."""
    change = calibrated(linear, np.zeros(len(NAMES)))
    shipped = Constants.shipped(linear.setups[0].profile)
    values = shipped.moved(change)
    error = _error(linear, change)
    loads = [s.point.concurrency for s in linear.setups]
    return {
        name: Number(
            value=round(max(getattr(values, name), _LEAST.get(name, -1e9)), 4),
            rows=len(linear.setups),
            error=round(error, 4),
            low=min(loads),
            high=max(loads),
            source="fitted",
            note=f"concurrency; shrunk to {getattr(shipped, name):g}",
        )
        for name in NAMES
    }


def _error(linear: Linear, change: Array) -> float:
    """Median relative error of TPOT (of TTFT where there is no TPOT) after the fit."""
    errors = np.abs(linear.times(change) / linear.measured - 1)
    for column in (0, 1):
        known = errors[np.isfinite(errors[:, column]), column]
        if known.size:
            return float(np.median(known))
    return 0.0


def _one_gpu(
    points: list[Point], rejected: list[Rejected], path: str | Path, profile: ProfileDocument | None
) -> str:
    named = {point.gpu for point in points}
    known = sorted({catalogue.gpu(name, field="gpu").name for name in named})
    wanted = catalogue.gpu(profile.device.name).name if profile else None
    if len(known) > 1 or (wanted and known and known != [wanted]):
        raise InvalidField(
            where=f"points '{path}'",
            field="gpu",
            value=", ".join(known),
            reason=f"the device is {wanted}" if wanted else "a profile is of one GPU",
            mend="Give the points of one GPU at a time.",
        )
    if not known:
        raise InvalidField(
            where=f"points '{path}'",
            field="rows",
            value=len(rejected),
            reason=f"none is a point; the first: {rejected[0].reason}",
            mend="Correct them.",
        )
    return known[0]
