"""benchmarks/cpu_loop.py runs through: a plan for a small model is served, loaded and simulated."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from planc.runtime.calibrate.checkpoint import random_llama
from planc.runtime.calibrate.device import Settings, calibrate
from tests.engines.support import ROOT, environment

pytestmark = [pytest.mark.engines, pytest.mark.timeout(1200)]


def test_predictions_stand_beside_what_was_measured(tmp_path: Path) -> None:
    """Whether they agree is for the benchmark to say, on a machine at rest."""
    spec = importlib.util.spec_from_file_location("cpu_loop", ROOT / "benchmarks/cpu_loop.py")
    assert spec is not None
    assert spec.loader is not None
    loop = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loop)
    python = str(environment() / "python")
    profile = calibrate(Settings("cpu", python=python, engine="vllm", quick=True), "2026-11-21", "a test")
    assert "vllm" in profile.machine.versions
    profile.save(tmp_path / "profile.json")
    random_llama(tmp_path / "model", hidden=256, intermediate=512, layers=2, heads=4, kv_heads=2)
    words = ["--engine-python", python, "--profile", tmp_path / "profile.json", "--model", tmp_path / "model"]
    words += ["--concurrency", 1, 2, "--requests", 2, "--isl", 32, "--osl", 16, "--tries", 1]
    loop.main([str(word) for word in (*words, "--out", tmp_path / "found.json")])
    found = json.loads((tmp_path / "found.json").read_text())
    assert [row["concurrency"] for row in found["rows"]] == [1, 2]
    for row in found["rows"]:
        assert all(row["predicted"][name] > 0 and row["measured"][name] > 0 for name in loop.METRICS)
        assert 0 <= row["measured"]["others"] <= 1
