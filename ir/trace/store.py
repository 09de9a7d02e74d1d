"""A traced graph as JSON, and back: what the trace cache holds. Data only; loading runs no code.

Weights are stored as dtype and shape and come back on the meta device, whatever they were; small
real buffers (rotary frequencies and the like, which no checkpoint holds) are stored with their
values. Size symbols are made anew in a fresh shape environment, so their names may differ.
"""

from __future__ import annotations

import ast
import base64
import json
import math
import operator
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch import Tensor, nn
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.utils._sympy import functions as sizes

import planc.ir.ops  # noqa: F401  (targets are looked up by name)
from planc.ir.graph import Graph, Source
from planc.ir.layers import module_stack

#: Real tensors up to this many elements are stored with their values.
_SMALL = 1 << 20
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    **{name: getattr(operator, name) for name in ("getitem", "add", "sub", "mul", "floordiv", "mod", "neg")},
    **{name: getattr(operator, name) for name in ("truediv", "pow", "lt", "le", "gt", "ge", "eq", "ne")},
    **{name: getattr(torch, name) for name in ("sym_max", "sym_min", "sym_float", "sym_int", "sym_not")},
    **{f"math.{name}": getattr(math, name) for name in ("floor", "ceil", "trunc")},
}
_NAMES = {function: name for name, function in _FUNCTIONS.items()}


def dumps(graph: Graph) -> str:
    """The graph as JSON. Only traced graphs that no pass has touched are stored; others raise ValueError."""
    if graph.stage != "traced" or graph.history or graph.weight_steps:
        raise ValueError("only traced graphs that no pass has touched are stored")
    nodes = list(graph.module.graph.nodes)
    raw = {
        "source": asdict(graph.source),
        "symbols": dict(graph.symbols),
        "class": type(graph.module).__name__,
        "tensors": dict(_tensors(graph.module, nodes)),
        "nodes": [_node(node) for node in nodes],
    }
    return json.dumps(raw, separators=(",", ":"))


def loads(text: str) -> Graph:
    """The graph back. Raises ValueError, KeyError or AttributeError where the text is not one of `dumps`."""
    raw = json.loads(text)
    reader = _Reader()
    root = nn.Module()
    for name, held in raw["tensors"].items():
        _attach(root, name, held)
    graph = torch.fx.Graph()
    for item in raw["nodes"]:
        reader.add(graph, item)
    module = GraphModule(root, graph, class_name=raw["class"])
    roles = {reader.renamed.get(symbol, symbol): role for symbol, role in raw["symbols"].items()}
    source = Source(**{**raw["source"], "notes": tuple(raw["source"]["notes"])})
    return Graph(module=module, stage="traced", source=source, symbols=roles)


# -- writing -----------------------------------------------------------------------------


def _tensors(module: GraphModule, nodes: list[Node]) -> Iterator[tuple[str, dict[str, Any]]]:
    parameters = dict(module.named_parameters(remove_duplicate=False))
    for node in nodes:
        if node.op != "get_attr":
            continue
        held = operator.attrgetter(str(node.target))(module)
        kind = "parameter" if str(node.target) in parameters else "buffer"
        entry = {"dtype": _bare(held.dtype), "shape": list(held.shape), "kind": kind}
        if kind == "buffer" and held.device.type != "meta" and held.numel() <= _SMALL:
            raw = held.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy().tobytes()
            entry["data"] = base64.b64encode(raw).decode()
        yield str(node.target), entry


def _node(node: Node) -> dict[str, Any]:
    item: dict[str, Any] = {"op": node.op, "name": node.name, "target": _target(node)}
    item["args"] = [_write(value) for value in node.args]
    if node.kwargs:
        item["kwargs"] = {name: _write(value) for name, value in node.kwargs.items()}
    if "val" in node.meta:
        item["val"] = _write_value(node.meta["val"])
    if stack := module_stack(node):
        item["stack"] = stack
    if trace := node.meta.get("stack_trace"):
        item["trace"] = trace
    return item


def _target(node: Node) -> str:
    if isinstance(node.target, torch._ops.OpOverload):
        return str(node.target)
    if node.op != "call_function":
        return str(node.target)
    if node.target not in _NAMES:
        raise ValueError(f"{node.target} cannot be stored")
    return f"python.{_NAMES[node.target]}"


def _write(value: Any) -> Any:
    if isinstance(value, Node):
        return {"node": value.name}
    if isinstance(value, tuple | list):
        return [_write(item) for item in value]
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return {"float": repr(value)}
    if isinstance(value, torch.dtype | torch.layout | torch.memory_format):
        return {"torch": _bare(value)}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    raise ValueError(f"an argument of type {type(value).__name__} cannot be stored")


def _write_value(value: Any) -> Any:
    if isinstance(value, Tensor):
        return {
            "dtype": _bare(value.dtype),
            "shape": [_write_size(size) for size in value.shape],
            "stride": [_write_size(step) for step in value.stride()],
            "device": str(value.device),
            "hints": [_hint(size) for size in value.shape],
        }
    if isinstance(value, tuple | list):
        return [_write_value(item) for item in value]
    if isinstance(value, torch.SymInt):
        return {"size": str(value.node.expr), "hint": _hint(value)}
    return _write(value)


def _write_size(size: int | torch.SymInt) -> int | str:
    return size if isinstance(size, int) else str(size.node.expr)


def _hint(size: int | torch.SymInt) -> int:
    if isinstance(size, int):
        return size
    hint = size.node.hint
    return 64 if hint is None else int(hint)


def _bare(value: object) -> str:
    return str(value).removeprefix("torch.")


# -- reading -----------------------------------------------------------------------------


def _attach(root: nn.Module, name: str, held: dict[str, Any]) -> None:
    dtype = getattr(torch, held["dtype"])
    if "data" in held:
        raw = bytearray(base64.b64decode(held["data"]))
        tensor = (
            torch.frombuffer(raw, dtype=dtype).reshape(held["shape"]) if raw else torch.empty(0, dtype=dtype)
        )
    else:
        tensor = torch.empty(held["shape"], dtype=dtype, device="meta")
    *path, leaf = name.split(".")
    owner = root
    for part in path:
        if part not in owner._modules:
            owner.add_module(part, nn.Module())
        owner = owner.get_submodule(part)
    if held["kind"] == "parameter":
        owner.register_parameter(leaf, nn.Parameter(tensor, requires_grad=False))
    else:
        owner.register_buffer(leaf, tensor)


class _Reader:
    """Rebuilds nodes and their values in one fake mode; `renamed` maps stored symbols to the new ones."""

    def __init__(self) -> None:
        self.environment = ShapeEnv()
        self.mode = FakeTensorMode(shape_env=self.environment, allow_non_fake_inputs=True)
        self.nodes: dict[str, Node] = {}
        self.renamed: dict[str, str] = {}
        self._symbols: dict[str, sympy.Expr] = {}
        self._sizes: dict[str, int | torch.SymInt] = {}
        self._tensors: dict[str, Tensor] = {}

    def add(self, graph: torch.fx.Graph, item: dict[str, Any]) -> None:
        target = self._target(item) if item["op"] == "call_function" else item["target"]
        args = tuple(self._argument(value) for value in item["args"])
        kwargs = {name: self._argument(value) for name, value in item.get("kwargs", {}).items()}
        node = graph.create_node(item["op"], target, args, kwargs, name=item["name"])
        self.nodes[item["name"]] = node
        if "stack" in item:
            node.meta["nn_module_stack"] = {f"L{i}": tuple(entry) for i, entry in enumerate(item["stack"])}
        if "trace" in item:
            node.meta["stack_trace"] = item["trace"]
        if "val" in item:
            if item["op"] == "placeholder":
                self._declare(item["val"])
            node.meta["val"] = self._value(item["val"])

    def _target(self, item: dict[str, Any]) -> Any:
        namespace, _, rest = item["target"].partition(".")
        if namespace == "python":
            return _FUNCTIONS[rest]
        packet, overload = rest.rsplit(".", 1)
        return getattr(getattr(getattr(torch.ops, namespace), packet), overload)

    def _argument(self, value: Any) -> Any:
        if isinstance(value, list):
            return [self._argument(item) for item in value]
        if not isinstance(value, dict):
            return value
        if "node" in value:
            return self.nodes[value["node"]]
        if "float" in value:
            return float(value["float"])
        if "device" in value:
            return torch.device(value["device"])
        return getattr(torch, value["torch"])

    def _value(self, value: Any) -> Any:
        if isinstance(value, list):
            return [self._value(item) for item in value]
        if isinstance(value, dict) and "shape" in value:
            return self._tensor(value)
        if isinstance(value, dict) and "size" in value:
            return self._size(value["size"], value["hint"])
        return self._argument(value)

    def _tensor(self, value: dict[str, Any]) -> Tensor:
        """A fake tensor; equal ones are one object, as nothing of them but their description is used."""
        described = repr(value)
        if described not in self._tensors:
            shape = [
                self._size(size, hint) for size, hint in zip(value["shape"], value["hints"], strict=True)
            ]
            stride = [self._size(step, None) for step in value["stride"]]
            with self.mode:
                self._tensors[described] = torch.empty_strided(
                    shape, stride, dtype=getattr(torch, value["dtype"]), device=value["device"]
                )
        return self._tensors[described]

    def _declare(self, value: Any) -> None:
        """Makes the symbols that an input's sizes introduce."""
        if not isinstance(value, dict) or "shape" not in value:
            return
        for size, hint in zip(value["shape"], value["hints"], strict=True):
            if isinstance(size, str) and size.isidentifier() and size not in self._symbols:
                context: Any = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC])
                example = torch.empty(max(hint, 2), device="meta")
                fake = self.mode.from_tensor(
                    example, symbolic_context=context, source=ConstantSource(f"size_{size}")
                )
                symbol = fake.shape[0].node.expr  # type: ignore[attr-defined]
                self._symbols[size] = symbol
                self.renamed[size] = str(symbol)

    def _size(self, size: int | str, hint: int | None) -> int | torch.SymInt:
        if isinstance(size, int):
            return size
        if size not in self._sizes:
            expression = _parse(size, self._symbols)
            self._sizes[size] = self.environment.create_symintnode(expression, hint=hint)
        return self._sizes[size]


_OPERATORS: dict[type[ast.AST], Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Pow: operator.pow,
    ast.Div: operator.truediv,
    ast.USub: operator.neg,
}


def _parse(text: str, symbols: dict[str, sympy.Expr]) -> sympy.Expr:
    """A size expression as sympy prints it, read without evaluating code."""

    def walk(node: ast.AST) -> Any:
        match node:
            case ast.Expression(body):
                return walk(body)
            case ast.Constant(int() as value):
                return sympy.Integer(value)
            case ast.Name(name):
                return symbols[name]
            case ast.BinOp(left, operation, right):
                return _OPERATORS[type(operation)](walk(left), walk(right))
            case ast.UnaryOp(operation, operand):
                return _OPERATORS[type(operation)](walk(operand))
            case ast.Call(ast.Name(name), arguments, []):
                return getattr(sizes, name)(*map(walk, arguments))
        raise ValueError(f"'{text}' is no size")

    return walk(ast.parse(text, mode="eval"))
