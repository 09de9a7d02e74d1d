"""What the commands share: options, progress, tables, JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from planc.errors import InvalidField

json_option = click.option("--json", "as_json", is_flag=True, help="Machine output on stdout.")
set_option = click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="NAME=VALUE",
    help="Change one value, e.g. slo.tpot_mean_ms=25. May be given several times.",
)
weights_option = click.option(
    "--weights",
    type=click.Path(),
    help="Folder with the model's weights (safetensors). Default: the model's own folder.",
)
trust_option = click.option(
    "--trust-remote-code", is_flag=True, help="Run Python code that a model folder carries."
)


def _use_profile(context: click.Context, option: click.Parameter, path: str | None) -> None:
    """Puts the profile in use until the command ends."""
    if path is not None and not context.resilient_parsing:
        from planc.cost_model import calibration

        context.with_resource(calibration.using(calibration.load_profile(path)))


profile_option = click.option(
    "--profile",
    type=click.Path(),
    expose_value=False,
    callback=_use_profile,
    help="Predict with this profile's numbers (see planc calibrate).",
)

Progress = Callable[[str], None]


def out() -> Console:
    """Where results go. Wide when it is not a terminal, so that nothing is cut."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else 120)


@contextmanager
def progress() -> Iterator[Progress]:
    """A status line on stderr while work goes on; silent when stderr is no terminal."""
    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        yield lambda message: None
        return
    with console.status("starting") as status:
        yield lambda message: status.update(message)


def emit_json(body: Any) -> None:
    click.echo(json.dumps(body, indent=2, sort_keys=True))


def pairs(settings: Sequence[str], option: str = "--set") -> dict[str, str]:
    """`NAME=VALUE` arguments as a mapping."""
    found: dict[str, str] = {}
    for item in settings:
        name, equals, text = item.partition("=")
        if not equals or not name.strip():
            raise InvalidField(
                where="command line",
                field=option,
                value=item,
                reason="not of the form NAME=VALUE",
                mend=f"Write for example {option} tp=4.",
            )
        found[name.strip()] = text.strip()
    return found


def grid(columns: Sequence[str], rows: Sequence[Sequence[object]], title: str | None = None) -> Table:
    """A plain table: first column left, the rest right-aligned."""
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for position, column in enumerate(columns):
        table.add_column(column, justify="left" if position == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    return table


UNITS: Mapping[str, tuple[str, str]] = {
    "ttft_ms": ("TTFT", "ms"),
    "tpot_ms": ("TPOT", "ms"),
    "itl_ms": ("ITL", "ms"),
    "e2e_ms": ("E2E", "ms"),
    "output_tok_s": ("output", "tok/s"),
    "output_tok_s_per_gpu": ("output per GPU", "tok/s"),
    "requests_s": ("requests", "/s"),
    "usd_per_million_tokens": ("price", "USD / 1M output tokens"),
    "usd_per_hour": ("price", "USD / h"),
    "joules_per_token": ("energy", "J / output token"),
    "memory_gib": ("memory per GPU", "GiB"),
}


def number(value: float) -> str:
    """Three to four significant digits, no exponent for everyday sizes."""
    size = abs(value)
    if size >= 1000:
        return f"{value:,.0f}"
    if size >= 100:
        return f"{value:.0f}"
    if size >= 10:
        return f"{value:.1f}"
    return f"{value:.3g}"
