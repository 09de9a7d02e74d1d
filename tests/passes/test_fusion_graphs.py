"""Fusion on graphs drawn at random, and the cases it must leave alone."""

from __future__ import annotations

from collections import Counter

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import planc.ir.ops  # noqa: F401
from planc.ir.graph import Graph
from planc.ir.trace import trace
from planc.ir.verify import verify
from planc.passes.fusion import Fusion, weights_for
from tests.passes.running import run, weights_of

ops = torch.ops.planc
WIDTH = 16


class Gated(nn.Module):
    def __init__(self, act: str, bias: bool, shared: bool) -> None:
        super().__init__()
        self.act = act
        self.gate_proj = nn.Linear(WIDTH, 24, bias=bias)
        self.up_proj = self.gate_proj if shared else nn.Linear(WIDTH, 24, bias=bias)
        self.down_proj = nn.Linear(24, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(ops.gated_activation(self.gate_proj(x), self.up_proj(x), self.act))


class Mixer(nn.Module):
    """q, k, v projections, some of them with a bias."""

    def __init__(self, biases: tuple[bool, bool, bool]) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(WIDTH, WIDTH, bias=b) for b in biases)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        return torch.softmax(q @ k.transpose(-1, -2), -1) @ v


class Residual(nn.Module):
    """x + f(norm(x)); with `scale`, the sum is of a broadcast row."""

    def __init__(self, mode: str, inner: nn.Module, broadcast: bool) -> None:
        super().__init__()
        self.mode, self.inner = mode, inner
        self.weight = None if mode == "none" else nn.Parameter(torch.randn(WIDTH))
        self.row = nn.Parameter(torch.randn(WIDTH)) if broadcast else None

    def forward(self, x: Tensor) -> Tensor:
        y = x if self.row is None else x + self.row
        return y + self.inner(ops.rms_norm(y, self.weight, 1e-5, self.mode))


_gated = st.builds(
    Gated, st.sampled_from(["silu", "gelu", "gelu_tanh", "relu"]), st.booleans(), st.booleans()
)
_mixer = st.builds(Mixer, st.tuples(st.booleans(), st.booleans(), st.booleans()))
_blocks = st.lists(
    st.builds(
        Residual,
        st.sampled_from(["cast_mul", "mul_cast", "one_plus", "none"]),
        st.one_of(_gated, _mixer),
        st.booleans(),
    ),
    min_size=1,
    max_size=3,
)


def traced(module: nn.Module) -> Graph:
    return trace(module.eval(), inputs=torch.randn(2, 5, WIDTH))


def ops_of(graph: Graph) -> Counter[object]:
    return Counter(node.target for node in graph.module.graph.nodes)


@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
@given(blocks=_blocks, seed=st.integers(0, 3))
def test_drawn_graphs_keep_their_numbers(blocks: list[nn.Module], seed: int) -> None:
    model = nn.Sequential(*blocks)
    graph, weights = traced(model), weights_of(model)
    fused = Fusion().apply(graph)
    verify(fused, "fusion", rerun=True)
    x = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        expected = model(x)
    torch.testing.assert_close(run(fused, weights_for(fused, weights), x), expected, rtol=1e-4, atol=1e-4)


def test_parts_with_and_without_bias_are_not_merged() -> None:
    graph = traced(Mixer((True, False, True)))
    assert ops_of(Fusion().apply(graph)) == ops_of(graph)


def test_biases_are_merged_with_their_weights() -> None:
    model = Mixer((True, True, True))
    fused = Fusion().apply(traced(model))
    assert ops_of(fused)[torch.ops.aten.linear.default] == 1
    assert [step.makes for step in fused.weight_steps] == [("qkv_proj.weight",), ("qkv_proj.bias",)]
    bound = weights_for(fused, weights_of(model))
    rows = torch.cat([model.q_proj.weight, model.k_proj.weight, model.v_proj.weight])
    assert torch.equal(bound["qkv_proj.weight"], rows)


def test_a_weight_that_two_calls_read_is_not_merged() -> None:
    graph = traced(Gated("silu", bias=False, shared=True))
    assert ops_of(Fusion().apply(graph)) == ops_of(graph)


def test_a_broadcast_sum_is_not_fused() -> None:
    graph = traced(Residual("none", nn.Identity(), broadcast=True))
    assert ops_of(Fusion().apply(graph))[ops.add_rms_norm.default] == 0


def test_products_of_different_modules_are_not_merged() -> None:
    class Routed(nn.Module):
        """A router beside an expert: one input, but not one module."""

        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Linear(WIDTH, 4, bias=False)
            self.expert = nn.ModuleDict({"w1": nn.Linear(WIDTH, 24, bias=False)})

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([self.gate(x), self.expert["w1"](x)], -1)

    graph = traced(Routed())
    assert ops_of(Fusion().apply(graph)) == ops_of(graph)
