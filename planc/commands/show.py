"""How a plan and its parts look in a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console

from planc.commands.common import UNITS, grid, number
from planc.planner.plan import Plan, Predicted, Replica
from planc.planner.routing import words


def summary(plan: Plan, console: Console) -> None:
    """What was decided and what it will do: the page that `planc compile` and `inspect` print."""
    replicas = plan.replicas()
    gpus = sum(len(r.gpus) for r in replicas)
    model = plan.model
    console.print(
        f"[bold]{model.name}[/] ({model.architecture}, {_billions(model.parameters)} parameters, "
        f"{_billions(model.active_parameters)} active, {model.kv_bytes_per_token:,} KV bytes/token)"
    )
    solver = plan.solver
    console.print(
        f"{len(replicas)} replica{'s' * (len(replicas) != 1)} on {gpus} GPU{'s' * (gpus != 1)}; "
        f"{solver.objective} {solver.status}, gap {100 * solver.gap:.2g} %, "
        f"{solver.candidates:,} candidates ({sum(solver.pruned.values()):,} pruned)\n"
    )
    pools(plan, console)
    if plan.routing is not None and plan.routing.compared:
        console.print(f"routing: {words(plan.routing)}")
    console.print()
    predictions(plan.predicted, console, plan.model.kind)


def pools(plan: Plan, console: Console) -> None:
    rows = []
    for pool in plan.pools:
        for replica, count in _grouped(pool.replicas):
            rows.append(
                (
                    pool.role,
                    f"{count} x",
                    replica.engine,
                    f"{len(replica.gpus)} {replica.gpu}",
                    parallel(replica),
                    formats(replica),
                    replica.max_num_seqs,
                    replica.max_num_batched_tokens,
                    f"{replica.kv_blocks:,} x {replica.block_size}",
                    f"{replica.memory.total_gib:.1f} / {replica.memory.capacity_gib:.1f}",
                )
            )
    columns = ("pool", "", "engine", "GPUs", "layout", "weights/act/KV", "seqs", "tokens", "KV blocks", "GiB")
    console.print(grid(columns, rows))


def parallel(replica: Replica) -> str:
    degrees = [(name.upper(), getattr(replica, name)) for name in ("tp", "pp", "dp", "ep", "cp")]
    return " ".join(f"{name}{degree}" for name, degree in degrees if degree > 1) or "one GPU"


def formats(replica: Replica) -> str:
    usual = f"{replica.weights}/{replica.activations}/{replica.kv}"
    return ", ".join([usual, *(f"{part} {taken}" for part, taken in replica.formats.items())])


def predictions(predicted: dict[str, Predicted], console: Console, kind: str = "causal_lm") -> None:
    """A table of metrics. What an encoder counts are its input tokens, and a module its items."""
    rows = []
    for key, found in predicted.items():
        if kind != "causal_lm" and key == "ttft_ms":
            continue  # nothing is streamed: it is the whole latency
        label, unit = UNITS.get(key, (key, ""))
        if kind != "causal_lm":
            label = label.replace("output", "throughput")
            unit = unit.replace("output ", "").replace("tok", {"encoder": "tok", "module": "item"}[kind])
        rows.append(
            (
                label,
                number(found.value),
                f"{number(found.low)} .. {number(found.high)}",
                ", ".join(f"{name} {number(value)}" for name, value in sorted(found.percentiles.items())),
                unit,
                found.source,
            )
        )
    console.print(grid(("predicted", "value", "band", "percentiles", "unit", "from"), rows))


def front(plan: Plan, console: Console) -> None:
    """The Pareto front that a plan was chosen from, cheapest first; nothing where there is none."""
    from planc.codegen.report.tradeoff import table
    from planc.planner.front import RULE

    found = plan._front
    if found is None:
        return
    told = table(found)
    rows = [
        ("*" if chosen else "", *cells, fleet.replace("×", "x"), "plan.json" if chosen else f"front/{i:03d}")
        for i, (cells, fleet, chosen) in enumerate(told.rows)
    ]
    shown = grid(("", *told.columns, "fleet", "in the bundle"), rows)
    for column in shown.columns[-2:]:
        column.justify = "left"
    console.print()
    console.print(shown)
    cut = "" if found.complete else ", stopped by the time limit"
    console.print(f"{len(rows)} undominated plans from {found.problems} problems{cut}", style="dim")
    console.print(f"* {RULE}", style="dim")


def load_test(found: Mapping[str, Any], console: Console) -> None:
    """A simulated load test: what it was told, its latencies as reported and in the steady state."""
    rows = []
    for key, whole in found["load_test"].items():
        label, unit = UNITS.get(key, (key, ""))
        band = found["bands"].get(key)
        for name, values in (("load test", whole), ("steady", found["steady"][key])):
            if name == "steady" and found["load"]["kind"] == "offline":
                continue
            rows.append(
                (
                    f"{label}, {name}",
                    number(values["mean"]),
                    f"{number(band[0])} .. {number(band[1])}" if band and name == "load test" else "",
                    ", ".join(f"{p} {number(v)}" for p, v in values.items() if p != "mean"),
                    unit,
                    found["source"],
                )
            )
    rates = found["rates"]
    band = found["bands"]["output_tok_s"]
    bounds = f"{number(band[0])} .. {number(band[1])}"
    rows.append(("output, load test", number(rates["output_tok_s"]), bounds, "", "tok/s", found["source"]))
    console.print()
    console.print(grid(("simulated", "mean", "band", "percentiles", "unit", "from"), rows))
    if found["load"]["kind"] == "closed loop":
        console.print(f"the start burst adds {number(found['burst_ttft_ms'])} ms to the mean TTFT")
    for name in ("load", "engine"):
        told = ", ".join(f"{key} {_told(value)}" for key, value in found[name].items() if value is not None)
        console.print(f"{name}: {told}", style="dim", markup=False)


def _told(value: object) -> str:
    return str(value).lower() if isinstance(value, bool | str) else number(value)  # type: ignore[arg-type]


def memory(plan: Plan, console: Console) -> None:
    """The memory map of one GPU of each distinct replica."""
    for pool in plan.pools:
        for replica, count in _grouped(pool.replicas):
            title = f"{pool.role}: {count} x {parallel(replica)} on {replica.gpu}, one GPU"
            parts = replica.memory.model_dump()
            capacity = parts.pop("capacity_gib")
            rows = [
                (name.removesuffix("_gib"), f"{size:.2f}", _bar(size / capacity))
                for name, size in parts.items()
                if name != "total_gib"
            ]
            rows.append(("of", f"{capacity:.2f}", ""))
            table = grid(("part", "GiB", "share"), rows, title=title)
            table.columns[2].justify = "left"
            console.print(table)


def layers(plan: Plan, console: Console) -> None:
    rows = [
        (
            layer.layer_class,
            layer.count,
            ", ".join([layer.decisions.format, *(f"{m} {f}" for m, f in layer.decisions.formats.items())]),
            ", ".join(layer.decisions.fusions) or "-",
            ", ".join(f"{site}: {how}" for site, how in layer.decisions.sharding.items()) or "-",
        )
        for layer in plan.layers
    ]
    table = grid(("layer class", "count", "format", "fusions", "sharding"), rows)
    for column in table.columns[2:]:
        column.justify = "left"
    console.print(table)


def rejected(plan: Plan, console: Console, limit: int = 12) -> None:
    rows = [
        (item.decision, item.reason, ", ".join(f"{k} {number(v)}" for k, v in item.predicted.items()))
        for item in plan.rejected[:limit]
    ]
    table = grid(("rejected", "because", "it would give"), rows)
    for column in table.columns:
        column.justify = "left"
    console.print(table)
    if len(plan.rejected) > limit:
        console.print(f"and {len(plan.rejected) - limit} more in plan.json", style="dim")


def _grouped(replicas: list[Replica]) -> list[tuple[Replica, int]]:
    """Replicas that differ in nothing but their GPUs and share of traffic, with their number."""
    kinds: dict[str, list[Replica]] = {}
    for replica in replicas:
        key = replica.model_dump_json(exclude={"gpus", "traffic_share"})
        kinds.setdefault(key, []).append(replica)
    return [(found[0], len(found)) for found in kinds.values()]


def _billions(count: int) -> str:
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.1f} M"


def _bar(share: float, width: int = 30) -> str:
    return "█" * max(0, min(width, round(share * width)))
