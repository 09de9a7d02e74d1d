"""Explanations of several models on one inventory: who pays for sharing, and whom more of it would serve."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from planc.errors import InvalidBundle
from planc.planner.compile import plan
from planc.planner.explain_fleet import FleetExplanation, explain_fleet, limit_of_all
from planc.planner.explain_prices import priced
from planc.planner.joint import Joint, JointPlan, Together, document, load_fleet, plans
from planc.planner.request import make_request
from planc.planner.shared import SharedResolver
from tests.planner.cases import Strict, raw, table

#: two cheap cards, of which each model alone would take what it needs
NODES = [
    {"gpu": "l40s", "gpus_per_node": 2, "usd_per_gpu_hour": 1.0},
    {"gpu": "h100_sxm", "gpus_per_node": 4, "usd_per_gpu_hour": 5.0},
]
LIMITS = {
    "weights": ["fp8"],
    "max_num_seqs": [128],
    "max_num_batched_tokens": [2048],
    "serving": ["aggregated"],
    "kv": ["bf16"],
    "tp": [1, 2],
    "pp": [1],
}


def joint(**limits: Any) -> Joint:
    requests = {
        name: make_request(
            raw(
                inventory={"nodes": NODES},
                workload={"isl": 1000, "osl": 200, "request_rate": rate},
                constraints=LIMITS,
            )
        )
        for name, rate in (("small", 5), ("large", 8))
    }
    return Joint(requests, Together(**limits))


TABLES = {name: table() for name in ("small", "large")}


@cache
def made() -> JointPlan:
    return plans(joint(), TABLES)


@cache
def explained() -> FleetExplanation:
    return explain_fleet(made(), joint(), TABLES)


def test_shares_are_the_prices_of_fleets_with_and_without() -> None:
    whole = made().usd_per_hour
    assert sum(share.part for share in explained().shares) == pytest.approx(whole)
    for share in explained().shares:
        lone = plan(joint().requests[share.model], table()).predicted["usd_per_hour"].value
        other = next(name for name in TABLES if name != share.model)
        rest = plan(joint().requests[other], table()).predicted["usd_per_hour"].value
        assert share.alone == pytest.approx(lone)
        assert share.saved == pytest.approx(whole - rest)
        assert share.pays is not None
        assert share.pays >= 0
    assert any(share.pays for share in explained().shares), "two cheap cards are not enough for both"


def test_one_more_gpu_is_priced_for_all_and_its_gain_has_an_owner() -> None:
    found = {one.price.name: one for one in explained().prices}
    one = found["inventory: single l40s"]
    assert one.price.verdict == "binds"
    assert one.price.pays
    assert sum(one.gains.values()) == pytest.approx(one.price.pays)
    nodes = [*NODES, {**NODES[0], "gpus_per_node": 1}]
    requests = {
        name: make_request({**request.dump(), "inventory": {"nodes": nodes}})
        for name, request in joint().requests.items()
    }
    more = plans(Joint(requests, Together()), TABLES)
    assert made().usd_per_hour - more.usd_per_hour == pytest.approx(one.price.looser)


def test_loads_and_lists_are_priced_for_each_model_alone() -> None:
    names = {one.price.name for one in explained().prices}
    assert {"small: workload.request_rate", "large: slo.tpot_mean_ms", "large: constraints.weights"} <= names
    assert explained().complete
    taken = {(name, one.decision) for name, one in explained().ablations}
    assert ("large", "weights=fp8") in taken
    json.dumps(explained().to_json())


def test_a_limit_of_all_binds() -> None:
    limited = joint(max_gpus=made().gpus)
    resolver = SharedResolver(limited, TABLES)
    base = resolver.base
    assert base is not None
    knob = limit_of_all(base, "max_gpus", "GPUs", made().gpus)
    price = next(priced(resolver, base, [knob]))
    assert (price.stated, price.reached) == (made().gpus, base.gpus)
    assert price.tighter_fails or price.tighter is not None


def test_time_that_is_out_is_said() -> None:
    found = explain_fleet(made(), joint(), TABLES, time_limit=1e-9, referee=Strict(2.0))
    assert not found.complete
    assert found.simulated
    assert all(share.alone is None for share in found.shares)
    assert any("time ran out" in note for note in found.notes)


def test_what_was_written_is_read(tmp_path: Path) -> None:
    for name, one in made().plans.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "plan.json").write_text(one.canonical(), encoding="utf-8")
    body = document(made())
    (tmp_path / "fleet.json").write_text(json.dumps(body), encoding="utf-8")
    found = load_fleet(tmp_path)
    assert found.plans == made().plans
    assert found.solution.value == made().solution.value
    assert found.limits == made().limits
    (tmp_path / "fleet.json").write_text("{}", encoding="utf-8")
    with pytest.raises(InvalidBundle, match=r"fleet\.json"):
        load_fleet(tmp_path)
