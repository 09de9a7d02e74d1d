"""Names of measured points as others spell them."""

from __future__ import annotations

from pathlib import Path

import pytest

from planc.cost_model import catalogue
from planc.errors import UnknownField, UnknownName
from planc.runtime.validation.harness import harness
from planc.runtime.validation.names import architecture, engine_name, format_name, gpu_name, model_name
from planc.runtime.validation.points import Point, read_points
from planc.runtime.validation.setups import Unpredictable, model_tables
from planc.runtime.validation.validate import catalogue_names

HEADER = "id,model,gpu,engine,weights,isl,osl,concurrency,tp,attention_dp,moe_ep,gpus"


def one(folder: Path, row: str, header: str = HEADER) -> Point:
    path = folder / "points.csv"
    path.write_text(f"{header}\n{row}\n", encoding="utf-8")
    points, rejected = read_points(path)
    assert not rejected, rejected
    return points[0]


@pytest.mark.parametrize(
    ("text", "name", "like"),
    [
        ("nvidia/Llama-3.3-70B-Instruct-FP8", "llama-3.3-70b", "llama-3.1-70b"),
        ("meta-llama/Meta-Llama-3.1-8B-Instruct", "llama-3.1-8b", "llama-3.1-8b"),
        ("openai/gpt-oss-20b", "gpt-oss-20b", "gpt-oss-20b"),
        ("nvidia/DeepSeek-R1-0528-FP4-v2", "deepseek-r1", "deepseek-r1"),
        ("deepseek-ai/DeepSeek-V3", "deepseek-v3", "deepseek-r1"),
        ("Qwen/Qwen3-30B-A3B-Instruct-2507", "qwen3-30b-a3b", "qwen3-30b-a3b"),
        ("meta-llama/Llama-4-Scout-17B-16E-Instruct", "llama-4-scout", "llama-4-scout"),
        ("mistralai/Mixtral-8x7B-Instruct-v0.1", "mixtral-8x7b", "mixtral-8x7b"),
    ],
)
def test_models(text: str, name: str, like: str) -> None:
    assert model_name(text) == name
    assert architecture(name) == like


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("H100 SXM", "h100_sxm"),
        ("NVIDIA H100 80GB HBM3", "h100_sxm"),
        ("NVIDIA A100-SXM4-40GB", "a100_sxm_40gb"),
        ("NVIDIA A100 80GB PCIe", "a100_pcie"),
        ("GB200 NVL72", "gb200"),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", "rtx_pro_6000"),
        ("AMD Instinct MI300X", "mi300x"),
        ("TPU v5e", "tpu v5e"),
    ],
)
def test_gpus(text: str, name: str) -> None:
    assert gpu_name(text) == name


def test_no_two_gpus_share_a_spelling() -> None:
    for gpu in catalogue.gpus().values():
        assert gpu_name(gpu.name) == gpu.name
        assert all(gpu_name(alias.upper().replace("_", " ")) == gpu.name for alias in gpu.aliases)
    with pytest.raises(UnknownName):
        catalogue.gpu("h10")


def test_engines_and_formats() -> None:
    assert [engine_name(t) for t in ("TensorRT-LLM", "dynamo-sglang", "vLLM")] == ["trtllm", "sglang", "vllm"]
    assert engine_name("LMDeploy") == "lmdeploy"
    assert [format_name(t) for t in ("FP8", "INT4", "bfloat16", "fp4")] == ["fp8", "w4a16", "bf16", "nvfp4"]
    assert format_name("FP4", "gpt-oss-120b") == "mxfp4"


def test_rules_of_launch_scripts_go_by_architecture(tmp_path: Path) -> None:
    row = "a,{},H200,TRT-LLM,FP8,1024,1024,16,8,1,1,8"
    both = [one(tmp_path, row.format(name)) for name in ("deepseek-r1", "deepseek-ai/DeepSeek-V3")]
    assert harness(both[0]) == harness(both[1])


def test_attention_ranks_counted_among_those_of_tp(tmp_path: Path) -> None:
    point = one(tmp_path, "a,deepseek-r1,h200_sxm,sglang,fp8,1024,1024,64,8,8,8,8")
    assert (point.tp, point.attention_dp, point.gpus) == (1, 8, 8)
    assert "counts 8 attention ranks" in point.repairs[0]
    apart = one(tmp_path, "a,deepseek-r1,h200_sxm,sglang,fp8,1024,1024,64,2,4,8,8")
    assert (apart.tp, apart.repairs) == (2, ())


def test_attention_ranks_in_pools(tmp_path: Path) -> None:
    pools = "prefill_workers,prefill_tp,prefill_dp,decode_workers,decode_tp,decode_dp"
    row = "a,deepseek-r1,h200_sxm,sglang,fp8,1024,1024,64,,,,24,Disaggregated,1,8,1,2,8,8"
    point = one(tmp_path, row, f"{HEADER},mode,{pools}")
    assert point.prefill is not None
    assert point.decode is not None
    assert (point.prefill.tp, point.decode.tp, point.decode.dp) == (8, 1, 8)


def test_unknown_names_are_said_with_near_ones(tmp_path: Path) -> None:
    point = one(tmp_path, "a,llama-3.1-8b,H1000,vllm,fp8,1024,1024,64,1,1,1,1")
    with pytest.raises(Unpredictable, match=r"h1000.*Did you mean h100"):
        catalogue_names(point)
    with pytest.raises(UnknownField, match="Did you mean ttft_ms"):
        one(tmp_path, "", f"{HEADER},ttft")


def test_configurations_are_found_under_other_spellings(tmp_path: Path) -> None:
    example = Path("examples/models/qwen3-0.6b.json")
    (tmp_path / "Own-Model-Instruct.json").write_text(example.read_text(encoding="utf-8"), encoding="utf-8")
    tables = model_tables((tmp_path,))
    assert tables("own-model").model.layers == 28
    with pytest.raises(Unpredictable, match="'other' has no configuration"):
        tables("other")


def test_seats_by_concurrency(tmp_path: Path) -> None:
    pools = "prefill_workers,prefill_tp,prefill_dp,decode_workers,decode_tp,decode_dp"
    row = "a,deepseek-r1,gb200,trtllm,nvfp4,1024,1024,{},,,,36,disagg,1,1,4,4,8,1"
    busy, idle = (one(tmp_path, row.format(count), f"{HEADER},mode,{pools}") for count in (192, 96))
    assert (harness(busy).max_num_seqs, harness(idle).max_num_seqs) == (128, None)
