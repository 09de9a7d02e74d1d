"""Every mistake gives one clear message and the right exit code, and nothing is left half-written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from planc.version import SCHEMA_VERSION
from tests.roof.support import ROOT, Planc, Result, write_request

NODES = {"gpu": "l4", "gpus_per_node": 2, "count": 1}


def one_message(result: Result, code: int, *words: str) -> None:
    assert result.code == code, result.err
    assert "Traceback" not in result.err
    assert result.err.count("error:") == 1
    for word in words:
        assert word in result.err, result.err


REQUESTS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "unknown key": ({"objectives": "min_cost"}, ("objectives", "objective")),
    "wrong unit": ({"slo": {"ttft_p99_s": 2}}, ("ttft_p99_s", "ttft_p99_ms")),
    "negative GPUs": ({"inventory": {"nodes": [{**NODES, "gpus_per_node": -8}]}}, ("gpus_per_node", "-8")),
    "no GPUs": ({"inventory": {"nodes": [{**NODES, "count": 0}]}}, ("count", "0")),
    "unknown GPU": ({"inventory": {"nodes": [{**NODES, "gpu": "h2000"}]}}, ("h2000", "h200")),
    "SLO of 0": ({"slo": {"tpot_mean_ms": 0}}, ("tpot_mean_ms", "0")),
    "missing model file": ({"model": "nowhere/config.json"}, ("nowhere/config.json",)),
    "unknown format": ({"constraints": {"weights": ["fp7"]}}, ("fp7", "fp8")),
    "unknown engine": ({"constraints": {"engines": ["vlm"]}}, ("vlm", "vllm")),
    "no workload": ({"workload": None}, ("workload",)),
    "text for a number": ({"workload": {"isl": "long", "osl": 10, "request_rate": 1}}, ("isl", "long")),
}


@pytest.mark.parametrize("mistake", REQUESTS)
def test_a_mistake_in_the_request(mistake: str, planc: Planc, tmp_path: Path) -> None:
    changes, words = REQUESTS[mistake]
    result = planc("compile", write_request(tmp_path, **changes), "-o", tmp_path / "out")
    one_message(result, 2, *words)
    assert [p.name for p in tmp_path.iterdir()] == ["request.yaml"]


def test_a_missing_request(planc: Planc, tmp_path: Path) -> None:
    one_message(planc("compile", tmp_path / "no.yaml", "-o", tmp_path / "out"), 2, "no.yaml")


@pytest.mark.parametrize("text", ["", "[1, 2]", "model: {", "\x00\x01", "a: 1\na: 2"])
def test_a_request_that_is_no_request(text: str, planc: Planc, tmp_path: Path) -> None:
    file = tmp_path / "request.yaml"
    file.write_text(text, encoding="utf-8")
    one_message(planc("compile", file, "-o", tmp_path / "out"), 2, "request.yaml")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("not json", ("config.json", "JSON")),
        ("[]", ("config.json",)),
        ("{}", ("model_type",)),
        ('{"model_type": "perceptron9000"}', ("perceptron9000",)),
        ('{"model_type": "x9", "auto_map": {"AutoConfig": "evil.Config"}}', ("trust-remote-code",)),
    ],
)
def test_a_model_that_cannot_be_built(
    text: str, words: tuple[str, ...], planc: Planc, tmp_path: Path
) -> None:
    config = tmp_path / "config.json"
    config.write_text(text, encoding="utf-8")
    result = planc("compile", write_request(tmp_path, model=str(config)), "-o", tmp_path / "out")
    one_message(result, 2, *words)
    assert not (tmp_path / "out").exists()


def test_a_model_larger_than_the_inventory(planc: Planc, tmp_path: Path) -> None:
    config = json.loads((ROOT / "examples/models/llama-3.1-8b.json").read_text())
    config |= {"num_hidden_layers": 2, "intermediate_size": 2_000_000}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    request = write_request(tmp_path, model=str(tmp_path / "config.json"))
    result = planc("compile", request, "-o", tmp_path / "out", "--json")
    one_message(result, 3, "GiB")
    assert result.json()["error"]["exit_code"] == 3
    assert not (tmp_path / "out").exists()


def test_an_objective_nobody_can_meet_names_what_would_help(planc: Planc, tmp_path: Path) -> None:
    result = planc("compile", write_request(tmp_path, slo={"tpot_mean_ms": 0.5}), "-o", tmp_path / "out")
    one_message(result, 3, "tpot_mean_ms")


def test_a_truncated_bundle(planc: Planc, tmp_path: Path, bundle: Path) -> None:
    broken = tmp_path / "b"
    shutil.copytree(bundle, broken)
    text = (broken / "plan.json").read_text(encoding="utf-8")
    (broken / "plan.json").write_text(text[: len(text) // 2], encoding="utf-8")
    one_message(planc("inspect", broken), 2, "plan.json", "truncated")


def test_a_bundle_without_a_key(planc: Planc, tmp_path: Path, bundle: Path) -> None:
    body = json.loads((bundle / "plan.json").read_text(encoding="utf-8"))
    del body["pools"]
    (tmp_path / "plan.json").write_text(json.dumps(body), encoding="utf-8")
    one_message(planc("inspect", tmp_path), 2, "pools")


def test_a_bundle_of_a_newer_schema(planc: Planc, tmp_path: Path, bundle: Path) -> None:
    body = json.loads((bundle / "plan.json").read_text(encoding="utf-8"))
    (tmp_path / "plan.json").write_text(json.dumps({**body, "schema_version": SCHEMA_VERSION + 1}))
    one_message(planc("diff", bundle, tmp_path), 2, "schema_version", "Upgrade")


def test_a_folder_that_is_no_bundle_is_not_overwritten(planc: Planc, tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("years of work")
    result = planc("compile", write_request(tmp_path), "-o", tmp_path / "precious")
    one_message(result, 2, "precious")
    assert (tmp_path / "precious" / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("setting", ["tp", "=4", "wheels=4", "tp=3.5", "tp=0", "weights=fp7"])
def test_a_bad_setting(setting: str, planc: Planc, tmp_path: Path) -> None:
    one_message(planc("estimate", write_request(tmp_path), "--set", setting), 2)


def test_an_unknown_option_is_bad_input(planc: Planc) -> None:
    assert planc("compile", "--frobnicate").code == 2


def test_what_must_not_be_overwritten_is_said_before_any_work(planc: Planc, tmp_path: Path) -> None:
    request = write_request(tmp_path, model=str(tmp_path / "no-such-model.json"))
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "notes.txt").write_text("mine", encoding="utf-8")
    one_message(planc("compile", request, "-o", tmp_path / "taken"), 2, "not overwritten")


def test_a_folder_of_several_models_is_named_as_such(planc: Planc, tmp_path: Path) -> None:
    for name in ("chat", "small"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "plan.json").write_text("{}", encoding="utf-8")
    (tmp_path / "fleet.json").write_text('{"models": []}', encoding="utf-8")
    for command in (("diff", tmp_path), ("inspect",), ("verify",)):
        one_message(planc(*command, tmp_path), 2, "several models")
    one_message(planc("explain", tmp_path, "--why-not", "tp=2"), 2, "one model's plan")
    one_message(planc("explain", tmp_path), 2, "fleet.json")
