"""`planc replay`: simulate a plan, or one configuration, under a recorded trace."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import click
from rich.console import Console

from planc.commands.common import (
    UNITS,
    emit_json,
    grid,
    json_option,
    number,
    out,
    pairs,
    profile_option,
    progress,
    set_option,
    trust_option,
)

_BARS = " ▁▂▃▄▅▆▇█"
_WIDTH = 60


@click.command("replay")
@click.argument("what", metavar="BUNDLE|REQUEST", type=click.Path())
@click.option("--trace", required=True, type=click.Path(), help="File of recorded requests.")
@click.option("--format", "form", help="mooncake, azure or vllm. Default: told by the file's first line.")
@click.option(
    "--router",
    help="round_robin, least_loaded, power_of_two or prefix_aware. Default: the plan's, else round_robin.",
)
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Replay the first N requests only.")
@click.option(
    "--rate-scale",
    type=click.FloatRange(min=0, min_open=True),
    default=1.0,
    metavar="X",
    help="Let requests come X times as fast.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="For what is drawn at random.")
@click.option("--out", "times", type=click.Path(), metavar="CSV", help="Also write each request's times.")
@set_option
@profile_option
@trust_option
@json_option
def replay_command(
    what: str,
    trace: str,
    form: str | None,
    router: str | None,
    limit: int | None,
    rate_scale: float,
    seed: int,
    times: str | None,
    settings: tuple[str, ...],
    trust_remote_code: bool,
    as_json: bool,
) -> None:
    """Simulate the plan in BUNDLE, or for REQUEST the configuration that --set names, under a trace.

    With a request, --set takes what `planc estimate` takes (tp, weights, max_num_seqs, replicas, ...), and
    prefill_replicas: how many of the replicas only prefill, for the others to decode.
    """
    from planc import api

    given = pairs(settings)
    overrides = [f"{name}={text}" for name, text in given.items() if "." in name]
    fixed = {name: text for name, text in given.items() if "." not in name}
    with progress() as say:
        found = api.replay(
            api.load_request(what, overrides) if overrides else what,
            trace,
            format=form,
            router=router,
            limit=limit,
            rate_scale=rate_scale,
            seed=seed,
            trust_remote_code=trust_remote_code,
            progress=say,
            **fixed,
        )
        if times is not None:
            say(f"writing {times}")
            found.save_requests(times)
    body = found.to_json()
    if as_json:
        emit_json(body)
        return
    console = out()
    _what(body, console)
    _latencies(body, console)
    _work(body, console)
    if len(body["replicas"]) > 1:
        _replicas(body["replicas"], console)
    _over_time(body["over_time"], console)
    for reason, count in body["requests"]["rejected"].items():
        console.print(f"! {count:,} requests were rejected: {reason}", style="yellow", markup=False)
    for note in body["notes"]:
        console.print(f"! {note}", style="yellow", markup=False)


def _what(body: Mapping[str, Any], console: Console) -> None:
    trace, requests = body["trace"], body["requests"]
    console.print(
        f"[bold]{requests['finished']:,}[/] of {requests['read']:,} requests served; they came within "
        f"{number(trace['seconds'])} s, with {number(trace['mean_prompt'])} tokens in and "
        f"{number(trace['mean_output'])} out on average"
    )
    for label, count in Counter(f"{r['label']} ({r['role']})" for r in body["replicas"]).items():
        console.print(f"{count} x {label}", markup=False)
    console.print()


def _latencies(body: Mapping[str, Any], console: Console) -> None:
    stats = ("mean", "p50", "p90", "p95", "p99")
    rows = [
        (UNITS[name][0], *(_number(body[name][stat]) for stat in stats), UNITS[name][1])
        for name in ("ttft_ms", "tpot_ms", "itl_ms", "e2e_ms")
    ]
    console.print(grid(("", *stats, "unit"), rows))
    console.print()


def _work(body: Mapping[str, Any], console: Console) -> None:
    kv, energy, good = body["kv_occupancy"], body["energy"], body["goodput_limits"]
    rows = [("output", f"{number(body['output_tok_s'])} tok/s", f"{number(body['requests_s'])} requests/s")]
    if good:
        limits = ", ".join(f"{key} <= {number(limit)}" for key, limit in good.items())
        rows.append(("goodput", f"{number(body['goodput'])} requests/s", f"within {limits}"))
    rows += [
        ("utilisation", f"{100 * body['utilisation']:.1f} %", "time that steps run"),
        ("KV cache", f"{100 * kv['mean']:.1f} %", f"at most {100 * kv['max']:.1f} %"),
        ("preemptions", f"{body['preemptions']:,}", ""),
    ]
    if body["prefix_hit_rate"] is not None:
        rows.append(("prefix hits", f"{100 * body['prefix_hit_rate']:.1f} %", "of the prompts' tokens"))
    per_token = number(energy["joules_per_token"])
    rows.append(("energy", f"{number(energy['joules'] / 3.6e6)} kWh", f"{per_token} J per output token"))
    table = grid(("", "", ""), rows)
    table.show_header = False
    table.columns[2].justify = "left"
    console.print(table)


def _replicas(replicas: Sequence[Mapping[str, Any]], console: Console) -> None:
    rows = [
        (
            replica["name"],
            replica["role"],
            f"{replica['requests']:,}",
            f"{100 * replica['utilisation']:.1f} %",
            f"{100 * replica['kv_occupancy']['mean']:.1f} %",
            f"{100 * replica['kv_occupancy']['max']:.1f} %",
            f"{replica['preemptions']:,}",
        )
        for replica in replicas
    ]
    console.print()
    console.print(grid(("replica", "pool", "requests", "busy", "KV mean", "KV max", "preempted"), rows))


def _over_time(series: Mapping[str, Sequence[float]], console: Console) -> None:
    """Requests that wait and run, as bars from 0 to their maximum."""
    console.print()
    for name in ("waiting", "running"):
        values = series[name]
        many = -(-len(values) // _WIDTH)
        tops = [max(values[i : i + many]) for i in range(0, len(values), many)]
        most = max(tops) or 1.0
        line = "".join(_BARS[round((len(_BARS) - 1) * top / most)] for top in tops)
        console.print(f"{name:8} {line} up to {number(max(tops))}", markup=False)


def _number(value: float | None) -> str:
    return "-" if value is None else number(value)
