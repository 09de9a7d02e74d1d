"""`planc compile`: the main job. Trace, optimise, write the bundle, print a summary."""

from __future__ import annotations

import time

import click

from planc.commands import show
from planc.commands.common import (
    emit_json,
    json_option,
    out,
    profile_option,
    progress,
    set_option,
    trust_option,
)


@click.command("compile")
@click.argument("request_file", metavar="REQUEST", type=click.Path())
@click.option("-o", "--output", required=True, type=click.Path(), help="The bundle folder to write.")
@set_option
@click.option("--engine", help="Plan for this engine only (as constraints.engines).")
@click.option(
    "--time-limit", type=click.FloatRange(min=0, min_open=True), help="Seconds the solver may take."
)
@click.option(
    "--simulate/--no-simulate",
    default=True,
    help="Play the workload against each proposed plan until one keeps the objectives (default).",
)
@click.option("--check-kernels", is_flag=True, help="Also compile the kernels ahead of time and check them.")
@profile_option
@trust_option
@json_option
def compile_command(
    request_file: str,
    output: str,
    settings: tuple[str, ...],
    engine: str | None,
    time_limit: float | None,
    simulate: bool,
    check_kernels: bool,
    trust_remote_code: bool,
    as_json: bool,
) -> None:
    """Compile REQUEST (YAML) to a plan and write its bundle.

    A request that lists several `models` gives a bundle for each, in folders below the one named.
    """
    from planc import api
    from planc.codegen.bundle import place
    from planc.codegen.engines import WRITERS, engines_of
    from planc.planner.front import document
    from planc.planner.joint import is_joint

    start = time.perf_counter()
    several = is_joint(request_file)
    place(output, several=several)  # what must not be overwritten is said before any work
    if several:
        _several(request_file, output, settings, time_limit, simulate, trust_remote_code, as_json)
        return
    overrides = [*settings, *([f"constraints.engines=[{engine}]"] if engine else [])]
    request = api.load_request(request_file, overrides)
    with progress() as say:
        plan = api.compile(
            request,
            time_limit=time_limit,
            trust_remote_code=trust_remote_code,
            progress=say,
            simulate=simulate,
        )
        say("writing the bundle")
        api.write_bundle(plan, output)
        if check_kernels:
            from planc.commands.verify import check_kernels as check

            check(output, say)
    seconds = time.perf_counter() - start
    if as_json:
        emit_json(
            {
                "bundle": output,
                "seconds": round(seconds, 3),
                "plan": plan.model_dump(mode="json", by_alias=True),
                **({"front": document(plan._front)} if plan._front is not None else {}),
            }
        )
        return
    console = out()
    show.summary(plan, console)
    show.front(plan, console)
    for engine in engines_of(plan):
        if engine not in WRITERS and plan.model.kind == "causal_lm":
            console.print(
                f"! planc writes no files for {engine} yet: the bundle is the plan only", style="yellow"
            )
    console.print(f"\nbundle {plan.fingerprint.plan} written to [bold]{output}[/] in {seconds:.1f} s")


def _several(
    request_file: str,
    output: str,
    settings: tuple[str, ...],
    time_limit: float | None,
    simulate: bool,
    trust_remote_code: bool,
    as_json: bool,
) -> None:
    from planc import api
    from planc.planner.joint import document

    start = time.perf_counter()
    with progress() as say:
        found = api.compile_joint(
            request_file,
            settings,
            time_limit=time_limit,
            trust_remote_code=trust_remote_code,
            progress=say,
            simulate=simulate,
        )
        say("writing the bundles")
        api.write_joint(found, output)
    seconds = time.perf_counter() - start
    if as_json:
        emit_json({"bundle": output, "seconds": round(seconds, 3), "fleet": document(found)})
        return
    console = out()
    for name, plan in found.plans.items():
        console.print(f"[bold]{name}[/]")
        show.summary(plan, console)
        console.print()
    solution = found.solution
    console.print(
        f"{len(found.plans)} models on {found.gpus} GPUs, {found.usd_per_hour:.4g} USD/h: {solution.status}, "
        f"gap {100 * solution.gap:.2g} %; bundles written to [bold]{output}[/] in {seconds:.1f} s"
    )
