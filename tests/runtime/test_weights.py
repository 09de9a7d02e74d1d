"""Weights and tokenizer from a model folder, as transformers writes it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer as Trained
from tokenizers import models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from planc.errors import FileMissing, WeightsMismatch
from planc.ir.graph import Graph, Source
from planc.ir.trace.module import trace_module
from planc.runtime.binding import bind, check, parameters
from planc.runtime.weights import Tokenizer, at_random, float_dtype, from_folder
from tests.runtime.serving import serving_graph, serving_model, serving_weights


def saved(family: str, folder: Path) -> Path:
    serving_model(family).save_pretrained(folder)  # type: ignore[operator]
    return folder


@pytest.mark.parametrize("family", ["llama", "qwen3", "qwen3_moe"])
def test_a_saved_folder_loads_under_the_traces_names(family: str, tmp_path: Path) -> None:
    """Tied embeddings are saved once, experts one by one; both come out as the trace has them."""
    found = from_folder(saved(family, tmp_path))
    check(serving_graph(family), found)
    (module,) = bind((serving_graph(family),), found)
    ids = torch.randint(2, 190, (2, 9), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(9).expand(2, -1)
    with torch.inference_mode():
        wanted = serving_model(family)(input_ids=ids, position_ids=positions, use_cache=False).logits
        torch.testing.assert_close(module(ids, positions), wanted)


def test_weights_are_converted_to_the_asked_type(tmp_path: Path) -> None:
    found = from_folder(saved("llama", tmp_path), dtype=torch.bfloat16)
    assert found["lm_head.weight"].dtype == torch.bfloat16
    (module,) = bind((serving_graph("llama"),), found)  # and back to what the graph has
    assert module.get_buffer("lm_head.weight").dtype == torch.float32


def rewrite(folder: Path, change: Any) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    saved("llama", tmp_path)
    rewrite(tmp_path, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(WeightsMismatch, match=r"missing.*model\.layers\.1\.mlp\.up_proj\.weight"):
        from_folder(tmp_path)


def test_a_tensor_of_another_shape_is_named(tmp_path: Path) -> None:
    saved("llama", tmp_path)
    rewrite(tmp_path, lambda tensors: tensors.update({"lm_head.weight": torch.zeros(3, 64)}))
    with pytest.raises(WeightsMismatch, match=r"lm_head\.weight"):
        from_folder(tmp_path)


def test_a_quantized_checkpoint_is_refused(tmp_path: Path) -> None:
    saved("llama", tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "quantization_config": {"quant_method": "awq"}}))
    with pytest.raises(WeightsMismatch, match="awq"):
        from_folder(tmp_path)


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileMissing, match="config"):
        from_folder(tmp_path)
    saved("llama", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileMissing, match="safetensors"):
        from_folder(tmp_path)


def test_random_weights_follow_the_seed() -> None:
    """gpt-oss: transformers initialises its sinks at random itself, and these follow the seed too."""
    graph = serving_graph("gpt_oss")
    first, again, other = at_random(graph, 1), at_random(graph, 1), at_random(graph, 2)
    check(graph, first)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])
    assert float_dtype(graph) == torch.float32


def test_random_weights_of_any_module() -> None:
    with torch.device("meta"):
        module = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
    graph = trace_module(module, torch.zeros(2, 4, device="meta"))
    made = at_random(graph)
    check(graph, made)
    assert set(made) == set(parameters(graph))


class Negate:
    reads = ("lm_head.weight",)
    makes = ("head",)

    def apply(self, tensors: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (-tensors[0],)


def test_binding_replays_what_passes_did_to_weights() -> None:
    """And a step whose source is missing is a mismatch that names it."""
    weights = {"lm_head.weight": torch.ones(2, 3)}
    nodes = torch.fx.Graph()
    x = nodes.placeholder("x")
    nodes.output(nodes.call_function(torch.ops.aten.linear.default, (x, nodes.get_attr("head"))))
    module = torch.fx.GraphModule({"head": torch.empty(2, 3, device="meta")}, nodes)
    graph = Graph(module, "traced", Source("m", "module", "M"), weight_steps=(Negate(),))
    (bound,) = bind((graph,), weights)
    assert bound(torch.ones(1, 3)).tolist() == [[-3.0, -3.0]]
    with pytest.raises(WeightsMismatch, match=r"lm_head\.weight"):
        bind((graph,), {})


def test_both_phases_share_one_copy_of_the_weights() -> None:
    graph = serving_graph("llama")
    one, two = bind((graph, graph), serving_weights("llama"))
    name = "model.embed_tokens.weight"
    assert one.get_buffer(name).data_ptr() == two.get_buffer(name).data_ptr()


def test_tokenizer(tmp_path: Path) -> None:
    words = {"<end>": 0, "the": 1, "quick": 2, "fox": 3, "<unk>": 4}
    trained = Trained(models.WordLevel(words, unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=trained, eos_token="<end>").save_pretrained(tmp_path)
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.encode("the quick fox") == [1, 2, 3]
    assert tokenizer.decode([2, 3, 0]) == "quick fox"
    assert tokenizer.eos == (0,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [3, 0]}')
    assert tokenizer.eos == (0, 3)
    with pytest.raises(FileMissing, match="tokenizer"):
        Tokenizer(tmp_path / "nowhere")
