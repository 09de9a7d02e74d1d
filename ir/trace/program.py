"""From an exported program to a `Graph`: the step that every door shares.

`torch.export` hands over a program whose weights are inputs and whose in-place operations are
still in place. Here weights become `get_attr` nodes under their own names (a tied weight under
the first of its names), in-place operations become functional ones, and what only guards the
trace (asserts, guard modules, dead code) is dropped.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node
from torch.fx.graph import CodeGen

from planc.ir.graph import Graph, Source

_GUARDS = (
    "aten::_assert_tensor_metadata",
    "aten::_assert_async",
    "aten::_assert_scalar",
    "aten::sym_constrain",
)


def graph_of(program: ExportedProgram, source: Source, *, tied: Mapping[str, str] | None = None) -> Graph:
    """The traced graph of an exported program.

    tied   parameter name -> the name it goes by (see `tied_names`); others keep theirs

    Inputs are the program's own, flattened; outputs likewise: one tensor, or a tuple of them.
    """
    if any(_mutates(node) for node in program.graph.nodes):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch's own use of its deprecated classes
            program = program.run_decompositions({})  # empty table: functionalises, decomposes nothing
    lifted = program.module(check_guards=False)
    assert isinstance(lifted, GraphModule)
    graph = lifted.graph
    graph.set_codegen(CodeGen())
    for node in list(graph.nodes):
        if node.op == "get_attr":
            node.target = (tied or {}).get(str(node.target), node.target)
        elif node.op == "output":
            flat = node.args[0]
            node.args = (flat[0] if isinstance(flat, tuple | list) and len(flat) == 1 else flat,)
        elif is_guard(node):
            graph.erase_node(node)
    graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))
    _merge_attributes(graph)
    module = GraphModule(lifted, graph, class_name=source.architecture or "Model")
    return Graph(module=module, stage="traced", source=source, symbols=symbol_roles(module))


def is_guard(node: Node) -> bool:
    """Whether a node only checks what was assumed while tracing."""
    if node.op == "call_module" and str(node.target).startswith("_guards"):
        return True
    return isinstance(node.target, torch._ops.OpOverload) and node.target.name().startswith(_GUARDS)


def tied_names(module: nn.Module) -> dict[str, str]:
    """Each name of a shared parameter or buffer -> the first one, as `named_parameters` lists them."""
    first: dict[int, str] = {}
    names: dict[str, str] = {}
    tensors = [
        *module.named_parameters(remove_duplicate=False),
        *module.named_buffers(remove_duplicate=False),
    ]
    for name, tensor in tensors:
        names[name] = first.setdefault(id(tensor), name)
    return {name: chosen for name, chosen in names.items() if name != chosen}


def symbol_roles(module: GraphModule) -> dict[str, str]:
    """Size symbol -> "batch" (leading dimension of an input), "seq" (second) or "other"."""
    roles: dict[str, str] = {}
    ranks = {0: "batch", 1: "seq"}
    values = [node.meta.get("val") for node in module.graph.nodes if node.op == "placeholder"]
    for dim in range(max((v.dim() for v in values if isinstance(v, torch.Tensor)), default=0)):
        for value in values:
            if isinstance(value, torch.Tensor) and dim < value.dim():
                size = value.shape[dim]
                if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol:
                    roles.setdefault(str(size.node.expr), ranks.get(dim, "other"))
    return roles


def _mutates(node: Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _merge_attributes(graph: torch.fx.Graph) -> None:
    """One `get_attr` node per name, ahead of everything else's use of it."""
    seen: dict[str, Node] = {}
    for node in list(graph.nodes):
        if node.op != "get_attr":
            continue
        first = seen.setdefault(str(node.target), node)
        if first is not node:
            node.replace_all_uses_with(first)
            graph.erase_node(node)
