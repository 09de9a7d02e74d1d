"""The bundle's report: one self-contained page, no script, no request to anywhere, everything escaped."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import jinja2

from planc.codegen.report import draw, fleet, latency, objectives, steps, summary, tradeoff
from planc.codegen.report.spares import spares
from planc.codegen.triton.kernel import Kernel
from planc.planner.front import RULE
from planc.planner.plan import Plan
from planc.version import __version__

__all__ = ["html"]


def html(plan: Plan, kernels: Sequence[Kernel] = ()) -> str:
    """The page. The same plan, with the same evidence and front, gives the same text.

    Drawings that need more than the plan's own document (roofline, breakdown, curves, what the search saw)
    are there when the plan comes from a compilation or a whole bundle.
    """
    evidence, front = plan._evidence, plan._front
    kinds = fleet.kinds(plan)
    plots = tradeoff.of_front(front) if front else []
    if not plots and evidence is not None:
        plots = [plot for plot in [tradeoff.of_search(plan, evidence)] if plot is not None]
    page = (
        _environment()
        .get_template("report.html.jinja")
        .render(
            plan=plan,
            version=__version__,
            tiles=summary.tiles(plan),
            objectives=objectives.objectives(plan),
            bands=summary.bands(plan),
            pruned=summary.pruned(plan),
            verdict=summary.verdict(plan),
            front=front,
            rule=RULE,
            table=tradeoff.table(front) if front else None,
            tradeoffs=plots,
            fleet_words=tradeoff.words(plan),
            kinds=kinds,
            placement=fleet.placement(plan, kinds),
            spares=spares(plan, kinds),
            steps=steps.views(evidence) if evidence else [],
            rooflines=steps.rooflines(evidence) if evidence else [],
            latencies=latency.distributions(plan, evidence),
            kernels=kernels,
        )
    )
    return page + "\n"


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent.parent / "templates"),
        undefined=jinja2.StrictUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = draw.number
    return environment
