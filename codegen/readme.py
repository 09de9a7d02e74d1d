"""The bundle's README: what lies in it and how to run it."""

from __future__ import annotations

import re
from collections.abc import Sequence

from planc.codegen.engines import WRITERS, engines_of, writer
from planc.codegen.shell import comment
from planc.codegen.triton.kernel import Kernel
from planc.planner.plan import Plan
from planc.version import __version__

_NO_FILES = "planc writes no files for this engine yet."
_WITHOUT_FILES = {"planc": "`planc run BUNDLE --prompt TEXT` executes it with planc's own executor."}


def readme(plan: Plan, kernels: Sequence[Kernel]) -> str:
    """Markdown. Names from a request or model are shown as plain text."""
    replicas = plan.replicas()
    gpus = sum(len(replica.gpus) for replica in replicas)
    lines = [
        f"# {_plain(plan.model.name)}: a serving plan",
        "",
        f"Written by planc {__version__}. Plan {plan.fingerprint.plan or '(unsealed)'}, "
        f"{len(replicas)} replica(s) on {gpus} GPU(s); {plan.solver.status}, gap {plan.solver.gap:.2%}.",
        "",
        "| predicted | value | band | source |",
        "|---|---|---|---|",
        *(
            f"| {_plain(name)} | {_number(p.value)} | {_number(p.low)} to {_number(p.high)} | {p.source} |"
            for name, p in sorted(plan.predicted.items())
        ),
        "",
        "`report.html` says why; `planc inspect`, `planc explain` and `planc diff` read this folder.",
        "",
    ]
    if plan._front is not None:
        lines += [
            f"This plan is the balanced one of {len(plan.front)} on a Pareto front; `front.json` lists them, "
            "the others lie in `front/` (`planc diff plan.json front/000.plan.json`).",
            "",
        ]
    for engine in engines_of(plan):
        if engine in WRITERS:
            lines += [writer(engine).readme(plan)]
        else:
            lines += [f"## {_plain(engine)}", "", _WITHOUT_FILES.get(engine, _NO_FILES), ""]
    if kernels:
        lines += [
            "## Kernels",
            "",
            "`kernels/` holds one Triton file per fused operation; each has a `launch` with the shapes in "
            "its docstring, for use in PyTorch; vLLM has kernels of its own for these. `planc verify` "
            "runs them in Triton's interpreter against float64 references and compiles them ahead of time "
            "for the plan's GPUs.",
            "",
            *(f"- `{kernel.file}`: {kernel.op}" for kernel in kernels),
            "",
        ]
    if plan.coverage.not_modelled:
        lines += ["## Not modelled", "", *(f"- {_plain(item)}" for item in plan.coverage.not_modelled), ""]
    return "\n".join(lines).rstrip() + "\n"


def _plain(text: str) -> str:
    """Text that Markdown shows as it is."""
    return re.sub(r"([\\`*{}\[\]<>#|])", r"\\\1", comment(text))


def _number(value: float) -> str:
    return f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
