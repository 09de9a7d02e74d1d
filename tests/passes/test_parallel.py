"""Tensor and expert parallelism: how models are divided, and that the ranks add up to the model."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from planc.errors import InvalidField
from planc.ir.graph import Graph
from planc.ir.layers import module_path
from planc.ir.trace import trace
from planc.ir.verify import verify
from planc.passes.fusion import Fusion
from planc.passes.parallel import TensorParallel, shard_rows
from planc.passes.phases import Phases
from planc.passes.quantize import Quantize, prepare
from tests.families import FAMILIES, tiny_graph
from tests.passes.lockstep import run_in_step
from tests.passes.running import family_weights, run, tokens, weights_of

#: A rounding of every weight moves qwen3_5's logits by 4e-4 (the delta rule amplifies it), others' by 2e-5.
TOLERANCE = {"qwen3_5": 1e-3}

#: Families whose every fake value is computed again; between them they have every kind of division.
RERUN = ("deepseek_v3", "gpt_oss", "minimax_m2", "qwen3_5")


def kinds(graph: Graph, layer: str) -> dict[str, tuple[str, int, str | None]]:
    """Site -> (kind, units, collective) of the products and attention of one layer."""
    found: dict[str, tuple[str, int, str | None]] = {}
    for node, shard in shard_rows(graph).items():
        path = module_path(node)
        name = str(node.target)
        if path.startswith(layer) and any(
            op in name for op in ("linear", "attention", "experts", "expand_kv")
        ):
            found[path.removeprefix(f"{layer}.") or path] = (shard.kind, shard.units, shard.collective)
    return found


def test_dense_layers_are_column_then_row() -> None:
    assert kinds(tiny_graph("llama"), "model.layers.0") == {
        "self_attn.q_proj": ("column", 4, None),
        "self_attn.k_proj": ("column", 2, None),
        "self_attn.v_proj": ("column", 2, None),
        "self_attn": ("heads", 4, None),
        "self_attn.o_proj": ("row", 4, "all_reduce"),
        "mlp.gate_proj": ("column", 96, None),
        "mlp.up_proj": ("column", 96, None),
        "mlp.down_proj": ("row", 96, "all_reduce"),
    }
    assert kinds(tiny_graph("llama"), "lm_head") == {"lm_head": ("column", 192, "all_gather")}


def test_latents_stay_whole() -> None:
    found = kinds(tiny_graph("deepseek_v3"), "model.layers.1")
    assert found["self_attn.q_a_proj"][0] == "replicated"
    assert found["self_attn.kv_a_proj_with_mqa"][0] == "replicated"
    assert found["self_attn.q_b_proj"] == ("column", 4, None)
    assert found["self_attn.o_proj"] == ("row", 4, "all_reduce")
    assert found["mlp.experts"] == ("experts", 32, None)  # added to the shared expert's share first
    assert found["mlp.shared_experts.down_proj"] == ("row", 32, None)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "minimax_m2", "llama4"])
def test_routers_stay_whole(family: str) -> None:
    rows = shard_rows(tiny_graph(family))
    routed = [shard for node, shard in rows.items() if "route_" in str(node.target)]
    assert routed
    assert all(shard.kind == "replicated" and not shard.collective for shard in routed)


def test_norms_across_heads_gather_and_slice() -> None:
    found = kinds(tiny_graph("minimax_m2"), "model.layers.0")
    assert found["self_attn.q_proj"] == ("column", 4, "all_gather")
    assert found["self_attn.o_proj"] == ("row", 4, "all_reduce")


def test_linear_attention_is_divided_by_heads() -> None:
    rows = shard_rows(tiny_graph("qwen3_5"))
    linear = {
        str(n.target): s for n, s in rows.items() if module_path(n).startswith("model.layers.0.linear_attn")
    }
    assert linear["planc.causal_conv1d.default"].kind == "heads"
    assert linear["planc.gated_delta_rule.default"].units == 4  # two key heads are shared by four value heads
    part = TensorParallel(2, 1).apply(tiny_graph("qwen3_5"))
    (step,) = [s for s in part.weight_steps if s.reads == ("model.layers.0.linear_attn.in_proj_qkv.weight",)]
    assert step.pieces == ((16, 16), (48, 16), (96, 32))  # type: ignore[attr-defined]  # of q, of k, of v


def test_caches_hold_a_ranks_own_heads() -> None:
    decode = Phases("decode").apply(tiny_graph("llama"))
    part = TensorParallel(2, 0).apply(decode)
    assert [cache.entry for cache in decode.caches[:2]] == [(2, 16), (2, 16)]
    assert [cache.entry for cache in part.caches[:2]] == [(1, 16), (1, 16)]
    replicated = TensorParallel(4, 3).apply(decode)
    assert [cache.entry for cache in replicated.caches[:2]] == [(1, 16), (1, 16)]
    latent = TensorParallel(2, 0).apply(Phases("decode").apply(tiny_graph("deepseek_v3")))
    assert [cache.entry for cache in latent.caches[:1]] == [(40,)]
    rows = [s for n, s in shard_rows(decode).items() if "paged_attention" in str(n.target)]
    assert {shard.kv_units for shard in rows} == {2}


@pytest.mark.parametrize("family", FAMILIES)
def test_ranks_add_up_to_the_model(family: str) -> None:
    graph, weights, inputs = tiny_graph(family), family_weights(family), tokens()
    whole = run(graph, weights, *inputs)
    for rank in range(2):
        verify(TensorParallel(2, rank).apply(graph), "tensor_parallel", rerun=rank == 0 and family in RERUN)
    routed = any("experts" in str(node.target) for node in graph.module.graph.nodes)
    for ep in (False, True) if routed else (False,):
        for out in run_in_step(graph, weights, *inputs, tp=2, ep=ep):
            torch.testing.assert_close(out, whole, rtol=0, atol=TOLERANCE.get(family, 1e-4))


@pytest.mark.parametrize("family", ["llama", "gpt_oss", "minimax_m2", "qwen3_5"])
def test_more_ranks_than_kv_heads(family: str) -> None:
    graph, weights, inputs = tiny_graph(family), family_weights(family), tokens()
    whole = run(graph, weights, *inputs)
    for out in run_in_step(graph, weights, *inputs, tp=4):
        torch.testing.assert_close(out, whole, rtol=0, atol=TOLERANCE.get(family, 1e-4))


# -- divided first, then fused and quantized --------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "deepseek_v3"])
def test_divided_graphs_fuse_and_quantize(family: str) -> None:
    graph, weights, inputs = tiny_graph(family), family_weights(family), tokens()
    whole = run(graph, weights, *inputs)
    for out in run_in_step(graph, weights, *inputs, tp=2, after=(Fusion(),)):
        torch.testing.assert_close(out, whole, rtol=0, atol=1e-4)
    quantized = Quantize("int8").apply(graph)
    lost = (
        (run(quantized, prepare(quantized, weights), *inputs) - whole).abs().median()
    )  # a few tokens change experts
    for out in run_in_step(graph, weights, *inputs, tp=2, after=(Fusion(), Quantize("int8"))):
        # pieces of a row-divided weight have scales of their own: no worse than the whole row's
        assert 0 < (out - whole).abs().median() < 1.5 * lost


# -- what does not divide -------------------------------------------------------------------


def test_indivisible_heads_are_refused() -> None:
    with pytest.raises(InvalidField, match=r"tp = 3.*does not divide 4 heads.*divides 4"):
        TensorParallel(3, 0).apply(tiny_graph("llama"))
    with pytest.raises(InvalidField, match=r"tp = 8.*does not divide 4 heads"):
        TensorParallel(8, 0).apply(tiny_graph("llama"))


def test_indivisible_experts_are_refused() -> None:
    graph = trace(_Mixture(), inputs=(torch.randn(5, 12),))
    with pytest.raises(InvalidField, match=r"tp = 2.*does not divide 3 experts"):
        TensorParallel(2, 0, ep=True).apply(graph)
    assert TensorParallel(2, 0).apply(graph).weight_steps


def test_ranks_are_numbered_from_zero() -> None:
    with pytest.raises(InvalidField, match=r"rank = 2.*0 to 1"):
        TensorParallel(2, 2).apply(tiny_graph("llama"))
    with pytest.raises(InvalidField, match="tp = 0"):
        TensorParallel(0, 0).apply(tiny_graph("llama"))


def test_a_table_that_does_not_divide_stays_whole() -> None:
    model = _Block(vocabulary=51, hidden=32, heads=4, kv_heads=2, inner=24, merged=True)
    graph = trace(model, inputs=(torch.randint(0, 51, (2, 6)),))
    part = TensorParallel(2, 1).apply(graph)
    names = {name for step in part.weight_steps for name in step.reads}
    assert "layers.0.gate_up.weight" in names
    assert not {"embed.weight", "head.weight"} & names


# -- any module -----------------------------------------------------------------------------


class _Mixture(nn.Module):
    """Three experts behind a router."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(12, 3, bias=False)
        self.gate_up = nn.Parameter(torch.randn(3, 16, 12))
        self.down = nn.Parameter(torch.randn(3, 12, 8))

    def forward(self, x: Tensor) -> Tensor:
        shares, ids = self.router(x).softmax(-1).topk(2)
        return torch.ops.planc.experts(  # type: ignore[no-any-return]
            x, ids, shares, self.gate_up, None, self.down, None, "silu", False, False, 0.0, 0.0, False
        )


class _Layer(nn.Module):
    def __init__(self, hidden: int, heads: int, kv_heads: int, inner: int, merged: bool, bias: bool) -> None:
        super().__init__()
        self.shape = (heads, kv_heads, hidden // heads)
        self.norms = nn.ModuleList([nn.LayerNorm(hidden), nn.LayerNorm(hidden)])
        width = (heads + 2 * kv_heads) * (hidden // heads)
        self.qkv = nn.Linear(hidden, width, bias=bias)
        self.out = nn.Linear(hidden, hidden, bias=bias)
        self.merged = merged
        self.gate_up = nn.Linear(hidden, 2 * inner, bias=bias)
        self.gate, self.up = nn.Linear(hidden, inner, bias=bias), nn.Linear(hidden, inner, bias=bias)
        self.down = nn.Linear(inner, hidden, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, hidden = x.shape
        heads, kv_heads, width = self.shape
        q, k, v = self.qkv(self.norms[0](x)).split([heads * width, kv_heads * width, kv_heads * width], -1)
        q, k, v = (t.view(batch, length, -1, width).transpose(1, 2) for t in (q, k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, hidden))
        inner = self.norms[1](x)
        gate, up = self.gate_up(inner).chunk(2, -1) if self.merged else (self.gate(inner), self.up(inner))
        out: Tensor = x + self.down(F.silu(gate) * up)
        return out


class _Block(nn.Module):
    """A transformer with q, k and v in one projection, and gate and up in one too where `merged`."""

    def __init__(
        self,
        vocabulary: int,
        hidden: int,
        heads: int,
        kv_heads: int,
        inner: int,
        merged: bool,
        bias: bool = True,
        tied: bool = False,
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, hidden)
        self.layers = nn.ModuleList(_Layer(hidden, heads, kv_heads, inner, merged, bias) for _ in range(2))
        self.head = nn.Linear(hidden, vocabulary, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        logits: Tensor = self.head(x)
        return logits


@settings(max_examples=6, deadline=None, derandomize=True, phases=[Phase.generate])
@given(
    heads=st.sampled_from([(4, 4), (4, 2), (4, 1), (8, 2)]),
    inner=st.sampled_from([8, 24]),
    merged=st.booleans(),
    bias=st.booleans(),
    tied=st.booleans(),
    tp=st.sampled_from([2, 4]),
)
def test_any_transformer_divides(
    heads: tuple[int, int], inner: int, merged: bool, bias: bool, tied: bool, tp: int
) -> None:
    torch.manual_seed(0)
    model = _Block(64, 32, *heads, inner, merged, bias, tied).eval()
    ids = torch.randint(0, 64, (2, 6))
    graph = trace(model, inputs=(ids,))
    with torch.no_grad():
        whole = model(ids)
    for out in run_in_step(graph, weights_of(model), ids, tp=tp):
        torch.testing.assert_close(out, whole, rtol=0, atol=1e-5)
    reduced = sum(
        "all_reduce" in str(n.target) for n in TensorParallel(tp, 0).apply(graph).module.graph.nodes
    )
    assert reduced == 5  # the embedding, and two per layer


class _FlatNorm(nn.Module):
    """A norm over all heads together, of tokens in one row: dimension 1 is divided and normalised."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 12), nn.Linear(12, 6)
        self.weight = nn.Parameter(torch.rand(12))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.b(torch.ops.planc.rms_norm(self.a(x), self.weight, 1e-5, "cast_mul"))
        return out


class _Odd(nn.Module):
    """Nothing here has a rule for what follows it: every divided value must be gathered or kept whole."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 12), nn.Linear(12, 6)

    def forward(self, x: Tensor) -> Tensor:
        sorted_ = self.a(x).sort(-1).values.flip(-1)
        out: Tensor = self.b(sorted_).cumsum(-1) + x.mean()
        return out


@pytest.mark.parametrize("kind", [_Odd, _FlatNorm])
def test_ops_without_rules_run_whole(kind: type[nn.Module]) -> None:
    torch.manual_seed(1)
    model, x = kind().eval(), torch.randn(5, 8)
    graph = trace(model, inputs=(x,))
    with torch.no_grad():
        whole = model(x)
    for out in run_in_step(graph, weights_of(model), x, tp=2):
        torch.testing.assert_close(out, whole, rtol=0, atol=1e-6)
