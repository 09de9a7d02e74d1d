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


# -- uneven stages and speculation ---------------------------------------------------------

DRAFTS = "method=ngram num_speculative_tokens=3 acceptance_rate=0.7"
MANY = "{method: ngram, num_speculative_tokens: [2, 3], acceptance_rate: 0.5}"


def test_stages_of_a_plan_can_be_named() -> None:
    even, cut = (estimate(request(), table(), pp=2, pipeline_layers=sizes) for sizes in ("16/16", [20, 12]))
    assert even.replica.pipeline_layers == [16, 16]
    assert cut.replica.pipeline_layers == [20, 12]
    assert cut.replica.memory.weights_gib > even.replica.memory.weights_gib
    assert estimate(request(), table(), pipeline_layers="20/12").replica == cut.replica
    assert even.replica.memory == estimate(request(), table(), pp=2).replica.memory


def test_speculation_of_a_plan_can_be_named() -> None:
    plain, drafting = (estimate(request(), table(), tp=1, speculative=way) for way in ("none", DRAFTS))
    assert plain.replica.speculative is None
    assert drafting.replica.speculative == {
        "method": "ngram",
        "num_speculative_tokens": 3,
        "acceptance_rate": 0.7,
    }
    assert drafting.predicted["tpot_ms"].value < plain.predicted["tpot_ms"].value
    for same in (drafting.replica.speculative, str(drafting.replica.speculative)):
        assert estimate(request(), table(), tp=1, speculative=same).predicted == drafting.predicted


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"pipeline_layers": "16/x"}, "20/20/22/18"),
        ({"pp": 2, "pipeline_layers": "16/15"}, "sum to 32"),
        ({"pp": 1, "pipeline_layers": "16/16"}, "must be 1"),
        ({"speculative": "ngram"}, "num_speculative_tokens"),
        ({"speculative": DRAFTS.replace("0.7", "2")}, "at most 1"),
        (
            {"speculative": "{method: ngram, num_speculative_tokens: [2, 3], acceptance_rate: 0.5}"},
            "one number",
        ),
        ({"speculative": f"{DRAFTS} tokens=2"}, "tokens"),
        ({"speculative": DRAFTS, "pp": 2}, "pipeline stages"),
        ({"speculative": "{method"}, "YAML"),
    ],
)
def test_stages_and_speculation_that_cannot_be(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(PlancError, match=words):
        estimate(request(), table(), **settings)
