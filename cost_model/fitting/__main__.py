"""`python -m planc.cost_model.fitting [family ...] [--tables DIR] [-o DIR] [--score]`.

Fits the shipped profiles from measured operator rows, or (`--score`) reports how well they predict
rows that were held out: a tenth of the shapes, and whole GPUs by physics alone.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from importlib import import_module, resources
from pathlib import Path

import click

from planc.cost_model.fitting import FAMILIES, sources
from planc.cost_model.profile import write


@click.command()
@click.argument("families", nargs=-1, type=click.Choice(FAMILIES))
@click.option("--tables", type=click.Path(exists=True, file_okay=False, path_type=Path), default=None)
@click.option("-o", "out", type=click.Path(file_okay=False, path_type=Path), default=None)
@click.option("--score", is_flag=True, help="Report held-out errors instead of writing profiles.")
@click.option("--json", "as_json", is_flag=True)
def main(
    families: tuple[str, ...], tables: Path | None, out: Path | None, score: bool, as_json: bool
) -> None:
    folder = tables or sources.root()
    target = out or Path(str(resources.files("planc.cost_model.data"))) / "profiles"
    for family in families or FAMILIES:
        module = import_module(f"planc.cost_model.fitting.{family}")
        if not score:
            for profile in module.fit(folder):
                path = write(profile, target)
                click.echo(
                    f"{path.name}: {family}, {len(profile.tables)} tables, {path.stat().st_size} bytes"
                )
            continue
        for found in module.score(folder):
            if as_json:
                click.echo(json.dumps(asdict(found)))
            else:
                click.echo(
                    f"{found.family:<10} {found.gpu:<14} {found.table:<28} {found.rows:>8} rows  "
                    f"held out {100 * found.held_out:5.1f} %  physics alone {100 * found.physics:5.1f} %"
                )


if __name__ == "__main__":
    main()
