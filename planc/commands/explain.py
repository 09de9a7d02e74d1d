"""`planc explain`: what binds, what each decision bought, where time goes; why an alternative lost."""

from __future__ import annotations

import click

from planc.commands.common import emit_json, json_option, out, profile_option, progress, trust_option
from planc.commands.explain_text import explanation, fleet
from planc.errors import InvalidField


@click.command("explain")
@click.argument("bundle", type=click.Path())
@click.option(
    "--why-not",
    metavar="NAME=VALUE,...",
    help='Why the plan is not otherwise, e.g. "tp=8,weights=bf16"; names as in a replica of the plan, and '
    "serving=aggregated|disaggregated.",
)
@click.option(
    "--time-limit",
    type=click.FloatRange(min=0, min_open=True),
    help="Seconds for solving varied requests (300 unless given).",
)
@click.option(
    "--simulate/--no-simulate",
    default=True,
    help="Judge what is compared by playing the workload, as the plan was (default), or by formulas alone.",
)
@trust_option
@profile_option
@json_option
def explain_command(
    bundle: str,
    why_not: str | None,
    time_limit: float | None,
    simulate: bool,
    trust_remote_code: bool,
    as_json: bool,
) -> None:
    """Explain the plan of BUNDLE (or a plan.json): which constraints bind and what a unit more of each would
    buy, what each decision bought, where time and memory go; or why a named alternative lost.

    Of several models that were compiled together BUNDLE is the folder of all: whom more of the inventory
    would serve, and what sharing it costs each.
    """
    from planc import api
    from planc.planner.joint import is_fleet
    from planc.planner.variations import UNITS as OBJECTIVE_UNITS

    if is_fleet(bundle):
        if why_not is not None:
            raise InvalidField(
                where="explain",
                field="--why-not",
                value=why_not,
                reason="it is asked of one model's plan",
                mend=f"Name its bundle, below {bundle}; it is looked at with the inventory to itself.",
            )
        with progress() as say:
            whole = api.explain_joint(
                bundle,
                time_limit=time_limit,
                trust_remote_code=trust_remote_code,
                progress=say,
                simulate=simulate,
            )
        if as_json:
            emit_json(whole.to_json())
        else:
            fleet(whole, out())
        return
    with progress() as say:
        found = api.explain(
            bundle,
            why_not,
            time_limit=time_limit,
            trust_remote_code=trust_remote_code,
            progress=say,
            simulate=simulate,
        )
    if as_json:
        emit_json(found.to_json())
        return
    unit = OBJECTIVE_UNITS.get(found.objective, found.objective)
    explanation(found, unit, out())
