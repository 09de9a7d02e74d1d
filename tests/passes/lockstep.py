"""Runs the graphs of all ranks of a tensor-parallel group in one process, node by node, in step.

Rank graphs differ in sizes and constants, not in structure, so the nth node of each is the same call.
Collectives are computed here from all ranks' values; everything else runs as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from planc.ir.graph import Graph
from planc.passes.parallel import TensorParallel, shard_weights
from planc.passes.pipeline import Pass, run


def _all_reduce(parts: Sequence[Tensor], group: str, ranks: int) -> list[Tensor]:
    return [torch.stack(list(parts)).sum(0)] * len(parts)


def _all_gather(parts: Sequence[Tensor], dim: int, group: str, ranks: int) -> list[Tensor]:
    return [torch.cat(list(parts), dim)] * len(parts)


_COLLECTIVES: Mapping[object, Callable[..., list[Tensor]]] = {
    torch.ops.planc.all_reduce.default: _all_reduce,
    torch.ops.planc.all_gather.default: _all_gather,
}


def run_in_step(
    graph: Graph,
    weights: Mapping[str, Tensor],
    *inputs: Tensor,
    tp: int,
    ep: bool = False,
    after: Sequence[Pass] = (),
) -> list[Tensor]:
    """Every rank's output of a traced graph divided over `tp` ranks, then rewritten by passes `after`."""
    parts = [run(graph, (TensorParallel(tp, rank, ep), *after)) for rank in range(tp)]
    held = [shard_weights(graph, part, weights) for part in parts]
    values: list[dict[Node, Any]] = [{} for _ in parts]
    feeds = [iter(inputs) for _ in parts]
    with torch.no_grad():
        for nodes in zip(*(part.module.graph.nodes for part in parts), strict=True):
            for env, node, feed, own in zip(values, nodes, feeds, held, strict=True):
                if node.op == "placeholder":
                    env[node] = next(feed)
                elif node.op == "get_attr":
                    env[node] = own[str(node.target)]
                    assert env[node].shape == node.meta["val"].shape
            if nodes[0].op == "call_function":
                for env, node, result in zip(values, nodes, _call(nodes, values), strict=True):
                    env[node] = result
            elif nodes[0].op == "output":
                return [map_arg(n.args[0], env.__getitem__) for n, env in zip(nodes, values, strict=True)]
    raise AssertionError("no output")


def _call(nodes: Sequence[Node], values: Sequence[Mapping[Node, Any]]) -> list[Any]:
    given = [map_arg((n.args, n.kwargs), env.__getitem__) for n, env in zip(nodes, values, strict=True)]
    assert len({node.target for node in nodes}) == 1, f"ranks differ: {[str(n.target) for n in nodes]}"
    together = _COLLECTIVES.get(nodes[0].target)
    if together is not None:
        return together([args[0] for args, _ in given], *given[0][0][1:])
    return [node.target(*args, **kwargs) for node, (args, kwargs) in zip(nodes, given, strict=True)]  # type: ignore[operator]
