"""Fused prefill and decode graphs serve the same tokens, with caches written by the fused ops."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from planc.ir.graph import Graph
from planc.ir.verify import verify
from planc.passes.fusion import Fusion, weights_for
from planc.passes.parallel import TensorParallel
from planc.passes.phases import Phases
from planc.passes.quantize import Quantize
from planc.runtime.executor import Executor, Request
from tests.families import FAMILIES, tiny_graph
from tests.passes.running import family_weights

PROMPTS = [[5, 9, 77, 12, 3, 8, 100, 31, 60, 61], [44, 2, 7]]


def phases(family: str) -> list[Graph]:
    return [Phases("prefill").apply(tiny_graph(family)), Phases("decode").apply(tiny_graph(family))]


def serve(graphs: list[Graph], family: str) -> tuple[list[list[int]], Tensor]:
    """Tokens of two requests of different lengths, prefilled in chunks, and the logits of every step."""
    prefill, decode = graphs
    executor = Executor(
        prefill, decode, family_weights(family), blocks=32, block_size=4, max_num_batched_tokens=8
    )
    logits: list[Tensor] = []
    requests = [Request(tuple(prompt), 2) for prompt in PROMPTS]
    tokens = executor.run(requests, observe=lambda step, found: logits.append(found))
    return tokens, torch.cat(logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_fused_phases_serve_the_same_tokens(family: str) -> None:
    graphs = phases(family)
    fused = [Fusion().apply(graph) for graph in graphs]
    for graph in fused:
        verify(graph, "fusion")
    assert fused[0].weight_steps == fused[1].weight_steps
    tokens, logits = serve(graphs, family)
    fused_tokens, fused_logits = serve(fused, family)
    torch.testing.assert_close(fused_logits, logits, rtol=1e-4, atol=1e-3)
    assert fused_tokens == tokens


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_oss"])
def test_the_fused_cache_write_gives_the_same_bits(family: str) -> None:
    graphs = phases(family)
    fused = [Fusion(frozenset({"qk_norm_rope", "rope_kv_write"})).apply(graph) for graph in graphs]
    names = {node.target for graph in fused for node in graph.module.graph.nodes}
    assert torch.ops.planc.rope_kv_write.default in names
    assert not names & {torch.ops.planc.paged_attention.default, torch.ops.planc.rope.default}
    assert torch.equal(serve(fused, family)[1], serve(graphs, family)[1])


def test_a_rotation_that_something_else_reads_is_left() -> None:
    """Rotated keys that leave the attention block must stay in memory."""
    (graph, _) = phases("llama")
    nodes = graph.module.graph
    rope = next(node for node in nodes.nodes if node.target is torch.ops.planc.rope.default)
    key = next(user for user in rope.users if user.args[1] == 1)
    output = nodes.output_node()
    output.args = ((output.args[0], key),)
    graph.module.recompile()
    left = Fusion(frozenset({"rope_kv_write"})).apply(graph)
    targets = [node.target for node in left.module.graph.nodes]
    assert targets.count(torch.ops.planc.rope.default) == 1
    assert targets.count(torch.ops.planc.rope_kv_write.default) == 1


def test_ranks_of_a_divided_model_are_fused_and_quantized_alike() -> None:
    """The order of the compiler: divide, fuse, quantize. Every rank's weights come from the whole model's."""
    graph = phases("llama")[1]
    weights = family_weights("llama")
    for rank in range(2):
        divided = TensorParallel(2, rank).apply(graph)
        ready = Quantize("fp8", "fp8", "fp8").apply(Fusion().apply(divided))
        verify(ready, "quantize", rerun=True)
        bound = weights_for(ready, weights)
        held = {**dict(ready.module.named_parameters()), **dict(ready.module.named_buffers())}
        read = [str(node.target) for node in ready.module.graph.nodes if node.op == "get_attr"]
        assert "model.layers.0.self_attn.qkv_proj.weight_scale" in read
        assert {n: (bound[n].shape, bound[n].dtype) for n in read} == {
            n: (held[n].shape, held[n].dtype) for n in read
        }
