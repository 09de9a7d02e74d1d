"""`planc validate`: measured serving points against predictions."""

from __future__ import annotations

from typing import Any

import click

from planc.commands.common import emit_json, grid, json_option, out, pairs, profile_option, progress
from planc.errors import InvalidField, UnknownField

_COLUMNS = ("n", "tpot_median_ape", "tpot_mape", "tpot_bias", "ttft_median_ape", "ttft_mape", "ttft_bias")
_MORE = (
    "ttft_burst",
    "throughput_median_ape",
    "throughput_mape",
    "within_band",
    "spearman",
    "pick_meets_slo",
    "pick_regret",
)


@click.command("validate")
@click.argument("points", metavar="POINTS.csv", type=click.Path())
@click.option("--by", default="", metavar="COLUMN,...", help="Group the errors by these columns.")
@click.option("--out", "out_file", type=click.Path(), help="Write every prediction to this CSV file.")
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="FLAG=VALUE",
    help="Harness or engine flag of all points: burst, requests_per_client (10), length_low (0.8), "
    "length_high (1.0), stream_interval, recv_interval, batch_wait_steps, prompts_per_step, "
    "max_num_batched_tokens, max_num_seqs (the concurrency), kv, gpu_memory_utilization, expert_parallel, "
    "expert_table, redundant_experts, fp8_gemm_backend (flashinfer_trtllm), graphed_rows, dependent_launch; "
    "of the prefill pool prompt_dp, prompt_ep, prompt_seats and prompt_router (round_robin, random_rank).",
)
@click.option(
    "--published-flags/--no-published-flags",
    default=True,
    help="Where neither file nor --set state a flag, take it from published launch scripts (default).",
)
@click.option(
    "--leave-out-cells",
    is_flag=True,
    help="Blind: constants of each (model, GPU, engine, weights) are fitted to the other cells of the file.",
)
@click.option(
    "--calibrate-on",
    type=click.Choice(["0", "3"]),
    default="0",
    help="3: beyond that, calibrate each cell on three of its points, which are then not scored.",
)
@click.option(
    "--models",
    multiple=True,
    type=click.Path(),
    help="Folder of model configurations, NAME.json each. Default: examples/models.",
)
@profile_option
@json_option
def validate_command(
    points: str,
    by: str,
    out_file: str | None,
    settings: tuple[str, ...],
    published_flags: bool,
    leave_out_cells: bool,
    calibrate_on: str,
    models: tuple[str, ...],
    as_json: bool,
) -> None:
    """Predict every measured serving point of POINTS.csv and report the errors."""
    from planc import api

    with progress() as say:
        report = api.validate(
            points,
            by=[name.strip() for name in by.split(",") if name.strip()],
            options=_flags(pairs(settings)),
            rules=published_flags,
            leave_out_cells=leave_out_cells,
            calibrate_on=int(calibrate_on),
            models=models,
            progress=say,
        )
    if out_file is not None:
        from planc.runtime.validation.validate import write_predictions

        write_predictions(report, out_file)
    body = report.to_json()
    if as_json:
        emit_json(body)
        return
    _show(body)


def _flags(given: dict[str, str]) -> dict[str, Any]:
    from planc.runtime.validation.points import FLAGS, flag_value

    found = {}
    for name, text in given.items():
        if name not in FLAGS:
            raise UnknownField(where="--set", field=name, mend=f"Known: {', '.join(FLAGS)}.")
        try:
            found[name] = flag_value(name, text)
        except ValueError as error:
            raise InvalidField(
                where="--set", field=name, value=text, reason=error, mend="Give another value."
            ) from None
    return found


def _show(body: dict[str, Any]) -> None:
    console = out()
    rows = [_cells("/".join(str(group[name]) for name in body["by"]), group) for group in body["groups"]]
    if not body["by"]:
        rows = []
    rows.append(_cells("all rows", body))
    rows.append(_cells("rows that pass lint", body["linted"]))
    titles = ["", "n", "TPOT median", "mean", "bias", "TTFT median", "mean", "bias"]
    console.print(grid(titles, [row[: len(titles)] for row in rows], title="Errors, %"))
    titles = [
        "",
        "start's part of TTFT",
        "tok/s/GPU median",
        "mean",
        "in band",
        "Spearman",
        "picks meet",
        "regret",
    ]
    console.print()
    console.print(grid(titles, [[row[0], *row[8:]] for row in rows]))
    console.print()
    how = "each cell by constants fitted to the others" if body["blind"] else "shipped constants, not blind"
    rules = ", ".join(f"{name} {count}" for name, count in body["lint"]["rules"].items()) or "none"
    console.print(f"{how}; {body['lint']['n_flagged']} rows flagged by lint ({rules})", style="dim")
    for item in body["unpredicted"][:20]:
        console.print(f"! not predicted: {item['id']}: {item['reason']}", style="yellow", markup=False)
    hidden = len(body["unpredicted"]) - 20
    if hidden > 0:
        console.print(f"! and {hidden} more", style="yellow")


def _cells(name: str, group: dict[str, Any]) -> list[str]:
    def text(key: str, digits: int = 1) -> str:
        value = group[key]
        return "-" if value is None else f"{value:.{digits}f}"

    return [
        name,
        str(group["n"]),
        *(text(key) for key in _COLUMNS[1:]),
        *(text(key) for key in _MORE[:3]),
        *(text(key, 3) for key in _MORE[3:]),
    ]
