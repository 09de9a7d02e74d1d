"""Infeasible requests: the reason, and relaxations that really help."""

from __future__ import annotations

from typing import Any

import pytest

from planc.errors import Infeasible
from planc.planner.compile import plan
from planc.planner.relax import relaxations, solved
from planc.planner.request import make_request
from planc.planner.search import Search
from tests.planner.cases import raw, table

ONE = {"nodes": [{"gpu": "l40s", "gpus_per_node": 1, "usd_per_gpu_hour": 1.0}]}
SMALL = {"max_num_seqs": [32, 128], "max_num_batched_tokens": [2048, 8192]}
LIGHT = {"isl": 1000, "osl": 200, "request_rate": 0.1}

#: name, table, changes, words of the reason, words that some relaxation must hold
CASES: list[tuple[str, str, dict[str, Any], str, tuple[str, ...]]] = [
    (
        "too much load",
        "llama8b",
        {"inventory": ONE, "workload": {"isl": 1000, "osl": 200, "request_rate": 20}, "constraints": SMALL},
        "carries at most",
        ("request_rate 20 ->", "inventory: 1 ->"),
    ),
    (
        "too fast",
        "llama8b",
        {"inventory": ONE, "slo": {"tpot_mean_ms": 18}, "constraints": SMALL},
        "tpot_mean_ms cannot be below",
        ("tpot_mean_ms 18 ->", "weights may also be fp8"),
    ),
    (
        "too large",
        "llama70b",
        {"constraints": {**SMALL, "tp": [1], "pp": [1]}, "slo": {}, "workload": LIGHT},
        "does not fit into memory",
        ("leave tp open", "leave pp open", "weights may also be w4a16"),
    ),
    (
        "too few GPUs allowed",
        "llama8b",
        {
            "workload": {"isl": 1000, "osl": 200, "request_rate": 12},
            "constraints": {**SMALL, "max_gpus": 1},
        },
        "carries at most",
        ("max_gpus 1 ->",),
    ),
    (
        "too many users",
        "llama8b",
        {"inventory": ONE, "workload": {"isl": 1000, "osl": 200, "concurrency": 1000}, "constraints": SMALL},
        "users",
        ("concurrency 1000 ->", "inventory: 1 ->"),
    ),
]


@pytest.mark.parametrize(("name", "model", "changes", "reason", "helps"), CASES, ids=[c[0] for c in CASES])
def test_reason_and_relaxations(
    name: str, model: str, changes: dict[str, Any], reason: str, helps: tuple[str, ...]
) -> None:
    wanted = make_request(raw(**changes))
    with pytest.raises(Infeasible) as caught:
        plan(wanted, table(model))
    message = str(caught.value)
    assert caught.value.exit_code == 3
    assert reason in message
    for words in helps:
        assert words in message, message


@pytest.mark.parametrize("case", CASES[:2], ids=[c[0] for c in CASES[:2]])
def test_every_relaxation_is_feasible(case: Any) -> None:
    _, model, changes, _, _ = case
    search = Search(make_request(raw(**changes)), table(model))
    found = relaxations(search)
    assert found
    for item in found:
        assert solved(search, item.request, item.isl, item.osl) is not None, item.text
        if item.isl == item.osl == 1:
            plan(item.request, table(model))


def test_relaxations_are_small() -> None:
    """A rate 2 % above the one offered is infeasible, and so is one node fewer."""
    _, model, changes, _, _ = CASES[0]
    search = Search(make_request(raw(**changes)), table(model))
    by_text = {item.text.split(" ")[1]: item for item in relaxations(search)}
    rate = by_text["request_rate"].request.workload.request_rate
    assert rate is not None
    more = {**changes, "workload": {**changes["workload"], "request_rate": rate * 1.02}}
    assert Search(make_request(raw(**more)), table(model)).fleet() is None
    nodes = (
        next(i for i in relaxations(search) if i.text.startswith("inventory"))
        .request.inventory.nodes[0]
        .count
    )
    fewer = {**changes, "inventory": {"nodes": [{**ONE["nodes"][0], "count": nodes - 1}]}}
    assert Search(make_request(raw(**fewer)), table(model)).fleet() is None


def test_nothing_helps() -> None:
    changes = {"slo": {"tpot_mean_ms": 0.001, "ttft_mean_ms": 0.001}, "inventory": ONE, "constraints": SMALL}
    with pytest.raises(Infeasible, match="No single change"):
        plan(make_request(raw(**changes)), table())
