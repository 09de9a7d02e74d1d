"""`planc diff`: what changed between two plans, by meaning, and why. Exit code 1 when they differ."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from planc.commands.common import emit_json, json_option, out, profile_option, progress, trust_option
from planc.errors import InvalidField

if TYPE_CHECKING:
    from planc.planner.diff import PlanDiff
    from planc.planner.diff_table import Column
    from planc.planner.plan import Plan

_LABEL = 38  # columns of the terminal that a decision may take before it is folded


@click.command("diff")
@click.argument("old", type=click.Path())
@click.argument("new", type=click.Path())
@click.option("--html", "page", type=click.Path(), metavar="FILE", help="Also write a page to look at.")
@click.option("--all", "everything", is_flag=True, help="Also bands, percentiles and changes below 0.1 %.")
@click.option("--no-attribution", is_flag=True, help="Only what changed; the model is not needed then.")
@trust_option
@profile_option
@json_option
def diff_command(
    old: str,
    new: str,
    page: str | None,
    everything: bool,
    no_attribution: bool,
    trust_remote_code: bool,
    as_json: bool,
) -> None:
    """Compare the plans of two bundles (or plan.json files): what changed, and how much of each metric's
    change each decision explains."""
    from planc import api

    plans = api.load_plan(old), api.load_plan(new)
    with progress() as say:
        found = api.diff(
            *plans, attribute=not no_attribution, trust_remote_code=trust_remote_code, progress=say
        )
    if page is not None:
        _write(Path(page), *plans, found)
    if as_json:
        emit_json(found.to_json())
    else:
        _show(out(), plans, found, everything)
    if found:
        raise click.exceptions.Exit(1)


def _write(path: Path, old: Plan, new: Plan, found: PlanDiff) -> None:
    from planc.codegen.diff_page import html
    from planc.files import whole

    text = html(old, new, found)
    try:
        with whole(path) as file:
            file.write(text)
    except OSError as error:
        raise InvalidField(
            where="diff",
            field="--html",
            value=path,
            reason=error.strerror or str(error),
            mend="Name a file in a folder that can be written.",
        ) from None


def _show(console: Console, plans: tuple[Plan, Plan], found: PlanDiff, everything: bool) -> None:
    if not found:
        console.print("the plans do not differ")
        return
    if len(found.pairs) > 1:
        for pair in found.pairs:
            before, after = (kind.title() if kind else "none" for kind in (pair.old, pair.new))
            same = "as before" if before == after else after
            console.print(f"{pair.name}: {before} -> {same}", markup=False)
        console.print()
    shown = [change for change in found.changes if everything or not change.is_detail]
    for change in shown:
        style = {"+": "green", "-": "red", "~": "yellow"}[change.kind]
        console.print(change.text(), style=style, markup=False)
    if len(shown) < len(found.changes):
        rest = len(found.changes) - len(shown)
        console.print(f"and {rest} bands, percentiles or changes below 0.1 % (--all)", style="dim")
    console.print()
    if found.attribution is None:
        console.print(f"no attribution: {found.unattributed}", style="dim", markup=False)
        return
    _explain(console, plans, found)


def _explain(console: Console, plans: tuple[Plan, Plan], found: PlanDiff) -> None:
    """The waterfall as a table: from the old plan's figures, decision by decision, to the new one's."""
    from planc.planner.diff_table import percentiles, sheet

    assert found.attribution is not None
    made = sheet(found.attribution, percentiles(plans))
    table = Table(box=None, pad_edge=False, show_edge=False, collapse_padding=True)
    table.add_column("why", max_width=_LABEL, overflow="fold")
    for column in made.moved:
        table.add_column("\n".join(column.head), justify="right", no_wrap=True)
    table.add_row("old", *(column.text(column.old) for column in made.moved), style="bold")
    for number, part in enumerate(made.parts):
        cells = (_cell(column, column.parts[number]) for column in made.moved)
        table.add_row(escape(part.text()), *cells)
    table.add_row("new", *(column.text(column.new) for column in made.moved), style="bold")
    console.print(table)
    if made.idle:
        names = ", ".join(part.name for part in made.idle)
        console.print(f"without effect on these: {names}", style="dim", markup=False)
    _notes(console, (reason for part in found.attribution.parts for reason in part.reasons))


def _notes(console: Console, reasons: Iterable[str]) -> None:
    for reason in dict.fromkeys(reasons):
        console.print(f"taken together: {reason}", style="dim", markup=False)


def _cell(column: Column, count: int) -> str:
    text = column.text(count, signed=True)
    style = {True: "green", False: "red", None: "dim" if not count else ""}[column.better(count)]
    return f"[{style}]{text}[/]" if style else text
