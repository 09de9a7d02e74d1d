"""Formats per part, from graph to checkpoint: what runs is what each part's format says, alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from planc.errors import WeightsMismatch
from planc.ir.graph import Graph
from planc.ir.ops import quantized_formats as qf
from planc.passes.fold import fold
from planc.passes.fusion import Fusion
from planc.passes.phases import Phases
from planc.passes.quantize import Quantize, QuantizeWeight
from planc.passes.quantize_config import Recipe, Rule
from planc.runtime.checkpoint import write_checkpoint
from planc.runtime.executor import Executor, Request
from tests.families import FAMILIES, tiny_graph
from tests.passes.running import family_weights, run, tokens

#: attention of the first layer as it is, other attention int8, the MLPs int4; the last one's in fp8
MIXED = {
    "decoder": "w4a16",
    "decoder:self_attn": "int8/bf16",
    "decoder[0]:self_attn": "bf16/bf16",
    "decoder[1]:mlp": "fp8/bf16",
}
GROUP = 32


def expected(name: str) -> str:
    """The format of a matrix by MIXED, written down once more."""
    _, _, layer, module, *_ = name.split(".")
    if module == "self_attn":
        return "bf16" if layer == "0" else "int8"
    return "fp8" if layer == "1" else "w4a16"


def rounded(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every matrix of a layer as its own format reads it back."""
    found = dict(weights)
    for name, tensor in weights.items():
        if ".layers." in name and tensor.dim() == 2 and (stored := expected(name)) != "bf16":
            group = GROUP if stored == "w4a16" else 0
            kind = qf.WEIGHT_FORMATS[stored]
            found[name] = kind.dequantize(kind.quantize(tensor, group), tensor.shape[-1], group)
    return found


def test_every_part_is_rounded_as_its_own_format_does() -> None:
    graph, weights = tiny_graph("llama"), dict(family_weights("llama"))
    mixed = Quantize(MIXED, group_size=GROUP).apply(graph)
    formats = {step.reads[0]: step.format for step in mixed.weight_steps if isinstance(step, QuantizeWeight)}
    assert formats == {name: expected(name) for name in formats}
    assert set(formats.values()) == {"w4a16", "int8", "fp8"}
    found = run(mixed, {**weights, **prepared(mixed, weights)}, *tokens(1))
    torch.testing.assert_close(found, run(graph, rounded(weights), *tokens(1)), rtol=1e-3, atol=2e-3)


def prepared(graph: Graph, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    from planc.passes.quantize import prepare

    return prepare(graph, weights)


@pytest.mark.parametrize("fused", [False, True])
def test_the_executor_runs_mixed_formats(fused: bool) -> None:
    """Greedy tokens and logits of mixed phase graphs are those of plain ones on rounded weights."""
    plain = [Phases(phase).apply(tiny_graph("llama")) for phase in ("prefill", "decode")]
    mixed = [Fusion().apply(graph) for graph in plain] if fused else plain
    mixed = [Quantize(MIXED, group_size=GROUP).apply(graph) for graph in mixed]
    weights = dict(family_weights("llama"))
    mine, theirs = serve(mixed, weights), serve(plain, rounded(weights))
    torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=2e-3)


def serve(graphs: list[Graph], weights: dict[str, Tensor]) -> Tensor:
    executor = Executor(*graphs, weights, blocks=16, block_size=4)
    logits: list[Tensor] = []
    requests = [Request((5, 9, 77, 12, 3, 8, 100, 31), 4), Request((44, 2, 7), 4)]
    executor.run(requests, observe=lambda step, found: logits.append(found))
    return torch.cat(logits)


def test_activations_are_rounded_where_the_part_says_so() -> None:
    graph = tiny_graph("llama")
    mixed = Quantize({"decoder:self_attn": "fp8/fp8", "decoder:mlp": "fp8/bf16"}, "int8").apply(graph)
    roundings = {
        str(node.args[1].target).split(".")[3]: node.args[5]
        for node in mixed.module.graph.nodes
        if "linear_fp8" in str(node.target)
    }
    assert roundings == {"self_attn": "fp8", "mlp": ""}


def test_caches_of_a_layer_class_change_alone() -> None:
    graph = Phases("decode").apply(tiny_graph("gpt_oss"))
    kinds = {layer: group.name for group in fold(graph) for layer in group.layers}
    assert {"sliding", "full"} <= set(kinds.values())
    mixed = Quantize({"sliding:kv": "fp8"}).apply(graph)
    narrow = {cache.name for cache in mixed.caches if cache.dtype == torch.float8_e4m3fn}
    assert narrow
    assert len(narrow) < len(mixed.caches)
    again = Quantize({"full:kv": "bf16"}, kv="fp8").apply(Phases("decode").apply(tiny_graph("gpt_oss")))
    assert [cache.dtype for cache in again.caches] == [cache.dtype for cache in mixed.caches]


RULES = (
    Rule("self_attn", (0,), ("bf16", "bf16")),
    Rule("self_attn", (1,), ("w4a16", "bf16")),
    Rule("mlp", (1,), ("fp8", "bf16")),
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint of two layers, wide enough for groups of 128."""
    source = tmp_path / "source"
    source.mkdir()
    generator = torch.Generator().manual_seed(0)
    make = lambda *shape: torch.randn(*shape, generator=generator).bfloat16()  # noqa: E731
    tensors = {"lm_head.weight": make(64, 128), "model.norm.weight": make(128)}
    for layer in range(2):
        base = f"model.layers.{layer}"
        tensors |= {f"{base}.self_attn.{name}_proj.weight": make(128, 128) for name in "qkvo"}
        tensors |= {f"{base}.mlp.{name}_proj.weight": make(128, 128) for name in ("gate", "up", "down")}
    save_file(tensors, source / "model.safetensors")
    (source / "config.json").write_text(json.dumps(FAMILIES["llama"]))
    return source


def test_a_mixed_checkpoint_holds_each_part_in_its_format(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    counts = write_checkpoint(folder, target, Recipe(("fp8", "fp8"), RULES))
    assert counts["packed"] == 10
    stored = load_file(target / "model.safetensors")
    wide = load_file(folder / "model.safetensors")
    assert torch.equal(
        stored["model.layers.0.self_attn.q_proj.weight"], wide["model.layers.0.self_attn.q_proj.weight"]
    )
    assert "model.layers.1.self_attn.q_proj.weight_packed" in stored
    for layer in (0, 1):
        name = f"model.layers.{layer}.mlp.up_proj.weight"
        read, scale = qf.quantize_fp8(wide[name])
        assert torch.equal(stored[name].float(), read.float())
        assert torch.equal(stored[f"{name}_scale"], scale)
    config = json.loads((target / "config.json").read_text())["quantization_config"]
    assert config["format"] == "mixed-precision"
    assert config["config_groups"]["group_2"]["targets"] == ["Linear"]
    kinds = [(g["format"], bool(g["input_activations"])) for g in config["config_groups"].values()]
    assert kinds == [("pack-quantized", False), ("float-quantized", False), ("float-quantized", True)]


def test_a_rule_without_matrices_is_refused(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    recipe = Recipe(("bf16", "bf16"), (Rule("mlp.experts", (1,), ("fp8", "fp8")),))
    with pytest.raises(WeightsMismatch, match="of layer 1"):
        write_checkpoint(folder, target, recipe)
