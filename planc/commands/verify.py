"""`planc verify`: is the bundle what it says? The plan, the graphs, the kernels, the engine files."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from planc.commands.common import (
    Progress,
    emit_json,
    json_option,
    out,
    progress,
    trust_option,
    weights_option,
)
from planc.errors import PlancError

if TYPE_CHECKING:
    from planc.planner.plan import Plan


@dataclass(frozen=True, slots=True)
class Check:
    """One check: "ok", "failed" or "not run", and what was found."""

    name: str
    verdict: str
    detail: str


@click.command("verify")
@click.argument("bundle", type=click.Path())
@weights_option
@click.option(
    "--target",
    "targets",
    multiple=True,
    default=("sm_90",),
    show_default=True,
    help="GPU architectures to compile the kernels for, e.g. sm_80, sm_100.",
)
@click.option(
    "--engine-python",
    type=click.Path(),
    help="Python of an environment that has the engine; its own parser then reads the configurations.",
)
@trust_option
@json_option
def verify_command(
    bundle: str,
    weights: str | None,
    targets: tuple[str, ...],
    engine_python: str | None,
    trust_remote_code: bool,
    as_json: bool,
) -> None:
    """Check BUNDLE: run compiled graphs against the original model, kernels against references, and every
    engine configuration with the engine's own parser. Exit code 1 if a check fails.

    Without --weights a model with a configuration is run narrow (every structure kept, widths cut) with
    random weights; with them, as it is.
    """
    from planc.planner.plan import load_plan

    plan = load_plan(bundle)
    steps: list[tuple[str, Callable[[], Iterator[Check]]]] = [
        ("plan", lambda: _plan(plan, bundle, trust_remote_code)),
        ("graphs", lambda: _graphs(plan, bundle, weights, trust_remote_code)),
        ("kernels", lambda: _kernels(bundle, targets)),
        ("engine files", lambda: _engines(plan, bundle, engine_python)),
    ]
    found: list[Check] = []
    with progress() as say:
        for name, step in steps:
            say(f"checking {name}")
            try:
                found += step()
            except PlancError as error:
                if error.exit_code == 2:
                    raise
                found.append(Check(name, "failed", str(error)))
    _report(found, as_json)


def check_kernels(bundle: str, say: Progress) -> None:
    """For `planc compile --check-kernels`."""
    say("checking kernels")
    found = [check for check in _kernels(bundle, ("sm_90",)) if check.verdict == "failed"]
    if found:
        _report(found, as_json=False)


def _report(found: list[Check], as_json: bool) -> None:
    if as_json:
        emit_json({"checks": [asdict(check) for check in found]})
    else:
        console = out()
        styles = {"ok": "green", "failed": "red", "not run": "yellow"}
        for check in found:
            console.print(f"[{styles[check.verdict]}]{check.verdict:>8}[/]  {check.name}", end="")
            console.print(f": {check.detail}" if check.detail else "", markup=False)
    if any(check.verdict == "failed" for check in found):
        raise click.exceptions.Exit(1)


def _plan(plan: Plan, bundle: str, trust_remote_code: bool) -> Iterator[Check]:
    from planc.passes.tabulate import load_table
    from planc.planner.check import check
    from planc.runtime.assemble import model_source

    sealed = plan.sealed().fingerprint.plan
    if sealed != plan.fingerprint.plan:
        yield Check("plan hash", "failed", f"plan.json was changed after it was written (now {sealed})")
    table = load_table(model_source(plan, Path(bundle)), trust_remote_code=trust_remote_code)
    wrong = check(plan, table)
    for reason in wrong:
        yield Check("plan", "failed", reason)
    if not wrong:
        yield Check("plan", "ok", "memory, placement, limits and objectives hold when computed anew")


def _graphs(plan: Plan, bundle: str, weights: str | None, trust_remote_code: bool) -> Iterator[Check]:
    from planc.runtime.proof import prove

    for proof in prove(plan, Path(bundle), weights=weights, trust_remote_code=trust_remote_code):
        verdict = "ok" if proof.holds else "failed"
        yield Check(f"graphs: {proof.name}", verdict, proof.detail)


def _kernels(bundle: str, targets: tuple[str, ...]) -> Iterator[Check]:
    from planc.codegen.triton.check import bundle_kernels, check
    from planc.ir.trace.cache import folder

    kernels = bundle_kernels(bundle)
    findings = check(kernels, targets=targets, cache=folder() / "kernels")
    for finding in findings:
        if not finding.ok:
            yield Check(f"kernel {finding.kernel}", "failed", f"{finding.what}: {finding.detail}")
    bad = {finding.kernel for finding in findings if not finding.ok}
    good = [kernel.name for kernel in kernels if kernel.name not in bad]
    if good:
        yield Check(
            "kernels", "ok", f"{', '.join(good)}: equal to the reference, compiled for {', '.join(targets)}"
        )


def _engines(plan: Plan, bundle: str, engine_python: str | None) -> Iterator[Check]:
    from planc.codegen.engines import WRITERS, engines_of, writer
    from planc.codegen.engines.accept import accept

    config_file = Path(bundle) / "model" / "config.json"
    config = json.loads(config_file.read_text(encoding="utf-8")) if config_file.is_file() else None
    for engine in engines_of(plan):
        if engine not in WRITERS:
            yield Check(f"{engine} files", "not run", "planc writes no files for this engine yet")
            continue
        texts = writer(engine).render(plan, config)
        folder = Path(bundle) / "engines" / engine
        changed = [
            name
            for name, text in texts.items()
            if not (folder / name).is_file() or (folder / name).read_text(encoding="utf-8") != text
        ]
        if changed:
            yield Check(f"{engine} files", "failed", f"{changed[0]} is not what the plan says")
        else:
            yield Check(f"{engine} files", "ok", f"{len(texts)} files say what the plan says")
        answers = accept(engine, Path(bundle), python=engine_python)
        if answers is None:
            yield Check(
                f"{engine} parser",
                "not run",
                f"{engine} is not installed here; name its Python with --engine-python",
            )
            continue
        for name, error in answers.items():
            yield Check(f"{engine} parser", "failed" if error else "ok", f"{name}: {error or 'accepted'}")
