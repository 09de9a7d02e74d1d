"""Positions that a model counts for itself, and the check that nothing else mixes tokens.

before   arange(S)                      token i of a row stands at position i (Llama 4 scales queries by it)
after    select(position_ids, 0, 0)     the position in its own sequence, cached tokens counted
"""

from __future__ import annotations

import torch
from torch.fx import Graph as Nodes
from torch.fx import Node

from planc.errors import UnsupportedModel
from planc.ir.graph import Graph
from planc.ir.verify import source_line
from planc.passes.phases_shapes import Sizes

_aten = torch.ops.aten

#: Ops that mix tokens and have no paged form.
_MIXING = (
    "aten::scaled_dot_product_attention",
    "aten::_scaled_dot_product",
    "aten::cumsum",
    "aten::conv",
    "planc::attention",
)


def absolute_positions(nodes: Nodes, graph: Graph, position_ids: Node) -> None:
    """Replaces every count from 0 over the sequence by the row of absolute positions."""
    row: Node | None = None
    for node in list(nodes.nodes):
        if not _counts_tokens(node, graph):
            continue
        if row is None:
            with nodes.inserting_after(position_ids):
                row = nodes.call_function(_aten.select.int, (position_ids, 0, 0))
        dtype = node.meta["val"].dtype
        new = row
        if dtype != position_ids.meta["val"].dtype:
            with nodes.inserting_before(node):
                new = nodes.call_function(_aten.to.dtype, (row, dtype))
                new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        nodes.erase_node(node)


def _counts_tokens(node: Node, graph: Graph) -> bool:
    if node.target not in (_aten.arange.default, _aten.arange.start, _aten.arange.start_step):
        return False
    (size,) = node.meta["val"].shape
    start = node.args[0] if node.target is not _aten.arange.default else 0
    step = node.args[2] if len(node.args) > 2 else 1
    sequence = isinstance(size, torch.SymInt) and graph.symbols.get(str(size.node.expr)) == "seq"
    return bool(sequence and start == 0 and step == 1)


def check_nothing_mixes_tokens(nodes: Nodes, graph: Graph, sizes: Sizes) -> None:
    """Raises UnsupportedModel where a token could see tokens of another sequence, or miss cached ones.

    Two signs of it: an op known to mix tokens without a paged form, and a tensor whose size grows
    with the square of the tokens (attention scores, masks).
    """
    for node in nodes.nodes:
        named = isinstance(node.target, torch._ops.OpOverload) and node.target.name().startswith(_MIXING)
        if named or sizes.grows_with_square(node.meta.get("val")):
            raise UnsupportedModel(
                model=graph.source.name,
                reason=f"'{node.name}' ({node.target}) mixes tokens in a way that planc has no cache for,"
                f" at {source_line(node)}",
                mend="Call torch.ops.planc.attention there, or compile the model as an encoder.",
            )
