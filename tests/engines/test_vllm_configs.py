"""vLLM's own parser and engine configuration accept what planc emits, and read it as it was meant."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from planc import api
from planc.codegen import bundle
from planc.codegen.engines.accept import launch_command, probe
from planc.errors import Infeasible, PlancError
from planc.ir.trace.hf_config import text_part
from planc.planner.plan import Plan, Pool
from planc.planner.request import Request
from tests.codegen.plans import plan as plan_of
from tests.codegen.plans import replica
from tests.engines import support

pytestmark = [pytest.mark.engines, pytest.mark.timeout(1500)]

MODELS = sorted((support.ROOT / "examples/models").glob("*.json"))

#: Files that a checkpoint has besides weights and tokenizer, which vLLM reads before it configures.
PROCESSORS: Mapping[str, Mapping[str, Any]] = {
    "kimi_k25": {
        "media_proc_cfg": {
            "in_patch_limit": 16384,
            "patch_size": 14,
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
            "merge_kernel_size": 2,
            "fixed_output_tokens": None,
            "patch_limit_on_one_side": 512,
            "temporal_merge_kernel_size": 4,
        }
    }
}


def offloaded(*tiers: str) -> dict[str, Any]:
    """As a plan states it: what recurs is loaded from these."""
    gpu = {"tier": "gpu", "share": 0.1, "loaded": True}
    others = [{"tier": t, "share": 0.4, "loaded": True, "gbytes_s": 9.0, "gib": 64.0} for t in tiers]
    return {"hit_rate": 0.5, "load_ms": 3.0, "break_even_gbytes_s": 4.0, "tiers": [gpu, *others]}


#: A plan's settings, one thing at a time, on a small dense and a mixture-of-experts model.
SHAPES: Mapping[str, tuple[str, dict[str, Any]]] = {
    "tp, fp8 weights and KV": (
        "llama-3.1-70b",
        {"tp": 8, "weights": "fp8", "activations": "fp8", "kv": "fp8"},
    ),
    "pipeline": ("llama-3.1-70b", {"tp": 2, "pp": 2, "pipeline_layers": [38, 42]}),
    "data and expert parallel": ("qwen3-30b-a3b", {"dp": 4, "ep": 4, "prefix_caching": True}),
    "tensor and expert parallel": ("qwen3-30b-a3b", {"tp": 4, "ep": 4, "cuda_graph_sizes": []}),
    "a latent cache over ranks": ("deepseek-r1", {"tp": 8, "cp": 8}),
    "copies of heads over ranks": ("qwen3-235b-a22b", {"tp": 8, "ep": 8, "cp": 2}),
    "whole prefills": ("llama-3.1-8b", {"chunked_prefill": False, "max_num_batched_tokens": 8192}),
    "fp8 weights, bf16 activations": ("llama-3.1-8b", {"weights": "fp8"}),
    "formats of parts": (
        "llama-3.1-8b",
        {"weights": "fp8", "activations": "fp8", "formats": {"decoder[0-7]:mlp": "w4a16/bf16"}},
    ),
    "speculative": (
        "llama-3.1-8b",
        {"speculative": {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 4}},
    ),
    "n-grams with a rate": (
        "llama-3.1-8b",
        {"speculative": {"method": "ngram", "num_speculative_tokens": 3, "acceptance_rate": 0.4}},
    ),
    "multi-token prediction": (
        "deepseek-r1",
        {"tp": 8, "speculative": {"method": "mtp", "num_speculative_tokens": 1, "acceptance_rate": 0.8}},
    ),
    "caches in host memory": ("llama-3.1-8b", {"prefix_caching": True, "kv_offload": offloaded("host")}),
    "caches on drives": ("llama-3.1-8b", {"prefix_caching": True, "kv_offload": offloaded("host", "nvme")}),
    "cpu": (
        "qwen3-0.6b",
        {"gpu": "cpu", "tp": 2, "weights": "fp32", "activations": "fp32", "kv": "fp32", "block_size": 32},
    ),
}


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Everything that is put to vLLM, in one process of its own: name -> plan's replica and vLLM's answer."""
    work = tmp_path_factory.mktemp("vllm")
    support.save_tokenizer(work / "tokenizer")
    plans: dict[str, tuple[Plan, Path]] = {}
    unplanned: dict[str, dict[str, Any]] = {}
    for path in MODELS:
        try:
            plans[f"model {path.stem}"] = (planned(path), path)
        except PlancError as error:  # fails that model's test, not the others'
            unplanned[f"model {path.stem}"] = {"error": f"not planned: {error}"}
    for name, (model, settings) in SHAPES.items():
        path = support.ROOT / f"examples/models/{model}.json"
        plans[name] = (plan_of(replica(**settings), name=model), path)
    asked = [_command(name, plan, path, work) for name, (plan, path) in plans.items()]
    answers = probe("vllm", asked, python=str(support.environment() / "python"))
    met = {name: {**answers[name], "replica": plan.replicas()[0]} for name, (plan, _) in plans.items()}
    return met | unplanned


def planned(path: Path) -> Plan:
    """The planner's own plan for a catalogue model: on one node of eight H200s, else on four."""
    for nodes in (1, 4):
        request = Request.model_validate(
            {
                "model": str(path),
                "inventory": {"nodes": [{"gpu": "h200_sxm", "gpus_per_node": 8, "count": nodes}]},
                "workload": {"isl": 2000, "osl": 500, "concurrency": 16},
                "constraints": {"engines": ["vllm"], "max_replicas": 1},
            }
        )
        try:
            return api.compile(request)
        except Infeasible:
            continue
    pytest.fail(f"no plan for {path.stem} on 32 H200s")


def _command(name: str, plan: Plan, model: Path, work: Path) -> dict[str, Any]:
    config = json.loads(model.read_text())
    folder = work / name.replace(" ", "_").replace(",", "")
    bundle.write(plan, folder, config=config)
    for file in (work / "tokenizer").iterdir():
        shutil.copy(file, folder / "model")
    if config["model_type"] in PROCESSORS:
        (folder / "model/preprocessor_config.json").write_text(json.dumps(PROCESSORS[config["model_type"]]))
    (script,) = (folder / "engines/vllm").glob("*/launch.sh")
    return {"name": name, **launch_command(script, work, folder)}


@pytest.mark.parametrize("name", [f"model {path.stem}" for path in MODELS] + list(SHAPES))
def test_accepted_as_meant(name: str, commands: dict[str, dict[str, Any]]) -> None:
    answer = commands[name]
    assert answer["error"] is None, answer["error"]
    mine, theirs = answer["replica"], answer["settings"]
    assert theirs["tensor_parallel"] == mine.tp
    assert theirs["pipeline_parallel"] == mine.pp
    assert theirs["data_parallel"] == mine.dp
    assert theirs["expert_parallel"] == (mine.ep > 1)
    assert theirs["decode_context_parallel"] == mine.cp
    assert theirs["max_num_seqs"] == mine.max_num_seqs
    assert theirs["max_model_len"] == mine.max_model_len
    assert theirs["prefix_caching"] == mine.prefix_caching
    assert theirs["kv_role"] == ("kv_both" if mine.kv_offload else None)
    assert theirs["cache_dtype"] == ("fp8" if mine.kv == "fp8" else "auto")
    if mine.gpu != "cpu":
        assert theirs["gpu_memory_utilization"] == pytest.approx(mine.gpu_memory_utilization)
    assert theirs["block_size"] == mine.block_size or _latent(name)
    if not _latent(name):  # vLLM's CPU platform has no chunked prefill for latent caches
        assert theirs["chunked_prefill"] == mine.chunked_prefill
        assert theirs["max_num_batched_tokens"] == mine.max_num_batched_tokens


def _latent(name: str) -> bool:
    model = SHAPES[name][0] if name in SHAPES else name.removeprefix("model ")
    config = json.loads((support.ROOT / f"examples/models/{model}.json").read_text())
    return bool(text_part(config).get("kv_lora_rank"))


def test_prefill_and_decode_pools_are_accepted(tmp_path: Path) -> None:
    """A prefill engine with pipeline stages and a decode engine: each as what it is."""
    prefill, decode = replica(tp=2, pp=2, pipeline_layers=[14, 14]), replica(tp=4)
    pools = [Pool(role="prefill", replicas=[prefill]), Pool(role="decode", replicas=[decode])]
    config = json.loads((support.ROOT / "examples/models/qwen3-0.6b.json").read_text())
    bundle.write(plan_of(prefill, name="qwen3-0.6b", pools=pools), tmp_path / "bundle", config=config)
    support.save_tokenizer(tmp_path / "bundle/model")
    asked = [
        {"name": script.parent.name.split("-")[0], **launch_command(script, tmp_path, tmp_path / "bundle")}
        for script in (tmp_path / "bundle/engines/vllm").glob("*/launch.sh")
    ]
    answers = probe("vllm", asked, python=str(support.environment() / "python"))
    assert {name: answer["error"] for name, answer in answers.items()} == {"prefill": None, "decode": None}
    assert answers["prefill"]["settings"]["kv_role"] == "kv_producer"
    assert answers["decode"]["settings"]["kv_role"] == "kv_consumer"
    ports = {entry["env"]["VLLM_NIXL_SIDE_CHANNEL_PORT"] for entry in asked}
    assert len(ports) == 2


def test_refusals_are_seen(tmp_path: Path) -> None:
    """The check can fail: vLLM refuses a misspelt option and heads that do not divide."""
    config = json.loads((support.ROOT / "examples/models/qwen3-0.6b.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    support.save_tokenizer(tmp_path)
    asked = [
        {"name": "misspelt", "argv": ["serve", str(tmp_path), "--tensor-paralel-size", "2"], "env": {}},
        {"name": "heads", "argv": ["serve", str(tmp_path), "--tensor-parallel-size", "3"], "env": {}},
    ]
    answers = probe("vllm", asked, python=str(support.environment() / "python"))
    assert "unrecognized arguments" in answers["misspelt"]["error"]
    assert "divisible by tensor parallel size" in answers["heads"]["error"]
