"""A graph as text that people read, and that tests compare.

    llama: LlamaForCausalLM, traced
    inputs
      %input_ids: i64[B, S]
    model.layers.0
      %rms_norm: bf16[B, S, 4096] = planc.rms_norm(%embedding, .input_layernorm.weight, 1e-05)
      ...
    model.layers.1 .. model.layers.31: the same
    outputs
      %linear_7

One line per operation under the layer (or module) it comes from; weights are named in place, those
of the layer itself by the path inside it, after a dot. Sizes are B, S (batch, sequence) in traced
graphs and T, S (tokens, sequences) in phase graphs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch.fx import Node

from planc.ir.graph import Graph
from planc.ir.layers import layer_spans, module_path, structure

_DTYPES = {
    torch.float64: "f64",
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.float8_e4m3fn: "f8e4m3",
    torch.float8_e5m2: "f8e5m2",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "bool",
    torch.complex64: "c64",
}
_ROLES = {"batch": "B", "seq": "S", "table": "M"}


def show(graph: Graph, *, limit: int | None = None, fold: bool = True) -> str:
    """The graph as text, always the same for the same graph.

    limit   lines of operations to print at most; the rest is counted
    fold    print layers of equal structure once
    """
    lines = list(_body(graph, fold))
    if limit is not None and len(lines) > limit:
        lines = [*lines[:limit], f"... {len(lines) - limit} more lines"]
    return "\n".join([_title(graph), *lines]) + "\n"


def show_node(node: Node, symbols: Mapping[str, str], layer: str | None = None) -> str:
    """One operation: its result, type, op and arguments."""
    arguments = [show_value(value, layer) for value in node.args]
    arguments += [f"{name}={show_value(value, layer)}" for name, value in node.kwargs.items()]
    return f"%{node.name}: {show_type(node, symbols)} = {show_target(node)}({', '.join(arguments)})"


def show_type(node: Node, symbols: Mapping[str, str]) -> str:
    """Type of what a node yields: `bf16[B, S, 4096]`, `int` or, of several, `(a, b)`."""
    return _typed(node.meta.get("val"), symbols)


def show_target(node: Node) -> str:
    """`planc.rms_norm`, `aten.add.Tensor` (the default overload is not named), `getitem`."""
    if isinstance(node.target, torch._ops.OpOverload):
        name = node.target.name().replace("::", ".")
        return str(name.removesuffix(".default"))
    return str(getattr(node.target, "__name__", "")) or str(node.target)


def show_value(value: Any, layer: str | None = None) -> str:
    """An argument: a node, a weight, a number, a dtype or a list of these."""
    if isinstance(value, Node):
        if value.op != "get_attr":
            return f"%{value.name}"
        name = str(value.target)
        return name[len(layer) :] if layer and name.startswith(f"{layer}.") else name
    if isinstance(value, tuple | list):
        return f"[{', '.join(show_value(item, layer) for item in value)}]"
    if isinstance(value, torch.dtype):
        return _DTYPES.get(value, str(value))
    if isinstance(value, str):
        return f"'{value}'"
    return str(value)


def _title(graph: Graph) -> str:
    passes = f", after {', '.join(graph.history)}" if graph.history else ""
    return f"{graph.source.name}: {graph.source.architecture}, {graph.stage}{passes}"


def _body(graph: Graph, fold: bool) -> Iterator[str]:
    nodes = list(graph.module.graph.nodes)
    yield "inputs"
    for node in nodes:
        if node.op == "placeholder":
            yield f"  %{node.name}: {show_type(node, graph.symbols)}"
    runs = list(layer_spans(nodes))
    place = 0
    while place < len(runs):
        layer, run = runs[place]
        yield from _run(run, layer, graph.symbols)
        last = _last_same(runs, place) if fold else place
        if last > place:
            yield f"{_span(str(runs[place + 1][0]), str(runs[last][0]))}: the same"
        place = last + 1
    for node in nodes:
        if node.op == "output":
            yield "outputs"
            outputs = node.args[0] if isinstance(node.args[0], tuple | list) else (node.args[0],)
            yield from (f"  {show_value(value)}" for value in outputs)


def _run(run: list[Node], layer: str | None, symbols: Mapping[str, str]) -> Iterator[str]:
    heading: str | None = None
    for node in run:
        wanted = layer or module_path(node) or "(top)"
        if wanted != heading:
            heading = wanted
            yield heading
        yield f"  {show_node(node, symbols, layer)}"


def _last_same(runs: list[tuple[str | None, list[Node]]], place: int) -> int:
    """The last of the layers that follow one another and are built as `runs[place]` is."""
    layer, run = runs[place]
    if layer is None:
        return place
    wanted = structure(run, layer)
    last = place
    for here in range(place + 1, len(runs)):
        other, nodes = runs[here]
        if other is None or structure(nodes, other) != wanted:
            break
        last = here
    return last


def _span(first: str, last: str) -> str:
    return first if first == last else f"{first} .. {last}"


def _typed(value: Any, symbols: Mapping[str, str]) -> str:
    if isinstance(value, torch.Tensor):
        sizes = ", ".join(_size(size, symbols) for size in value.shape)
        return f"{_DTYPES.get(value.dtype, str(value.dtype))}[{sizes}]"
    if isinstance(value, tuple | list):
        return f"({', '.join(_typed(item, symbols) for item in value)})"
    if isinstance(value, int | torch.SymInt):
        return "int"
    return "?" if value is None else type(value).__name__


def _size(size: int | torch.SymInt, symbols: Mapping[str, str]) -> str:
    """A size with its symbols called by their roles: `B*S`, `S + 1`."""
    if isinstance(size, int):
        return str(size)
    named = {symbol: _name(symbol, symbols) for symbol in size.node.expr.free_symbols}
    return str(size.node.expr.xreplace(named))


def _name(symbol: sympy.Symbol, symbols: Mapping[str, str]) -> sympy.Symbol:
    role = symbols.get(str(symbol), "other")
    return symbol if role == "other" else sympy.Symbol(_ROLES.get(role, role), integer=True, positive=True)
