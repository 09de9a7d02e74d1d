"""Fold: repeated layers become layer classes, so that costs are computed once and multiplied.

    80 x model.layers.i      ->  embedding x 1, decoder x 80, head x 1
    DeepSeek-R1's 61 layers  ->  embedding x 1, dense x 3, moe x 58, head x 1

Layers are equal when they compute the same on the same shapes (`planc.ir.layers.structure`), whatever
their weights hold. A class is called after what sets it apart from the others.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.fx import Node

from planc.ir.graph import Graph
from planc.ir.layers import layer_of, layer_path, module_stack, structure
from planc.ir.opdef import Call, declaration

__all__ = ["LayerGroup", "fold", "layer_of", "layer_path", "traits"]


@dataclass(frozen=True, slots=True)
class LayerGroup:
    """Layers of one structure; "embedding", "head" and "model" (a graph without layers) are not layers.

    paths     where each lies, e.g. "model.layers.3"; "" for what is no layer
    members   the nodes of each, in order of the graph, without weights and inputs
    """

    name: str
    paths: tuple[str, ...]
    members: tuple[tuple[Node, ...], ...]

    @property
    def count(self) -> int:
        return len(self.members)

    @property
    def layers(self) -> tuple[int, ...]:
        """The index of each layer in its `ModuleList`."""
        return tuple(int(path.rpartition(".")[2]) for path in self.paths if path)

    @property
    def nodes(self) -> tuple[Node, ...]:
        """The nodes of the first layer, which stands for all."""
        return self.members[0]


def fold(graph: Graph) -> tuple[LayerGroup, ...]:
    """The layer classes of a graph, in the order they first run. What depends on no layer is
    "embedding", what else lies outside them "head". Every call that yields tensors is in exactly one
    layer; arithmetic on sizes is in none.
    """
    places = {node: path for node, path in layers_of(graph).items() if _computes(node)}
    layers: dict[str, list[Node]] = {}
    embedding: list[Node] = []
    head: list[Node] = []
    after: set[Node] = set()
    for node, path in places.items():
        if path is not None:
            layers.setdefault(path, []).append(node)
        late = path is not None or any(used in after for used in node.all_input_nodes)
        if late:
            after.add(node)
        if path is None:
            (head if late else embedding).append(node)
    if not layers:
        return (LayerGroup("model", ("",), (tuple(embedding),)),)
    alike: dict[tuple[str, str], list[str]] = {}
    for path, nodes in layers.items():
        alike.setdefault((path.rpartition(".")[0], structure(nodes, path)), []).append(path)
    names = _names(graph, [layers[paths[0]] for paths in alike.values()], [key[0] for key in alike])
    groups = [LayerGroup("embedding", ("",), (tuple(embedding),))] if embedding else []
    for name, paths in zip(names, alike.values(), strict=True):
        groups.append(LayerGroup(name, tuple(paths), tuple(tuple(layers[path]) for path in paths)))
    if head:
        groups.append(LayerGroup("head", ("",), (tuple(head),)))
    return tuple(groups)


def layers_of(graph: Graph) -> dict[Node, str | None]:
    """The layer of every call. One whose origin is not recorded is in the layer that it stands between."""
    found: dict[Node, str | None] = {}
    for node in graph.module.graph.nodes:
        if node.op != "call_function":
            continue
        path = layer_path(node)
        if path is None and not module_stack(node):
            users = {layer_path(user) for user in node.users}
            path = next((p for used in node.all_input_nodes if (p := found.get(used)) in users), None)
        found[node] = path
    return found


def traits(graph: Graph, nodes: tuple[Node, ...] | list[Node]) -> dict[str, str]:
    """What kind of layer this is: how its tokens mix ("full", "sliding", "chunked", "sparse", "linear")
    and what follows ("moe", "dense"), from what its ops declare. Parts it has not are left out."""
    found: dict[str, str] = {}
    for node in nodes:
        declared = declaration(node)
        if declared is None:
            continue
        work = declared.work(Call(node, graph.symbols))
        if work.family == "attention":
            spans = [name[2:] for name in work.flops.features() if name.startswith("P:")]
            reach = _REACH.get(spans[0][0] if spans else "", "full")
            found["mixer"] = reach if found.get("mixer", "full") == "full" else found["mixer"]
        elif work.family == "recurrence":
            found["mixer"] = "linear"
        elif work.family == "grouped_gemm":
            found["mlp"] = "moe"
        elif work.family == "gemm":
            found.setdefault("mlp", "dense")
    return found


def _computes(node: Node) -> bool:
    return isinstance(node.meta.get("val"), Tensor | tuple | list)


_REACH = {"w": "sliding", "c": "chunked", "k": "sparse"}


def _names(graph: Graph, firsts: list[list[Node]], containers: list[str]) -> list[str]:
    """Names by the traits that differ; where none does, by the role of the layers."""
    kinds = [traits(graph, nodes) for nodes in firsts]
    telling = [part for part in ("mixer", "mlp") if len({kind.get(part) for kind in kinds}) > 1]
    roles = {"causal_lm": "decoder", "encoder": "encoder"}
    names: list[str] = []
    for kind, container in zip(kinds, containers, strict=True):
        role = roles.get(graph.source.kind) or container.rpartition(".")[2] or "layer"
        name = "_".join(kind[part] for part in telling if part in kind) or role
        again = sum(other == name or other.startswith(f"{name}.") for other in names)
        names.append(f"{name}.{again}" if again else name)
    return names
