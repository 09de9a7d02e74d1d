"""From a file of measured points to a report: what `planc validate` does."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np

from planc.cost_model import catalogue
from planc.errors import InvalidField, PlancError, UnknownField
from planc.files import whole
from planc.runtime.validation.constants import Constants
from planc.runtime.validation.fit import (
    Cell,
    Fitted,
    calibrated,
    chosen_points,
    fit,
    left_out,
    linearised,
)
from planc.runtime.validation.harness import harness
from planc.runtime.validation.lint import lint, requests_per_second
from planc.runtime.validation.points import Point, Rejected, read_points
from planc.runtime.validation.predict import Prediction, Predictor
from planc.runtime.validation.report import Row, ValidationReport
from planc.runtime.validation.setups import Setup, Tables, Unpredictable, setup

Progress = Callable[[str], None]

#: columns that points may be grouped by
GROUPS = tuple(
    item.name
    for item in fields(Point)
    if item.name not in ("row", "id", "prefill", "decode", "flags", "repairs")
)


def validate(
    path: str | Path,
    tables: Tables,
    *,
    by: Sequence[str] = (),
    options: Mapping[str, Any] | None = None,
    rules: bool = True,
    leave_out_cells: bool = False,
    calibrate_on: int = 0,
    progress: Progress | None = None,
) -> ValidationReport:
    """Predicts every point of a file and compares.

    by                columns to group by
    options           harness and engine flags for all points (see `harness`)
    rules             whether published flags apply where neither file nor options state them
    leave_out_cells   constants of each cell are fitted to the other cells of the file
    calibrate_on      3: each cell's constants are then calibrated on three of its points, which are not
                      scored (0: not)

    Raises the errors of `read_points`; UnknownField for a column or an option that does not exist.
    """
    for name in by:
        if name not in GROUPS:
            raise UnknownField(where="--by", field=name, mend=f"Known: {', '.join(GROUPS)}.")
    points, rejected = read_points(path)
    predictor = Predictor()
    setups, refused = prepare(points, tables, options or {}, rules, predictor)
    flagged = lint(setups)
    predicted: dict[int, Prediction] = {}
    used: set[int] = set()
    fitted: dict[str, Any] = {}
    if leave_out_cells or calibrate_on:
        predicted, used, fitted = blind(setups, flagged, predictor, calibrate_on, progress)
    else:
        for i, found in enumerate(setups):
            if progress and i % 20 == 0:
                progress(f"simulating {i} of {len(setups)}")
            predicted[found.point.row] = predictor.predict(found)
    rows = tuple(
        Row(s.point, predicted[s.point.row], measured(s), flagged.get(s.point.row, ()))
        for s in setups
        if s.point.row not in used
    )
    settings = {
        "points": str(path),
        "options": dict(options or {}),
        "published_flags": rules,
        "calibrated_on": calibrate_on,
        "constants": {
            name: asdict(Constants.shipped(catalogue.engine(name)))
            for name in sorted({s.profile.name for s in setups})
        },
        "constants_fitted_to_all": fitted,
    }
    return ValidationReport(
        rows, (*rejected, *refused), tuple(by), leave_out_cells or calibrate_on > 0, settings
    )


def prepare(
    points: Sequence[Point],
    tables: Tables,
    options: Mapping[str, Any],
    rules: bool,
    predictor: Predictor,
) -> tuple[list[Setup], list[Rejected]]:
    """Setups of the points that can be simulated, and why the others cannot."""
    setups: list[Setup] = []
    refused: list[Rejected] = []
    for point in points:
        try:
            catalogue_names(point)
            found = setup(point, harness(point, options, rules=rules), tables)
            predictor.ready(found)
            setups.append(found)
        except Unpredictable as error:
            cells = {name: str(getattr(point, name)) for name in GROUPS}
            refused.append(Rejected(point.row, point.id, str(error), cells))
    return setups, refused


def catalogue_names(point: Point) -> None:
    """Raises Unpredictable for a GPU or engine that the catalogue does not hold."""
    try:
        catalogue.engine(point.engine)
        catalogue.gpu(point.gpu)
    except PlancError as error:
        raise Unpredictable(str(error)) from None


def measured(found: Setup) -> dict[str, float | None]:
    """Measured TPOT and TTFT, ms, and tokens/s and GPU by Little's law."""
    point = found.point
    rate = requests_per_second(found)
    mean = (found.harness.length_low + found.harness.length_high) / 2
    return {
        "tpot": point.tpot_ms,
        "ttft": point.ttft_ms,
        "throughput": None if rate is None else rate * mean * point.osl / point.gpus,
    }


def blind(
    setups: Sequence[Setup],
    flagged: Mapping[int, tuple[str, ...]],
    predictor: Predictor,
    calibrate_on: int,
    progress: Progress | None,
) -> tuple[dict[int, Prediction], set[int], dict[str, Any]]:
    """Predictions of each cell with constants that were fitted to the other cells, flagged rows left out of
    every fit; the rows that a calibration used up; and, by engine, the constants of a fit to all cells.

    Raises InvalidField where no other cell has rows to fit to."""
    linear = linearised(setups, predictor, progress)
    clean = linear.rows(np.array([s.point.row not in flagged for s in setups]))
    cells = {s.point.cell for s in setups}
    fitted = left_out(clean, cells)
    if cells - fitted.keys():
        raise InvalidField(
            where="validate",
            field="leave_out_cells",
            value=" ".join(min(cells - fitted.keys())),
            reason="no other cell has rows to fit constants to",
            mend="Add points of other models, GPUs, engines or weights, or use the shipped constants.",
        )
    engines = catalogue.engines()
    changes = {cell: one.change(engines[cell[2]]) for cell, one in fitted.items()}
    used: set[int] = set()
    if calibrate_on:
        changes, used = _calibrations(setups, flagged, linear, fitted)
    predicted = {}
    for i, found in enumerate(setups):
        if progress and i % 20 == 0:
            progress(f"simulating, left-out constants: {i} of {len(setups)}")
        constants = Constants.shipped(found.profile).moved(changes[found.point.cell])
        predicted[found.point.row] = predictor.predict(found, constants)
    whole = fit(clean)
    by_engine = {s.profile.name: asdict(whole.constants(s)) for s in setups}
    return predicted, used, by_engine


def _calibrations(
    setups: Sequence[Setup],
    flagged: Mapping[int, tuple[str, ...]],
    linear: Any,
    fitted: Mapping[Cell, Fitted],
) -> tuple[dict[Cell, Any], set[int]]:
    changes, used = {}, set()
    for cell, one in fitted.items():
        mine = [i for i, s in enumerate(setups) if s.point.cell == cell and s.point.row not in flagged]
        changes[cell] = one.change(catalogue.engine(cell[2]))
        if len(mine) > 3:
            picked = chosen_points(linear, mine)
            keep = np.isin(np.arange(len(setups)), picked)
            changes[cell] = calibrated(linear.rows(keep), changes[cell])
            used |= {setups[i].point.row for i in picked}
    return changes, used


def write_predictions(report: ValidationReport, path: str | Path) -> None:
    """One line per point, predicted and measured, unpredicted ones with their reason; whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    names = ["id", *(n for n in GROUPS if n not in ("ttft_ms", "tpot_ms", "source"))]
    values = [
        f"{metric}{kind}"
        for metric in ("tpot_ms", "ttft_ms", "throughput")
        for kind in ("", "_low", "_high", "_measured")
    ]
    with whole(path) as file:
        writer = csv.writer(file)
        writer.writerow([*names, *values, "ttft_steady_ms", "source", "lint", "repairs", "unpredicted"])
        for row in report.rows:
            writer.writerow(_line(row, names))
        for item in report.unpredicted:
            blank = [""] * (len(values) + 4)
            labels = [item.id, *item.labels(names[1:])]
            writer.writerow([*labels, *blank, item.reason])


def _line(row: Row, names: Sequence[str]) -> list[Any]:
    found = row.prediction
    cells: list[Any] = [getattr(row.point, name) for name in names]
    for metric in ("tpot", "ttft", "throughput"):
        low, high = found.bands[metric]
        value = row.measured[metric]
        cells += [_short(v) for v in (found.value(metric), low, high, value)]
    ends = [_short(found.ttft_steady_ms), found.source, " ".join(row.lint), "; ".join(row.point.repairs), ""]
    return [*cells, *ends]


def _short(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"


def gpus_of(path: str | Path) -> list[str]:
    """The GPUs of a file's points."""
    points, _ = read_points(path)
    return sorted({point.gpu for point in points})
