"""Checkpoints as engines read them: decoders written from the engines' own layouts read them back."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor

from planc.errors import InvalidField, UnknownName
from planc.ir.ops import quantized_formats as qf
from planc.passes.quantize_pack import (
    CHECKPOINTS,
    checkpoint_config,
    is_target,
    left_alone,
    pack,
    pack_checkpoint,
    pack_words,
)

N, K, GROUP = 48, 128, 64


@pytest.fixture
def weight() -> Tensor:
    return torch.randn(N, K, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)


def int4_values(weight: Tensor) -> tuple[Tensor, Tensor]:
    """What w4a16 stores: values -8..7 [n, k] and scales [n, k / group], for fp16 weights."""
    packed, scale = qf.quantize_int4(weight, GROUP)
    return qf.unpack_int4(packed, K), scale


def fields(words: Tensor, bits: int) -> Tensor:
    """int32 words -> their unsigned fields, lowest bits first, as one more dimension."""
    wide = words.to(torch.int64) & 0xFFFFFFFF
    return torch.stack([(wide >> shift) & (2**bits - 1) for shift in range(0, 32, bits)], -1)


def test_awq_reads_back_as_its_gemm_kernel_does(weight: Tensor) -> None:
    tensors = pack("model.layers.0.mlp.up_proj.weight", weight, "awq", GROUP)
    base = "model.layers.0.mlp.up_proj."
    assert {name.removeprefix(base): (tuple(t.shape), t.dtype) for name, t in tensors.items()} == {
        "qweight": ((K, N // 8), torch.int32),
        "qzeros": ((K // GROUP, N // 8), torch.int32),
        "scales": ((K // GROUP, N), torch.float16),
    }

    def columns(words: Tensor) -> Tensor:  # AutoAWQ: reverse order of its interleaving
        return fields(words, 4)[..., [0, 4, 1, 5, 2, 6, 3, 7]].flatten(-2)

    values = columns(tensors[base + "qweight"]) - columns(tensors[base + "qzeros"]).repeat_interleave(
        GROUP, 0
    )
    expected, scale = int4_values(weight.half())
    assert torch.equal(values.t(), expected)
    assert torch.equal(tensors[base + "scales"].t(), scale)


def test_gptq_reads_back_as_its_kernels_do(weight: Tensor) -> None:
    tensors = pack("q.weight", weight, "gptq", GROUP)
    assert tensors["q.qweight"].shape == (K // 8, N)
    assert tensors["q.qzeros"].shape == (K // GROUP, N // 8)
    assert tensors["q.g_idx"].tolist() == [i // GROUP for i in range(K)]
    values = fields(tensors["q.qweight"].t(), 4).flatten(-2)  # [n, k]
    zeros = fields(tensors["q.qzeros"], 4).flatten(-2).t() + 1  # v1 stores them less one
    expected, scale = int4_values(weight.half())
    assert torch.equal(values - zeros.repeat_interleave(GROUP, 1), expected)
    assert torch.equal(tensors["q.scales"].t(), scale)


@pytest.mark.parametrize(("checkpoint", "bits"), [("w4a16", 4), ("int8", 8)])
def test_pack_quantized_reads_back_as_compressed_tensors_does(
    weight: Tensor, checkpoint: str, bits: int
) -> None:
    tensors = pack("q.weight", weight, checkpoint, GROUP)
    assert tensors["q.weight_shape"].tolist() == [N, K]
    assert tensors["q.weight_packed"].shape == (N, K * bits // 32)
    values = fields(tensors["q.weight_packed"], bits).flatten(-2) - 2 ** (bits - 1)
    if bits == 4:
        expected, scale = int4_values(weight)
    else:
        expected, scale = qf.quantize_int8(weight)
    assert torch.equal(values, expected.to(torch.int64))
    assert torch.equal(tensors["q.weight_scale"], scale)


@pytest.mark.parametrize("checkpoint", ["fp8", "w8a8"])
def test_eight_bit_tensors_are_those_the_graph_multiplies_with(weight: Tensor, checkpoint: str) -> None:
    tensors = pack("q.weight", weight, checkpoint)
    stored, scale = (qf.quantize_fp8 if checkpoint == "fp8" else qf.quantize_int8)(weight)
    assert torch.equal(tensors["q.weight"].float(), stored.float())
    assert torch.equal(tensors["q.weight_scale"], scale)


def test_fp8_config_is_per_channel_and_dynamic_per_token() -> None:
    config = checkpoint_config("fp8", ["lm_head"])
    group = config["config_groups"]["group_0"]
    assert (config["quant_method"], config["format"], config["ignore"]) == (
        "compressed-tensors",
        "float-quantized",
        ["lm_head"],
    )
    assert group["weights"]["strategy"] == "channel"
    assert group["input_activations"] == {
        "num_bits": 8,
        "type": "float",
        "symmetric": True,
        "strategy": "token",
        "dynamic": True,
    }


@pytest.mark.parametrize("checkpoint", ["fp8", "int8", "w8a8", "w4a16", "awq", "gptq"])
def test_configs_are_json_and_name_what_is_left(checkpoint: str) -> None:
    config = checkpoint_config(checkpoint, ["model.layers.0.mlp.gate", "lm_head"], 32)
    text = json.dumps(config)
    assert "lm_head" in text
    assert ("32" in text) == (checkpoint in ("w4a16", "awq", "gptq"))


def test_targets_are_matrices_of_layers() -> None:
    names = {
        "model.embed_tokens.weight": 2,
        "model.layers.0.self_attn.q_proj.weight": 2,
        "model.layers.0.self_attn.q_proj.bias": 1,
        "model.layers.0.self_attn.kv_b_proj.weight": 2,
        "model.layers.0.input_layernorm.weight": 1,
        "model.layers.0.mlp.gate.weight": 2,
        "model.layers.0.mlp.gate_proj.weight": 2,
        "model.layers.0.mlp.experts.3.up_proj.weight": 2,
        "model.layers.0.block_sparse_moe.gate.weight": 2,
        "model.layers.0.linear_attn.conv1d.weight": 3,
        "lm_head.weight": 2,
    }
    tensors = {name: torch.empty((2,) * dims) for name, dims in names.items()}
    assert [name for name, t in tensors.items() if is_target(name, t)] == [
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.0.mlp.gate_proj.weight",
        "model.layers.0.mlp.experts.3.up_proj.weight",
    ]
    assert left_alone(tensors) == [
        "lm_head",
        "model.embed_tokens",
        "model.layers.0.block_sparse_moe.gate",
        "model.layers.0.mlp.gate",
        "model.layers.0.self_attn.kv_b_proj",
    ]


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InvalidField, match="no multiple of 64"):
        pack("q.weight", torch.randn(8, 96), "w4a16", 64)
    with pytest.raises(InvalidField, match="8 outputs"):
        pack("q.weight", torch.randn(12, 64), "awq", 64)
    with pytest.raises(UnknownName, match="gguf"):
        pack("q.weight", torch.randn(8, 64), "gguf")
    with pytest.raises(UnknownName, match="gguf"):
        checkpoint_config("gguf", [])


def test_words_hold_their_fields_lowest_first() -> None:
    values = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 15]], dtype=torch.int32)
    assert pack_words(values, 4).item() == 0xF7654321 - 2**32
    assert torch.equal(fields(pack_words(values, 4), 4).flatten(-2), values.to(torch.int64))


def test_a_whole_checkpoint_keeps_what_is_no_target() -> None:
    tensors = {"lm_head.weight": torch.randn(16, 64), "layers.0.q_proj.weight": torch.randn(16, 64)}
    packed, config = pack_checkpoint(tensors, "fp8")
    assert packed["lm_head.weight"] is tensors["lm_head.weight"]
    assert set(packed) == {"lm_head.weight", "layers.0.q_proj.weight", "layers.0.q_proj.weight_scale"}
    assert config["ignore"] == ["lm_head"]


def test_every_checkpoint_of_a_plan_has_a_packer() -> None:
    for checkpoint in CHECKPOINTS.values():
        assert checkpoint_config(checkpoint, [])["quant_method"] == "compressed-tensors"
