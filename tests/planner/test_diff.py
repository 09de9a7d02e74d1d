"""Differences of plans, by meaning."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest

from planc.planner.diff import diff
from planc.planner.plan import Plan, load_plan
from tests.planner.cases import planned

VARIANTS: list[dict[str, Any]] = [
    {},
    {"slo": {"ttft_p99_ms": 3000, "tpot_mean_ms": 25}},
    {"constraints": {"weights": ["fp8"], "tp": [2]}},
    {"workload": {"isl": 1000, "osl": 200, "request_rate": 12}},
    {
        "objective": "max_goodput",
        "workload": {"isl": 1000, "osl": 200, "rate": "max"},
        "constraints": {"weights": ["fp8"], "serving": ["aggregated"]},
    },
    {"inventory": {"nodes": [{"gpu": "h100_sxm", "gpus_per_node": 2, "usd_per_gpu_hour": 3.0}]}},
]


@pytest.fixture(scope="module")
def plans() -> list[Plan]:
    return [planned(**changes) for changes in VARIANTS]


def test_a_plan_does_not_differ_from_itself(plans: list[Plan], tmp_path: Any) -> None:
    for number, one in enumerate(plans):
        assert not diff(one, one)
        assert diff(one, one).lines() == ["the plans do not differ"]
        file = tmp_path / f"{number}.json"
        file.write_text(one.canonical())
        assert not diff(one, load_plan(file))


def test_mirror(plans: list[Plan]) -> None:
    for a, b in itertools.permutations(plans, 2):
        assert diff(b, a) == diff(a, b).mirrored()
        assert diff(a, b).mirrored().mirrored() == diff(a, b)


def test_different_plans_differ(plans: list[Plan]) -> None:
    for a, b in itertools.combinations(plans, 2):
        assert diff(a, b)


def changed(a: Plan, b: Plan) -> dict[str, tuple[Any, Any]]:
    return {f"{c.section}.{c.path}": (c.old, c.new) for c in diff(a, b).changes}


def test_what_changed_is_named(plans: list[Plan]) -> None:
    found = changed(plans[0], plans[2])
    assert found["pools.aggregated.tp"] == (1, 2)
    assert found["pools.GPUs used"] == (1, 2)
    assert found["predicted.usd_per_hour"] == (1.0, 2.0)
    assert found["request.constraints.tp"] == (None, [2])
    rate = changed(plans[0], plans[3])
    assert rate["request.workload.request_rate"] == (2, 12)
    gpu = changed(plans[0], plans[5])
    assert gpu["pools.aggregated.gpu"] == ("l40s", "h100_sxm")


def test_replicas_are_counted_not_listed(plans: list[Plan]) -> None:
    found = changed(plans[0], plans[4])
    assert found["pools.aggregated.replicas"] == (1, 4)
    assert "pools.aggregated[0].replicas" not in found


def test_formats_of_layers(plans: list[Plan]) -> None:
    found = changed(planned(constraints={"weights": ["bf16"]}), planned(constraints={"weights": ["fp8"]}))
    assert found["layers.block.format"] == ("bf16", "fp8")


def test_lines_and_json(plans: list[Plan]) -> None:
    found = diff(plans[0], plans[3])
    assert {line[0] for line in found.lines()} <= set("+-~")
    body = json.loads(json.dumps(found.to_json()))
    assert body["differs"] is True
    assert len(body["changes"]) == len(found.changes)
    ratio = next(c["ratio"] for c in body["changes"] if c["path"] == "workload.request_rate")
    assert ratio == pytest.approx(5.0)


def test_search_statistics_are_no_difference(plans: list[Plan]) -> None:
    one = plans[0]
    other = one.model_copy(update={"solver": one.solver.model_copy(update={"candidates": 1, "seconds": 9.0})})
    assert not diff(one, other)


def test_added_pools_and_layers(plans: list[Plan]) -> None:
    one = plans[0]
    pool = one.pools[0].model_copy(update={"role": "prefill"})
    more = one.model_copy(update={"pools": [*one.pools, pool], "layers": one.layers[:-1]})
    kinds = {(c.section, c.kind) for c in diff(one, more).changes}
    assert ("pools", "+") in kinds
    assert ("layers", "-") in kinds
