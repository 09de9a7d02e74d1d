"""Where the time of a step goes, and its ops under the roofline (Williams, Waterman, Patterson 2009)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from planc.codegen.report import palette
from planc.codegen.report.draw import PATHS, Label, Line, Mark, Plot, Scale, Shape, number, placed
from planc.planner.evidence import Evidence, Op, Roof, Step

_SHAPES: dict[str, Shape] = {"decode": "circle", "prefill": "square"}
_LEAST = 0.004  # share of a step's time from which an op is drawn under the roofline
_ROWS = 14


@dataclass(frozen=True, slots=True)
class Part:
    name: str
    colour: str
    percent: float
    ms: float

    @property
    def title(self) -> str:
        return f"{self.name}: {number(self.ms)} ms, {self.percent:.1f} %"


@dataclass(frozen=True, slots=True)
class Bar:
    """One split of a step's time."""

    title: str
    parts: tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class Row:
    """An op of the table. tflops, gbytes: achieved; roof: percent of what the roofline allows."""

    op: Op
    kind: str
    colour: str
    percent: float
    tflops: float
    gbytes: float
    intensity: float
    roof: float | None


@dataclass(frozen=True, slots=True)
class View:
    step: Step
    bars: tuple[Bar, ...]
    rows: tuple[Row, ...]
    rest: float


def views(evidence: Evidence) -> list[View]:
    roofs = {roof.gpu: roof for roof in evidence.roofs}
    return [_view(step, roofs[step.gpu]) for step in evidence.steps if step.ms > 0]


def _view(step: Step, roof: Roof) -> View:
    classes = list(dict.fromkeys(op.layer_class for op in step.ops if op.layer_class != "step"))
    hues = {name: palette.CLASSES[i % len(palette.CLASSES)] for i, name in enumerate(classes)}
    hues["step"] = "grey"
    names = {name: f"layers “{name}”" for name in classes} | {"step": "host and hand-over"}
    bars = (
        Bar("kind of work", _split(step, palette.WORK, {}, _kind)),
        Bar("layer class", _split(step, hues, names, lambda op: op.layer_class)),
        Bar("bound by", _split(step, palette.BOUND, {}, lambda op: op.bound)),
    )
    order = sorted(step.ops, key=lambda op: -op.ms)
    shown = order[:_ROWS]
    return View(
        step,
        bars,
        tuple(_row(op, step, roof) for op in shown),
        100.0 * sum(op.ms for op in order[_ROWS:]) / step.ms,
    )


def _kind(op: Op) -> str:
    return palette.work(op.layer_class, op.site, op.op, op.bound)


def _split(
    step: Step, colours: dict[str, str], names: dict[str, str], by: Callable[[Op], str]
) -> tuple[Part, ...]:
    sums: dict[str, float] = {}
    for op in step.ops:
        key = by(op)
        sums[key] = sums.get(key, 0.0) + op.ms
    return tuple(
        Part(names.get(key, key), colours[key], round(100.0 * sums[key] / step.ms, 3), sums[key])
        for key in colours
        if sums.get(key, 0.0) > 0
    )


def _row(op: Op, step: Step, roof: Roof) -> Row:
    seconds, kind = max(op.ms, 1e-12) / 1e3, _kind(op)
    intensity = op.flops / op.nbytes if op.nbytes else 0.0
    limit = _limit(op, roof)
    share = 100.0 * op.flops / seconds / limit if limit else None
    if share is None and op.nbytes:
        share = 100.0 * op.nbytes / seconds / roof.bytes_s
    return Row(
        op=op,
        kind=kind,
        colour=palette.WORK[kind],
        percent=100.0 * op.ms / step.ms,
        tflops=op.flops / seconds / 1e12,
        gbytes=op.nbytes / seconds / 1e9,
        intensity=intensity,
        roof=share,
    )


def _limit(op: Op, roof: Roof) -> float:
    """FLOP/s that the roofline allows an op; 0 without arithmetic."""
    if not op.flops or not op.nbytes:
        return 0.0
    return min(roof.flops_s[_units(op.precision, roof)], op.flops / op.nbytes * roof.bytes_s)


def _units(precision: str, roof: Roof) -> str:
    """What a precision runs on: its own units, else bf16's, else the fastest."""
    for name in (precision, "bf16"):
        if name in roof.flops_s:
            return name
    return max(roof.flops_s, key=lambda name: roof.flops_s[name])


# -- roofline ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Rooflines:
    gpu: str
    plot: Plot
    key: tuple[tuple[str, str], ...]
    phases: tuple[tuple[str, str], ...]


def rooflines(evidence: Evidence) -> list[Rooflines]:
    """One plot per GPU type: ops of all its engines' steps that do arithmetic and take time."""
    found = []
    for roof in evidence.roofs:
        steps = [step for step in evidence.steps if step.gpu == roof.gpu and step.ms > 0]
        ops = [(step, op) for step in steps for op in _merged(step)]
        ops = [(step, op) for step, op in ops if op.flops and op.nbytes and op.ms >= _LEAST * step.ms]
        if ops:
            found.append(_roofline(roof, ops))
    return found


def _merged(step: Step) -> Iterable[Op]:
    """Ops of one kind, site and precision over all layer classes are one point."""
    found: dict[tuple[str, ...], Op] = {}
    for op in step.ops:
        key = (op.site, op.op, op.precision)
        old = found.get(key)
        if old is not None:
            op = op.model_copy(
                update={
                    "layer_class": f"{old.layer_class}, {op.layer_class}",
                    "ms": old.ms + op.ms,
                    "flops": old.flops + op.flops,
                    "nbytes": old.nbytes + op.nbytes,
                }
            )
        found[key] = op
    return found.values()


def _roofline(roof: Roof, ops: Sequence[tuple[Step, Op]]) -> Rooflines:
    used = sorted({_units(op.precision, roof) for _, op in ops}, key=lambda p: -roof.flops_s[p])
    points = [(op.flops / op.nbytes, op.flops / (op.ms / 1e3)) for _, op in ops]
    knees = [roof.flops_s[p] / roof.bytes_s for p in used]
    x = Scale.over([*(p[0] for p in points), *(k * 3 for k in knees)], log=True, room=0.04)
    y = Scale.over([*(p[1] for p in points), *(roof.flops_s[p] * 1.3 for p in used)], log=True, room=0.03)
    lines, names = [], []
    for level, precision in enumerate(used):
        peak = roof.flops_s[precision]
        knee = peak / roof.bytes_s
        start = max(x.low, y.low / roof.bytes_s)
        path = ((x.at(start), y.at(start * roof.bytes_s)), (x.at(knee), y.at(peak)), (100.0, y.at(peak)))
        lines.append(Line(path, "ink", dashed=level > 0, title=f"{precision}: {number(peak / 1e12)} TFLOP/s"))
        names.append(
            Label(x.at(knee), y.at(peak), f"{precision} {number(peak / 1e12)} TFLOP/s", -8, 0, "end")
        )
    marks = [_mark(step, op, x, y) for step, op in sorted(ops, key=lambda both: -both[1].ms / both[0].ms)]
    present = {_kind(op) for _, op in ops}
    shown = list({(mark.label, mark.shape): mark for mark in reversed(marks) if mark.label}.values())
    return Rooflines(
        gpu=roof.gpu,
        plot=Plot(
            about=f"Roofline of {roof.gpu}: achieved FLOP/s of the plan's ops over arithmetic intensity",
            x_title="arithmetic intensity, FLOP per byte",
            y_title="achieved FLOP/s",
            x_ticks=x.ticks(6),
            y_ticks=y.ticks(5),
            lines=lines,
            marks=marks[::-1],
            labels=[*names, *placed(marks, names, only=shown)],
        ),
        key=tuple((name, colour) for name, colour in palette.WORK.items() if name in present),
        phases=tuple((p, PATHS[s]) for p, s in _SHAPES.items() if any(step.phase == p for step, _ in ops)),
    )


def _mark(step: Step, op: Op, x: Scale, y: Scale) -> Mark:
    share, kind = op.ms / step.ms, _kind(op)
    speed = op.flops / (op.ms / 1e3)
    name = (op.site.split("+")[0].split(".")[-1] if kind != "attention" else "") or op.op.split("::")[-1]
    title = (
        f"{op.site or op.op} ({op.op.split('::')[-1]}, layers {op.layer_class}), "
        f"{step.phase} on {step.engine}: "
        f"{number(op.ms)} ms, {100 * share:.1f} % of the step, {number(op.flops / op.nbytes)} FLOP/byte, "
        f"{number(speed / 1e12)} TFLOP/s, {op.bound}-bound"
    )
    return Mark(
        x=x.at(op.flops / op.nbytes),
        y=y.at(speed),
        title=title,
        colour=palette.WORK[kind],
        shape=_SHAPES[step.phase],
        size=round(4.0 + 11.0 * share**0.5, 2),
        label=name if share > 0.04 else "",
    )
