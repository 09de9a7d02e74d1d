"""`planc inspect`: a plan, the IR before and after a pass, costs per op, the memory map."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console

from planc.commands import show
from planc.commands.common import (
    emit_json,
    grid,
    json_option,
    number,
    out,
    profile_option,
    progress,
    trust_option,
)
from planc.cost_model import calibration
from planc.cost_model.table import CostTable, Row
from planc.errors import InvalidField
from planc.ir.work import Amount

if TYPE_CHECKING:
    from planc.planner.plan import Plan


@click.command("inspect")
@click.argument("target", metavar="BUNDLE|MODEL", type=click.Path())
@click.option(
    "--graph", "phase", type=click.Choice(["traced", "prefill", "decode"]), help="Print this graph."
)
@click.option("--pass", "pass_name", help="Print what this pass changed in the graph, as a diff.")
@click.option(
    "--ops", is_flag=True, help="The cost table: work per op and layer class; with a bundle also time."
)
@click.option("--memory", is_flag=True, help="The memory map of one GPU.")
@click.option("--limit", type=click.IntRange(min=1), help="Print at most this many lines of a graph.")
@click.option("--full", is_flag=True, help="Print every layer of a graph, not only the distinct ones.")
@profile_option
@trust_option
@json_option
def inspect_command(
    target: str,
    phase: str | None,
    pass_name: str | None,
    ops: bool,
    memory: bool,
    limit: int | None,
    full: bool,
    trust_remote_code: bool,
    as_json: bool,
) -> None:
    """Look at a bundle's plan, or at a model (config.json, folder, module:factory, .pt2)."""
    plan = _plan(target)
    if plan is not None:
        calibration.require([replica.gpu for replica in plan.replicas()], where="profile")
    console = out()
    if phase or pass_name:
        with progress() as say:
            say("tracing")
            text = graph_text(target, plan, phase, pass_name, limit, full, trust_remote_code)
        emit_json({"graph": text}) if as_json else click.echo(text, nl=False)
        return
    if plan is None:
        with progress() as say:
            say("tracing")
            table = _table(target, trust_remote_code)
        if memory:
            raise InvalidField(
                where="command line",
                field="--memory",
                value=target,
                reason="a model alone has no memory map",
                mend="Compile a request first, then inspect its bundle.",
            )
        if as_json:
            emit_json(_model_json(table, ops))
            return
        _model(table, console)
        if ops:
            _work(table, console)
        return
    if as_json:
        emit_json(_plan_json(plan, target, ops, trust_remote_code))
        return
    if not (ops or memory):
        show.summary(plan, console)
        console.print()
        show.layers(plan, console)
        console.print()
        show.rejected(plan, console)
        _coverage(plan, console)
    if memory:
        show.memory(plan, console)
    if ops:
        rows = _times(plan, target, trust_remote_code)
        for name in ("decode", "prefill"):
            part = [r for r in rows if r["phase"] == name]
            whole = sum(r["ms"] for r in part)
            body = []
            for r in sorted(part, key=lambda r: -r["ms"]):
                share = f"{100 * r['ms'] / whole:.1f} %"
                where = (r["class"], short(r["site"]), r["op"])
                body.append((*where, f"{r['ms']:.3f}", share, r["bound"], r["source"]))
            if part:
                title = f"{name} step at the planned load: {whole:.2f} ms"
                columns = ("layer class", "site", "op", "ms", "share", "bound by", "from")
                console.print(grid(columns, body, title=title))
                console.print()


def _plan(target: str) -> Plan | None:
    """The plan, if the target is a bundle (or plan.json) rather than a model."""
    place = Path(target)
    if any((place / name).is_file() for name in ("plan.json", "fleet.json")) or place.name == "plan.json":
        from planc.planner.plan import load_plan

        return load_plan(place)
    return None


def _table(target: str, trust_remote_code: bool) -> CostTable:
    from planc.passes.tabulate import load_table

    return load_table(target, trust_remote_code=trust_remote_code)


def graph_text(
    target: str,
    plan: Plan | None,
    phase: str | None,
    pass_name: str | None,
    limit: int | None,
    full: bool,
    trust_remote_code: bool,
) -> str:
    """The text of a graph, or the difference that one pass made to it."""
    from planc.ir.text import show as text_of
    from planc.ir.trace import trace
    from planc.passes.phases import Phases
    from planc.passes.pipeline import FRONT, Pass, Step, run
    from planc.runtime import assemble

    steps: list[Step] = []
    passes: tuple[Pass, ...]
    if plan is None:
        traced = trace(target, trust_remote_code=trust_remote_code)
    else:
        traced = assemble.traced_model(plan, Path(target), trust_remote_code=trust_remote_code)
    has_phases = traced.source.kind == "causal_lm"
    wanted = phase or ("decode" if has_phases else "traced")
    if wanted != "traced" and not has_phases:
        raise InvalidField(
            where="command line",
            field="--graph",
            value=wanted,
            reason=f"{traced.source.name} is no causal language model and has no phases",
            mend="Use --graph traced.",
        )
    passes = FRONT
    if wanted != "traced":
        passes = (*passes, Phases("prefill" if wanted == "prefill" else "decode"))
    if plan is not None and (wanted != "traced" or not has_phases):
        passes = (*passes, *assemble.decisions(plan, plan.replicas()[0]))
    graph = run(traced, passes, observe=steps.append)
    if pass_name is None:
        return text_of(graph, limit=limit, fold=not full)
    found = [step for step in steps if step.pass_.name == pass_name]
    if not found:
        names = ", ".join(dict.fromkeys(step.pass_.name for step in steps))
        raise InvalidField(
            where="command line",
            field="--pass",
            value=pass_name,
            reason=f"no such pass ran on the {wanted} graph",
            mend=f"Known here: {names}.",
        )
    before, after = (text_of(g, fold=not full).splitlines() for g in (found[0].before, found[-1].after))
    lines = list(difflib.unified_diff(before, after, "before", f"after {pass_name}", lineterm="", n=2))
    if limit is not None and len(lines) > limit:
        lines = [*lines[:limit], f"... {len(lines) - limit} more lines"]
    return "\n".join(lines or [f"{pass_name} changed nothing"]) + "\n"


def _model(table: CostTable, console: Console) -> None:
    m = table.model
    console.print(
        f"[bold]{m.name}[/] ({m.architecture}): {m.parameters / 1e9:.3f} B parameters, "
        f"{m.active_parameters / 1e9:.3f} B active, published in {m.native_format}, "
        f"{m.layers} layers, hidden {m.hidden}, vocabulary {m.vocab}, "
        f"{table.kv_elements_per_token():,} KV elements/token"
    )
    rows = []
    for c in table.classes:
        size = f"{c.parameters / 1e6:,.1f} M"
        rows.append((c.name, c.count, size, f"{c.kv_elements:,}", c.kv_span or "-", f"{c.state_elements:,}"))
    columns = ("layer class", "count", "parameters", "KV elements/token", "reach", "state elements/sequence")
    console.print(grid(columns, rows))
    if m.generic_ops:
        console.print(f"costed generically (ATen ops no declaration covers): {', '.join(m.generic_ops)}")


def _work(table: CostTable, console: Console) -> None:
    for phase, rows in table.rows.items():
        body = [
            (r.layer_class, r.site, r.op, r.calls, amount(r.work.flops), f"{r.work.weights:,}",
             amount(r.work.reads + r.work.writes), amount(r.work.kv_reads + r.work.kv_writes), r.shard.kind)
            for r in _interesting(rows)
        ]  # fmt: skip
        columns = ("layer class", "site", "op", "calls", "FLOPs", "weights", "activations", "KV", "sharding")
        console.print(grid(columns, body, title=f"{phase}: elements moved, per layer"))
        console.print(
            "T tokens, S sequences, P:span attended pairs, K:span cached tokens read; see docs/ir.md",
            style="dim",
        )


def short(site: str) -> str:
    """Merged sites with their common parent named once: "self_attn.q_proj+k_proj+v_proj"."""
    parts = site.split("+")
    parent = parts[0].rpartition(".")[0]
    same = parent and all(part.rpartition(".")[0] == parent for part in parts)
    return f"{parent}." + "+".join(part.rpartition(".")[2] for part in parts) if same else site


def _interesting(rows: Iterable[Row]) -> list[Row]:
    return [r for r in rows if r.work.family != "view"]


def amount(value: Amount) -> str:
    """A linear expression in short: `1.07e9 T + 512`."""
    parts = [number(c) if name == "1" else f"{number(c)} {name}" for name, c in sorted(value.terms.items())]
    return " + ".join(parts) or "-"


def _times(plan: Plan, target: str, trust_remote_code: bool) -> list[dict[str, Any]]:
    """Time per op of a decode step and of a prefill chunk, at the load the plan expects."""
    from planc.planner.breakdown import breakdown
    from planc.runtime.assemble import model_source

    table = _table(str(model_source(plan, Path(target))), trust_remote_code)
    return breakdown(plan, table)


def _plan_json(plan: Plan, target: str, ops: bool, trust_remote_code: bool) -> dict[str, Any]:
    body: dict[str, Any] = plan.model_dump(mode="json", by_alias=True)
    if ops:
        body["ops"] = _times(plan, target, trust_remote_code)
    return body


def _model_json(table: CostTable, ops: bool) -> dict[str, Any]:
    import json

    body: dict[str, Any] = json.loads(table.to_json())
    if not ops:
        body.pop("rows")
        body.pop("fusions")
    return body


def _coverage(plan: Plan, console: Console) -> None:
    console.print(f"\nmodelled: {', '.join(plan.coverage.modelled)}", style="dim")
    console.print(f"not modelled: {', '.join(plan.coverage.not_modelled)}", style="dim")
