"""`planc estimate`: evaluate one fixed configuration, without search."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from planc.commands import show
from planc.commands.common import (
    emit_json,
    json_option,
    out,
    pairs,
    profile_option,
    progress,
    set_option,
    trust_option,
)

if TYPE_CHECKING:
    from planc.planner.plan import Replica


@click.command("estimate")
@click.argument("request_file", metavar="REQUEST", type=click.Path())
@set_option
@profile_option
@click.option(
    "--simulate/--no-simulate",
    default=True,
    show_default=True,
    help="Also play the workload against the engine's scheduler, as a load test would.",
)
@trust_option
@json_option
def estimate_command(
    request_file: str,
    settings: tuple[str, ...],
    simulate: bool,
    trust_remote_code: bool,
    as_json: bool,
) -> None:
    """Evaluate the configuration that --set names (tp, pp, dp, ep, weights, kv, max_num_seqs, ...) under
    REQUEST's workload. A dotted name changes the request itself, e.g. --set workload.isl=2000.

    Stages of a pipeline: --set pipeline_layers=42/38. Speculation: --set "speculative=method=mtp
    num_speculative_tokens=2 acceptance_rate=0.8".

    The load test that is simulated is set the same way, or by the request's workload.load_test: burst,
    requests_per_client, requests, length_low, length_high, seed; and the engine's flags that clients feel:
    stream_interval, recv_interval, prompts_per_step, request_ms, lag_steps.
    """
    from planc import api

    given = pairs(settings)
    overrides = [f"{name}={text}" for name, text in given.items() if "." in name]
    fixed = {name: text for name, text in given.items() if "." not in name}
    with progress() as say:
        request = api.load_request(request_file, overrides)
        say("evaluating")
        found = api.estimate(request, trust_remote_code=trust_remote_code, simulate=simulate, **fixed)
    if as_json:
        emit_json(found.to_json())
        return
    console = out()
    console.print(
        f"[bold]{show.parallel(found.replica)}[/] on {found.replica.gpu}, {found.replica.engine}, "
        f"{show.formats(found.replica)}, up to {found.replica.max_num_seqs} sequences{_extras(found.replica)}"
    )
    show.predictions(found.predicted, console)
    if found.simulated is not None:
        show.load_test(found.simulated, console)
    for note in found.notes:
        console.print(f"! {note}", style="yellow", markup=False)


def _extras(replica: Replica) -> str:
    """Pipeline stages and speculation, where there are any."""
    words = ""
    if replica.pp > 1:
        words += f", stages of {'/'.join(map(str, replica.pipeline_layers))} layers"
    if replica.speculative:
        way = replica.speculative
        words += f", {way['num_speculative_tokens']} tokens drafted by {way['method']}"
    return words
