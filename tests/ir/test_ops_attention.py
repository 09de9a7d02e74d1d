"""`planc.attention` and `planc.mla_expand_kv` against a loop over pairs and transformers' own code."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from transformers.models.gpt_oss import modeling_gpt_oss as gpt_oss
from transformers.models.llama import modeling_llama as llama

import planc.ir.ops  # noqa: F401
from tests.families import tiny_model

BATCH, HEADS, KV_HEADS, TOKENS, DIM, V_DIM = 2, 4, 2, 11, 8, 6


@pytest.fixture
def qkv() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    q = torch.randn(BATCH, HEADS, TOKENS, DIM)
    return q, torch.randn(BATCH, KV_HEADS, TOKENS, DIM), torch.randn(BATCH, KV_HEADS, TOKENS, V_DIM)


def run(q: Tensor, k: Tensor, v: Tensor, **facts: object) -> Tensor:
    given = {"sinks": None, "indices": None, "scale": 0.3, "causal": True, "window": 0, "chunk": 0} | facts
    return torch.ops.planc.attention(q, k, v, *given.values(), 0.0)


def pair_by_pair(q: Tensor, k: Tensor, v: Tensor, seen: object, scale: float) -> Tensor:
    """Softmax attention written as loops; `seen(query, key)` says who sees whom."""
    out = torch.zeros(BATCH, TOKENS, HEADS, V_DIM, dtype=torch.float64)
    group = HEADS // KV_HEADS
    for b in range(BATCH):
        for h in range(HEADS):
            for i in range(TOKENS):
                keys = [j for j in range(TOKENS) if seen(i, j)]
                scores = [scale * float(q[b, h, i].double() @ k[b, h // group, j].double()) for j in keys]
                top = max(scores)
                weights = [math.exp(s - top) for s in scores]
                for j, w in zip(keys, weights, strict=True):
                    out[b, i, h] += w / sum(weights) * v[b, h // group, j].double()
    return out.float()


@pytest.mark.parametrize(
    ("facts", "seen"),
    [
        ({}, lambda i, j: j <= i),
        ({"causal": False}, lambda i, j: True),
        ({"window": 3}, lambda i, j: i - 3 < j <= i),
        ({"chunk": 4}, lambda i, j: j <= i and i // 4 == j // 4),
    ],
    ids=["causal", "both", "window", "chunk"],
)
def test_who_sees_whom(qkv: tuple[Tensor, Tensor, Tensor], facts: dict[str, object], seen: object) -> None:
    torch.testing.assert_close(run(*qkv, **facts), pair_by_pair(*qkv, seen, 0.3))


def test_chosen_positions_and_minus_one_for_nothing(qkv: tuple[Tensor, Tensor, Tensor]) -> None:
    chosen = [
        [{j for j in range(i + 1) if (i + j + b) % 3 == 0} | {0} for i in range(TOKENS)] for b in (0, 1)
    ]
    indices = torch.full((BATCH, TOKENS, 5), -1, dtype=torch.int32)
    for b, rows in enumerate(chosen):
        for i, row in enumerate(rows):
            for at, j in enumerate(sorted(row)):
                indices[b, i, at] = j
    found = run(*qkv, indices=indices)
    for b in range(BATCH):
        alone = pair_by_pair(*qkv, lambda i, j, b=b: j in chosen[b][i], 0.3)
        torch.testing.assert_close(found[b], alone[b])


def test_equals_llama_eager(qkv: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v = qkv
    module = torch.nn.Module()
    module.num_key_value_groups = HEADS // KV_HEADS
    future = torch.full((TOKENS, TOKENS), float("-inf")).triu(1)
    theirs, _ = llama.eager_attention_forward(module.eval(), q, k, v, future, 0.3)
    torch.testing.assert_close(run(q, k, v), theirs)


def test_sinks_equal_gpt_oss_eager(qkv: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v = qkv
    module = torch.nn.Module()
    module.num_key_value_groups, module.sinks = HEADS // KV_HEADS, torch.randn(HEADS)
    future = torch.full((TOKENS, TOKENS), float("-inf")).triu(1)
    theirs, _ = gpt_oss.eager_attention_forward(module.eval(), q, k, v, future, 0.3)
    torch.testing.assert_close(run(q, k, v, sinks=module.sinks), theirs)


def test_softcap_bounds_every_score(qkv: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v = qkv
    capped = torch.ops.planc.attention(q * 50, k, v, None, None, 0.3, True, 0, 0, 2.0)
    scores = torch.einsum("bhid,bhjd->bhij", q * 50, k.repeat_interleave(2, 1)) * 0.3
    scores = (torch.tanh(scores / 2) * 2).masked_fill(
        torch.ones(TOKENS, TOKENS, dtype=torch.bool).triu(1), -1e30
    )
    expected = scores.softmax(-1) @ v.repeat_interleave(2, 1)
    torch.testing.assert_close(capped, expected.transpose(1, 2))


def test_mla_expansion_equals_deepseek() -> None:
    attention = tiny_model("deepseek_v3").model.layers[0].self_attn
    torch.manual_seed(0)
    c_kv = torch.randn(2, 1, 5, attention.kv_lora_rank)
    k_rot = torch.randn(2, 1, 5, attention.qk_rope_head_dim)
    weight = attention.kv_b_proj.weight
    k, v = torch.ops.planc.mla_expand_kv(
        c_kv, k_rot, weight, attention.qk_nope_head_dim, attention.v_head_dim
    )
    theirs_k, theirs_v = attention.expand_kv(c_kv, k_rot)
    torch.testing.assert_close(k, theirs_k, rtol=0, atol=0)
    torch.testing.assert_close(v, theirs_v, rtol=0, atol=0)
