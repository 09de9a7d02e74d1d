"""`planc calibrate`: measure the local device, or fit an engine's constants to measured points."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

from planc.commands.common import emit_json, grid, json_option, number, out
from planc.errors import FileMissing, InvalidField

if TYPE_CHECKING:
    from planc.cost_model.calibration import ProfileDocument
    from planc.runtime.calibrate.samples import Progress


@click.command("calibrate")
@click.option("--device", is_flag=True, help="Measure this machine's GPU, or its CPU where there is none.")
@click.option("--points", type=click.Path(), help="Fit engine constants to these measured serving points.")
@click.option("-o", "--output", required=True, type=click.Path(), help="The profile to write.")
@click.option("--quick", is_flag=True, help="A few small shapes in seconds; the numbers are rough.")
@click.option(
    "--threads",
    type=click.IntRange(min=1),
    help="Threads of a CPU's kernels. Default: all cores "
    "(with an engine all but one, as it keeps one for its own processes).",
)
@click.option(
    "--budget",
    type=click.FloatRange(min=1),
    default=600.0,
    show_default=True,
    metavar="S",
    help="Seconds that micro-benchmarks may take; what is left then is not measured.",
)
@click.option(
    "--ranks",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Also measure collectives between up to so many processes.",
)
@click.option("--gpu", help="The catalogue's name of the device, where its own name does not tell.")
@click.option(
    "--engine",
    type=click.Choice(["torch", "vllm"]),
    help="Whose kernels to measure. Default: vllm where --engine-python is given, else torch.",
)
@click.option(
    "--engine-python",
    type=click.Path(),
    help="Interpreter of an environment with vLLM: measures its kernels, and its host time by serving "
    "three small models with it (on a CPU).",
)
@json_option
def calibrate_command(
    device: bool,
    points: str | None,
    output: str,
    quick: bool,
    threads: int | None,
    budget: float,
    ranks: int,
    gpu: str | None,
    engine: str | None,
    engine_python: str | None,
    as_json: bool,
) -> None:
    """Write a profile of this machine, for --profile of the commands that predict.

    Without --points, the device is measured. With both, constants are fitted on top of what was measured.
    """
    profile: ProfileDocument | None = None
    if Path(output).is_dir():
        raise InvalidField(
            where="planc calibrate", field="-o", value=output, reason="it is a folder", mend="Name a file."
        )
    today = datetime.now(UTC).date().isoformat()
    if device or points is None:
        profile = _measured(quick, threads, budget, ranks, gpu, engine, engine_python, today)
    if points is not None:
        from planc.runtime.validation.calibrate import from_points

        profile = from_points(points, profile, date=today)
    assert profile is not None
    profile.save(output)
    if as_json:
        emit_json(profile.model_dump(mode="json", exclude_defaults=True))
        return
    show(profile, out())
    out().print(f"\nprofile {profile.fingerprint} written to [bold]{output}[/]; use it with --profile")


def _measured(
    quick: bool,
    threads: int | None,
    budget: float,
    ranks: int,
    gpu: str | None,
    engine: str | None,
    engine_python: str | None,
    date: str,
) -> ProfileDocument:
    from planc.runtime.calibrate import device as devices
    from planc.runtime.calibrate import engine as engines

    python = _program(engine_python)
    engine = engine or ("vllm" if python else "torch")
    if engine != "torch" and python is None:
        raise InvalidField(
            where="planc calibrate",
            field="--engine",
            value=engine,
            reason="planc's own environment has no serving engine",
            mend="Name the interpreter of its environment with --engine-python.",
        )
    kind = devices.local_device()
    cores = len(os.sched_getaffinity(0))
    settings = devices.Settings(
        device=kind,
        gpu=gpu,
        python=python,
        engine=engine,
        threads=threads or max(1, cores - (engine != "torch")),
        quick=quick,
        budget_s=budget,
        ranks=ranks,
    )
    with bar() as progress:
        found = devices.calibrate(settings, date, "planc calibrate --device", progress)
        if engine == "vllm" and kind == "cpu" and not quick:
            assert python is not None
            found = engines.measure(found, str(Path(python).with_name("vllm")), {}, progress)
    return found


def _program(path: str | None) -> str | None:
    if path is None:
        return None
    found = shutil.which(path)
    if found is None:
        raise FileMissing(
            what="--engine-python", path=path, mend="Name the environment's interpreter, e.g. env/bin/python."
        )
    return str(Path(found).absolute())


@contextmanager
def bar() -> Iterator[Progress]:
    """A progress bar on stderr; silent when stderr is no terminal."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Bar(*columns, console=console, disable=not console.is_terminal, transient=True) as shown:
        task = shown.add_task("starting", total=None)
        yield lambda done, total, what: shown.update(
            task, description=f"measuring {what}", completed=done, total=total
        )


def show(profile: ProfileDocument, console: Console) -> None:
    """What a profile holds, in three tables."""
    device = profile.device
    rows = [
        [f"peak {name}", f"{number(peak.value)} TFLOP/s", peak.rows]
        for name, peak in device.peak_tflops.items()
    ]
    if device.memory_gbytes_s is not None:
        rows.append(["memory", f"{number(device.memory_gbytes_s.value)} GB/s", device.memory_gbytes_s.rows])
    console.print(grid([device.name, "", "rows"], rows))
    if profile.tables:
        lines = [
            [t.info.name, t.info.rows, f"{100 * t.info.error:.1f} %" if t.info.error else ""]
            for t in profile.tables
        ]
        console.print(grid(["table", "rows", "error between its points"], lines))
    constants = [
        [
            f"{engine} {name}",
            number(found.value),
            found.rows,
            "" if found.error is None else f"{100 * found.error:.1f} %",
        ]
        for section in (profile.engines, profile.serving)
        for engine, values in section.items()
        for name, found in values.items()
    ]
    if constants:
        console.print(grid(["constant", "", "rows", "error of the fit"], constants))
