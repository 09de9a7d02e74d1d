"""Routing statistics in a request: they price experts, decide where they lie, and are checked."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from planc.codegen.bundle import files
from planc.cost_model import catalogue
from planc.cost_model.collectives import Fabric
from planc.cost_model.memory import memory_map
from planc.cost_model.routing import ExpertLoad, routed
from planc.cost_model.shape import EngineShape
from planc.cost_model.step import StepLoad, StepModel
from planc.errors import FileMissing, FileUnreadable, InvalidField
from planc.planner.check import check
from planc.planner.compile import plan
from planc.planner.expert_load import read, with_expert_load
from planc.planner.plan import Plan
from tests.planner.cases import request
from tests.sample_tables import llama8b, qwen235b

TABLE = qwen235b()
EXPERTS = TABLE.model.experts


def skewed(layers: int = 4) -> np.ndarray:
    return np.random.default_rng(0).pareto(1.5, (layers, EXPERTS)) + 0.1


def seconds(load: ExpertLoad | None) -> float:
    shape = EngineShape("vllm", "h200_sxm", tp=8, ep=8)
    table = replace(TABLE, expert_load=load)
    gpu, profile = catalogue.gpu("h200_sxm"), catalogue.engine("vllm")
    return float(StepModel(table, shape, gpu, Fabric(), profile).seconds(StepLoad(256, 1000, 4096, 1)))


def test_placing_by_counts_is_faster_than_the_order_of_experts() -> None:
    even = ExpertLoad(np.ones((1, EXPERTS)))
    placed, ordered = ExpertLoad(skewed()), ExpertLoad(skewed(), placed=False)
    assert placed.imbalance(8) < ordered.imbalance(8)
    assert seconds(even) <= seconds(placed) < seconds(ordered)


def test_equal_counts_load_all_ranks_alike() -> None:
    load = ExpertLoad(np.ones((2, EXPERTS)))
    found = routed(EXPERTS, 8, 8, load)
    whole = routed(EXPERTS, 8, 1, load)
    assert found.pairs[-1] == pytest.approx(whole.pairs[-1] / 8, rel=0.02)
    assert load.imbalance(8) == pytest.approx(1.0)


def test_a_request_prices_the_table_once(tmp_path: Path) -> None:
    (tmp_path / "load.csv").write_text("\n".join(",".join(f"{v:g}" for v in row) for row in skewed()))
    asked = request(workload={"isl": 100, "osl": 100, "request_rate": 1, "expert_load": "load.csv"})
    asked._base = tmp_path
    priced = with_expert_load(asked, TABLE)
    assert priced.expert_load is not None
    assert priced.expert_load.counts.shape == (4, EXPERTS)
    assert with_expert_load(asked, priced) is priced
    assert priced.to_json() == TABLE.to_json(), "counts are not the model's"
    assert asked.dump()["workload"]["expert_load"] == "load.csv"
    assert "load.csv" in asked.files()


def test_a_plan_carries_the_placement_to_its_engines(tmp_path: Path) -> None:
    (tmp_path / "load.json").write_text(json.dumps(skewed(1).tolist()))
    asked = request(
        inventory={"nodes": [{"gpu": "h200_sxm", "gpus_per_node": 8, "usd_per_gpu_hour": 3.0}]},
        workload={"isl": 1000, "osl": 200, "request_rate": 2, "expert_load": "load.json"},
        slo={"tpot_mean_ms": 60},
        constraints={"tp": [8], "pp": [1], "dp": [1], "ep": [8], "weights": ["fp8"], "kv": ["fp8"]},
    )
    asked._base = tmp_path
    found = plan(asked, TABLE)
    (experts,) = found.experts
    assert experts.ranks == 8
    assert 1.0 <= experts.bound <= experts.imbalance < ExpertLoad(skewed(1), placed=False).imbalance(8)
    (read_back,) = Plan.model_validate_json(found.canonical()).experts
    assert read_back.physical_to_logical == experts.physical_to_logical
    made = files(found)
    held = json.loads(made["experts/ep8.json"])["physical_to_logical_map"]
    assert sorted(held[0]) == list(range(EXPERTS))
    assert any("enable-eplb: true" in text for name, text in made.items() if name.endswith(".yaml"))
    assert check(found, TABLE, asked) == check(found, with_expert_load(asked, TABLE), asked) == []
    moved = found.model_copy(update={"experts": [experts.model_copy(update={"imbalance": 0.5})]})
    assert any("below its bound" in line for line in check(moved, with_expert_load(asked, TABLE), asked))


def test_copies_of_busy_experts_are_a_decision(tmp_path: Path) -> None:
    """One expert of each layer takes a fifth of the tokens: only copies even that out, and the most goodput
    takes them; they cost weights."""
    counts = np.ones((2, EXPERTS))
    counts[:, 7] = EXPERTS / 4
    (tmp_path / "load.json").write_text(json.dumps(counts.tolist()))
    asked = request(
        objective="max_goodput",
        inventory={"nodes": [{"gpu": "h200_sxm", "gpus_per_node": 8, "usd_per_gpu_hour": 3.0}]},
        workload={"isl": 2000, "osl": 200, "request_rate": "max", "expert_load": "load.json"},
        slo={"tpot_mean_ms": 60},
        constraints={"tp": [8], "pp": [1], "dp": [1], "ep": [8], "weights": ["fp8"], "kv": ["fp8"]},
    )
    asked._base = tmp_path
    found = plan(asked, TABLE)
    (replica,) = found.replicas()
    (experts,) = found.experts
    assert replica.expert_copies == experts.copies > 0
    assert experts.imbalance < 1.05 < ExpertLoad(counts).imbalance(8)
    assert check(found, TABLE, asked) == []
    made = files(found)
    settings = next(text for name, text in made.items() if name.endswith("config.yaml"))
    assert f"num_redundant_experts: {8 * experts.copies}" in settings
    assert f"experts/ep8-copies{experts.copies}.json" in made


def test_copies_weigh_what_their_experts_weigh() -> None:
    gpu, profile = catalogue.gpu("h200_sxm"), catalogue.engine("vllm")
    limits = {"max_num_seqs": 64, "max_num_batched_tokens": 8192, "max_model_len": 4096}
    shape = EngineShape("vllm", "h200_sxm", tp=8, ep=8, weights="fp8", activations="fp8")
    plain, more = (
        memory_map(TABLE, one, gpu, profile, **limits).weights for one in (shape, replace(shape, copies=2))
    )
    expert = sum(row.work.weights for row in TABLE.rows["decode"] if row.shard.kind == "experts") / EXPERTS
    assert more - plain == pytest.approx(2 * expert * TABLE.model.layers, rel=0.02)


@pytest.mark.parametrize(
    ("name", "text", "error", "word"),
    [
        ("a.csv", None, FileMissing, "relative"),
        ("a.csv", "one,two", FileUnreadable, "one"),
        ("a.json", "{}", FileUnreadable, "list of lists"),
        ("a.json", "[[null]]", FileUnreadable, "counts"),
        ("a.csv", "", InvalidField, "no layer"),
        ("a.csv", "1,2,3", InvalidField, "3 counts"),
        ("a.json", json.dumps([[-1.0] * EXPERTS]), InvalidField, "below zero"),
        ("a.json", json.dumps([[0] * EXPERTS]), InvalidField, "without any token"),
    ],
)
def test_bad_files_are_refused(
    tmp_path: Path, name: str, text: str | None, error: type[Exception], word: str
) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(error, match=word):
        read(tmp_path / name, TABLE)


def test_dense_models_have_no_experts_to_count(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("1,2")
    with pytest.raises(InvalidField, match="no routed experts"):
        read(tmp_path / "a.csv", llama8b())
