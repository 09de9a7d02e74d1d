"""Thin: leave the first layers of each class and drop the others, where layers form a chain.

    before   h1 = layer0(h0); h2 = layer1(h1); ... h80 = layer79(h79)
    after    h1 = layer0(h0); h2 = layer1(h1)

What one layer costs does not depend on how many follow it, so tables are made from the thin graph:
for 80 layers that is minutes less work. It computes something else, of course; nothing runs it.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

from torch import Tensor
from torch.fx import GraphModule, Node

from planc.ir.graph import Graph
from planc.ir.text import show_type
from planc.passes.fold import LayerGroup, layers_of

#: Layers kept of each class: the second one shows what happens between equal layers.
KEPT = 2


def thin(graph: Graph, groups: Sequence[LayerGroup]) -> Graph:
    """A shallower graph with `KEPT` layers of each class; the graph itself where layers are no chain.

    A layer can go where each value it hands on has exactly one counterpart, of equal shape and dtype,
    among the values it takes from the layers before it.
    """
    dropped = {path for group in groups for path in group.paths[KEPT:]}
    nodes = copy.deepcopy(graph.module.graph)
    twins = dict(zip(graph.module.graph.nodes, nodes.nodes, strict=True))
    layers: dict[str, list[Node]] = {}
    layered: set[Node] = set()
    for node, path in layers_of(graph).items():
        if path is not None:
            layered.add(twins[node])
        if path in dropped:
            layers.setdefault(str(path), []).append(twins[node])
    for layer in layers.values():
        swaps = _swaps(graph, layer, layered)
        if swaps is None:
            return graph
        inside = set(layer)
        for out, carried in swaps.items():
            for user in [user for user in out.users if user not in inside]:
                user.replace_input_with(out, carried)
        for node in reversed(layer):
            nodes.erase_node(node)
    nodes.eliminate_dead_code()
    module = GraphModule(graph.module, nodes, class_name=type(graph.module).__name__)
    return graph.after("thin", module)


def _swaps(graph: Graph, members: list[Node], layered: set[Node]) -> dict[Node, Node] | None:
    """Each value that the layer hands on -> what stands in for it; None where that is not clear."""
    inside = set(members)
    handed = [node for node in members if any(user not in inside for user in node.users)]
    taken: dict[str, list[Node]] = {}
    for node in dict.fromkeys(used for member in members for used in member.all_input_nodes):
        if node not in inside and node in layered and isinstance(node.meta.get("val"), Tensor):
            taken.setdefault(show_type(node, graph.symbols), []).append(node)
    swaps: dict[Node, Node] = {}
    for node in handed:
        candidates = taken.get(show_type(node, graph.symbols), [])
        if len(candidates) != 1 or candidates[0] in swaps.values():
            return None
        swaps[node] = candidates[0]
    return swaps
