"""Which matrices keep their precision, whatever the plan says, by the name of their module.

Tables and heads (their errors go straight into the logits), routers and gates of shared experts
(a flipped expert costs more than the bytes saved; engines load them unquantized too), the weights of
sparse attention's indexer, latent attention's kv_b (the decode graph takes it apart to absorb it),
short convolutions, and the vision parts that planc does not plan.
"""

from __future__ import annotations

import re

#: what the names of such modules end in, as a regular expression
PATTERN = (
    r"(^|\.)("
    r"lm_head|embed_tokens|embed_in|embed_out|wte|wpe|\w*embeddings?"
    r"|router(\..*)?|(mlp|moe|feed_forward|block_sparse_moe)\.gate|shared_expert_gate"
    r"|weights_proj|kv_b_proj"
    r"|conv1d"
    r"|(vision_tower|visual|vision_model|multi_modal_projector|audio_tower)(\..*)?"
    r")$"
)
_KEPT = re.compile(PATTERN)


def keeps_precision(module: str) -> bool:
    """Whether the matrix of a module called e.g. "model.layers.0.mlp.gate" stays as it is."""
    return _KEPT.search(module) is not None
