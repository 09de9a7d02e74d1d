"""Norms, rotary embeddings, routers, experts, recurrences and the indexer against transformers' modules."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as deepseek
from transformers.models.gemma4 import modeling_gemma4 as gemma4
from transformers.models.gpt_oss import modeling_gpt_oss as gpt_oss
from transformers.models.llama import modeling_llama as llama
from transformers.models.llama4 import modeling_llama4 as llama4
from transformers.models.minimax_m2 import modeling_minimax_m2 as minimax
from transformers.models.qwen3_5_moe import modeling_qwen3_5_moe as qwen3_5

from planc.ir.ops.indexer import index_scores
from planc.ir.trace.raise_modules import raise_modules
from planc.ir.trace.raising import Raising
from tests.families import FAMILIES, tiny_model

OPS = torch.ops.planc


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def part(family: str, suffix: str) -> Any:
    """The first module of a tiny model whose class name ends so."""
    return next(m for m in tiny_model(family).modules() if type(m).__name__.endswith(suffix))


# -- norms ------------------------------------------------------------------------------


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_norms_are_bit_equal_in_bf16(family: str) -> None:
    from contextlib import ExitStack

    model = tiny_model(family).to(torch.bfloat16)
    norms = {
        (type(m), tuple(m.weight.shape) if getattr(m, "weight", None) is not None else ()): m
        for m in model.modules()
        if "Norm" in type(m).__name__ and not isinstance(m, nn.LayerNorm)
    }
    assert norms
    for norm in norms.values():
        width = norm.weight.shape[0] if getattr(norm, "weight", None) is not None else 24
        inputs = [torch.randn(5, width).bfloat16() for _ in range(1 + type(norm).__name__.endswith("Gated"))]
        theirs = norm(*inputs)
        with ExitStack() as stack:
            raising = Raising(stack)
            raise_modules(raising, norm)
            assert not raising.left
            assert "forward" in vars(norm), f"{type(norm).__name__} was not raised"
            assert torch.equal(norm(*inputs), theirs), type(norm).__name__
        assert "forward" not in vars(norm)


def test_a_norm_that_computes_something_else_is_left_alone() -> None:
    from contextlib import ExitStack

    class OddRMSNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.randn(8)), 1e-6

        def forward(self, x: Tensor) -> Tensor:
            return self.weight * x / (x.float().abs().mean(-1, keepdim=True) + self.eps).to(x.dtype)

    odd = OddRMSNorm()
    with ExitStack() as stack:
        raising = Raising(stack)
        raise_modules(raising, odd)
        assert raising.left == {"OddRMSNorm"}
        assert "forward" not in vars(odd)


# -- rotary embeddings ---------------------------------------------------------------------


def tables(tokens: int, width: int, twice: bool) -> tuple[Tensor, Tensor]:
    angles = torch.randn(2, tokens, width // 2)
    angles = torch.cat([angles, angles], -1) if twice else angles
    return angles.cos(), angles.sin()


@pytest.mark.parametrize(
    ("function", "style", "width", "twice"),
    [
        (llama.apply_rotary_pos_emb, "half", 8, True),
        (minimax.apply_rotary_pos_emb, "half", 4, True),
        (gpt_oss.apply_rotary_pos_emb, "split", 8, False),
        (deepseek.apply_rotary_pos_emb_interleave, "interleaved", 8, True),
    ],
    ids=["llama", "minimax", "gpt_oss", "deepseek"],
)
@pytest.mark.parametrize("heads_dim", [1, 2])
def test_rope(function: Any, style: str, width: int, twice: bool, heads_dim: int) -> None:
    tokens, shape = 5, [2, 3, 3, 8]
    shape[3 - heads_dim] = tokens
    q, k = torch.randn(shape), torch.randn(shape).narrow(heads_dim, 0, 1)
    cos, sin = tables(tokens, width, twice)
    theirs = function(q, k, cos, sin, unsqueeze_dim=heads_dim)
    mine = OPS.rope(q, k, cos, sin, heads_dim, style)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_rope_single_equals_gemma() -> None:
    x = torch.randn(2, 5, 3, 8)
    cos, sin = tables(5, 8, True)
    theirs = gemma4.apply_rotary_pos_emb(x, cos, sin, unsqueeze_dim=2)
    torch.testing.assert_close(OPS.rope_single(x, cos, sin, 2, "half"), theirs, rtol=0, atol=0)


def test_rope_in_pairs_equals_llama4s_complex_product() -> None:
    q, k = torch.randn(2, 5, 4, 8), torch.randn(2, 5, 2, 8)
    angles = torch.randn(2, 5, 4)
    theirs = llama4.apply_rotary_emb(q, k, torch.polar(torch.ones_like(angles), angles))
    mine = OPS.rope(q, k, angles.cos(), angles.sin(), 2, "pairs")
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b)


# -- routers and experts ---------------------------------------------------------------------


def dense(weights: Tensor, ids: Tensor, experts: int) -> Tensor:
    return torch.zeros(ids.shape[0], experts).scatter_(1, ids, weights.float())


@pytest.mark.parametrize(
    ("family", "suffix"),
    [
        ("qwen3_moe", "Router"),
        ("mixtral", "Router"),
        ("deepseek_v3", "Router"),
        ("glm5", "Router"),
        ("gpt_oss", "Router"),
        ("gemma4", "Router"),
        ("minimax_m2", "Router"),
        ("qwen3_5", "Router"),
    ],
)
def test_routers_choose_and_weigh_alike(family: str, suffix: str) -> None:
    from contextlib import ExitStack

    router = part(family, suffix)
    hidden = torch.randn(33, FAMILIES[family]["hidden_size"])
    extra = (torch.randn(8) * 0.2,) if family == "minimax_m2" else ()
    _, weights, ids = router(hidden, *extra)
    with ExitStack() as stack:
        raising = Raising(stack)
        raise_modules(raising, router)
        assert "forward" in vars(router), "not raised"
        _, mine, chosen = router(hidden, *extra)
    torch.testing.assert_close(dense(mine, chosen, 8), dense(weights, ids, 8))


def test_groups_limit_the_choice() -> None:
    """Experts 0-1 score best, but group-limited routing counts the two best of a group together."""
    logits = torch.tensor([[5.0, -9.0, 3.0, 3.0, 1.0, 1.0, 0.0, 0.0]])
    _, ids = OPS.route_grouped(logits, None, 2, 4, 1, True, 1.0)
    assert sorted(ids[0].tolist()) == [2, 3]


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "gemma4", "deepseek_v3", "qwen3_5", "minimax_m2"])
def test_experts(family: str) -> None:
    module = part(family, "Experts")
    experts, hidden = module.gate_up_proj.shape[0], FAMILIES[family]["hidden_size"]
    x = torch.randn(17, hidden)
    weights, ids = torch.rand(17, experts).topk(2, -1)
    theirs = module(x, ids, weights)
    args = experts_arguments(module)
    torch.testing.assert_close(OPS.experts(x, ids, weights, *args), theirs, rtol=1e-5, atol=1e-5)


def experts_arguments(module: Any, first: int = 0, count: int | None = None) -> list[Any]:
    stop = None if count is None else first + count
    tensors = [
        None if t is None else t[first:stop]
        for t in (
            module.gate_up_proj,
            getattr(module, "gate_up_proj_bias", None),
            module.down_proj,
            getattr(module, "down_proj_bias", None),
        )
    ]
    oai = hasattr(module, "alpha")
    act = "swigluoai" if oai else "gelu_tanh" if "Gemma" in type(module).__name__ else "silu"
    scales = [module.alpha, module.limit] if oai else [0.0, 0.0]
    return [*tensors, act, module.is_transposed, not module.is_concatenated, *scales, False, first]


def test_expert_parallel_parts_add_up() -> None:
    module = part("gpt_oss", "Experts")
    x = torch.randn(17, 64)
    weights, ids = torch.rand(17, 4).topk(2, -1)
    whole = OPS.experts(x, ids, weights, *experts_arguments(module))
    parts = [OPS.experts(x, ids, weights, *experts_arguments(module, first, 2)) for first in (0, 2)]
    torch.testing.assert_close(parts[0] + parts[1], whole, rtol=1e-5, atol=1e-6)


# -- linear attention ---------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [1, 7, 70])
@pytest.mark.parametrize("l2norm", [True, False])
def test_delta_rule_equals_both_forms(tokens: int, l2norm: bool) -> None:
    q, k = (torch.randn(2, tokens, 2, 8) * 0.3 for _ in range(2))
    v = torch.randn(2, tokens, 4, 6)
    g, beta = -torch.rand(2, tokens, 4), torch.rand(2, tokens, 4)
    mine = OPS.gated_delta_rule(q, k, v, g, beta, l2norm)
    for function in (qwen3_5.torch_chunk_gated_delta_rule, qwen3_5.torch_recurrent_gated_delta_rule):
        theirs, _ = function(q, k, v, g=g, beta=beta, use_qk_l2norm_in_kernel=l2norm)
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("activation", ["silu", None])
def test_causal_conv(activation: str | None) -> None:
    x, weight, bias = torch.randn(2, 6, 9), torch.randn(6, 4), torch.randn(6)
    theirs = qwen3_5.causal_conv1d_fn(x, weight, bias, activation=activation)
    torch.testing.assert_close(OPS.causal_conv1d(x, weight, bias, activation or ""), theirs)


# -- the indexer -----------------------------------------------------------------------------------


def test_indexer_chooses_the_same_keys() -> None:
    from contextlib import ExitStack

    tokens, model = 14, tiny_model("glm5")
    indexer = next(m for m in model.modules() if type(m).__name__.endswith("Indexer"))
    hidden, q_resid = torch.randn(2, tokens, 64), torch.randn(2, tokens, 24)
    positions = torch.arange(tokens).expand(2, -1)
    tables = model.model.rotary_emb(hidden, positions)
    causal = torch.ones(2, tokens, tokens, dtype=torch.bool).tril()
    theirs = indexer(hidden, q_resid, tables, causal, positions)
    with ExitStack() as stack:
        raise_modules(Raising(stack), indexer)
        mine = indexer(hidden, q_resid, tables, causal, positions)
    assert mine.dtype == torch.int32
    assert mine.shape == (2, tokens, indexer.index_topk)
    for row in range(2):
        for query in range(tokens):
            visible = {int(j) for j in theirs[row, query] if j <= query}
            assert {int(j) for j in mine[row, query] if j >= 0} == visible


def test_index_scores_of_later_keys_are_nothing() -> None:
    q, k, w = torch.randn(1, 5, 2, 4), torch.randn(1, 5, 4), torch.randn(1, 5, 2)
    scores = index_scores(q, k, w, 0.5)
    assert torch.equal(scores == float("-inf"), torch.ones(1, 5, 5, dtype=torch.bool).triu(1))
    at = 3, 1
    expected = sum(w[0, at[0], h] * max(0.0, float(q[0, at[0], h] @ k[0, at[1]]) * 0.5) for h in range(2))
    torch.testing.assert_close(scores[0, at[0], at[1]], torch.as_tensor(expected))
