"""The `.pt2` door: programs that someone else exported with `torch.export.save`."""

from __future__ import annotations

from pathlib import Path
from zipfile import BadZipFile

import torch
from torch.export import ExportedProgram

import planc.ir.ops  # noqa: F401  (a program may hold planc ops; they must be known before it loads)
from planc.errors import FileUnreadable
from planc.ir.graph import Graph, Source
from planc.ir.trace.module import kind_of_inputs
from planc.ir.trace.program import graph_of


def trace_file(path: Path) -> Graph:
    """Reads a `.pt2` file. Raises FileUnreadable.

    Loading a file runs no code of the file's author: torch reads the graph as data.
    """
    try:
        program = torch.export.load(path)
    except (RuntimeError, ValueError, OSError, KeyError, EOFError, AssertionError, BadZipFile) as error:
        raise FileUnreadable(
            what="model",
            path=path,
            format="an exported program",
            reason=str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__,
            mend="Write it with torch.export.save, with a torch no newer than the installed one.",
        ) from error
    return trace_program(program, name=path.stem)


def trace_program(program: ExportedProgram, *, name: str = "exported") -> Graph:
    """The graph of an exported program; sizes it was exported with as dynamic stay dynamic."""
    architecture = _root_class(program) or "ExportedProgram"
    source = Source(name=name, kind=kind_of_inputs(program), architecture=architecture)
    return graph_of(program, source)


def _root_class(program: ExportedProgram) -> str:
    for node in program.graph.nodes:
        for path, kind in (node.meta.get("nn_module_stack") or {}).values():
            if path == "":
                return str(kind).rsplit(".", 1)[-1]
    return ""
