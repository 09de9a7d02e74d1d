"""How well single kernels are predicted: held-out points of every table, and whole GPUs by physics alone.

    python benchmarks/operators.py [gemm attention experts links pointwise] [--tables DIR] [--json FILE]

Reads the operator tables of aiconfigurator-core 0.12.0 (`pip install planc[measured]`, or `--tables` with
its `systems/data`), fits each table without a tenth of its points (attention tables of under 300 rows or
100 shapes: without each tenth in turn) and the roofline without each GPU in turn, and prints the medians of
|predicted / measured - 1|: per table, then per family and GPU against the targets, 5 % on held-out points
and 20 % by physics (a star where one is missed). Takes some minutes on one core; nothing that planc ships
is changed.

What is compared: the profile that `planc.cost_model.fitting` would write, and `planc.cost_model.roofline`,
with rows that were measured and not left out as defects (each family's module says which those are, and a
profile's `dropped` counts them). Physics of a family on a GPU is over all its rows where the family says so
(a table named "all"), else the median over its tables.
"""

from __future__ import annotations

import json
import math
import sys
from dataclasses import asdict
from importlib import import_module
from pathlib import Path

import click
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from planc.cost_model.fitting import FAMILIES, Score, sources

HELD_OUT, PHYSICS = 0.05, 0.20


@click.command()
@click.argument("families", nargs=-1, type=click.Choice(FAMILIES))
@click.option("--tables", type=click.Path(exists=True, file_okay=False, path_type=Path), default=None)
@click.option("--json", "out", type=click.Path(dir_okay=False, path_type=Path), default=None)
def main(families: tuple[str, ...], tables: Path | None, out: Path | None) -> None:
    folder = tables or sources.root()
    found: list[Score] = []
    for family in families or FAMILIES:
        for score in import_module(f"planc.cost_model.fitting.{family}").score(folder):
            found.append(score)
            click.echo(_line(score))
    click.echo("\nfamily     GPU            tables      rows  held out (worst table)   physics alone")
    for family, gpu in dict.fromkeys((score.family, score.gpu) for score in found):
        click.echo(_summary([score for score in found if (score.family, score.gpu) == (family, gpu)]))
    if out:
        out.write_text(json.dumps([asdict(score) for score in found], indent=1), encoding="utf-8")


def _line(score: Score) -> str:
    physics = "" if math.isnan(score.physics) else f"{100 * score.physics:5.1f} %"
    return (
        f"{score.family:<10} {score.gpu:<14} {score.table:<40} {score.rows:>8}  "
        f"{100 * score.held_out:5.1f} %  {physics}"
    )


def _summary(mine: list[Score]) -> str:
    """One family on one GPU; a star where a target is missed."""
    tables = [score for score in mine if score.table != "all"]
    whole = next((score for score in mine if score.table == "all"), None)
    physics = float(np.nanmedian([score.physics for score in tables])) if whole is None else whole.physics
    held_out = float(np.median([score.held_out for score in tables]))
    worst = max(score.held_out for score in tables)
    missed = lambda value, target: "*" if value > target else " "  # noqa: E731
    return (
        f"{mine[0].family:<10} {mine[0].gpu:<14} {len(tables):>6} {sum(s.rows for s in tables):>9}  "
        f"{100 * held_out:5.1f} % ({100 * worst:5.1f} %{missed(worst, HELD_OUT)})        "
        f"{100 * physics:5.1f} %{missed(physics, PHYSICS)}"
    )


if __name__ == "__main__":
    main()
