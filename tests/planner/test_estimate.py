"""One fixed configuration."""

from __future__ import annotations

import json
from typing import Any

import pytest

from planc.errors import Infeasible, InvalidField, PlancError, UnknownField, UnknownName
from planc.planner.estimate import estimate
from tests.planner.cases import planned, request, table


def test_an_estimate_of_the_plans_own_configuration_gives_its_numbers() -> None:
    found = planned()
    replica = found.replicas()[0]
    names = (
        "tp",
        "pp",
        "dp",
        "ep",
        "weights",
        "activations",
        "kv",
        "max_num_seqs",
        "max_num_batched_tokens",
        "gpu",
    )
    again = estimate(request(), table(), **{name: getattr(replica, name) for name in names}, replicas=1)
    assert again.meets_slo
    assert again.notes == ()
    assert again.replica.memory == replica.memory
    for name, value in found.predicted.items():
        assert again.predicted[name].value == pytest.approx(value.value, rel=1e-3), name


def test_strings_are_read_as_on_the_command_line() -> None:
    found = estimate(request(), table(), tp="2", weights="fp8")
    assert (found.replica.tp, found.replica.weights, found.replica.activations) == (2, "fp8", "fp8")
    assert json.loads(json.dumps(found.to_json()))["replica"]["tp"] == 2


def test_missed_objectives_are_noted() -> None:
    slow = estimate(request(slo={"tpot_mean_ms": 1}), table(), tp=1)
    assert not slow.meets_slo
    assert any("tpot_mean_ms" in note for note in slow.notes)


def test_overload_is_noted() -> None:
    found = estimate(request(workload={"isl": 1000, "osl": 200, "request_rate": 500}), table(), tp=1)
    assert found.replicas == 4
    assert any("overloaded" in note for note in found.notes)
    assert found.predicted["requests_s"].value < 500


def test_more_gpus_are_faster() -> None:
    one, two = (estimate(request(), table(), tp=tp, replicas=1) for tp in (1, 2))
    assert two.predicted["tpot_ms"].value < one.predicted["tpot_ms"].value


@pytest.mark.parametrize(
    ("settings", "kind", "words"),
    [
        ({"tpp": 4}, UnknownField, "tpp"),
        ({"tp": "four"}, InvalidField, "four"),
        ({"tp": 0}, InvalidField, "tp"),
        ({"tp": 3}, InvalidField, "divide"),
        ({"tp": 8}, InvalidField, "tp"),
        ({"weights": "fp7"}, UnknownName, "fp7"),
        ({"weights": "nvfp4"}, InvalidField, "nvfp4"),
        ({"gpu": "h100_sxm"}, InvalidField, "inventory"),
        ({"gpu": "h300"}, UnknownName, "h300"),
        ({"engine": "vlm"}, UnknownName, "vlm"),
        ({"ep": 2}, InvalidField, "ep"),
        ({"replicas": 9}, InvalidField, "replicas"),
        ({"gpu_memory_utilization": 2}, InvalidField, "share"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], kind: type[PlancError], words: str) -> None:
    with pytest.raises(PlancError) as caught:
        estimate(request(), table(), **settings)
    assert type(caught.value) is kind, str(caught.value)
    assert words in str(caught.value)


def test_a_model_that_does_not_fit() -> None:
    with pytest.raises(Infeasible, match="GiB of weights"):
        estimate(request(), table("llama70b"), tp=1)
