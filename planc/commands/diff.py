"""`planc diff`: what changed between two plans, by meaning. Exit code 1 when they differ."""

from __future__ import annotations

import click

from planc.commands.common import emit_json, json_option, out


@click.command("diff")
@click.argument("old", type=click.Path())
@click.argument("new", type=click.Path())
@json_option
def diff_command(old: str, new: str, as_json: bool) -> None:
    """Compare the plans of two bundles (or plan.json files)."""
    from planc import api

    found = api.diff(old, new)
    if as_json:
        emit_json(found.to_json())
    else:
        console = out()
        for line in found.lines():
            style = {"+": "green", "-": "red", "~": "yellow"}.get(line[:1])
            console.print(line, style=style, markup=False)
    if found:
        raise click.exceptions.Exit(1)
