"""Prefill and decode graphs with an explicit paged KV cache, derived from the traced forward.

    before   forward(input_ids [B, S], position_ids [B, S]) -> logits [B, S, V]
             q = linear(h, wq) ...
             o = planc.attention(q, k, v, scale=..., window=...)
    after    forward(input_ids [1, T], position_ids [1, T], query_starts, context_lens, block_table,
                     slots, state_slots, cache_0_k, cache_0_v, ...) -> logits [S, V]
             q = linear(h, wq) ...
             o = planc.paged_attention(q, k, v, cache_0_k, cache_0_v, query_starts, context_lens,
                                       block_table, slots, scale=..., window=...)

The model's author wrote no caching code and none is needed: an op that only looks at its own token
stays as it is, however the tokens are laid out; the few that look at other tokens (attention, latent
attention, the indexer, convolution and delta rule) are replaced by ops that find those tokens in a
cache. The two phases differ in how latent attention is computed and in where logits are taken:
prefill narrows to each sequence's last token before the head; in decode every token is a last one.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch.fx import Graph as Nodes
from torch.fx import GraphModule, Node

from planc.errors import UnsupportedModel
from planc.ir.graph import PHASE_INPUTS, Graph
from planc.passes.phases_caches import Caches
from planc.passes.phases_head import take_logits
from planc.passes.phases_positions import absolute_positions, check_nothing_mixes_tokens
from planc.passes.phases_shapes import Sizes, propagate


@dataclass(frozen=True, slots=True)
class Phases:
    """Makes the prefill or the decode graph of a traced causal language model.

    Raises UnsupportedModel for any other kind of model, and where an op mixes tokens in a way that
    no cache is known for.
    """

    phase: Literal["prefill", "decode"]
    name: ClassVar[str] = "phases"

    def apply(self, graph: Graph) -> Graph:
        """The phase graph; the traced one is left as it is."""
        if graph.source.kind != "causal_lm" or graph.stage != "traced":
            raise UnsupportedModel(
                model=graph.source.name,
                reason=f"the {graph.stage} graph of a model of kind '{graph.source.kind}' has no phases",
                mend="Only traced causal language models have a prefill and a decode phase.",
            )
        nodes = copy.deepcopy(graph.module.graph)
        inputs = _phase_inputs(nodes, graph)
        caches = Caches(nodes, inputs, decode=self.phase == "decode")
        caches.page(graph)
        absolute_positions(nodes, graph, inputs["position_ids"])
        take_logits(nodes, inputs["query_starts"], narrow=self.phase == "prefill")
        nodes.eliminate_dead_code()
        sizes = Sizes.of(inputs["input_ids"])
        propagate(nodes, graph.module, sizes, caches.specs)
        check_nothing_mixes_tokens(nodes, graph, sizes)
        module = GraphModule(graph.module, nodes, class_name=graph.source.architecture or "Model")
        return graph.after(
            f"{self.name}:{self.phase}",
            module,
            stage=self.phase,
            symbols=sizes.roles(),
            caches=tuple(caches.specs),
        )


def _phase_inputs(nodes: Nodes, graph: Graph) -> dict[str, Node]:
    """The phase inputs as placeholders; the first two are those of the traced graph."""
    given = list(nodes.find_nodes(op="placeholder"))
    names = tuple(str(node.target) for node in given)
    if names != PHASE_INPUTS[:2]:
        raise UnsupportedModel(
            model=graph.source.name,
            reason=f"its traced inputs are {', '.join(names)}",
            mend=f"A causal language model takes {' and '.join(PHASE_INPUTS[:2])}.",
        )
    inputs = dict(zip(names, given, strict=True))
    last = given[-1]
    for name in PHASE_INPUTS[2:]:
        with nodes.inserting_after(last):
            last = inputs[name] = nodes.placeholder(name)
    return inputs
