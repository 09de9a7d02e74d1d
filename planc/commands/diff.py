"""`planc diff`: what changed between two plans, by meaning. Exit code 1 when they differ."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from planc.commands.common import emit_json, json_option, out

if TYPE_CHECKING:
    from planc.planner.diff import Change


@click.command("diff")
@click.argument("old", type=click.Path())
@click.argument("new", type=click.Path())
@click.option("--all", "everything", is_flag=True, help="Also bands, percentiles and changes below 0.1 %.")
@json_option
def diff_command(old: str, new: str, everything: bool, as_json: bool) -> None:
    """Compare the plans of two bundles (or plan.json files)."""
    from planc import api

    found = api.diff(old, new)
    if as_json:
        emit_json(found.to_json())
    else:
        console = out()
        shown = [change for change in found.changes if everything or _tells(change)]
        for change in shown:
            style = {"+": "green", "-": "red", "~": "yellow"}[change.kind]
            console.print(change.text(), style=style, markup=False)
        if len(shown) < len(found.changes):
            rest = len(found.changes) - len(shown)
            console.print(f"and {rest} bands, percentiles or changes below 0.1 % (--all)", style="dim")
        if not found:
            console.print("the plans do not differ")
    if found:
        raise click.exceptions.Exit(1)


def _tells(change: Change) -> bool:
    """Whether a change stands for itself: bands and percentiles follow their value."""
    detail = change.path.endswith((".low", ".high")) or ".percentiles." in change.path
    return not detail and (change.ratio is None or abs(change.ratio) >= 1e-3)
