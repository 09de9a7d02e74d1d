"""The Hugging Face door: a `config.json` becomes a traced graph, with nothing allocated.

The model is built on meta, its parts are raised to the dialect (`planc.ir.trace.raising`), and
`torch.export` records its forward with symbolic batch and sequence at full depth.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from operator import is_not
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import Dim
from torch.fx import Graph as FxGraph
from torch.fx import GraphModule, Node

import planc.ir.ops  # noqa: F401  (registers the dialect)
from planc.errors import TraceFailed
from planc.ir.graph import Graph, Source
from planc.ir.trace.depth import unfold
from planc.ir.trace.hf_build import build, derived_buffers, from_config
from planc.ir.trace.hf_config import model_name, read_config, text_part, transformers_config
from planc.ir.trace.module import TraceRefused, export
from planc.ir.trace.program import graph_of, tied_names
from planc.ir.trace.raising import raised

__all__ = ["build", "trace_config", "trace_path"]


def trace_path(path: Path, *, trust_remote_code: bool = False) -> Graph:
    """The traced graph of a `config.json` or of a model folder, named after the file or folder.

    Raises FileMissing, FileUnreadable, UnsupportedModel, UntrustedCode or TraceFailed.
    """
    folder = path if path.is_dir() else path.parent
    return trace_config(
        read_config(path), model_name(path), trust_remote_code=trust_remote_code, folder=folder
    )


def trace_config(
    config: Mapping[str, Any],
    name: str,
    *,
    dtype: torch.dtype = torch.bfloat16,
    trust_remote_code: bool = False,
    folder: Path | None = None,
) -> Graph:
    """The traced graph of a configuration: forward(input_ids, position_ids [B, S]) -> logits [B, S, V].

    Parameters and saved buffers are on meta under the transformers model's own names; buffers that
    follow from the configuration (rotary frequencies) hold their values. No token mixes with others
    except in attention, recurrence, convolution and indexer ops, and positions come from
    `position_ids` alone, so several sequences may be laid end to end in one row once those ops know
    where each begins.

    Raises UnsupportedModel, UntrustedCode or TraceFailed.
    """
    settings = transformers_config(config, name, trust_remote_code=trust_remote_code, folder=folder)
    model = from_config(settings, dtype, "meta", None, name, trust_remote_code)
    constants = derived_buffers(model)
    # two tensors: one passed twice would be taken for a single input
    tokens, positions = (torch.zeros(2, 16, dtype=torch.long, device="meta") for _ in range(2))
    dims = {0: Dim("batch", min=1), 1: Dim("seq", min=2)}
    with raised(model) as raising:
        try:
            program = export(model, (tokens, positions), {}, (dims, dims))
        except TraceRefused as error:
            raise TraceFailed(
                model=name,
                reason=f"torch.export refuses it ({error})",
                mend="docs/models.md lists the architectures that are known to work.",
            ) from error
    source = Source(
        name=name,
        kind="causal_lm",
        architecture=type(model).__name__,
        model_type=str(text_part(config)["model_type"]),
        config=dict(config),
        notes=tuple(f"{part} stays ATen: no op of the dialect computes it" for part in sorted(raising.left)),
    )
    _out_of_place(program.graph)
    tied = tied_names(model)
    graph = graph_of(program, source, tied=tied)
    unfold(graph.module, model, raising.folded, tied)
    _forget_device(graph.module)
    graph.module.recompile()
    _bind(graph.module, constants)
    lost = _lost_constants(graph.module, model)
    return replace(graph, source=replace(source, notes=(*source.notes, *lost))) if lost else graph


def _lost_constants(module: nn.Module, model: nn.Module) -> tuple[str, ...]:
    """Notes on constants that no checkpoint holds and that have no value on meta."""
    known = model.state_dict().keys()
    return tuple(
        f"{name} is in no checkpoint and has no value here: the graph can be costed, not run"
        for name, buffer in module.named_buffers()
        if buffer.device.type == "meta" and name not in known
    )


def _out_of_place(graph: FxGraph) -> None:
    """Arithmetic in place on a fresh tensor that no view looks at becomes ordinary arithmetic.

        y = mul_(x, s); later uses of x     ->     y = mul(x, s); later uses of y

    What is left in place, `graph_of` makes functional by tracing the program once more, which takes long.
    """
    for node in list(graph.nodes):
        if not isinstance(node.target, torch._ops.OpOverload) or not node.target._schema.is_mutable:
            continue
        changed, *others = node.args
        packet = getattr(torch.ops.aten, node.target.overloadpacket.__name__.removesuffix("_"), None)
        plain = getattr(packet, node.target._overloadname, None)
        same_type = all(
            not isinstance(o, Node) or o.meta["val"].dtype == changed.meta["val"].dtype for o in others
        )
        seen = [changed, *changed.users]
        if plain is None or not same_type or changed.op == "placeholder" or any(map(_aliases, seen)):
            continue
        later = set(itertools.takewhile(partial(is_not, node), reversed(list(graph.nodes))))
        changed.replace_all_uses_with(node, delete_user_cb=later.__contains__)
        node.target = plain


def _aliases(node: Node) -> bool:
    """Whether a call's result may share memory with an argument without being it (a view)."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return node.op == "call_function"
    return not target._schema.is_mutable and any(r.alias_info is not None for r in target._schema.returns)


def _forget_device(module: GraphModule) -> None:
    """The graph runs where its weights lie, so moves to the device it was traced on are dropped:

    x.to("meta", dtype)  ->  x.to(dtype), or x where that is its type already
    """
    moves = (torch.ops.aten.to.device, torch.ops.aten.to.dtype_layout)
    for node in list(module.graph.nodes):
        if node.target not in moves:
            continue
        source, dtype = node.args[0], node.meta["val"].dtype
        if source.meta["val"].dtype == dtype:
            node.replace_all_uses_with(source)
            module.graph.erase_node(node)
        else:
            node.target, node.args, node.kwargs = torch.ops.aten.to.dtype, (source, dtype), {}


def _bind(module: nn.Module, values: Mapping[str, torch.Tensor]) -> None:
    """Gives buffers of the graph that follow from the configuration their values."""
    held = dict(module.named_buffers())
    for name, value in values.items():
        if name in held:
            owner, _, leaf = name.rpartition(".")
            module.get_submodule(owner)._buffers[leaf] = value
