"""Running a graph that has no phases: an encoder or any module, plain inputs to plain outputs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from planc.errors import FileMissing, FileUnreadable, InvalidField, UnknownField
from planc.ir.graph import Graph
from planc.runtime.binding import bind

_MEND = 'Write JSON ({"input": nested lists}), or a .pt, .npz or .safetensors file of named tensors.'


def input_specs(graph: Graph) -> dict[str, Tensor]:
    """The fake tensor of every input of a graph, by name, in order."""
    found = {}
    for node in graph.module.graph.nodes:
        if node.op == "placeholder" and isinstance(node.meta.get("val"), Tensor):
            found[str(node.target)] = node.meta["val"]
    return found


def run_module(
    graph: Graph,
    weights: Mapping[str, Tensor],
    inputs: Mapping[str, Tensor],
    *,
    device: str | torch.device = "cpu",
) -> tuple[Tensor, ...]:
    """The outputs of a graph, flattened. Inputs go by name; see `read_inputs` for the errors."""
    given = checked(graph, inputs)
    (module,) = bind((graph,), weights, device)
    with torch.inference_mode():
        outputs = module(*(tensor.to(device) for tensor in given.values()))
    return tuple(leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor))


def random_inputs(graph: Graph, seed: int = 0) -> dict[str, Tensor]:
    """Inputs to try a graph with: symbolic sizes as in the trace's own example, integers 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, spec in input_specs(graph).items():
        shape = [n if isinstance(n, int) else int(n.node.hint) for n in spec.shape]
        if spec.is_floating_point():
            made[name] = torch.randn(shape, generator=generator).to(spec.dtype)
        else:
            made[name] = torch.randint(0, 2, shape, generator=generator).to(spec.dtype)
    return made


def read_inputs(graph: Graph, path: Path) -> dict[str, Tensor]:
    """Named tensors from a file, in the dtypes of the graph's inputs.

    Raises FileMissing, FileUnreadable; UnknownField and InvalidField where names or shapes differ.
    """
    if not path.is_file():
        raise FileMissing(what="inputs", path=path, mend=_MEND)
    try:
        found = _read(path)
    except (OSError, ValueError, TypeError, RuntimeError, KeyError, EOFError) as error:
        raise FileUnreadable(
            what="inputs", path=path, format=path.suffix.lstrip(".") or "JSON", reason=error, mend=_MEND
        ) from error
    return checked(graph, found)


def checked(graph: Graph, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inputs in the graph's order and dtypes; raises UnknownField or InvalidField."""
    specs = input_specs(graph)
    where = f"inputs of '{graph.source.name}'"
    for name in inputs:
        if name not in specs:
            raise UnknownField(where=where, field=name, mend=f"Its inputs are: {', '.join(specs)}.")
    result = {}
    for name, spec in specs.items():
        wanted = tuple(n if isinstance(n, int) else -1 for n in spec.shape)
        if name not in inputs:
            raise InvalidField(
                where=where,
                field=name,
                value=None,
                reason="it is missing",
                mend=f"Give a tensor of shape {_said(wanted)}.",
            )
        tensor = inputs[name]
        fits = tensor.dim() == len(wanted) and all(
            due in (-1, n) for n, due in zip(tensor.shape, wanted, strict=True)
        )
        if not fits:
            raise InvalidField(
                where=where,
                field=name,
                value=list(tensor.shape),
                reason=f"its shape must be {_said(wanted)}",
                mend="A star stands for any size.",
            )
        result[name] = tensor.to(spec.dtype)
    return result


def _said(shape: tuple[int, ...]) -> str:
    return "[" + ", ".join("*" if n < 0 else str(n) for n in shape) + "]"


def _read(path: Path) -> dict[str, Tensor]:
    match path.suffix:
        case ".pt" | ".pth":
            raw = torch.load(path, map_location="cpu", weights_only=True)
        case ".npz":
            raw = dict(np.load(path, allow_pickle=False))
        case ".safetensors":
            from safetensors.torch import load_file

            raw = load_file(path)
        case _:
            raw = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(raw, dict):
        raise ValueError(f"it holds a {type(raw).__name__}, not tensors by name")
    return {str(name): torch.as_tensor(value) for name, value in raw.items()}
