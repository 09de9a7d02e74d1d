"""The second door: `torch.fx.symbolic_trace`, for plain modules that `torch.export` refuses.

A symbolic trace runs `forward` on proxies, so what export cannot take because it looks at values
or state (an attribute assigned in forward, a log call) evaporates. The trace is a plain
`GraphModule`, and exporting that gives the same ATen graph and sizes as the first door.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from planc.errors import TraceFailed
from planc.ir.trace.module import TraceRefused, export


def export_symbolically(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    shapes: Any,
    name: str,
    refused: TraceRefused,
) -> tuple[ExportedProgram, tuple[str, ...]]:
    """The program, and a note on why it took this door. Raises TraceFailed with both reasons."""
    try:
        traced = torch.fx.symbolic_trace(module)
    except Exception as error:  # proxies make user code fail in any way
        raise TraceFailed(
            model=name,
            reason=f"torch.export refused it ({refused}), and torch.fx.symbolic_trace too ({_line(error)})",
            mend="Keep data-dependent control flow out of forward; see torch.export's documentation.",
        ) from error
    try:
        program = export(traced, args, kwargs, shapes)
    except TraceRefused as again:
        raise TraceFailed(
            model=name,
            reason=f"torch.export refused it ({refused}), and its symbolic trace too ({again})",
            mend="Check that the example inputs fit forward, and keep data-dependent control flow out of it.",
        ) from refused
    return program, (f"traced by torch.fx.symbolic_trace, because torch.export refused it: {refused}",)


def _line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
