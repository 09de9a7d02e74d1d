"""Explanations as terminal text: what binds, what each decision bought, where time goes, why another lost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from planc.commands.common import UNITS, grid, number

if TYPE_CHECKING:
    from planc.planner.explain import Engine, Explanation
    from planc.planner.explain_ablation import Ablation
    from planc.planner.explain_fleet import FleetExplanation, Share, SharedPrice
    from planc.planner.explain_prices import Price
    from planc.planner.explain_why_not import WhyNot

_OPS = 12  # ops of a step that are listed
_IN_CACHE = 1.1  # share of the memory's bandwidth above which operands cannot have come from it
_STYLES = {"binds": "bold red", "limits": "yellow", "slack": "dim", "not tried": "dim"}


def explanation(found: Explanation, unit: str, console: Console) -> None:
    """Of one model's plan, or of an alternative to it."""
    console.print(f"[bold]{escape(found.model)}[/]: {escape(found.fleet)}")
    console.print(f"{number(found.value)} {unit}, {found.status}\n")
    if found.why_not is not None:
        alternative(found.why_not, unit, console)
    elif found.engines:
        constraints(found.prices, unit, found.maximising, console)
        decisions(found, unit, console)
        for engine in found.engines:
            steps(engine, console)
    for note in found.notes:
        console.print(f"! {note}", style="yellow", markup=False)


# -- several models ------------------------------------------------------------------------


def fleet(found: FleetExplanation, console: Console) -> None:
    """Of several models on one inventory."""
    for name, words in found.models.items():
        console.print(f"[bold]{escape(name)}[/]: {escape(words)}")
    console.print(f"{number(found.value)} USD/h, {found.status}\n")
    sharing(found.shares, console)
    constraints(
        [one.price for one in found.prices], "USD/h", False, console, [_gains(o) for o in found.prices]
    )
    rows = [
        (
            escape(name),
            escape(one.decision),
            escape(one.instead),
            _loss(one),
            *_latencies(one.metrics),
            escape(one.fleet or one.reason) if one.tried else "not tried",
        )
        for name, one in found.ablations
    ]
    heads = ("model", "without", "instead", "costs all", "TTFT", "TPOT", "by")
    console.print(
        _table(heads, rows, "What each decision bought: the best fleet of all without it", (1, 2, 6))
    )
    console.print()
    for name, engines in found.engines.items():
        console.print(f"[bold]{escape(name)}[/]")
        for engine in engines:
            steps(engine, console)
    for note in found.notes:
        console.print(f"! {note}", style="yellow", markup=False)


def sharing(shares: Sequence[Share], console: Console) -> None:
    """What each model pays, and would pay alone."""
    rows = [
        (
            escape(share.model),
            str(share.gpus),
            number(share.part),
            _number(share.alone),
            "" if share.pays is None else _signed("+", share.pays),
            "" if share.costs_others is None else _signed("+", share.costs_others),
            _number(share.saved),
            escape(share.by if share.alone_by in ("", share.by) else f"{share.by}; alone {share.alone_by}"),
        )
        for share in shares
    ]
    heads = ("model", "GPUs", "USD/h", "alone", "sharing", "costs others", "saved without it", "by")
    console.print(_table(heads, rows, "What sharing the inventory costs (USD/h)", left=(7,)))
    console.print(
        "alone: with the whole inventory to itself; sharing: how much dearer it is beside the others; costs "
        "others: how much dearer they are beside it; saved without it: both its price and that.\n",
        style="dim",
    )


def _gains(priced: SharedPrice) -> str:
    return ", ".join(f"{escape(name)} {_signed('-', gain)}" for name, gain in priced.gains.items())


# -- what binds ----------------------------------------------------------------------------


def constraints(
    prices: Sequence[Price],
    unit: str,
    maximising: bool,
    console: Console,
    gainers: Sequence[str] | None = None,
) -> None:
    """`gainers`: who gains at the first value that pays, where several models share the inventory."""
    sign = "+" if maximising else "-"
    rows = []
    for position, price in enumerate(prices):
        style = _STYLES[price.verdict]
        rows.append(
            (
                escape(price.name),
                "" if price.stated is None else f"{number(price.stated)} {price.unit}",
                "" if price.reached is None else number(price.reached),
                f"[{style}]{price.verdict}[/]",
                _step(price, sign),
                _tighter(price, "-" if maximising else "+"),
                "" if price.pays_at is None else f"{number(price.pays_at)}: {_signed(sign, price.pays)}",
                "" if price.without is None else f"{price.instead}: {_signed(sign, price.without)}",
                *(() if gainers is None else (gainers[position],)),
            )
        )
    heads = (
        "constraint",
        "stated",
        "reached",
        "",
        "one unit looser",
        "tighter",
        "first that pays",
        "without",
        *(() if gainers is None else ("to whom",)),
    )
    table = _table(heads, rows, f"What binds ({unit})", left=(3,))
    table.columns[0].no_wrap = True
    console.print(table)
    console.print(
        "binds: one unit more is worth something; limits: more would be; slack: nothing looser helps. "
        "Each figure is the difference of two optima, not a dual price; ~ is what a unit would gain if "
        "engines could be bought in parts (linear relaxation).\n",
        style="dim",
    )


def _step(price: Price, sign: str) -> str:
    if price.stated is None:
        return ""
    about = f" (~{sign}{price.marginal:.2g})" if price.marginal else ""
    return f"{number(price.stated + price.step)}: {_signed(sign, price.looser)}{about}"


def _tighter(price: Price, sign: str) -> str:
    return "no plan" if price.tighter_fails else _signed(sign, price.tighter)


def _signed(sign: str, value: float | None) -> str:
    if value is None:
        return ""
    if value < 0:
        sign = "-" if sign != "-" else "+"
    return "0" if value == 0 else f"{sign}{number(abs(value))}"


# -- decisions -----------------------------------------------------------------------------


def decisions(found: Explanation, unit: str, console: Console) -> None:
    plan = found.metrics
    rows: list[tuple[str, ...]] = [
        ("the plan", "", "", number(found.value), *_latencies(plan), escape(found.fleet))
    ]
    rows += [_decision(found, ablation) for ablation in found.ablations]
    heads = ("without", "instead", "costs" if not found.maximising else "loses", unit, "TTFT", "TPOT", "by")
    console.print(_table(heads, rows, "What each decision bought: the best plan without it", left=(1, 6)))
    console.print()


def _decision(found: Explanation, ablation: Ablation) -> tuple[str, ...]:
    name, instead = escape(ablation.decision), escape(ablation.instead)
    if not ablation.tried:
        return name, instead, "", "", "", "", "not tried"
    if not ablation.metrics:
        return name, instead, "[red]all[/]", "", "", "", escape(ablation.reason)
    sign = -1.0 if found.maximising else 1.0
    value = "" if ablation.loss is None else number(found.value + sign * ablation.loss)
    loss = _loss(ablation)
    words = "the same" if ablation.fleet == found.fleet else escape(ablation.fleet)
    words += " (needs more nodes)" if ablation.more_nodes else ""
    return name, instead, loss, value, *_latencies(ablation.metrics), words


def _loss(ablation: Ablation) -> str:
    """What the plan without a decision costs more; less in green."""
    if ablation.loss is None:
        return "[red]all[/]" if ablation.tried else ""
    return _signed("", ablation.loss) if ablation.loss >= 0 else f"[green]{_signed('', ablation.loss)}[/]"


def _latencies(metrics: Mapping[str, float]) -> tuple[str, str]:
    shown = [number(metrics[name]) if name in metrics else "" for name in ("ttft_ms", "tpot_ms")]
    return shown[0], shown[1]


# -- time and memory -----------------------------------------------------------------------


def steps(engine: Engine, console: Console) -> None:
    """The ops of each phase that take longest, what bounds the step, and the memory map."""
    for phase, shares in engine.bounds.items():
        mine = sorted((row for row in engine.steps if row["phase"] == phase), key=lambda row: -row["ms"])
        rows: list[tuple[str, ...]] = [
            (
                f"{escape(row['class'])} {escape(_place(row['site'], row['op']))}",
                f"{row['ms']:.3g}",
                f"{row['ms'] / shares['ms']:.1%}",
                row["bound"],
                number(row["intensity"]) if row.get("flops") else "",
                f"{row['peak_compute']:.0%}" if row.get("flops") else "",
                _bandwidth(row["peak_bandwidth"]) if row.get("bytes") else "",
                row["source"],
            )
            for row in mine[:_OPS]
        ]
        rest = sum(row["ms"] for row in mine[_OPS:])
        if rest:
            rows.append((f"{len(mine) - _OPS} more", f"{rest:.3g}", f"{rest / shares['ms']:.1%}", *[""] * 5))
        bounds = ", ".join(f"{share:.0%} {name}" for name, share in shares.items() if name != "ms")
        title = f"{engine.count} x {engine.label}: a {phase} step of {shares['ms']:.3g} ms, bound by {bounds}"
        heads = ("op", "ms", "share", "bound", "FLOP/byte", "of peak", "of bandwidth", "from")
        console.print(_table(heads, rows, escape(title), left=(3, 7)))
        console.print()
    memory = {name.removesuffix("_gib"): size for name, size in engine.memory.items()}
    capacity, total = memory.pop("capacity"), memory.pop("total")
    parts = ", ".join(f"{name.replace('_', ' ')} {size:.1f}" for name, size in memory.items())
    console.print(f"memory of each GPU: {total:.1f} of {capacity:.1f} GiB: {parts}\n", markup=False)


def _bandwidth(share: float) -> str:
    """Of the memory's; small operands come from the cache before it, faster than that."""
    return "in cache" if share > _IN_CACHE else f"{share:.0%}"


def _place(site: str, op: str) -> str:
    name = op.rpartition("::")[2]
    parts = site.split("+")
    last = "+".join(dict.fromkeys(part.rpartition(".")[2] for part in parts))
    return f"{last} ({name})" if last else name


# -- an alternative ------------------------------------------------------------------------


def alternative(found: WhyNot, unit: str, console: Console) -> None:
    asked = ", ".join(f"{name}={value}" for name, value in found.asked.items())
    style = {"chosen": "green", "better": "green"}.get(found.verdict, "red")
    console.print(f"[bold]why not {escape(asked)}?[/] [{style}]{found.verdict}[/]: {escape(found.reason)}")
    for words in found.forbidden:
        console.print(f"! the request does not allow it: {words}; looked at as if it did", markup=False)
    if not found.metrics:
        return
    console.print(f"\nbest with it: {found.fleet}\n", markup=False)
    rows = [(f"objective, {unit}", _number(found.plan_value), _number(found.value))]
    for key, theirs in found.metrics.items():
        label, what = UNITS.get(key, (key, ""))
        if key in found.plan_metrics and key != "usd_per_hour":
            rows.append((f"{label}, {what}", number(found.plan_metrics[key]), number(theirs)))
    console.print(_table(("", "plan", "with it"), rows, None))
    if found.terms:
        console.print()
        table = [
            (
                escape(t.name),
                number(t.plan),
                number(t.other),
                f"{'+' if t.change > 0 else '-'}{number(abs(t.change))}",
                t.unit,
            )
            for t in found.terms
        ]
        console.print(_table(("what it takes more of", "plan", "with it", "", ""), table, None, left=(4,)))


def _number(value: float | None) -> str:
    return "" if value is None else number(value)


def _table(
    heads: Sequence[str], rows: Sequence[Sequence[str]], title: str | None, left: Sequence[int] = ()
) -> Table:
    table = grid(heads, rows, title)
    for position in left:
        table.columns[position].justify = "left"
    return table
