"""Traced Hugging Face graphs: the numbers of transformers' eager model, and what a graph must hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.llama import modeling_llama

from planc.errors import FileMissing, FileUnreadable, PlancError, UnsupportedModel, UntrustedCode
from planc.ir.graph import Graph
from planc.ir.layers import layer_of, module_path
from planc.ir.trace.hf import trace_config, trace_path
from planc.ir.trace.hf_config import read_config, text_part, transformers_config
from planc.ir.trace.raising import raised
from planc.ir.verify import verify
from tests.families import FAMILIES, tiny_graph, tiny_model

BOTH = pytest.mark.parametrize("family", sorted(FAMILIES))

#: Largest difference of logits whose spread is 3. The delta rule is a chunked form there, a step-by-step
#: one here; elsewhere only the order of sums differs.
TOLERANCE = {"qwen3_5": 1e-3}


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def run(graph: Graph, model: nn.Module, ids: Tensor, positions: Tensor) -> Tensor:
    """The graph with the model's weights; buffers that the graph carries itself are kept."""
    weights = tensors(model)
    given = {name: weights[name] for name, t in tensors(graph.module).items() if t.device.type == "meta"}
    with torch.no_grad():
        out = torch.func.functional_call(graph.module, given, (ids, positions))
    assert isinstance(out, Tensor)
    return out


def tokens(rows: int, length: int) -> tuple[Tensor, Tensor]:
    ids = torch.randint(2, 190, (rows, length), generator=torch.Generator().manual_seed(length))
    return ids, torch.arange(length).expand(rows, length).contiguous()


@BOTH
@pytest.mark.parametrize(("rows", "length"), [(3, 29), (1, 1)])
def test_graph_gives_transformers_eager_logits(family: str, rows: int, length: int) -> None:
    model = tiny_model(family)
    ids, positions = tokens(rows, length)
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
    found = run(tiny_graph(family), model, ids, positions)
    assert expected.std() > 1.5
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE.get(family, 2e-5))


@BOTH
def test_graph_is_whole(family: str) -> None:
    """Verified, all parameters present, no constants made on a device, every layer's nodes its own."""
    graph, model = tiny_graph(family), tiny_model(family)
    verify(graph, "trace", rerun=True)
    assert not graph.source.notes
    assert set(graph.symbols.values()) == {"batch", "seq"}
    mine = dict(graph.module.named_parameters())
    theirs = dict(model.named_parameters())
    assert {n: p.shape for n, p in mine.items()} == {n: p.shape for n, p in theirs.items()}
    layers = set()
    for node in graph.module.graph.nodes:
        assert "device" not in node.kwargs, node
        assert node.op == "output" or "val" in node.meta, node
        if node.op == "call_function" and (layer := layer_of(node)) is not None:
            layers.add(layer)
            for weight in node.all_input_nodes:
                if weight.op == "get_attr":
                    assert f"layers.{layer}." in str(weight.target), (node, weight, module_path(node))
    assert layers == set(range(FAMILIES[family]["num_hidden_layers"]))


@BOTH
def test_attention_is_one_op_per_layer_and_mlps_keep_their_linears(family: str) -> None:
    names = [str(n.target) for n in tiny_graph(family).module.graph.nodes if n.op == "call_function"]
    mixing = [n for n in names if n.startswith(("planc.attention", "planc.gated_delta_rule"))]
    assert len(mixing) == FAMILIES[family]["num_hidden_layers"]
    assert not any(n.startswith(("aten.softmax", "aten.topk", "aten.matmul", "aten.bmm")) for n in names)
    assert any(n.startswith(("planc.gated_activation", "planc.experts")) for n in names)


def test_positions_come_from_position_ids_alone() -> None:
    """Llama 4 scales queries by position: a row laid behind another must not look further along."""
    model, graph = tiny_model("llama4"), tiny_graph("llama4")
    ids, positions = tokens(1, 8)
    apart = run(graph, model, ids, positions)
    later = run(graph, model, ids, positions + 40)
    assert (apart - later).abs().max() > 1e-3
    twice = run(graph, model, torch.cat([ids, ids], 1), torch.cat([positions, positions], 1))
    torch.testing.assert_close(twice[:, :8], apart, rtol=0, atol=1e-4)


def test_folded_depth_equals_every_layer_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five gpt-oss layers: copies of two kinds against a trace of each layer by itself."""
    config = {
        **FAMILIES["gpt_oss"],
        "num_hidden_layers": 5,
        "layer_types": ["sliding_attention", "full_attention"] * 2 + ["full_attention"],
    }
    folded = trace_config(config, "folded", dtype=torch.float32)
    monkeypatch.setattr("planc.ir.trace.depth._signature", lambda *facts: object())
    whole = trace_config(config, "whole", dtype=torch.float32)
    assert [(n.op, str(n.target)) for n in ordered(folded)] == [(n.op, str(n.target)) for n in ordered(whole)]
    assert [module_path(n) for n in ordered(folded)] == [module_path(n) for n in ordered(whole)]
    windows = [n.args[7] for n in folded.module.graph.nodes if str(n.target) == "planc.attention.default"]
    assert windows == [5, 0, 5, 0, 0]


def ordered(graph: Graph) -> list[torch.fx.Node]:
    return [
        n for n in graph.module.graph.nodes if n.op == "call_function" and "sym_size" not in str(n.target)
    ]


def test_tracing_leaves_transformers_as_it_was() -> None:
    model = tiny_model("llama")
    function = modeling_llama.apply_rotary_pos_emb
    before = [dict(vars(m)) for m in model.modules()]
    with raised(model):
        assert modeling_llama.apply_rotary_pos_emb is not function
    assert modeling_llama.apply_rotary_pos_emb is function
    assert [dict(vars(m)) for m in model.modules()] == before
    assert model.config._attn_implementation == "eager"


# -- configurations -----------------------------------------------------------------------------


def test_text_part_of_a_multimodal_configuration() -> None:
    config = {"model_type": "outer", "tie_word_embeddings": True, "text_config": {"model_type": "llama"}}
    assert text_part(config) == {"model_type": "llama", "tie_word_embeddings": True}


def test_kimi_is_built_as_deepseek_without_its_own_code() -> None:
    config = read_config(Path("examples/models/kimi-k2.5.json"))
    assert text_part(config)["auto_map"]
    assert transformers_config(config, "kimi").model_type == "deepseek_v3"


@pytest.mark.parametrize(
    ("config", "error", "said"),
    [
        ({}, UnsupportedModel, "model_type"),
        ({"model_type": "lama"}, UnsupportedModel, "llama"),
        ({"model_type": "bert"}, UnsupportedModel, "encoder"),
        ({"model_type": "vit"}, UnsupportedModel, "causal"),
        ({"model_type": "brandnew", "auto_map": {"AutoModelForCausalLM": "m.X"}}, UntrustedCode, "m.X"),
        ({"model_type": "llama", "hidden_size": 100, "num_attention_heads": 3}, UnsupportedModel, "hidden"),
    ],
)
def test_configurations_that_cannot_be_built(
    config: dict[str, Any], error: type[PlancError], said: str
) -> None:
    with pytest.raises(error, match=said):
        trace_config(config, "mine")


def test_files_that_are_no_configuration(tmp_path: Path) -> None:
    with pytest.raises(FileMissing):
        trace_path(tmp_path / "config.json")
    for text, said in (("{", "JSON"), ("[1]", "list")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(FileUnreadable, match=said):
            trace_path(tmp_path)


def test_a_folder_is_named_after_itself(tmp_path: Path) -> None:
    folder = tmp_path / "my-model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(FAMILIES["llama"]))
    assert trace_path(folder).source.name == "my-model"


OWN_CODE = """
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_code_in_a_model_folder_runs_only_when_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "own"
    folder.mkdir()
    classes = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    (folder / "config.json").write_text(
        json.dumps({**FAMILIES["llama"], "model_type": "own", "auto_map": classes})
    )
    (folder / "own.py").write_text(OWN_CODE)
    with pytest.raises(UntrustedCode, match="own"):
        trace_path(folder)
    graph = trace_path(folder, trust_remote_code=True)
    assert graph.source.architecture == "OwnForCausalLM"
    assert any(str(n.target) == "planc.rope.default" for n in graph.module.graph.nodes)
