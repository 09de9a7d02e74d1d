"""Facts of a model that no row of its cost table holds: sizes, active parameters, the checkpoint's format."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.fx import Node

from planc.cost_model.table import LayerClass, ModelFacts, Row
from planc.ir.graph import Graph
from planc.ir.ops.aten import is_parameter
from planc.passes.native_format import block_scales, native_format
from planc.passes.recognise import coverage

_DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


def facts(graph: Graph, classes: tuple[LayerClass, ...], rows: tuple[Row, ...]) -> ModelFacts:
    """The facts of a canonical traced graph, given its classes and the rows of its last phase."""
    config = text_config(graph.source.config)
    counts = {each.name: each.count for each in classes}
    parameters = sum(each.count * each.parameters for each in classes)
    routed = [row for row in rows if row.work.family == "grouped_gemm"]
    heads = [row.work.dims for row in rows if row.work.family == "attention"]
    idle = sum(_idle(row) * counts[row.layer_class] for row in routed)
    table, vocabulary = _embedding(graph)
    return ModelFacts(
        name=graph.source.name,
        architecture=graph.source.architecture,
        model_type=graph.source.model_type,
        kind=graph.source.kind,
        parameters=parameters,
        active_parameters=parameters - idle,
        native_format=native_format(graph.source.config) or _weights_dtype(graph),
        hidden=_number(config, "hidden_size") or (table[1] if table else 0),
        layers=sum(each.count for each in classes if each.layers),
        vocab=vocabulary,
        max_position=_number(config, "max_position_embeddings"),
        q_heads=max((dims["q_heads"] for dims in heads), default=0),
        kv_heads=max((dims["kv_heads"] for dims in heads), default=0),
        experts=max((row.work.dims["experts"] for row in routed), default=0),
        top_k=max((row.work.dims["top_k"] for row in routed), default=0),
        tied_embeddings=_tied(graph),
        generic_ops=tuple(coverage(graph).generic),
        notes=graph.source.notes,
        block_scales=block_scales(graph.source.config),
    )


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The language model's part of a configuration."""
    inner = config.get("text_config")
    return inner if isinstance(inner, Mapping) else config


def _idle(row: Row) -> int:
    """Expert parameters that one token does not pass through."""
    experts, top_k = row.work.dims["experts"], row.work.dims["top_k"]
    return row.calls * row.work.weights * (experts - top_k) // experts


def _weights_dtype(graph: Graph) -> str:
    names = {str(p.dtype).removeprefix("torch.") for p in graph.module.parameters()}
    return _DTYPES.get(next(iter(sorted(names)), ""), "bf16")


def _embedding(graph: Graph) -> tuple[tuple[int, int] | None, int]:
    """Shape of the token table (the first embedding looked up), and the vocabulary."""
    for node in graph.module.graph.nodes:
        if str(node.target) == "aten.embedding.default":
            rows, width = node.args[0].meta["val"].shape
            return (int(rows), int(width)), int(rows)
    return None, 0


def _tied(graph: Graph) -> bool:
    """Whether the token table is also the output projection."""
    for node in graph.module.graph.nodes:
        if str(node.target) == "aten.embedding.default" and isinstance(node.args[0], Node):
            users = [user for user in node.args[0].users if user is not node]
            return is_parameter(node.args[0]) and any(str(u.target) == "aten.linear.default" for u in users)
    return False


def _number(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    return value if isinstance(value, int) and not isinstance(value, bool) else 0
