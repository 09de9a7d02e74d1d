"""Published checkpoints: which of their parts keep another format, and what a shape makes of it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from planc.cost_model import catalogue, checkpoints
from planc.cost_model.local import activation_format, weight_format
from planc.cost_model.shape import EngineShape, refusals
from planc.cost_model.table import CostTable
from tests.sample_tables import deepseek_v3


def of_type(model_type: str) -> CostTable:
    """A latent-attention mixture of experts under another family's name."""
    table = deepseek_v3()
    return replace(table, model=replace(table.model, model_type=model_type))


@pytest.fixture
def r1() -> CostTable:
    return of_type("deepseek_v3")


def formats(table: CostTable, shape: EngineShape) -> dict[str, str]:
    return {
        row.site: weight_format(row, shape) for row in table.rows["decode"] if row.layer_class == "sparse"
    }


def test_attention_of_a_four_bit_checkpoint_stays_wide(r1: CostTable) -> None:
    kept = checkpoints.kept(r1, "nvfp4")
    shape = EngineShape("trtllm", "b200_sxm", tp=8, weights="nvfp4", activations="nvfp4", formats=kept)
    assert not refusals(shape, r1, catalogue.gpu("b200_sxm"), catalogue.engine("trtllm"))
    found = formats(r1, shape)
    assert found["self_attn.q_b_proj"] == "bf16"
    assert found["self_attn.o_proj"] == found["mlp.experts"] == found["mlp.shared.up_proj"] == "nvfp4"
    query = next(row for row in r1.rows["decode"] if row.site == "self_attn.q_b_proj")
    assert activation_format(query, shape) == "bf16"


def test_integer_weights_of_kimi_are_those_of_routed_experts() -> None:
    table = of_type("kimi_k2")
    shape = EngineShape("vllm", "h200_sxm", weights="w4a16", formats=checkpoints.kept(table, "w4a16"))
    found = formats(table, shape)
    assert found["mlp.experts"] == "w4a16"
    assert found["self_attn.o_proj"] == found["self_attn.q_a_proj"] == "bf16"


def test_checkpoints_in_one_format_have_no_exceptions(r1: CostTable) -> None:
    assert checkpoints.kept(r1, "fp8") == ()


def test_block_scales_follow_family_and_label() -> None:
    other, dense = of_type("glm_moe_dsa"), of_type("llama")
    assert checkpoints.as_published(other, "fp8").model.block_scales
    assert not checkpoints.as_published(other, "bf16").model.block_scales
    assert not checkpoints.as_published(dense, "fp8").model.block_scales
    assert checkpoints.as_published(dense, "fp8_block").model.block_scales


def test_an_exception_for_no_matrix_is_refused(r1: CostTable) -> None:
    shape = EngineShape("vllm", "h200_sxm", formats=(("sparse:self_attn.z_proj", "bf16/bf16"),))
    reasons = refusals(shape, r1, catalogue.gpu("h200_sxm"), catalogue.engine("vllm"))
    assert any("no part of the model" in item.reason for item in reasons)


def test_published_groups_may_be_smaller(r1: CostTable) -> None:
    shape = EngineShape("vllm", "h200_sxm", tp=32, weights="w4a16", activations="bf16")
    asked = (shape, r1, catalogue.gpu("h200_sxm"), catalogue.engine("vllm"))
    assert any("groups of 128" in item.reason for item in refusals(*asked))
    assert not any("groups of 128" in item.reason for item in refusals(*asked, groups=False))
