"""verify, run and export on a tiny model with weights and a tokenizer of its own."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from planc import api
from tests.roof.support import ROOT, Planc, write_request

CPU = {"nodes": [{"gpu": "cpu", "gpus_per_node": 1, "count": 1}]}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What examples/tiny_model.py writes."""
    spec = importlib.util.spec_from_file_location("tiny_model", ROOT / "examples/tiny_model.py")
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    folder = tmp_path_factory.mktemp("model") / "tiny-llama"
    example.main(folder)
    return folder


def compiled(model: Path, folder: Path, **constraints: Any) -> Path:
    request = write_request(
        folder,
        model=str(model),
        inventory=CPU,
        workload={"isl": 32, "osl": 16, "concurrency": 2},
        slo={"tpot_mean_ms": 500},
        constraints=constraints or None,
    )
    api.compile(request).save(folder / "bundle")
    return folder / "bundle"


def test_run_gives_the_tokens_of_transformers(planc: Planc, model: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    bundle = compiled(model, tmp_path)
    prompts = [[11, 42, 7, 100], [5]]
    (tmp_path / "ids.json").write_text(json.dumps(prompts))
    words = ["run", bundle, "--input", tmp_path / "ids.json", "--max-new-tokens", 8, "--json"]
    result = planc(*words)
    assert result.code == 0, result.err
    theirs = AutoModelForCausalLM.from_pretrained(model)
    for prompt, mine in zip(prompts, result.json()["token_ids"], strict=True):
        whole = theirs.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False, eos_token_id=None)
        assert mine == whole[0, len(prompt) :].tolist()


def test_run_takes_text(planc: Planc, model: Path, tmp_path: Path) -> None:
    bundle = compiled(model, tmp_path)
    result = planc("run", bundle, "--prompt", "the quick", "--prompt", "fox", "--max-new-tokens", 3, "--json")
    assert result.code == 0, result.err
    assert all(isinstance(text, str) for text in result.json()["outputs"])
    assert all(1 <= len(ids) <= 3 for ids in result.json()["token_ids"])


def test_verify_says_what_holds_and_sees_what_was_changed(planc: Planc, model: Path, tmp_path: Path) -> None:
    bundle = compiled(model, tmp_path)
    result = planc("verify", bundle, "--weights", model, "--json")
    assert result.code == 0, result.out
    assert {check["verdict"] for check in result.json()["checks"]} <= {"ok", "not run"}
    (config,) = (bundle / "engines/vllm").glob("*/config.yaml")
    config.write_text(config.read_text().replace("max-num-seqs: ", "max-num-seqs: 1"))
    changed = planc("verify", bundle, "--weights", model)
    assert changed.code == 1
    assert "config.yaml is not what the plan says" in " ".join(changed.out.split())


def test_export_packs_the_formats_of_the_plan(planc: Planc, model: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    bundle = compiled(model, tmp_path, weights=["int8"], activations=["int8"])
    out = tmp_path / "exported"
    result = planc("export", bundle, "--engine", "vllm", "--weights", model, "-o", out, "--json")
    assert result.code == 0, result.err
    assert result.json()["checkpoint"]["packed"] == 28  # seven products in each of four layers
    stored = load_file(out / "model/model.safetensors")
    assert str(stored["model.layers.0.mlp.up_proj.weight"].dtype) == "torch.int8"
    config = json.loads((out / "model/config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    again = planc("export", bundle, "--engine", "vllm", "-o", out)
    assert again.code == 2
    assert "there already" in again.err


def test_formats_of_parts_are_run_verified_and_exported(planc: Planc, model: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    formats = {"decoder:self_attn": "bf16/bf16", "decoder[0-1]:mlp": "bf16/bf16"}
    bundle = compiled(model, tmp_path, weights=["int8"], activations=["int8"], formats=formats)
    checked = planc("verify", bundle, "--weights", model, "--json")
    assert checked.code == 0, checked.out
    (tmp_path / "ids.json").write_text("[[11, 42, 7, 100]]")
    words = ["run", bundle, "--input", tmp_path / "ids.json", "--weights", model, "--max-new-tokens", 4]
    assert len(planc(*words, "--json").json()["token_ids"][0]) == 4
    out = tmp_path / "exported"
    result = planc("export", bundle, "--engine", "vllm", "--weights", model, "-o", out, "--json")
    assert result.code == 0, result.err
    assert result.json()["checkpoint"]["packed"] == 6  # three products in each of the last two layers
    stored = load_file(out / "model/model.safetensors")
    kinds = {
        name: str(stored[f"model.layers.{name}.weight"].dtype) for name in ("1.mlp.up_proj", "3.mlp.up_proj")
    }
    assert kinds == {"1.mlp.up_proj": "torch.float32", "3.mlp.up_proj": "torch.int8"}
    stated = json.loads((out / "model/config.json").read_text())["quantization_config"]
    (planned,) = (bundle / "engines/vllm").glob("*/quantization_config.json")
    assert json.loads(planned.read_text())["config_groups"] == stated["config_groups"]
    assert sum(name.startswith("re:") for name in stated["ignore"]) == 2


def test_run_needs_weights(planc: Planc, bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "ids.json").write_text("[[1, 2]]")
    result = planc("run", bundle, "--input", tmp_path / "ids.json")
    assert result.code == 2
    assert "--weights" in result.err
    wrong = planc("run", bundle, "--input", tmp_path / "ids.json", "--weights", tmp_path / "nowhere")
    assert wrong.code == 2
    assert "nowhere" in wrong.err
