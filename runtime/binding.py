"""Binding weights to graphs, by the source model's own names.

A graph's parameters are `get_attr` nodes whose tensors lie on meta. Passes that merge, quantize or
divide parameters leave `weight_steps` behind; binding replays them on the real tensors.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.fx import Graph as Nodes
from torch.fx import GraphModule

from planc.errors import WeightsMismatch
from planc.ir.graph import Graph
from planc.passes.fusion_rewriter import weights_for

#: Types between which binding converts.
_FLOATS = {torch.float32, torch.bfloat16, torch.float16}


def parameters(graph: Graph) -> dict[str, Tensor]:
    """Every tensor attribute a graph reads, by name: on meta (to be bound) or real (its own constants)."""
    found: dict[str, Tensor] = {}
    for node in graph.module.graph.nodes:
        if node.op == "get_attr" and node.target not in found:
            value: object = graph.module
            for part in node.target.split("."):
                value = getattr(value, part)
            if isinstance(value, Tensor):
                found[node.target] = value
    return found


def check(graph: Graph, weights: Mapping[str, Tensor], origin: str = "weights") -> None:
    """Raises WeightsMismatch unless every parameter of the graph has a tensor of its shape and kind.

    Ordinary floating-point types may differ (binding converts them); others must be the same.
    """
    wanted = {name: value for name, value in parameters(graph).items() if value.is_meta}
    missing = [name for name in wanted if name not in weights]
    if missing:
        raise WeightsMismatch(
            path=origin,
            reason=f"{len(missing)} of {len(wanted)} parameters are missing, the first is '{missing[0]}'",
            mend="Give the weights of the model that was compiled.",
        )
    for name, value in wanted.items():
        given = weights[name]
        alike = given.dtype == value.dtype or {given.dtype, value.dtype} <= _FLOATS
        if given.shape != value.shape or not alike:
            raise WeightsMismatch(
                path=origin,
                reason=f"'{name}' is {_kind(given)}, the model has {_kind(value)}",
                mend="Give the weights of the model that was compiled.",
            )


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def bind(
    graphs: Sequence[Graph],
    weights: Mapping[str, Tensor],
    device: torch.device | str = "cpu",
    origin: str = "weights",
) -> tuple[GraphModule, ...]:
    """Runnable modules of graphs that share one set of weights; the graphs themselves stay on meta.

    Graphs with the same weight steps share the tensors too. Raises WeightsMismatch.
    """
    placed: dict[tuple[int, torch.dtype], Tensor] = {}

    def place(tensor: Tensor, dtype: torch.dtype) -> Tensor:
        key = (id(tensor), dtype)
        if key not in placed:
            placed[key] = tensor.detach().to(device, dtype)
        return placed[key]

    modules = []
    made: list[tuple[object, dict[str, Tensor]]] = []
    for graph in graphs:
        tensors = next((found for steps, found in made if steps == graph.weight_steps), None)
        if tensors is None:
            tensors = weights_for(graph, weights, origin)
            made.append((graph.weight_steps, tensors))
        check(graph, tensors, origin)
        attributes = {
            name: place(tensors.get(name, value), value.dtype) for name, value in parameters(graph).items()
        }
        modules.append(GraphModule(attributes, _placed_on(graph, torch.device(device))))
    return tuple(modules)


def _placed_on(graph: Graph, device: torch.device) -> Nodes:
    """The graph's nodes, where tensors that the traced code made itself lie on `device`.

    before   aten.arange(S, device=meta)     (traced on meta, as the parameters)
    after    aten.arange(S, device=cpu)
    """
    nodes = copy.deepcopy(graph.module.graph)
    for node in nodes.nodes:
        if isinstance(node.kwargs.get("device"), torch.device):
            node.kwargs = {**node.kwargs, "device": device}
    return nodes
