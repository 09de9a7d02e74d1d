"""Graphs and weights of the tiny families, as the serving tests use them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from planc.ir.graph import Graph
from planc.ir.trace.hf import build, trace_config
from planc.runtime.weights import of_module
from tests.families import FAMILIES, tiny_graph

#: With two indexer heads every fourth score is relu(.) + relu(.) = 0, and which of several equal keys
#: `topk` picks is chance: transformers with a cache differs there from transformers without. Eight
#: heads make ties as rare as the models' own 32 and 64 do.
_OVERRIDES: dict[str, dict[str, Any]] = {"glm5": {"index_n_heads": 8}}


def config_of(family: str) -> dict[str, Any]:
    return {**FAMILIES[family], **_OVERRIDES.get(family, {})}


@cache
def serving_model(family: str) -> nn.Module:
    """transformers' own model, fp32, random weights."""
    return build(config_of(family), dtype=torch.float32, device="cpu", seed=0, name=family)


@cache
def serving_graph(family: str) -> Graph:
    if family not in _OVERRIDES:
        return tiny_graph(family)
    return trace_config(config_of(family), family, dtype=torch.float32)


@cache
def serving_weights(family: str) -> Mapping[str, Tensor]:
    return of_module(serving_model(family))
