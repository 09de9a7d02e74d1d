"""Architectures beyond the families: traced graphs give transformers' logits, raised or not.

What no op of the dialect computes must stay ATen and be noted, never be taken for something else.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from planc.errors import TraceFailed
from planc.ir.trace.hf import build, trace_config
from tests.families import _BASE, _MLA
from tests.ir.test_trace_hf import run, tokens

_ALTERNATING = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}
_MOE = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_ROUTED = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
_LINEAR = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "shared_expert_intermediate_size": 32,
}
_INDEXED = {"index_topk": 6, "index_n_heads": 8, "index_head_dim": 16, "n_group": 2, "topk_group": 1}

OTHERS: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 7},
    "gemma2": {**_ALTERNATING, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 20.0},
    "gemma3_text": {**_ALTERNATING, "query_pre_attn_scalar": 16, "tie_word_embeddings": True},
    "phi3": {"pad_token_id": 0},
    "olmo2": {},
    "glm4_moe": _ROUTED,
    "qwen3_next": {**_LINEAR, **_MOE},
    "deepseek_v32": {**_MLA, **_INDEXED},
    "cohere2": _ALTERNATING,
    "deepseek_v2": {**_MLA, "n_group": 2, "topk_group": 1, "topk_method": "group_limited_greedy"},
}

#: What stays ATen of them.
LEFT = {
    "cohere2": {"Cohere2LayerNorm", "apply_rotary_pos_emb"},
    "deepseek_v2": {"DeepseekV2TopkRouter", "apply_rotary_emb"},
}


@pytest.mark.parametrize("model_type", sorted(OTHERS))
def test_logits(model_type: str) -> None:
    config = {**_BASE, **OTHERS[model_type], "model_type": model_type}
    model = build(config, dtype=torch.float32, device="cpu", seed=0)
    graph = trace_config(config, model_type, dtype=torch.float32)
    ids, positions = tokens(2, 21)
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(run(graph, model, ids, positions), expected, rtol=0, atol=1e-4)
    assert {note.split()[0] for note in graph.source.notes} == LEFT.get(model_type, set())


def test_constants_without_a_value_are_noted() -> None:
    """Falcon's code makes a tensor from a number; on meta only its shape remains."""
    config = {k: v for k, v in _BASE.items() if k != "head_dim"} | {"model_type": "falcon", "alibi": False}
    graph = trace_config(config | {"new_decoder_architecture": True, "num_kv_heads": 2}, "falcon")
    assert [note for note in graph.source.notes if "no value here" in note]


def test_an_architecture_that_export_refuses_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def branches(self: Any, x: torch.Tensor) -> torch.Tensor:
        return x if x.sum() > 0 else -x

    monkeypatch.setattr("transformers.models.llama.modeling_llama.LlamaDecoderLayer.forward", branches)
    with pytest.raises(TraceFailed, match=r"mine.*docs/models\.md"):
        trace_config({**_BASE, "model_type": "llama"}, "mine")
