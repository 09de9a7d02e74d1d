"""Several models on one inventory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from planc.errors import Infeasible, InvalidField, UnknownField
from planc.planner.compile import plan
from planc.planner.joint import JointPlan, document, is_joint, load_joint, plans
from planc.planner.request import load_request
from tests.planner.cases import table

BASE: dict[str, Any] = {
    "inventory": {"nodes": [{"gpu": "l40s", "gpus_per_node": 4, "count": 2, "usd_per_gpu_hour": 1.0}]},
    "models": [
        {
            "name": name,
            "model": f"{name}.json",
            "workload": {"isl": 1000, "osl": 200, "request_rate": rate},
            "slo": {"tpot_mean_ms": 60},
            "constraints": {"max_num_seqs": [32, 128], "max_num_batched_tokens": [2048]},
        }
        for name, rate in (("first", 2), ("second", 5))
    ],
}


def written(folder: Path, **changes: Any) -> Path:
    file = folder / "fleet.yaml"
    file.write_text(yaml.safe_dump({**BASE, **changes}))
    return file


def compiled(file: Path) -> JointPlan:
    joint = load_joint(file)
    return plans(joint, {name: table() for name in joint.requests})


def test_other_commands_say_what_such_a_file_is_for(tmp_path: Path) -> None:
    with pytest.raises(InvalidField, match="planc compile"):
        load_request(written(tmp_path))


def test_models_lie_on_gpus_of_their_own_at_the_price_of_both(tmp_path: Path) -> None:
    file = written(tmp_path)
    assert is_joint(file)
    found = compiled(file)
    used = [gpu for one in found.plans.values() for r in one.replicas() for gpu in r.gpus]
    assert len(used) == len(set(used)) == found.gpus
    alone = [plan(request, table()) for request in load_joint(file).requests.values()]
    price = sum(one.predicted["usd_per_hour"].value for one in alone)
    assert found.usd_per_hour == pytest.approx(price)  # there is room for both as they would be alone
    assert found.solution.status == "optimal"
    assert document(found)["gpus"] == found.gpus


def test_scarce_gpus_go_where_they_save_most(tmp_path: Path) -> None:
    """One cheap node: the master problem gives it to one model, as no order of single plans could know."""
    nodes = [
        {"gpu": "l40s", "gpus_per_node": 4, "count": 1, "usd_per_gpu_hour": 1.0},
        {"gpu": "h100_sxm", "gpus_per_node": 8, "count": 1, "usd_per_gpu_hour": 6.0},
    ]
    models = [dict(model) for model in BASE["models"]]
    for model, rate in zip(models, (3, 6), strict=True):
        model["workload"] = {"isl": 1000, "osl": 200, "request_rate": rate}
    file = written(tmp_path, inventory={"nodes": nodes}, models=models)
    found = compiled(file)
    requests = load_joint(file).requests
    lone = [plan(request, table()).predicted["usd_per_hour"].value for request in requests.values()]
    assert sum(lone) - 1e-9 <= found.usd_per_hour
    assert found.usd_per_hour == pytest.approx(found.solution.value)


def test_limits_hold_for_all_models_together(tmp_path: Path) -> None:
    free = compiled(written(tmp_path))
    with pytest.raises(Infeasible, match="together"):
        compiled(written(tmp_path, constraints={"max_gpus": free.gpus - 1}))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"models": []}, InvalidField, "models"),
        ({"models": [BASE["models"][0], BASE["models"][0]]}, InvalidField, "two models have this name"),
        ({"models": [{**BASE["models"][0], "slo": {"tpot_ms": 3}}]}, UnknownField, "tpot"),
        ({"models": [{**BASE["models"][0], "constraints": {"max_gpus": 3}}]}, InvalidField, "max_gpus"),
        (
            {"models": [{**BASE["models"][0], "workload": {"isl": 9, "osl": 9, "rate": "max"}}]},
            InvalidField,
            "request_rate",
        ),
    ],
)
def test_mistakes_are_named(tmp_path: Path, change: dict[str, Any], error: type, words: str) -> None:
    with pytest.raises(error, match=words):
        load_joint(written(tmp_path, **change))
