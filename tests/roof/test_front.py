"""`objective: pareto` as a user types it."""

from __future__ import annotations

from pathlib import Path

import pytest

import planc
from planc.planner import pareto
from planc.planner.plan import load_plan
from tests.roof.support import Planc, write_request

FEW = {
    "weights": ["fp8"],
    "kv": ["bf16"],
    "max_num_seqs": [32],
    "serving": ["aggregated"],
    "max_num_batched_tokens": [2048],
    "pp": [1],
}


def test_a_front_is_printed_and_written(
    planc: Planc, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pareto, "_MOST", 6)
    file = write_request(tmp_path, objective="pareto", constraints=FEW)
    result = planc("compile", file, "-o", tmp_path / "b", "--no-simulate")
    assert result.code == 0, result.err
    front = load_plan(tmp_path / "b").front
    assert len(front) >= 2
    assert f"{len(front)} undominated plans" in result.out
    assert "Pareto front" in (tmp_path / "b" / "report.html").read_text()


def test_a_front_as_json(planc: Planc, tmp_path: Path) -> None:
    file = write_request(tmp_path, objective="pareto", constraints=FEW)
    result = planc("compile", file, "-o", tmp_path / "b", "--json", "--time-limit", "0.001", "--no-simulate")
    assert result.code == 0, result.err
    front = result.json()["front"]
    assert not front["complete"]
    assert front["points"][front["chosen"]]["plan"] == "plan.json"


def test_each_plan_of_a_front_can_be_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pareto, "_MOST", 6)
    plan = planc.compile(write_request(tmp_path, objective="pareto", constraints=FEW), simulate=False)
    plan.save(tmp_path / "front")
    for number, one in enumerate([*plan.front, *planc.load_plan(tmp_path / "front").front]):
        one.save(tmp_path / str(number))
        assert planc.load_plan(tmp_path / str(number)) == one
        assert (tmp_path / str(number) / "model" / "config.json").is_file()


def test_a_point_of_a_front_is_exported(
    planc: Planc, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pareto, "_MOST", 6)
    planc("compile", write_request(tmp_path, objective="pareto", constraints=FEW), "-o", tmp_path / "b")
    point = min((tmp_path / "b" / "front").iterdir())
    done = planc("export", point, "--engine", "vllm", "-o", tmp_path / "served")
    assert done.code == 0
    assert (tmp_path / "served" / "README.md").is_file()
    assert load_plan(point)._model == tmp_path / "b" / "model" / "config.json"
