"""Fusion keeps the numbers of every family and takes exactly the calls out that it says."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from planc.errors import UnknownName, WeightsMismatch
from planc.ir.graph import Graph
from planc.ir.verify import verify
from planc.passes.fusion import NAMES, Fusion, fuse, weights_for
from tests.families import FAMILIES, tiny_graph
from tests.passes.running import family_weights, run, tokens

MERGES = frozenset({"gate_up_merge", "qkv_merge"})
VERTICAL = NAMES - MERGES


def count(graph: Graph) -> Counter[str]:
    """How often each op is called; calls that nothing reads do not count."""
    return Counter(
        node.target.name()
        for node in graph.module.graph.nodes
        if isinstance(node.target, torch._ops.OpOverload) and node.users
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_vertical_fusions_give_the_same_bits(family: str) -> None:
    graph, weights = tiny_graph(family), family_weights(family)
    fused = Fusion(VERTICAL).apply(graph)
    assert fused.weight_steps == ()
    assert count(fused)["planc::add_rms_norm"] > 0
    assert torch.equal(run(fused, weights, *tokens()), run(graph, weights, *tokens()))


@pytest.mark.parametrize("family", FAMILIES)
def test_all_fusions_give_the_same_numbers_from_the_source_weights(family: str) -> None:
    graph, weights = tiny_graph(family), family_weights(family)
    fused = Fusion().apply(graph)
    verify(fused, "fusion", rerun=True)
    bound = weights_for(fused, weights)
    for step in fused.weight_steps:
        assert not set(step.reads) & set(bound)
    torch.testing.assert_close(
        run(fused, bound, *tokens()), run(graph, weights, *tokens()), rtol=1e-4, atol=1e-4
    )


#: What is left after fusing, per family: calls of each op in the whole tiny model.
EXPECTED = {
    "llama": {
        "planc::add_rms_norm": 4,
        "planc::rms_norm": 1,
        "planc::silu_mul": 2,
        "planc::rope": 2,
        "aten::linear": 9,
    },
    "qwen3": {"planc::add_rms_norm": 4, "planc::rms_norm": 1, "planc::qk_norm_rope": 2, "aten::linear": 9},
    "gpt_oss": {"planc::add_rms_norm": 4, "planc::rms_norm": 1, "planc::rope": 2, "aten::linear": 7},
    # sandwich norms: 8 a layer that no addition feeds, or that read a sum another norm took
    "gemma4": {
        "planc::add_rms_norm": 6,
        "planc::qk_norm_rope": 3,
        "planc::gelu_tanh_mul": 3,
        "planc::rope_single": 0,
    },
    # one dense and two mixture layers; q_a with kv_a, the shared expert's gate with its up, routers apart
    "deepseek_v3": {"planc::add_rms_norm": 6, "planc::silu_mul": 3, "aten::linear": 3 * 5 + 2 + 1},
    "qwen3_5": {"planc::add_rms_norm": 8, "planc::qk_norm_rope": 1, "planc::silu_mul": 4},
}


@pytest.mark.parametrize("family", EXPECTED)
def test_every_site_is_found(family: str) -> None:
    left = count(Fusion().apply(tiny_graph(family)))
    assert {op: left[op] for op in EXPECTED[family]} == EXPECTED[family]
    assert left["planc::gated_activation"] == 0


def test_the_given_graph_is_untouched() -> None:
    graph = tiny_graph("llama")
    before = str(graph.module.graph), sorted(name for name, _ in graph.module.named_parameters())
    Fusion().apply(graph)
    assert (str(graph.module.graph), sorted(name for name, _ in graph.module.named_parameters())) == before


def test_nothing_chosen_changes_nothing() -> None:
    graph = tiny_graph("llama")
    assert count(Fusion(frozenset()).apply(graph)) == count(graph)


def test_fusing_twice_finds_nothing_more() -> None:
    once = Fusion().apply(tiny_graph("llama"))
    twice = Fusion().apply(once)
    assert count(twice) == count(once)
    assert twice.weight_steps == once.weight_steps


def test_replacements_are_told_before_they_vanish() -> None:
    seen: list[tuple[int, int]] = []
    fuse(
        tiny_graph("llama"), frozenset({"gate_up_merge"}), lambda old, new: seen.append((len(old), len(new)))
    )
    assert seen == [(3, 2), (3, 2)]


def test_an_unknown_fusion_is_refused() -> None:
    with pytest.raises(UnknownName, match="add_rms_nrom"):
        Fusion(frozenset({"add_rms_nrom"})).apply(tiny_graph("llama"))


def test_a_missing_weight_is_named() -> None:
    fused = Fusion().apply(tiny_graph("llama"))
    weights = dict(family_weights("llama"))
    del weights["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(WeightsMismatch, match=r"layers\.1\.mlp\.up_proj\.weight"):
        weights_for(fused, weights)
