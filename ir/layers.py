"""Where in the model a node comes from: its module, and the repeated layer that module lies in.

Read from `meta["nn_module_stack"]`, which `torch.export` puts on every node of a user's module and
which passes hand on. A layer is the outermost member of a `ModuleList` or `Sequential` that is more
than one primitive of torch: `model.layers.12`, `blocks.3`, but not the `Conv2d` called `stem.0`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch.fx import Node

_CALL = re.compile(r"@\d+")  # torch.export marks the second call of a module as "name@1"
_PRIMITIVE = re.compile(r"^torch\.nn\.modules\.(?!container|transformer)")


def module_stack(node: Node) -> list[tuple[str, str]]:
    """The modules around a node, outermost first, as (path, class); the root's path is ""."""
    stack = node.meta.get("nn_module_stack") or {}
    found = []
    for path, kind in stack.values():
        name = kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}"
        if not path.startswith("_empty_nn_module_stack"):
            found.append((_CALL.sub("", path), name))
    return found


def module_path(node: Node) -> str:
    """The innermost module around a node, "" at the root or where that is unknown."""
    stack = module_stack(node)
    return stack[-1][0] if stack else ""


def layer_path(node: Node) -> str | None:
    """The layer a node lies in, e.g. "model.layers.12"; None outside the repeated layers."""
    for path, kind in module_stack(node):
        parts = path.split(".")
        if parts[-1].isdigit() and not _PRIMITIVE.match(kind):
            return path
    return None


def layer_of(node: Node) -> int | None:
    """The index of the layer a node lies in, e.g. 12 for "model.layers.12"."""
    path = layer_path(node)
    return None if path is None else int(path.rpartition(".")[2])


def relative(path: str, layer: str | None) -> str:
    """A dotted path as seen from inside a layer: `model.layers.3.mlp.up` -> `mlp.up`."""
    if layer and (path == layer or path.startswith(f"{layer}.")):
        return path[len(layer) + 1 :]
    return path


def layer_spans(nodes: Iterable[Node]) -> Iterator[tuple[str | None, list[Node]]]:
    """Runs of nodes of one layer (or of none, None), in order. Weights and inputs are left out."""
    run: list[Node] = []
    current: str | None = None
    for node in nodes:
        if node.op in ("get_attr", "placeholder", "output"):
            continue
        here = layer_path(node)
        if run and here != current:
            yield current, run
            run = []
        current = here
        run.append(node)
    if run:
        yield current, run


def structure(nodes: Iterable[Node], layer: str | None, *, ignore: Mapping[str, object] | None = None) -> str:
    """A hash of what the nodes of a layer compute, equal for layers that differ in weights alone.

    Covers the ops, their arguments, how values flow between the nodes, and the shapes and dtypes of
    results, weights and what comes from outside. Arguments named in `ignore` (by default the layer's
    own number) do not count.
    """
    skipped = {"layer": 0} if ignore is None else ignore
    numbers: dict[Node, str] = {}
    digest = hashlib.sha256()
    outside = 0

    def said(value: Any) -> str:
        nonlocal outside
        if isinstance(value, Node):
            if value not in numbers:
                if value.op == "get_attr":
                    numbers[value] = f"weight {relative(str(value.target), layer)}"
                else:
                    numbers[value] = f"outside {outside}"
                    outside += 1
                return f"{numbers[value]}:{shape_of(value)}"
            return numbers[value]
        if isinstance(value, tuple | list):
            return f"({','.join(said(item) for item in value)})"
        return repr(value)

    for index, node in enumerate(nodes):
        arguments = [said(value) for name, value in arguments_of(node) if name not in skipped]
        digest.update(f"{node.target}({';'.join(arguments)})->{shape_of(node)}\n".encode())
        numbers[node] = f"value {index}"
    return digest.hexdigest()[:16]


def arguments_of(node: Node) -> list[tuple[str, Any]]:
    """The arguments that a call gives, by schema name where the op has a schema."""
    if isinstance(node.target, torch._ops.OpOverload):
        specs = [argument.name for argument in node.target._schema.arguments]
        given = list(zip(specs, node.args, strict=False))
    else:
        given = [(f"arg{place}", value) for place, value in enumerate(node.args)]
    return [*given, *sorted(node.kwargs.items())]


def shape_of(node: Node) -> str:
    """Dtype and sizes of what a node yields, as text; "" where it yields no tensor."""
    value = node.meta.get("val")
    values = value if isinstance(value, tuple | list) else (value,)
    return " ".join(f"{v.dtype}{tuple(v.shape)}" for v in values if isinstance(v, torch.Tensor))
