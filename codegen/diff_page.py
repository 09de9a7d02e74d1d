"""The page of a diff: what changed between two plans, and why; no script, no request, everything escaped.

Each metric has a waterfall from the old plan's figure to the new one's, a bar for every decision, drawn with
the rounded figures of `diff_table`, so that what is printed adds up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import jinja2

from planc.codegen.report.draw import Scale, Tick
from planc.codegen.report.summary import METRICS
from planc.planner.diff import Change, PlanDiff, shown
from planc.planner.diff_table import Column, Sheet, percentiles, sheet
from planc.planner.plan import Plan
from planc.version import __version__

_SECTIONS = {
    "model": "Model",
    "request": "Request",
    "pools": "Pools and replicas",
    "layers": "Layers",
    "predicted": "Predictions",
    "solver": "Search",
    "coverage": "Coverage",
}
_TILES = ("ttft_ms", "tpot_ms", "output_tok_s", "usd_per_hour", "usd_per_million_tokens", "joules_per_token")
#: share of the largest figure above which an axis need not start at 0
_CUT = 0.8


@dataclass(frozen=True, slots=True)
class Bar:
    """One row of a waterfall, positions in percent of the axis. `tone`: total, good, bad or even."""

    label: str
    text: str
    tone: str
    left: float
    width: float
    end: float


@dataclass(frozen=True, slots=True)
class Waterfall:
    """`ground`: where the bars of both plans begin, percent; `cut`: the axis does not start at 0."""

    title: str
    unit: str
    change: str
    tone: str
    bars: tuple[Bar, ...]
    ticks: tuple[Tick, ...]
    ground: float
    cut: bool


@dataclass(frozen=True, slots=True)
class Line:
    """A structural change: `sign` is +, - or ~."""

    sign: str
    path: str
    old: str
    new: str
    share: str


def html(old: Plan, new: Plan, found: PlanDiff) -> str:
    """The page. The same plans give the same text."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        undefined=jinja2.StrictUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    why = found.attribution
    made = sheet(why, percentiles((old, new))) if why is not None else None
    page = environment.get_template("diff.html.jinja").render(
        old=old,
        new=new,
        found=found,
        version=__version__,
        sheet=made,
        tiles=[(title(c.metric), c) for c in made.columns if c.metric in _TILES] if made else [],
        tone=tone,
        waterfalls=waterfalls(made) if made else [],
        reasons=sorted({reason for part in why.parts for reason in part.reasons}) if why else [],
        sections=sections(found),
        details=sum(change.is_detail for change in found.changes),
    )
    return page + "\n"


def title(metric: str) -> tuple[str, str]:
    """(name, unit) of a metric or one of its percentiles."""
    name, _, percentile = metric.partition(".")
    words, unit = METRICS.get(name, (name, ""))
    return f"{words}{', ' if percentile else ''}{percentile}", unit


def tone(column: Column, count: int) -> str:
    """Whether a change is good or bad; even where it is neither."""
    return {True: "good", False: "bad", None: "even"}[column.better(count)]


def waterfalls(made: Sheet) -> list[Waterfall]:
    """One drawing for each metric that changed."""
    labels = [part.text("→") for part in made.parts]
    return [_waterfall(column, labels) for column in made.columns if any(column.parts)]


def _waterfall(column: Column, labels: Sequence[str]) -> Waterfall:
    levels = list(accumulate(column.parts, initial=column.old))
    unit = 10.0**-column.decimals
    cut = min(levels) > _CUT * max(levels) > 0
    below = min(levels) < 0  # means of two walks may dip under 0 on the way
    scale = Scale.over(
        [level * unit for level in (*levels, *((0,) if below else ()))], zero=not (cut or below)
    )
    ground = scale.at(0.0)
    bars = [_bar("old plan", column.text(column.old), "total", scale.at(column.old * unit), ground)]
    for label, part, before, after in zip(labels, column.parts, levels, levels[1:], strict=False):
        if part:
            ends = scale.at(before * unit), scale.at(after * unit)
            bars.append(_bar(label, column.text(part, signed=True), tone(column, part), ends[1], ends[0]))
    bars.append(_bar("new plan", column.text(column.new), "total", scale.at(column.new * unit), ground))
    words, name = title(column.metric)
    return Waterfall(
        title=words,
        unit=name,
        change=column.text(column.change, signed=True),
        tone=tone(column, column.change),
        bars=tuple(bars),
        ticks=tuple(scale.ticks(4)),
        ground=ground,
        cut=cut,
    )


def _bar(label: str, text: str, kind: str, end: float, start: float) -> Bar:
    low, high = sorted((end, start))
    return Bar(label, text, kind, low, max(high - low, 0.3), end)


def sections(found: PlanDiff) -> list[tuple[str, list[Line], list[Line]]]:
    """(title, changes, details) of each section that has any."""
    made = []
    for name, words in _SECTIONS.items():
        mine = found.section(name)
        if mine:
            plain = [_line(change) for change in mine if not change.is_detail]
            made.append((words, plain, [_line(change) for change in mine if change.is_detail]))
    return made


def _line(change: Change) -> Line:
    share = f"{100 * change.ratio:+.3g} %" if change.ratio is not None else ""
    old, new = ("" if value is None else shown(value) for value in (change.old, change.new))
    return Line(change.kind, change.path, old, new, share)
