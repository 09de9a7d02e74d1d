"""Cost tables: parameters, caches and FLOPs of real configurations, against what is published."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from planc.cost_model.table import CostTable
from planc.ir.trace import trace
from planc.ir.trace.hf import trace_config
from planc.passes.native_format import native_format
from planc.passes.tabulate import tabulate

ROOT = Path(__file__).resolve().parents[2]
PUBLISHED: dict[str, Any] = json.loads((ROOT / "tests/passes/published.json").read_text())
MODELS = [name for name in PUBLISHED if name != "about"]
FAST = ["llama-3.1-70b", "qwen3-30b-a3b", "deepseek-r1"]


def config(name: str) -> dict[str, Any]:
    return json.loads((ROOT / f"examples/models/{name}.json").read_text())


@cache
def table(name: str) -> CostTable:
    return tabulate(trace_config(config(name), name))


def marked(names: list[str]) -> list[Any]:
    return [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in names]


@pytest.mark.parametrize("name", marked(MODELS))
def test_parameters_are_as_published(name: str) -> None:
    facts = table(name).model
    assert facts.parameters == pytest.approx(PUBLISHED[name]["parameters"] * 1e9, rel=0.005)
    if "active" in PUBLISHED[name]:
        assert facts.active_parameters == pytest.approx(PUBLISHED[name]["active"] * 1e9, rel=0.005)
    else:
        assert facts.experts or facts.active_parameters == facts.parameters


@pytest.mark.parametrize("name", marked(MODELS))
def test_cache_elements_per_token_are_exact(name: str) -> None:
    assert table(name).kv_elements_per_token() == eval(PUBLISHED[name]["kv"], {})


@pytest.mark.parametrize("name", marked(MODELS))
def test_flops_of_a_decoded_token_are_two_per_active_parameter_and_attention(name: str) -> None:
    found, context = table(name), 4096
    features = {"T": 1.0, "S": 1.0}
    for span, reach in (("full", context), ("w128", 128), ("w4096", context), ("c8192", context)):
        features |= {f"P:{span}": float(reach), f"K:{span}": float(reach)}
    counts = {each.name: each.count for each in found.classes}
    flops = {"attention": 0.0, "rest": 0.0}
    for row in found.rows["decode"]:
        part = "attention" if row.work.family == "attention" else "rest"
        flops[part] += counts[row.layer_class] * row.calls * row.work.flops.at(features)
    facts = found.model
    looked_up = 0 if facts.tied_embeddings else facts.vocab * facts.hidden  # a look-up multiplies nothing
    assert flops["rest"] == pytest.approx(2.0 * (facts.active_parameters - looked_up), rel=0.03)
    assert flops["attention"] > 0


@pytest.mark.parametrize("name", FAST)
def test_tables_are_small_and_survive_json(name: str) -> None:
    found = table(name)
    assert CostTable.from_json(found.to_json()) == found
    assert all(len(rows) < 100 for rows in found.rows.values())
    assert found.model.generic_ops == ()
    offered = {(offer.name, offer.layer_class) for offer in found.fusions}
    layers = [each.name for each in found.classes if each.layers]
    assert offered >= {("residual_add_rms_norm", layer) for layer in layers}


def test_rows_say_how_they_are_divided() -> None:
    rows = {row.site: row for row in table("llama-3.1-70b").rows["decode"] if row.layer_class == "decoder"}
    assert (rows["self_attn.q_proj"].shard.kind, rows["self_attn.q_proj"].shard.units) == ("column", 64)
    assert rows["mlp.down_proj"].shard.kind == "row"
    assert rows["mlp.down_proj"].shard.collective == "all_reduce"
    assert dict(rows["mlp.down_proj"].shard.moved.terms) == {"T": 8192.0}
    attention = next(row for row in table("llama-3.1-70b").rows["decode"] if row.work.family == "attention")
    assert (attention.shard.kind, attention.shard.kv_units) == ("heads", 8)


def test_layer_classes_say_what_a_layer_keeps() -> None:
    dense, moe = (each for each in table("deepseek-r1").classes if each.layers)
    assert (dense.name, dense.count, dense.layers) == ("dense", 3, (0, 1, 2))
    assert (moe.name, moe.count, moe.kv_elements, moe.kv_units) == ("moe", 58, 576, 0)
    facts = table("deepseek-r1").model
    assert (facts.experts, facts.top_k, facts.native_format, facts.layers) == (256, 8, "fp8", 61)
    assert facts.block_scales
    total = sum(each.count * each.parameters for each in table("deepseek-r1").classes)
    assert total == facts.parameters


@pytest.mark.parametrize("name", ["qwen3-0.6b"])
def test_a_tied_table_counts_once(name: str) -> None:
    shallow = tabulate(trace_config({**config(name), "num_hidden_layers": 1}, name))
    assert shallow.model.tied_embeddings
    head = next(each for each in shallow.classes if each.name == "head")
    assert head.parameters == shallow.model.hidden, "only the norm is the head's own"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama-3.1-8b", "bf16"),
        ("deepseek-r1", "fp8"),
        ("gpt-oss-20b", "mxfp4"),
        ("kimi-k2.5", "w4a16"),
        ("minimax-m2.5", "fp8"),
    ],
)
def test_the_checkpoints_format_is_read_from_the_configuration(name: str, expected: str) -> None:
    assert native_format(config(name)) == expected


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"quant_method": "gptq", "bits": 8}, "int8"),
        ({"quant_method": "awq", "bits": 4}, "w4a16"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "nvfp4"),
        (
            {"quant_method": "compressed-tensors", "config_groups": {"g": {"weights": {"type": "float"}}}},
            "fp8",
        ),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {"g": {"weights": {"num_bits": 8}, "input_activations": {"num_bits": 8}}},
            },
            "int8",
        ),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {
                    "a": {"weights": {"num_bits": 4, "type": "int"}},
                    "b": {"weights": {"num_bits": 8, "type": "float"}},
                },
            },
            "fp8",
        ),
    ],
)
def test_formats_of_other_quantizers(settings: dict[str, Any], expected: str) -> None:
    assert native_format({"dtype": "bfloat16", "quantization_config": settings}) == expected


def test_modules_and_encoders_have_prefill_rows_only() -> None:
    encoder = tabulate(trace("examples.modules.encoder:tiny"))
    assert list(encoder.rows) == ["prefill"]
    assert encoder.model.kind == "encoder"
    assert encoder.model.parameters == 43_328
    assert encoder.kv_elements_per_token() == 0
    attention = next(row for row in encoder.rows["prefill"] if row.work.family == "attention")
    assert dict(attention.work.flops.terms) == {"P:both": 2.0 * 4 * 16}
    convnet = tabulate(trace("examples.modules.convnet:tiny"))
    assert convnet.model.kind == "module"
    assert convnet.model.generic_ops == ()
    assert {row.work.family for row in convnet.rows["prefill"]} == {"gemm", "elementwise"}
