"""Running graphs on real weights, for tests that compare before and after."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from planc.ir.graph import Graph
from tests.families import tiny_model


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of a module by name, tied ones under each of their names."""
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: tensor.detach() for name, tensor in named}


@cache
def family_weights(family: str) -> Mapping[str, Tensor]:
    return weights_of(tiny_model(family))


def run(graph: Graph, weights: Mapping[str, Tensor], *inputs: Any) -> Any:
    """What the graph's module gives; raises where a weight that it reads is missing."""
    module = graph.module
    read = {str(node.target) for node in module.graph.nodes if node.op == "get_attr"}
    with torch.no_grad():
        return torch.func.functional_call(module, {name: weights[name] for name in read}, inputs)


def tokens(batch: int = 2, length: int = 13, seed: int = 0) -> tuple[Tensor, Tensor]:
    """input_ids and position_ids of a traced language model."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, 190, (batch, length), generator=generator)
    return ids, torch.arange(length).expand(batch, length).contiguous()
