"""Logits of each sequence's last token only.

    before   h [1, T, H] -> rms_norm -> linear [1, T, V]
    after    h [1, T, H] -> last_token [1, S, H] -> rms_norm -> linear [1, S, V] -> squeeze [S, V]

The selection climbs from the logits as far up as every op looks at one token only, and no further
than the last layer's output: layers stay identical, so that they still fold into one class.
"""

from __future__ import annotations

import torch
from torch.fx import Graph as Nodes
from torch.fx import Node

from planc.ir.layers import layer_of

_aten = torch.ops.aten

#: Ops, beside pointwise ones, whose result at a token depends on that token alone.
_TOKENWISE = (
    "aten::linear",
    "aten::to.",
    "aten::_to_copy",
    "aten::alias",
    "aten::contiguous",
    "aten::clone",
    "aten::layer_norm",
    "aten::rms_norm",
    "planc::rms_norm",
    "planc::layer_norm",
    "planc::linear",
)


def take_logits(nodes: Nodes, query_starts: Node, *, narrow: bool) -> None:
    """Makes the output [S, V]; `narrow`: of last tokens, chosen as early as possible.

    Nodes carry the traced graph's fake tensors still: the token dimension is dimension 1.
    """
    output = nodes.output_node()
    logits = output.args[0]
    assert isinstance(logits, Node), "a causal language model has one output"
    _drop_whole_slices(nodes, logits)
    logits = output.args[0]
    assert isinstance(logits, Node)
    if narrow:
        logits = _narrowed(nodes, logits, query_starts)
    with nodes.inserting_before(output):
        row = nodes.call_function(_aten.squeeze.dim, (logits, 0))
    output.args = (row,)


def _narrowed(nodes: Nodes, logits: Node, query_starts: Node) -> Node:
    chain = [logits]
    while (above := _only_token_input(chain[-1])) is not None:
        chain.append(above)
    top = chain.pop()
    with nodes.inserting_after(top):
        chosen = nodes.call_function(torch.ops.planc.last_token.default, (top, query_starts))
    if not chain:
        return chosen
    chain[-1].replace_input_with(top, chosen)
    return logits


def _only_token_input(node: Node) -> Node | None:
    """The input that a tokenwise op of the head takes its tokens from; None where the climb ends."""
    if node.op != "call_function" or layer_of(node) is not None or not _tokenwise(node):
        return None
    inputs = [n for n in node.all_input_nodes if n.op not in ("get_attr",)]
    if len(inputs) != 1 or list(inputs[0].users) != [node] or inputs[0].op == "placeholder":
        return None
    return inputs[0]


def _tokenwise(node: Node) -> bool:
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return False
    return torch.Tag.pointwise in target.tags or target.name().startswith(_TOKENWISE)


def _drop_whole_slices(nodes: Nodes, logits: Node) -> None:
    """Removes x[:, 0:] and the like above the logits (transformers' `logits_to_keep=0`)."""
    node: Node | None = logits
    while node is not None:
        source = next((n for n in node.all_input_nodes if n.op == "call_function"), None)
        if node.target is _aten.slice.Tensor and _whole(node):
            node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
            nodes.erase_node(node)
        elif layer_of(node) is not None:
            return
        node = source


def _whole(node: Node) -> bool:
    args = (*node.args, *(None, None, None, 1)[len(node.args) - 1 :])
    start, end, step = args[2:5]
    return bool(start in (0, None) and (end is None or (isinstance(end, int) and end >= 2**62)) and step == 1)
