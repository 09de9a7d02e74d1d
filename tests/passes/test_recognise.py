"""Recognise raises clusters of ATen ops, keeps the numbers, and leaves alone what it does not know."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.export import Dim

from planc.ir.graph import Graph
from planc.ir.trace import trace
from planc.ir.trace.module import trace_module
from planc.passes.pipeline import FRONT, run
from planc.passes.recognise import coverage
from tests.ir.blocks import Attention, Block, GatedMlp, Norm

ANY_SIZE = ({0: Dim.AUTO, 1: Dim.AUTO},)


def front(module: nn.Module, example: Tensor) -> tuple[Graph, Graph]:
    graph = trace_module(module, (example,), dynamic_shapes=ANY_SIZE)
    return graph, run(graph, FRONT, check_shapes=True)


def same(before: Graph, after: Graph, given: Tensor) -> None:
    tolerance = 1e-5 if given.dtype == torch.float32 else 2e-2
    with torch.no_grad():
        torch.testing.assert_close(after.module(given), before.module(given), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", ["cast_mul", "mul_cast", "one_plus", "none"])
def test_norms_are_raised_with_the_rounding_they_have(mode: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    module = Norm(64, mode).to(dtype)
    _, after = front(module, torch.randn(2, 5, 64).to(dtype))
    (norm,) = [n for n in after.module.graph.nodes if n.op == "call_function"]
    assert str(norm.target) == "planc.rms_norm.default"
    given = torch.randn(3, 7, 64).to(dtype)
    assert torch.equal(after.module(given), module(given))
    if dtype == torch.bfloat16:  # in fp32 there is nothing to round, and one spelling for all
        assert norm.args[3] == mode


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torchs_own_norm_is_raised(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    module = nn.RMSNorm(64, eps=1e-5).to(dtype)
    nn.init.uniform_(module.weight, 0.5, 1.5)
    _, after = front(module, torch.randn(2, 5, 64).to(dtype))
    assert coverage(after).raised == {"planc.rms_norm": 1}
    given = torch.randn(3, 7, 64).to(dtype)
    torch.testing.assert_close(after.module(given), module(given))


@pytest.mark.parametrize("act", ["silu", "swish", "gelu", "gelu_tanh", "relu"])
def test_gated_activations_are_raised(act: str) -> None:
    torch.manual_seed(0)
    before, after = front(GatedMlp(16, act), torch.randn(2, 5, 16))
    assert coverage(after).raised == {"planc.gated_activation": 1}
    same(before, after, torch.randn(3, 7, 16))


@pytest.mark.parametrize(
    ("how", "causal"),
    [
        *(("repeat", True), ("gqa", True), ("expand", True), ("mask", True)),
        *(("written", True), ("added", True), ("both", False)),
    ],
)
def test_attention_is_raised_however_it_is_written(how: str, causal: bool) -> None:
    torch.manual_seed(0)
    before, after = front(Attention(how=how), torch.randn(2, 6, 32))
    assert coverage(after).raised == {"planc.attention": 1, "planc.rope_single": 2}
    (node,) = after.module.graph.find_nodes(op="call_function", target=torch.ops.planc.attention.default)
    assert node.args[6] is causal
    key = node.args[1].meta["val"]
    assert key.shape[1] == 2, "the KV heads are still repeated"
    same(before, after, torch.randn(3, 9, 32))


@pytest.mark.parametrize("how", ["window", "moved"])
def test_attention_under_a_mask_that_is_not_understood_stays_aten(how: str) -> None:
    before, after = front(Attention(how=how), torch.randn(2, 6, 32))
    assert "planc.attention" not in coverage(after).raised
    assert coverage(after).declared["aten.scaled_dot_product_attention"] == 1
    same(before, after, torch.randn(3, 9, 32))


class Lookalikes(nn.Module):
    """Close to what the rules look for, but something else."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        over_tokens = x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-6)
        cubed = x * torch.rsqrt(x.pow(4).mean(-1, keepdim=True) + 1e-6)
        other = x * torch.rsqrt((x + 1).pow(2).mean(-1, keepdim=True) + 1e-6)
        broadcast = F.silu(x[..., :1]) * x
        low, high = x.chunk(2, -1)
        not_turned = x * x.cos() + torch.cat((high, low), -1) * x.sin()
        return over_tokens + cubed + other + broadcast + not_turned


def test_lookalikes_are_left_alone() -> None:
    before, after = front(Lookalikes(), torch.randn(2, 5, 8))
    assert coverage(after).raised == {}
    same(before, after, torch.randn(3, 4, 8))


def test_decomposed_programs_get_their_linears_and_norms_back() -> None:
    module = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 4, bias=False)).eval()
    program = torch.export.export(module, (torch.randn(2, 8),), dynamic_shapes=({0: Dim("batch")},))
    graph = trace(program.run_decompositions())
    assert "aten.addmm" in coverage(graph).declared
    after = run(graph, FRONT, check_shapes=True)
    assert coverage(after).declared == {"aten.linear": 2, "aten.layer_norm": 1}
    given = torch.randn(5, 8)
    torch.testing.assert_close(after.module(given), module(given))


def test_new_nodes_know_where_they_come_from() -> None:
    _, after = front(nn.Sequential(Block(), Block()), torch.randn(2, 6, 32))
    for node in after.module.graph.nodes:
        if node.op == "call_function" and str(node.target).startswith("planc."):
            assert "blocks.py" in node.meta["stack_trace"] or "rms_norm" in node.name
            assert node.meta["nn_module_stack"]


# -- drawn graphs ------------------------------------------------------------------------

PARTS = st.one_of(
    st.builds(Norm, st.just(16), st.sampled_from(["cast_mul", "mul_cast", "one_plus", "none"])),
    st.builds(GatedMlp, st.just(16), st.sampled_from(["silu", "swish", "gelu", "relu"])),
    st.builds(
        Attention,
        st.just(16),
        st.just(4),
        st.sampled_from([1, 2, 4]),
        st.sampled_from(["repeat", "gqa", "mask", "written", "added", "both", "window"]),
    ),
    st.builds(nn.LayerNorm, st.just(16)),
    st.builds(lambda bias: nn.Linear(16, 16, bias=bias), st.booleans()),
    st.sampled_from([nn.Tanh, nn.SiLU, nn.GELU, nn.Identity]).map(lambda kind: kind()),
    st.builds(nn.Dropout, st.just(0.3)),
)


class Drawn(nn.Module):
    """Parts in a row, some of them with a residual around."""

    def __init__(self, parts: list[nn.Module], residual: list[bool]) -> None:
        super().__init__()
        self.parts, self.residual = nn.ModuleList(parts), residual

    def forward(self, x: Tensor) -> Tensor:
        for part, residual in zip(self.parts, self.residual, strict=True):
            x = x + part(x) if residual else part(x)
        return x


@settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_drawn_graphs_give_the_same_numbers_before_and_after(data: st.DataObject) -> None:
    torch.manual_seed(data.draw(st.integers(0, 99), label="seed"))
    parts = data.draw(st.lists(PARTS, min_size=1, max_size=4), label="parts")
    residual = data.draw(st.lists(st.booleans(), min_size=len(parts), max_size=len(parts)), label="residual")
    before, after = front(Drawn(parts, residual), torch.randn(2, 6, 16))
    same(before, after, torch.randn(data.draw(st.integers(1, 3)), data.draw(st.integers(2, 9)), 16))
