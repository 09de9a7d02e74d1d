"""vLLM's files as text: settings, quoting, instances, several nodes, and what cannot be said."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from planc.codegen.engines import checkpoint, router, vllm, writer
from planc.codegen.engines.vllm_formats import weights
from planc.codegen.engines.vllm_settings import settings
from planc.errors import CheckFailed, UnknownName
from planc.planner.plan import LayerDecisions, LayerPlan, Plan, Pool, Routing
from planc.version import __version__
from tests.codegen.plans import memory, plan, replica

ROOT = Path(__file__).parents[2]


def config_of(model: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((ROOT / f"examples/models/{model}.json").read_text())
    return found


LLAMA = config_of("llama-3.1-70b")


def two_replicas() -> Plan:
    shape: dict[str, Any] = {"tp": 4, "weights": "fp8", "activations": "fp8", "kv": "fp8"}
    return plan(
        replica(**shape, gpus=[f"a/{i}" for i in range(4)], traffic_share=0.5),
        replica(**shape, gpus=[f"a/{i}" for i in range(4, 8)], traffic_share=0.5),
    )


def four_nodes(**shape: Any) -> Plan:
    gpus = [f"n{node}/{index}" for node in range(4) for index in range(8)]
    return plan(replica(gpus=gpus, **shape), name="deepseek-r1")


def apart() -> Plan:
    """Two prefill instances and a decode instance on two nodes."""
    prefill = [replica(tp=2, gpus=[f"a/{2 * i}", f"a/{2 * i + 1}"], traffic_share=0.5) for i in range(2)]
    decode = replica(tp=8, gpus=[f"b/{i}" for i in range(8)], max_num_seqs=256)
    pools = [Pool(role="prefill", replicas=prefill), Pool(role="decode", replicas=[decode])]
    return plan(decode, pools=pools)


@pytest.mark.parametrize(
    ("name", "made", "config"),
    [
        ("two_replicas", two_replicas(), LLAMA),
        ("apart", apart(), LLAMA),
        (
            "four_nodes_dp",
            four_nodes(dp=4, tp=8, ep=32, weights="fp8", activations="fp8"),
            config_of("deepseek-r1"),
        ),
        ("four_nodes_pp", four_nodes(tp=8, pp=4, pipeline_layers=[16, 15, 15, 15]), None),
        ("exported", plan(replica(weights="w4a16")), LLAMA),
        (
            "cpu",
            plan(
                replica(
                    gpu="cpu",
                    tp=2,
                    block_size=32,
                    kv_blocks=10000,
                    cuda_graph_sizes=[],
                    memory=memory(kv_cache_gib=0.3),
                )
            ),
            LLAMA,
        ),
    ],
)
def test_files(name: str, made: Plan, config: dict[str, Any], golden: Callable[[str, str], None]) -> None:
    for file, text in vllm.render(made, config).items():
        fixed = text.replace(made.fingerprint.plan, "PLAN").replace(__version__, "VERSION")
        if file != "router.py":  # planc's own module, as it is
            golden(f"vllm/{name}/{file.replace('/', '_') if name == 'apart' else Path(file).name}", fixed)


def test_prefill_and_decode_instances_meet(tmp_path: Path) -> None:
    files = vllm.render(apart(), LLAMA)
    roles = {
        name.split("-")[0]: yaml.safe_load(text)["kv-transfer-config"]["kv_role"]
        for name, text in files.items()
        if name.endswith("config.yaml")
    }
    assert roles == {"prefill": "kv_producer", "decode": "kv_consumer"}
    (route,) = json.loads(files["router.json"])["routes"]
    assert [(e["node"], e["port"], e["share"]) for e in route["prefill"]] == [
        ("a", 8000, 0.5),
        ("a", 8001, 0.5),
    ]
    assert [(e["node"], e["port"]) for e in route["decode"]] == [("b", 8002)]
    assert files["router.py"] == Path(router.__file__).read_text()
    assert "--at a=ADDRESS b=ADDRESS" in vllm.readme(apart())
    ports = {
        line
        for name, text in files.items()
        if name.endswith("launch.sh")
        for line in text.split()
        if "side_port=" in line
    }
    assert {"side_port=5600", "side_port=5664", "side_port=5728"} <= ports


def test_several_replicas_come_with_a_router_of_the_plans_policy() -> None:
    two = [replica(gpus=[f"a/{i}"], traffic_share=0.5) for i in range(2)]
    assert "router.json" not in vllm.render(plan(*two), LLAMA)
    routed = plan(*two, routing=Routing(policy="prefix_aware", reason="simulated"))
    files = vllm.render(routed, LLAMA)
    listed = json.loads(files["router.json"])
    (route,) = listed["routes"]
    assert listed["policy"] == "prefix_aware"
    assert [(e["port"], e["share"], e["cache_tokens"]) for e in route["whole"]] == [
        (8000, 0.5, 320_000),
        (8001, 0.5, 320_000),
    ]
    assert "then the router" in vllm.readme(routed)
    assert "NIXL" not in vllm.readme(routed)


def test_caches_over_ranks_are_set() -> None:
    mine = replica(tp=8, cp=4)
    assert settings(mine, plan(mine), config_of("deepseek-r1"))["decode-context-parallel-size"] == 4
    assert "decode-context-parallel-size" not in settings(replica(), plan(), LLAMA)


def test_each_setting_is_the_evaluated_one() -> None:
    mine = replica(
        tp=2, dp=2, ep=4, kv="fp8", max_num_seqs=77, max_num_batched_tokens=3333, max_model_len=4444,
        block_size=32, kv_blocks=5555, gpu_memory_utilization=0.83, cuda_graph_sizes=[4, 1, 2],
        chunked_prefill=False, prefix_caching=True,
    )  # fmt: skip
    found = settings(mine, plan(mine), LLAMA)
    assert found == {
        "served-model-name": "llama-3.1-70b",
        "dtype": "bfloat16",
        "tensor-parallel-size": 2,
        "pipeline-parallel-size": 1,
        "data-parallel-size": 2,
        "enable-expert-parallel": True,
        "distributed-executor-backend": "mp",
        "max-num-seqs": 77,
        "max-num-batched-tokens": 3333,
        "max-model-len": 4444,
        "block-size": 32,
        "kv-cache-dtype": "fp8",
        "no-enable-chunked-prefill": True,
        "enable-prefix-caching": True,
        "num-gpu-blocks-override": 5555,
        "gpu-memory-utilization": 0.83,
        "compilation-config": {"cudagraph_capture_sizes": [1, 2, 4]},
    }


def test_cpu_blocks_are_those_it_takes() -> None:
    found = settings(replica(gpu="cpu", block_size=32, kv_blocks=50), plan(replica(gpu="cpu")), LLAMA)
    assert (found["block-size"], found["num-gpu-blocks-override"]) == (32, 50)
    assert "gpu-memory-utilization" not in found
    odd = replica(gpu="cpu", block_size=16)
    with pytest.raises(CheckFailed, match="32"):
        settings(odd, plan(odd), LLAMA)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"tp": 4, "ep": 2}, "ep=2"),
        ({"kv": "int8"}, "kv=int8"),
        ({"gpu": "cpu", "weights": "fp8"}, "fp8"),
        ({"gpu": "cpu", "tp": 2, "ep": 2}, "experts"),
    ],
)
def test_what_vllm_cannot_be_told(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(CheckFailed, match=says):
        vllm.render(plan(replica(**changes)), LLAMA)


@pytest.mark.parametrize(
    ("model", "wanted", "setting", "exported"),
    [
        ("llama-3.1-8b", "bf16", None, False),
        ("llama-3.1-8b", "fp8", "fp8", False),
        ("llama-3.1-8b", "w4a16", None, True),
        ("llama-3.1-8b", "int8", None, True),
        ("deepseek-r1", "fp8", None, False),
        ("deepseek-r1", "bf16", None, True),
        ("gpt-oss-120b", "mxfp4", None, False),
        ("kimi-k2.5", "w4a16", None, False),
    ],
)
def test_weights_by_checkpoint(model: str, wanted: str, setting: str | None, exported: bool) -> None:
    one = replica(weights=wanted)
    found = weights(one, plan(one), config_of(model))
    assert (found.setting, found.exported) == (setting, exported)


@pytest.mark.parametrize(
    ("model", "plain"),
    [("llama-3.1-8b", True), ("qwen3-235b-a22b", True), ("mixtral-8x7b", True), ("minimax-m2.5", True),
     ("deepseek-r1", False), ("gpt-oss-20b", False), ("gemma-4-26b-a4b", False), ("llama-4-scout", False),
     ("qwen3.5-397b-a17b", False), ("glm-5", False), ("kimi-k2.5", False)],
)  # fmt: skip
def test_block_count_only_where_blocks_mean_the_same(model: str, plain: bool) -> None:
    assert checkpoint.plain_cache(config_of(model)) == plain


NASTY = "m'; touch pwned #\n$(touch pwned) `touch pwned` --trust-remote-code"


def _dry(script: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": os.environ["PATH"], "DRY_RUN": "1", **variables}
    return subprocess.run(
        ["bash", script, *arguments], capture_output=True, text=True, env=environment, cwd=script.parent
    )


def _script(made: Plan, folder: Path, config: dict[str, Any] | None = None) -> Path:
    for name, text in vllm.render(made, config).items():
        (folder / Path(name).name).write_text(text)
    return folder / "launch.sh"


def test_names_cannot_leave_their_quotes(tmp_path: Path) -> None:
    made = plan(replica(gpus=[f"{NASTY}/0;id"]), name=NASTY, source=f"/models/{NASTY}".replace(":", ""))
    script = _script(made, tmp_path)
    done = _dry(script)
    assert done.returncode == 0, done.stderr
    assert f"vllm serve /models/{NASTY}" in done.stderr
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.yaml", "launch.sh"]
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["served-model-name"] == NASTY


def test_a_name_is_never_an_option() -> None:
    mine = replica()
    assert (
        settings(mine, plan(mine, name="--trust-remote-code"), None)["served-model-name"]
        == "trust-remote-code"
    )


def test_instances_and_their_gpus(tmp_path: Path) -> None:
    script = _script(two_replicas(), tmp_path, LLAMA)
    assert "MODEL" in _dry(script).stderr
    assert _dry(script).returncode != 0
    first, second = (_dry(script, which, "--api-key", "a b", MODEL="/w") for which in ("0", "1"))
    assert "--port 8000 --api-key a b" in first.stderr
    assert "--port 8001" in second.stderr
    assert "instances: 0 to 1" in _dry(script, "2", MODEL="/w").stderr
    assert "gpus=4,5,6,7" in script.read_text()


def test_nodes_of_one_instance(tmp_path: Path) -> None:
    script = _script(four_nodes(dp=4, tp=8), tmp_path)
    third = _dry(script, "0", MODEL="/w", HEAD_ADDR="10.0.0.1", NODE_RANK="2").stderr
    assert "--headless --data-parallel-start-rank 2" in third
    assert "--data-parallel-size-local 1 --data-parallel-address 10.0.0.1" in third
    assert "HEAD_ADDR" in _dry(script, "0", MODEL="/w").stderr
    script = _script(four_nodes(tp=8, pp=4), tmp_path)
    head = _dry(script, "0", MODEL="/w", HEAD_ADDR="10.0.0.1").stderr
    assert "--nnodes 4 --node-rank 0 --master-addr 10.0.0.1" in head
    assert "--headless" not in head


def test_a_plain_checkpoint_is_refused_where_the_plan_needs_an_exported_one(tmp_path: Path) -> None:
    script = _script(plan(replica(weights="w4a16")), tmp_path, LLAMA)
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    refused = _dry(script, MODEL=str(model))
    assert refused.returncode == 2
    assert "planc export" in refused.stderr
    assert _dry(script, MODEL=str(model), ANY_WEIGHTS="1").returncode == 0
    (model / "config.json").write_text('{"quantization_config": {"quant_method": "gptq"}}')
    assert _dry(script, MODEL=str(model)).returncode == 0


def test_registry() -> None:
    assert writer("vllm") is vllm
    with pytest.raises(UnknownName, match="vllm"):
        writer("vlm")


def test_formats_of_parts_are_said_where_vllm_looks_for_them() -> None:
    """Groups of modules in the checkpoint's configuration, layers whose cache stays wide in the engine's."""
    formats = {"decoder:self_attn": "bf16/bf16", "decoder[0-1]:mlp": "w4a16/bf16", "decoder[0,3]:kv": "bf16"}
    one = replica(weights="fp8", activations="fp8", kv="fp8", formats=formats)
    kept = LayerDecisions(format="fp8", sharding={}, fusions=[], kernel={})
    named = [("decoder", "2-3"), ("decoder[0-1]", "0-1")]
    layers = [
        LayerPlan.model_validate({"class": name, "count": 2, "layers": numbers, "decisions": kept})
        for name, numbers in named
    ]
    whole = plan(one, layers=layers)
    files = vllm.render(whole, LLAMA)
    (folder,) = {name.split("/")[0] for name in files}
    assert folder.endswith("-mixed")
    stated = json.loads(files[f"{folder}/quantization_config.json"])
    groups = [(group["format"], group["targets"]) for group in stated["config_groups"].values()]
    assert groups[1:] == [("float-quantized", ["Linear"])]
    assert groups[0][0] == "pack-quantized"
    (narrow,), (*_, wide) = groups[0][1], stated["ignore"]
    for name, pattern, met in [
        ("model.layers.1.mlp.up_proj", narrow, True),
        ("model.layers.2.mlp.up_proj", narrow, False),
        ("model.layers.1.self_attn.qkv_proj", narrow, False),
        ("model.layers.3.self_attn.qkv_proj", wide, True),
        ("model.layers.13.self_attn.qkv_proj", wide, False),
    ]:
        assert bool(re.match(pattern.removeprefix("re:"), name)) == met, name
    said = settings(one, whole, LLAMA)
    assert (said["kv-cache-dtype"], said["kv-cache-dtype-skip-layers"]) == ("fp8", ["0", "3"])
    assert "num-gpu-blocks-override" not in said
    assert "quantization" not in said
    assert "needs fp8 and bf16 and w4a16 weights" in files[f"{folder}/launch.sh"]
