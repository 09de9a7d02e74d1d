"""Folding depth while tracing: one layer of each kind is recorded, the others are copies of it.

Eighty equal decoder layers take eighty times as long to export as one, and give the same nodes but
for the names of their weights. So only the first layer of a kind is traced; each further one leaves
a single `repeat` marker, which `unfold` replaces by a copy of the first one's nodes. The result is
the graph of full depth.

Two layers are of one kind when their modules agree in classes, structure, every plain attribute but
the layer's number, shapes of parameters and buffers and the configuration's entries for the layer,
and when they are called alike. Anything not understood (an attribute that is some object of the
layer's own, an argument that collects state) makes a layer a kind of its own.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from operator import getitem
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.utils import _pytree as pytree

from planc.ir.trace.raising import Raising

_PLAIN = (bool, int, float, str, bytes, type(None), torch.dtype, torch.device)
_NUMBERS = ("layer_idx", "layer_id", "layer_number")  # which layer it is: the one thing that may differ
_IDS = itertools.count()
_SHAPES: dict[int, list[tuple[Any, Any, torch.dtype, torch.device]]] = {}


# -- markers in the graph being traced; they never run --------------------------------------


def _like(tensors: list[Tensor]) -> list[Tensor]:
    return [torch.empty_like(t) for t in tensors]


@torch.library.custom_op("planc_trace::enter", mutates_args=())
def enter(tensors: list[Tensor], call: int) -> list[Tensor]:
    """The tensors that a layer is called with."""
    return [t.clone() for t in tensors]


@enter.register_fake
def _(tensors: list[Tensor], call: int) -> list[Tensor]:
    return _like(tensors)


@torch.library.custom_op("planc_trace::leave", mutates_args=())
def leave(tensors: list[Tensor], call: int) -> list[Tensor]:
    """The tensors that a layer gives back."""
    return [t.clone() for t in tensors]


@leave.register_fake
def _leave_fake(tensors: list[Tensor], call: int) -> list[Tensor]:
    _SHAPES[call] = [(t.shape, t.stride(), t.dtype, t.device) for t in tensors]
    return _like(tensors)


@torch.library.custom_op("planc_trace::repeat", mutates_args=())
def repeat(tensors: list[Tensor], call: int, first: int) -> list[Tensor]:
    """A layer that does to `tensors` what call `first` did to its own, with its own weights."""
    raise AssertionError("a repeat marker is unfolded before a graph runs")


@repeat.register_fake
def _repeat_fake(tensors: list[Tensor], call: int, first: int) -> list[Tensor]:
    return [torch.empty_strided(size, stride, dtype=d, device=at) for size, stride, d, at in _SHAPES[first]]


# -- while tracing ----------------------------------------------------------------------------


@dataclass(slots=True)
class Folded:
    """What `unfold` must know: call number -> dotted name of the layer that was called."""

    layers: dict[int, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _First:
    """The first call of a kind: its number, and its result with tensors taken out."""

    call: int
    leaves: tuple[Any, ...]
    spec: Any


def fold_depth(raising: Raising, model: nn.Module) -> Folded:
    """Makes layers of one kind share a trace until the raising ends. Call before parts are raised."""
    folded, firsts = Folded(), dict[Any, _First]()
    kinds: dict[str, Any] = {}
    config: Any = getattr(model, "config", None)
    settings = {} if config is None else config.to_dict()
    for path, layers in _stacks(model):
        for index, layer in enumerate(layers):
            kinds[f"{path}.{index}"] = _signature(layer, index, len(layers), settings)
    counts: dict[Any, int] = {}
    for kind in kinds.values():
        counts[kind] = counts.get(kind, 0) + 1
    for name, kind in kinds.items():
        if counts[kind] > 1:
            layer = model.get_submodule(name)
            raising.set(layer, "forward", _sharing(layer.forward, name, kind, folded, firsts))
    raising.stack.callback(lambda: [_SHAPES.pop(call, None) for call in folded.layers])
    return folded


def _stacks(model: nn.Module) -> Iterator[tuple[str, nn.ModuleList]]:
    """Outermost lists of layers."""
    found: list[str] = []
    for path, module in model.named_modules():
        inner = any(path.startswith(f"{outer}.") for outer in found)
        if isinstance(module, nn.ModuleList) and len(module) > 1 and not inner:
            found.append(path)
            yield path, module


def _signature(layer: nn.Module, index: int, depth: int, settings: Mapping[str, Any]) -> Any:
    """What must agree for two layers to compute alike."""
    parts: list[Any] = [_entries(settings, index, depth)]
    for path, module in layer.named_modules():
        tensors = [
            (name, tuple(t.shape), t.dtype)
            for table in (module._parameters, module._buffers)
            for name, t in table.items()
            if t is not None
        ]
        own = sorted(
            (name, _value(value))
            for name, value in vars(module).items()
            if not name.startswith("_") and name not in _NUMBERS
        )
        parts.append((path, type(module), tuple(tensors), tuple(own)))
    return tuple(parts)


def _entries(settings: Mapping[str, Any], index: int, depth: int) -> Any:
    """The configuration's own word on this layer: its entry in every list as long as the model, and
    whether lists of rising numbers (layers that have experts, ...) name it."""
    said: list[tuple[str, str]] = []
    for key, value in sorted(settings.items()):
        if not isinstance(value, list | tuple) or not value:
            continue
        if all(type(item) is int for item in value) and all(a < b for a, b in itertools.pairwise(value)):
            said.append((key, str(index in value)))
        elif len(value) == depth:
            said.append((key, repr(value[index])))
    return tuple(said)


def _value(value: Any) -> Any:
    if isinstance(value, _PLAIN):
        return repr(value)
    if isinstance(value, list | tuple | set):
        return f"{type(value).__name__}({', '.join(_value(v) for v in value)})"
    if isinstance(value, functools.partial):
        return (
            f"partial({_value(value.func)}, {_value(value.args)}, {_value(sorted(value.keywords.items()))})"
        )
    if callable(value) and hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__} of {id(getattr(value, '__self__', None))}"
    return f"{type(value).__name__} at {id(value)}"


def _sharing(forward: Any, name: str, kind: Any, folded: Folded, firsts: dict[Any, _First]) -> Any:
    def shared(*args: Any, **kwargs: Any) -> Any:
        leaves, spec = pytree.tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        key = (kind, str(spec), tuple(_described(leaf) for leaf in leaves))
        call = next(_IDS)
        folded.layers[call] = name
        if key in firsts:
            first = firsts[key]
            given = iter(torch.ops.planc_trace.repeat(tensors, call, first.call))
            results = [next(given) if leaf is Tensor else leaf for leaf in first.leaves]
            return pytree.tree_unflatten(results, first.spec)
        entered = iter(torch.ops.planc_trace.enter(tensors, call))
        renewed = [next(entered) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        args, kwargs = pytree.tree_unflatten(renewed, spec)
        out, out_spec = pytree.tree_flatten(forward(*args, **kwargs))
        left = iter(torch.ops.planc_trace.leave([t for t in out if isinstance(t, Tensor)], call))
        results = [next(left) if isinstance(leaf, Tensor) else leaf for leaf in out]
        if not any(isinstance(leaf, Mapping) and len(leaf) for leaf in leaves):  # nothing was left in passing
            shape = tuple(Tensor if isinstance(leaf, Tensor) else leaf for leaf in out)
            firsts[key] = _First(call, shape, out_spec)
        return pytree.tree_unflatten(results, out_spec)

    return shared


def _described(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return (str(tuple(leaf.shape)), str(leaf.dtype))
    return repr(leaf) if isinstance(leaf, _PLAIN) else id(leaf)


# -- afterwards ---------------------------------------------------------------------------------


def unfold(module: GraphModule, model: nn.Module, folded: Folded, tied: Mapping[str, str]) -> None:
    """Replaces every marker: repeats by copies of the first layer of their kind. The caller recompiles.

    y = repeat([x], 7, 3)     ->     the nodes between enter([..], 3) and leave([..], 3), reading
                                     x, with weights of call 7's layer instead of call 3's
    """
    graph = module.graph
    bodies = _bodies(graph)
    weights = _Weights(module, dict(_tensors(model)), tied)
    for node in list(graph.nodes):
        if node.target is not torch.ops.planc_trace.repeat.default:
            continue
        _, call, first = node.args
        entry, body, exit_ = bodies[first]
        old, new = folded.layers[first], folded.layers[call]
        copies: dict[Node, Node] = {}

        def follow(source: Node, copies: dict[Node, Node] = copies, old: str = old, new: str = new) -> Node:
            if source in copies:
                return copies[source]
            return weights.counterpart(source, old, new) if source.op == "get_attr" else source

        for inner in body:
            if inner.target is getitem and inner.args[0] is entry:
                copies[inner] = _picked(node, inner)
                continue
            with graph.inserting_before(node):
                copies[inner] = graph.node_copy(inner, follow)
            copies[inner].meta = _renamed(inner.meta, old, new)
        for user in list(node.users):
            user.replace_all_uses_with(follow(_picked(exit_, user)))
            graph.erase_node(user)
        graph.erase_node(node)
    for entry, _, exit_ in bodies.values():
        for marker in (exit_, entry):
            for user in list(marker.users):
                user.replace_all_uses_with(_picked(marker, user))
                graph.erase_node(user)
            graph.erase_node(marker)
    graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))
    graph.lint()


def _picked(marker: Node, item: Node) -> Node:
    """The tensor a marker was called with at the place that a getitem of it picks."""
    tensors: Any = marker.args[0]
    picked = tensors[item.args[1]]
    assert isinstance(picked, Node)
    return picked


def _bodies(graph: Graph) -> dict[int, tuple[Node, list[Node], Node]]:
    """Call number -> (enter marker, nodes in between, leave marker)."""
    found: dict[int, tuple[Node, list[Node], Node]] = {}
    entry: Node | None = None
    body: list[Node] = []
    for node in graph.nodes:
        if node.target is torch.ops.planc_trace.enter.default:
            entry, body = node, []
        elif node.target is torch.ops.planc_trace.leave.default:
            assert entry is not None
            found[node.args[1]] = (entry, body, node)
            entry = None
        elif entry is not None and node.op != "get_attr":
            body.append(node)
    return found


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


@dataclass(slots=True)
class _Weights:
    """`get_attr` nodes by name; made, with the attribute itself, where the graph has none yet."""

    module: GraphModule
    values: Mapping[str, Tensor]
    tied: Mapping[str, str]
    nodes: dict[str, Node] = field(default_factory=dict)
    last: Node | None = None

    def __post_init__(self) -> None:
        for node in self.module.graph.nodes:
            if node.op == "get_attr":
                self.nodes[node.target] = self.last = node

    def counterpart(self, source: Node, old: str, new: str) -> Node:
        target = str(source.target)
        if not target.startswith(f"{old}."):
            return source
        name = new + target[len(old) :]
        name = self.tied.get(name, name)
        if name not in self.values:
            return source  # a constant that the layer's code made, not a weight
        if name not in self.nodes:
            _attach(self.module, name, self.values[name])
            assert self.last is not None
            with self.module.graph.inserting_after(self.last):
                made = self.module.graph.get_attr(name)
            made.meta = dict(source.meta)
            self.nodes[name] = self.last = made
        return self.nodes[name]


def _attach(module: nn.Module, name: str, value: Tensor) -> None:
    *path, leaf = name.split(".")
    for part in path:
        if part not in module._modules:
            module.add_module(part, nn.Module())
        module = module.get_submodule(part)
    if isinstance(value, nn.Parameter):
        module.register_parameter(leaf, value)
    else:
        module.register_buffer(leaf, value)


def _renamed(meta: Mapping[str, Any], old: str, new: str) -> dict[str, Any]:
    """A node's meta with the layer's own name in its module stack."""
    out = dict(meta)
    stack = meta.get("nn_module_stack")
    if stack:
        out["nn_module_stack"] = {
            key.replace(old, new): (_moved(path, old, new), cls) for key, (path, cls) in stack.items()
        }
    return out


def _moved(path: str, old: str, new: str) -> str:
    return new + path[len(old) :] if path == old or path.startswith(f"{old}.") else path
