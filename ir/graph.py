"""The graph: an executable `torch.fx.GraphModule` plus what planc knows about it.

Invariant of every stage: `graph.module` runs. Parameters are `get_attr` nodes whose targets are
the source model's own names (so weights bind by name); they lie on the meta device until weights
are bound. Every tensor-valued node has `meta["val"]` (a fake tensor with symbolic sizes), and
`meta["nn_module_stack"]` / `meta["stack_trace"]` where they came from the user's model.

Stages

    traced    forward(input_ids [B, S], position_ids [B, S]) -> logits [B, S, V]; any nn.Module keeps
              its own inputs and outputs
    prefill   a step over several sequences laid end to end; any query lengths
    decode    the same inputs with one query token per sequence (T = S)

Inputs of both phase graphs, in order (the sequence is flattened into one row, batch is 1):

    input_ids     int64 [1, T]     tokens of all sequences, end to end
    position_ids  int64 [1, T]     absolute position of each token in its sequence
    query_starts  int32 [S + 1]    where each sequence begins in the row
    context_lens  int32 [S]        tokens of each sequence in the cache after this step
    block_table   int32 [S, M]     cache blocks of each sequence, padded with 0
    slots         int64 [T]        block * block_size + offset that each new token is written to
    state_slots   int64 [S]        row of the state caches (recurrent layers) of each sequence
    hidden        [1, T, H]        only in a later pipeline stage: what the stage before gave
    then one input per cache, as listed in `Graph.caches`, written in place

and their output is logits [S, V]: of the last token of each sequence.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

import torch
from torch.fx import GraphModule

Stage = Literal["traced", "prefill", "decode"]

PHASE_INPUTS = (
    "input_ids",
    "position_ids",
    "query_starts",
    "context_lens",
    "block_table",
    "slots",
    "state_slots",
)

#: An input of a pipeline stage that carries what the stage before it gave ("hidden", "hidden_1", ...).
HIDDEN = "hidden"


@dataclass(frozen=True, slots=True)
class CacheSpec:
    """One cache input of a phase graph.

    paged   shape of one token's entry, e.g. (kv_heads, head_dim); the cache is
            [blocks, block_size, *entry]
    state   shape of one sequence's entry; the cache is [state slots, *entry]
    """

    name: str  # the placeholder, e.g. "cache_0_k"
    layer: int
    kind: Literal["paged", "state"]
    entry: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class Source:
    """Where a graph came from. `config` is the model's own configuration, empty for plain modules."""

    name: str
    kind: Literal["causal_lm", "encoder", "module"]
    architecture: str
    model_type: str = ""
    config: Mapping[str, object] = field(default_factory=dict)
    notes: tuple[str, ...] = ()  # what a user should know of how it was traced


class WeightStep(Protocol):
    """One change that a pass made to parameters, so that the source model's weights still bind.

    reads   names it consumes; gone afterwards     makes   names it puts in their place
    """

    @property
    def reads(self) -> tuple[str, ...]: ...

    @property
    def makes(self) -> tuple[str, ...]: ...

    def apply(self, tensors: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """The tensors of `makes` from those of `reads`, in order."""


@dataclass(frozen=True, slots=True)
class Graph:
    """A stage of the model.

    symbols        size symbol -> role: "batch", "seq" (traced); "T", "S", "blocks", "block_size", "table",
                   "states" (phases)
    history        names of the passes applied, in order
    weight_steps   what the passes did to the parameters, in order (merged, quantized, divided)
    """

    module: GraphModule
    stage: Stage
    source: Source
    symbols: Mapping[str, str] = field(default_factory=dict)
    caches: tuple[CacheSpec, ...] = ()
    history: tuple[str, ...] = ()
    weight_steps: tuple[WeightStep, ...] = ()

    def after(self, name: str, module: GraphModule, **changes: object) -> Graph:
        """The graph that a pass called `name` made."""
        return replace(self, module=module, history=(*self.history, name), **changes)  # type: ignore[arg-type]
