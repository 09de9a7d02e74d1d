"""Doors into the IR: Hugging Face configs, nn.Modules, exported programs, symbolic traces.

`trace(source)` looks at what it was given and opens the right door. This package imports torch
only when a door is opened; `fingerprint` and `cache` never do.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from planc.errors import FileMissing, UnsupportedModel

if TYPE_CHECKING:
    from torch import nn
    from torch.export import ExportedProgram

    from planc.ir.graph import Graph

#: "package.module:factory" or "path/to/file.py:factory"
FACTORY = re.compile(r"^(?P<module>[\w./\-]+?):(?P<name>[A-Za-z_][\w.]*)$")

_FORMS = "Name a Hugging Face config.json or folder, a 'package.module:factory', or an exported .pt2."


def trace(
    source: str | Path | nn.Module | ExportedProgram,
    *,
    inputs: Any = None,
    trust_remote_code: bool = False,
    cache: Path | None = None,
) -> Graph:
    """The traced graph of a model, whatever form it comes in.

    source   a Hugging Face `config.json` or model folder; "package.module:factory" (or
             "file.py:factory"), a function that returns a module or (module, example_inputs) or
             (module, example_inputs, dynamic_shapes); a `.pt2` file; an `nn.Module`; an
             `ExportedProgram`
    inputs   example inputs for a module: a tensor, a tuple of positional or a dict of named ones
    cache    folder that traces of Hugging Face models are kept in; None is the user's own, see
             `planc.ir.trace.cache.folder`. Modules are code, whose identity planc cannot know, and
             are traced anew each time

    Raises FileMissing, FileUnreadable, UnsupportedModel, UntrustedCode or TraceFailed.
    """
    if isinstance(source, Path | str):
        return _from_name(source, inputs, trust_remote_code, cache)
    from torch import nn
    from torch.export import ExportedProgram

    if isinstance(source, ExportedProgram):
        from planc.ir.trace.exported import trace_program

        return trace_program(source)
    if isinstance(source, nn.Module):
        from planc.ir.trace.module import trace_module

        return trace_module(source, inputs)
    raise UnsupportedModel(
        model=type(source).__name__, reason="this is no model that planc can read", mend=_FORMS
    )


def kind_of(source: str | Path) -> str:
    """Which door a name opens: "hf", "factory" or "exported". Looks at the file system, not inside.

    Raises FileMissing.
    """
    path = Path(source)
    if path.suffix == ".pt2":
        door = "exported"
    elif path.is_dir() or path.suffix == ".json":
        door = "hf"
    elif FACTORY.match(str(source)):
        return "factory"
    else:
        door = ""
    if not door or not path.exists():
        raise FileMissing(what="model", path=source, mend=_FORMS)
    return door


def _from_name(source: str | Path, inputs: Any, trust_remote_code: bool, cache: Path | None) -> Graph:
    door = kind_of(source)
    if door == "factory":
        from planc.ir.trace.module import trace_factory

        return trace_factory(str(source), inputs)
    if door == "exported":
        from planc.ir.trace.exported import trace_file

        return trace_file(Path(source))
    from planc.ir.trace.cache import cached_trace

    def traced() -> Graph:
        from planc.ir.trace.hf import trace_path  # loads transformers: only where there is no stored trace

        return trace_path(Path(source), trust_remote_code=trust_remote_code)

    return cached_trace(Path(source), cache, traced)
