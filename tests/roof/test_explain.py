"""`planc explain` as a user types it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from planc.planner.plan import load_plan
from tests.roof.support import Planc, write_request
from tests.roof.test_bad_input import one_message


def test_a_bundle_is_explained(planc: Planc, bundle: Path) -> None:
    result = planc("explain", bundle, "--json")
    assert result.code == 0, result.err
    body = result.json()
    plan = load_plan(bundle)
    assert body["complete"]
    assert body["objective"]["value"] == pytest.approx(plan.solver.value)
    names = {entry["name"] for entry in body["constraints"]}
    assert {"workload.request_rate", "slo.tpot_mean_ms", "slo.ttft_p99_ms"} <= names
    assert all(entry["verdict"] in ("binds", "limits", "slack") for entry in body["constraints"])
    assert all(entry["tried"] for entry in body["decisions"])
    assert sum(engine["count"] for engine in body["engines"]) == len(plan.replicas())
    assert body["why_not"] is None


def test_an_explanation_reads_in_a_terminal(planc: Planc, bundle: Path) -> None:
    result = planc("explain", bundle, "--time-limit", "0.001")
    assert result.code == 0, result.err
    for words in (
        "What binds",
        "What each decision bought",
        "of bandwidth",
        "memory of each GPU",
        "time ran out",
    ):
        assert words in result.out, result.out


@pytest.mark.parametrize(
    ("asked", "words"), [("tp=2", "it costs more"), ("tp=3", "illegal"), ("tp=1", "already")]
)
def test_an_alternative_is_answered(asked: str, words: str, planc: Planc, bundle: Path) -> None:
    result = planc("explain", bundle, "--why-not", asked)
    assert result.code == 0, result.err
    assert words in result.out, result.out
    body = planc("explain", bundle, "--why-not", asked, "--json").json()
    assert body["why_not"]["verdict"] in ("worse", "illegal", "chosen")
    assert body["constraints"] == []


def test_python_says_the_same(planc: Planc, bundle: Path) -> None:
    import planc as package

    found = package.explain(load_plan(bundle), "tp=2")
    shown = planc("explain", bundle, "--why-not", "tp=2", "--json").json()
    assert json.loads(json.dumps(found.to_json())) == shown


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ("tp", "NAME=VALUE"),
        ("tp=many", "whole number"),
        ("cards=2", "Known: tp"),
        ("weights=fp7", "fp8"),
        ("gpu=h200_sxm", "not in the inventory"),
    ],
)
def test_an_alternative_that_cannot_be_named(asked: str, words: str, planc: Planc, bundle: Path) -> None:
    one_message(planc("explain", bundle, "--why-not", asked), 2, words)


def test_what_is_no_bundle(planc: Planc, tmp_path: Path) -> None:
    one_message(planc("explain", tmp_path / "none"), 2, "none")
    (tmp_path / "plan.json").write_text("{}", encoding="utf-8")
    one_message(planc("explain", tmp_path), 2, "schema_version")


def test_an_infeasible_request_names_its_conflict(planc: Planc, tmp_path: Path) -> None:
    limits = {"serving": "aggregated", "tp": 1, "pp": 1, "max_num_seqs": 32}
    request = write_request(tmp_path, slo={"tpot_mean_ms": 0.1}, constraints=limits)
    result = planc("compile", request, "-o", tmp_path / "b", "--json")
    assert result.code == 3
    assert "cannot hold" in result.err
    fields = result.json()["error"]["fields"]
    assert "slo.tpot_mean_ms: 0.1" in fields["conflict"]
    assert fields["complete"] == "True"
    assert not (tmp_path / "b").exists()
