"""Formats per part: a uniform shape written as exceptions costs the same, a mixed one what its parts do."""

from __future__ import annotations

import pytest

from planc.cost_model import catalogue
from planc.cost_model.collectives import Fabric
from planc.cost_model.memory import MemoryMap, memory_map
from planc.cost_model.parts import Part, banded, held, module_of_weight, parse, split
from planc.cost_model.shape import EngineShape, refusals
from planc.cost_model.step import StepLoad, StepModel
from planc.cost_model.table import CostTable
from tests.sample_tables import deepseek_v3, llama70b

H100, VLLM = catalogue.gpu("h100_sxm"), catalogue.engine("vllm")
LOADS = StepLoad([1, 64, 256], [500, 4000, 2000], [0, 0, 4096], [0, 0, 1])


def shape(**fields: object) -> EngineShape:
    return EngineShape("vllm", "h100_sxm", **{"tp": 8, **fields})  # type: ignore[arg-type]


def seconds(table: CostTable, **fields: object) -> list[float]:
    return list(StepModel(table, shape(**fields), H100, Fabric(8), VLLM).seconds(LOADS))


def memory(table: CostTable, **fields: object) -> MemoryMap:
    limits = {"max_num_seqs": 64, "max_num_batched_tokens": 4096, "max_model_len": 8192}
    return memory_map(table, shape(**fields), H100, VLLM, **limits)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("block:self_attn", Part("block", "self_attn")),
        ("block.1:mlp.experts", Part("block.1", "mlp.experts")),
        ("moe[3-5,9]:kv", Part("moe", "kv", (3, 4, 5, 9))),
        ("block:", Part("block", "")),
        ("block", None),
        ("block[a]:mlp", None),
    ],
)
def test_parts_read_as_they_are_written(text: str, part: Part | None) -> None:
    assert parse(text) == part
    if part is not None:
        assert str(part) == text


def test_the_parts_of_a_mixture_of_experts() -> None:
    found = {str(one.part): one.count for one in held(deepseek_v3())}
    assert found["sparse:mlp.experts"] == 58
    assert found["dense:mlp"] == found["dense:self_attn"] == found["dense:kv"] == 3


def test_tensors_of_a_checkpoint_belong_to_their_module() -> None:
    assert module_of_weight("self_attn.q_proj.weight") == "self_attn"
    assert module_of_weight("mlp.experts.17.up_proj.weight") == "mlp.experts"
    assert module_of_weight("mlp.experts.gate_up_proj") == "mlp.experts"


@pytest.mark.parametrize("table", [llama70b(), deepseek_v3()], ids=["dense", "moe"])
def test_exceptions_everywhere_are_the_uniform_shape(table: CostTable) -> None:
    parts = [str(one.part) for one in held(table)]
    every = tuple((part, "fp8" if part.endswith(":kv") else "fp8/fp8") for part in parts)
    assert seconds(table, formats=every) == seconds(table, weights="fp8", activations="fp8", kv="fp8")
    mine, other = memory(table, formats=every), memory(table, weights="fp8", activations="fp8", kv="fp8")
    assert mine == other


def test_a_band_of_layers_weighs_what_its_share_does() -> None:
    table = llama70b()
    half = tuple((f"block[0-39]:{module}", "fp8/fp8") for module in ("self_attn", "mlp"))
    cut = split(table, half)
    assert [(cls.name, cls.count) for cls in cut.classes if cls.layers] == [
        ("block", 40),
        ("block[0-39]", 40),
    ]
    wide, narrow = seconds(table), seconds(table, weights="fp8", activations="fp8")
    means = [(a + b) / 2 for a, b in zip(wide, narrow, strict=True)]
    assert seconds(table, formats=half) == pytest.approx(means, rel=1e-9)
    weights = [memory(table, **f).weights for f in ({}, {"weights": "fp8", "activations": "fp8"})]
    assert memory(table, formats=half).weights == pytest.approx(sum(weights) / 2, rel=1e-9)


def test_stages_hold_the_bands_of_their_own_layers() -> None:
    table, first = llama70b(), (("block[0-39]:mlp", "w4a16/bf16"),)
    model = StepModel(table, shape(pp=2, formats=first), H100, Fabric(8), VLLM)
    stages = [{part.layer_class for part in model.breakdown(StepLoad(8, 500), stage)} for stage in (0, 1)]
    assert "block[0-39]" in stages[0] - stages[1]
    assert "block" in stages[1] - stages[0]


def test_a_cache_of_its_own_format() -> None:
    table = deepseek_v3()
    wide, narrow = memory(table).kv_bytes_per_token, memory(table, kv="fp8").kv_bytes_per_token
    mixed = memory(table, formats=(("dense:kv", "fp8"),)).kv_bytes_per_token
    assert narrow == wide / 2
    assert mixed == pytest.approx(wide * (1 - 3 / 61 / 2))


@pytest.mark.parametrize(
    ("formats", "field", "words"),
    [
        ((("block:self_atn", "bf16/bf16"),), "formats", "no part of the model"),
        ((("block[70-90]:mlp", "bf16/bf16"),), "formats", "not of its class"),
        ((("block:mlp", "nvfp4/nvfp4"),), "weights", "no nvfp4"),
        ((("block:kv", "int8"),), "kv", "no int8 cache"),
    ],
)
def test_what_cannot_be_is_refused(formats: tuple[tuple[str, str], ...], field: str, words: str) -> None:
    found = refusals(shape(formats=formats), llama70b(), H100, VLLM)
    assert [one.field for one in found] == [field]
    assert words in found[0].reason


def test_groups_of_one_part_may_not_be_split() -> None:
    table = llama70b()
    assert not refusals(shape(tp=8, formats=(("block:mlp", "w4a16/bf16"),)), table, H100, VLLM)
    wide = shape(tp=64, formats=(("block:mlp", "w4a16/bf16"),))
    assert any("groups of 128" in one.reason for one in refusals(wide, table, H100, VLLM))


def test_bands_have_short_names() -> None:
    assert banded("block", (0, 1, 2, 7, 9, 10)) == "block[0-2,7,9-10]"
