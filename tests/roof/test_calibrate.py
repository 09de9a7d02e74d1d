"""planc calibrate, and --profile of the commands that predict."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import planc
from planc import api
from planc.errors import InvalidField
from tests.roof.support import Planc, write_request

CPU = {"nodes": [{"gpu": "cpu", "gpus_per_node": 1, "count": 1}]}
SLOW = {"value": 1.0}
FAST = {"value": 500.0}


def profile(folder: Path, gbytes_s: dict[str, Any]) -> Path:
    path = folder / f"profile-{gbytes_s['value']}.json"
    body = {
        "kind": "planc.profile",
        "schema_version": 1,
        "planc_version": "0.1.0",
        "date": "2026-11-21",
        "source": "a test",
        "device": {"name": "cpu", "memory_gbytes_s": gbytes_s, "facts": {"memory_gib": 16}},
    }
    path.write_text(json.dumps(body))
    return path


def request_on_cpu(folder: Path) -> Path:
    return write_request(folder, inventory=CPU, workload={"isl": 32, "osl": 16, "concurrency": 2}, slo=None)


def test_a_calibrated_cpu_is_planned_with(planc: Planc, tmp_path: Path) -> None:
    made = tmp_path / "made.json"
    result = planc("calibrate", "--device", "--quick", "--threads", 1, "-o", made, "--json")
    assert result.code == 0, result.err
    assert result.json() == json.loads(made.read_text())
    assert result.json()["device"]["name"] == "cpu"
    request, bundle = request_on_cpu(tmp_path), tmp_path / "bundle"
    compiled = planc("compile", request, "-o", bundle, "--profile", made, "--json")
    assert compiled.code == 0, compiled.err
    plain = planc("compile", request, "-o", tmp_path / "plain", "--json")
    prints = [answer.json()["plan"]["fingerprint"]["profile"] for answer in (compiled, plain)]
    assert prints[0] != prints[1]
    inspected = planc("inspect", bundle, "--ops", "--profile", made, "--json")
    assert inspected.code == 0, inspected.err


def test_estimates_follow_the_profile(planc: Planc, tmp_path: Path) -> None:
    request = request_on_cpu(tmp_path)
    found = []
    for option in ([], ["--profile", profile(tmp_path, SLOW)], ["--profile", profile(tmp_path, FAST)]):
        result = planc("estimate", request, *option, "--json")
        assert result.code == 0, result.err
        found.append(result.json()["predicted"]["tpot_ms"]["value"])
    assert found[1] > found[0] > found[2]
    loaded = api.load_request(request)
    slow = api.estimate(loaded, profile=planc_profile(tmp_path))
    assert slow.predicted["tpot_ms"].value == pytest.approx(found[1])
    assert api.estimate(loaded).predicted["tpot_ms"].value == pytest.approx(found[0])


def planc_profile(folder: Path) -> Any:
    return planc.load_profile(profile(folder, SLOW))


def test_a_profile_of_other_hardware_is_refused(planc: Planc, tmp_path: Path) -> None:
    request = write_request(tmp_path)
    result = planc("estimate", request, "--profile", profile(tmp_path, SLOW))
    assert result.code == 2
    assert "cpu" in result.err
    assert "l4" in result.err
    with pytest.raises(InvalidField, match="l4"):
        api.compile(request, profile=profile(tmp_path, SLOW))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--engine", "vllm"], "--engine-python"),
        (["--engine-python", "nowhere/python"], "nowhere/python"),
        (["--threads", "0"], "threads"),
        (["--points", "nowhere.csv"], "nowhere.csv"),
    ],
)
def test_bad_options(words: list[str], message: str, planc: Planc, tmp_path: Path) -> None:
    result = planc("calibrate", *words, "-o", tmp_path / "profile.json")
    assert result.code == 2
    assert message in result.err
    assert list(tmp_path.iterdir()) == []


def test_the_output_is_a_file(planc: Planc, tmp_path: Path) -> None:
    result = planc("calibrate", "--quick", "-o", tmp_path)
    assert result.code == 2
    assert "folder" in result.err


def test_a_bad_profile_ends_in_one_message(planc: Planc, tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text("{}")
    result = planc("estimate", request_on_cpu(tmp_path), "--profile", tmp_path / "bad.json")
    assert result.code == 2
    assert "Traceback" not in result.err
