"""The `nn.Module` door: any module, by object or by "package.module:factory".

The module may lie on the meta device (nothing is allocated) or hold real weights (the graph
shares them). It is traced in evaluation mode, and left in the mode it came in.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

import planc.ir.ops  # noqa: F401  (modules may call the dialect themselves)
from planc.errors import FileMissing, TraceFailed, UnsupportedModel
from planc.ir.graph import Graph, Source
from planc.ir.trace import FACTORY
from planc.ir.trace.program import graph_of, tied_names

_RETURN = "Return a module, (module, example_inputs) or (module, example_inputs, dynamic_shapes)."


def trace_factory(spec: str, inputs: Any = None) -> Graph:
    """Imports "package.module:factory" (the current directory is importable), calls it, traces.

    `inputs` override the example inputs that the factory returned.
    Raises FileMissing, UnsupportedModel (not a module) or TraceFailed.
    """
    factory = load_factory(spec)
    if isinstance(factory, nn.Module):
        made: Any = factory
    elif callable(factory):
        try:
            made = factory()
        except Exception as error:  # whatever the user's own code raises
            raise TraceFailed(
                model=spec,
                reason=f"the factory raised {type(error).__name__}: {error}",
                mend=f"It is called without arguments. {_RETURN}",
            ) from error
    else:
        raise UnsupportedModel(model=spec, reason=f"it is a {type(factory).__name__}", mend=_RETURN)
    parts = made if isinstance(made, tuple) else (made,)
    if not isinstance(parts[0], nn.Module) or len(parts) > 3:
        raise UnsupportedModel(model=spec, reason=f"the factory returned {_said(made)}", mend=_RETURN)
    module, examples, dynamic = (*parts, None, None)[:3]
    return trace_module(module, examples if inputs is None else inputs, dynamic_shapes=dynamic, name=spec)


def load_factory(spec: str) -> Any:
    """What "package.module:factory" or "file.py:factory" names. Raises FileMissing or TraceFailed."""
    match = FACTORY.match(spec)
    assert match, spec
    place, name = match["module"], match["name"]
    imported = _import_file(Path(place), spec) if place.endswith(".py") else _import_name(place, spec)
    for part in name.split("."):
        if not hasattr(imported, part):
            near = [n for n in dir(imported) if not n.startswith("_")]
            raise TraceFailed(
                model=spec,
                reason=f"'{place}' has no attribute '{name}'",
                mend=f"It has: {', '.join(near[:12])}." if near else "It is empty.",
            )
        imported = getattr(imported, part)
    return imported


def trace_module(
    module: nn.Module,
    inputs: Any = None,
    *,
    dynamic_shapes: Any = None,
    name: str | None = None,
) -> Graph:
    """The traced graph of a module.

    inputs          example inputs: a tensor, a tuple of positional or a dict of named ones
    dynamic_shapes  as `torch.export` takes them. Left out, the leading dimension of every tensor is
                    the batch, and the second one of token ids (integers [B, S]) the sequence

    Where `torch.export` refuses a module, `torch.fx.symbolic_trace` is tried and the refusal noted
    in `Source.notes`. Raises TraceFailed with the reason of the export.
    """
    name = name or type(module).__name__
    if inputs is None:
        raise TraceFailed(
            model=name,
            reason="there are no example inputs to trace it with",
            mend="Return (module, example_inputs) from the factory, or pass inputs=.",
        )
    args, kwargs = _arguments(module, inputs)
    if dynamic_shapes is None:
        args, kwargs = pytree.tree_map_only(Tensor, _two_rows, (args, kwargs))
        shapes = pytree.tree_map(_default_dims, (args, kwargs))
        dynamic_shapes = shapes[1] if kwargs else shapes[0]
    notes: tuple[str, ...] = ()
    with evaluated(module):
        try:
            program = export(module, args, kwargs, dynamic_shapes)
        except TraceRefused as refused:
            from planc.ir.trace.symbolic import export_symbolically

            program, notes = export_symbolically(module, args, kwargs, dynamic_shapes, name, refused)
    source = Source(name=name, kind=kind_of_inputs(program), architecture=type(module).__name__, notes=notes)
    return graph_of(program, source, tied=tied_names(module))


class TraceRefused(Exception):
    """`torch.export` did not take a module; the message is its own, in one line."""


def export(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], shapes: Any) -> ExportedProgram:
    """`torch.export` without gradients, non-strict. Raises TraceRefused."""
    try:
        with torch.no_grad():
            return torch.export.export(module, args, kwargs, dynamic_shapes=shapes, strict=False)
    except Exception as error:  # export passes on whatever the module's forward raises
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise TraceRefused(f"{type(error).__name__}: {lines[0] if lines else 'no reason given'}") from error


def kind_of_inputs(program: ExportedProgram) -> Literal["encoder", "module"]:
    """ "encoder" where the first input is token ids (integers [B, S]), else "module"."""
    names = program.graph_signature.user_inputs
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.name in names:
            value = node.meta.get("val")
            if isinstance(value, Tensor):
                return "encoder" if _is_ids(value) else "module"
    return "module"


@contextmanager
def evaluated(module: nn.Module) -> Iterator[None]:
    """The module in evaluation mode; afterwards every submodule's mode and attributes are as before.

    A forward may assign attributes; under a trace these would be fake tensors or proxies.
    """
    before = [(part, part.training, dict(part.__dict__)) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training, attributes in before:
            part.__dict__.clear()
            part.__dict__.update(attributes)
            part.training = training


def _arguments(module: nn.Module, inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    device = next((t.device for t in (*module.parameters(), *module.buffers())), None)
    moved = inputs if device is None else pytree.tree_map_only(Tensor, lambda t: t.to(device), inputs)
    if isinstance(moved, Mapping):
        return (), dict(moved)
    return (tuple(moved) if isinstance(moved, tuple | list) else (moved,)), {}


def _is_ids(value: Tensor) -> bool:
    return value.dim() == 2 and not value.dtype.is_floating_point and value.dtype != torch.bool


def _two_rows(value: Tensor) -> Tensor:
    """A batch of one would be taken for a constant by torch.export: double it."""
    return torch.cat([value, value]) if value.dim() and value.shape[0] == 1 else value


def _default_dims(value: Any) -> dict[int, Any] | None:
    if not isinstance(value, Tensor) or not value.dim():
        return None
    return {0: Dim.AUTO, 1: Dim.AUTO} if _is_ids(value) else {0: Dim.AUTO}


def _import_name(place: str, spec: str) -> Any:
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        return importlib.import_module(place.replace("/", "."))
    except ModuleNotFoundError as error:
        missing = error.name or place
        owner = place == missing or place.startswith(f"{missing}.")
        reason = f"there is no module '{place}'" if owner else f"'{place}' needs the module '{missing}'"
        raise TraceFailed(
            model=spec,
            reason=reason,
            mend="The current directory and the Python path are searched."
            if owner
            else f"Install what provides '{missing}'.",
        ) from error
    except Exception as error:  # the user's own module may raise anything while it loads
        raise TraceFailed(
            model=spec,
            reason=f"importing '{place}' raised {type(error).__name__}: {error}",
            mend="Mend it first.",
        ) from error


def _import_file(path: Path, spec: str) -> Any:
    if not path.is_file():
        raise FileMissing(what="model", path=path, mend="Name a file as 'path/to/file.py:factory'.")
    loader = importlib.util.spec_from_file_location(path.stem, path)
    assert loader is not None
    assert loader.loader is not None
    module = importlib.util.module_from_spec(loader)
    try:
        loader.loader.exec_module(module)
    except Exception as error:  # the user's own file may raise anything while it loads
        raise TraceFailed(
            model=spec,
            reason=f"importing '{path}' raised {type(error).__name__}: {error}",
            mend="Mend it first.",
        ) from error
    return module


def _said(made: Any) -> str:
    if isinstance(made, tuple):
        return f"a tuple of {', '.join(type(part).__name__ for part in made)}"
    return f"a {type(made).__name__}"
