"""Tiny models, compiled by planc and served by vLLM from the bundle alone, answer as the executor does."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from planc import api
from planc.ir.trace.hf import trace_config
from planc.passes.phases import Phases
from planc.passes.pipeline import FRONT, run
from planc.planner.plan import Plan, load_plan
from planc.planner.request import Request
from planc.runtime import weights as loading
from planc.runtime.assemble import decisions
from planc.runtime.executor import Executor
from tests.engines import support

pytestmark = [pytest.mark.engines, pytest.mark.timeout(1200)]

TOKENS = 24
PROMPTS = [[0, 50, 60, 70, 80, 90], [0, 5, 9, 200, 201, 33, 41, 17, 88, 120, 7], [0, 280, 285, 3, 4]]


def _llama(vocabulary: int) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        initializer_range=0.15,
        tie_word_embeddings=False,
    )


def _qwen3_moe(vocabulary: int) -> Any:
    from transformers import Qwen3MoeConfig

    return Qwen3MoeConfig(
        vocab_size=vocabulary,
        hidden_size=256,
        intermediate_size=512,
        moe_intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        max_position_embeddings=2048,
        initializer_range=0.15,
        tie_word_embeddings=False,
    )


FAMILIES = {"llama": _llama, "qwen3_moe": _qwen3_moe}


def model_folder(family: str, folder: Path) -> Path:
    """A checkpoint with random fp32 weights and a tokenizer, both made here."""
    from transformers import AutoModelForCausalLM

    folder.mkdir()
    config = FAMILIES[family](support.save_tokenizer(folder))
    config.update({"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2})
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.copy_(1 + 0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


def compiled(
    model: Path,
    bundle: Path,
    *,
    tp: int,
    weights: str = "fp32",
    activations: str = "fp32",
    formats: Mapping[str, str] | None = None,
) -> Plan:
    """Compiles for `tp` CPUs and writes the bundle; the plan as it was read back from it."""
    request = Request.model_validate(
        {
            "model": str(model),
            "inventory": {"nodes": [{"gpu": "cpu", "gpus_per_node": tp, "count": 1}]},
            "workload": {"isl": 32, "osl": 32, "concurrency": 4},
            "constraints": {
                "engines": ["vllm"],
                "weights": [weights],
                "activations": [activations],
                "kv": ["fp32"],
                "tp": [tp],
                "max_num_seqs": [4],
                "max_num_batched_tokens": [512],
                "gpu_memory_utilization": 0.2,
                "max_replicas": 1,
                "formats": formats,
            },
        }
    )
    api.write_bundle(api.compile(request), bundle)
    return load_plan(bundle)


def executed(plan: Plan, bundle: Path, model: Path) -> list[list[int]]:
    """Greedy token ids of planc's executor, on the plan's graphs in fp32, all prompts in one batch."""
    config = json.loads((bundle / "model/config.json").read_text())
    traced = trace_config(config, plan.model.name, dtype=torch.float32)
    rewrites = decisions(plan, plan.replicas()[0])
    prefill, decode = (run(traced, (*FRONT, Phases(phase), *rewrites)) for phase in ("prefill", "decode"))
    executor = Executor(prefill, decode, loading.from_folder(model), blocks=64, block_size=16)
    return executor.generate(PROMPTS, TOKENS)


def served(
    plan: Plan, scripts: Path, log: Path, variables: Mapping[str, str] | None = None
) -> list[list[int]]:
    """The same of `vllm serve`, started by the one launch script below `scripts`."""
    (script,) = scripts.glob("*/launch.sh")
    with support.serving(
        script, plan.model.name, log, "--enforce-eager", variables=variables or {}, patience_s=900
    ) as server:
        return [server.greedy(prompt, TOKENS) for prompt in PROMPTS]


@pytest.mark.parametrize("family", list(FAMILIES))
def test_same_tokens_as_the_executor(family: str, tmp_path: Path) -> None:
    model = model_folder(family, tmp_path / f"tiny-{family}")
    plan = compiled(model, tmp_path / "bundle", tp=1)
    mine = executed(plan, tmp_path / "bundle", model)
    assert len({token for answer in mine for token in answer}) > TOKENS, "the model repeats itself"
    assert served(plan, tmp_path / "bundle/engines/vllm", tmp_path / "log") == mine


def test_two_processes(tmp_path: Path) -> None:
    """TP=2: sums of two halves may round differently, so tokens agree up to the first near tie."""
    model = model_folder("llama", tmp_path / "tiny-llama")
    plan = compiled(model, tmp_path / "bundle", tp=2)
    assert [replica.tp for replica in plan.replicas()] == [2]
    answers = served(plan, tmp_path / "bundle/engines/vllm", tmp_path / "log")
    log = (tmp_path / "log").read_text(errors="replace")
    assert "tensor_parallel_size=2" in log
    mine = executed(plan, tmp_path / "bundle", model)
    assert [answer[:4] for answer in answers] == [answer[:4] for answer in mine]
    assert all(len(answer) == TOKENS for answer in answers)


#: attention in other numbers than the MLPs, and the first layer's MLP as it was
MIXED = {"decoder:self_attn": "int8/int8", "decoder[0]:mlp": "bf16/bf16"}


@pytest.mark.parametrize(
    ("weights", "activations", "formats"),
    [("int8", "int8", None), ("w4a16", "bf16", None), ("w4a16", "bf16", MIXED)],
)
def test_an_exported_checkpoint_is_served(
    weights: str, activations: str, formats: Mapping[str, str] | None, tmp_path: Path
) -> None:
    """vLLM reads the packed weights and computes in 16 bits, the executor in fp32: the first tokens agree."""
    model = model_folder("llama", tmp_path / "tiny-llama")
    plan = compiled(
        model, tmp_path / "bundle", tp=1, weights=weights, activations=activations, formats=formats
    )
    out = tmp_path / "exported"
    words = ["export", tmp_path / "bundle", "--engine", "vllm", "--weights", model, "-o", out]
    subprocess.run([sys.executable, "-m", "planc.cli", *map(str, words)], check=True)
    answers = served(plan, out, tmp_path / "log", {"MODEL": str(out / "model")})
    mine = executed(plan, tmp_path / "bundle", model)
    plain = executed(compiled(model, tmp_path / "plain", tp=1), tmp_path / "plain", model)
    assert [answer[:2] for answer in answers] == [answer[:2] for answer in mine]
    assert answers != plain, "the checkpoint is not quantized"
