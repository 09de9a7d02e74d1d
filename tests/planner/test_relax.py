"""Infeasible requests: the reason, and relaxations that really help."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from planc.errors import Infeasible
from planc.planner.compile import plan
from planc.planner.conflict import conflict, pairs, parts
from planc.planner.relax import explained, infeasible, relaxations, why
from planc.planner.request import Request, make_request
from planc.planner.search import Search
from planc.planner.variations import Resolver
from tests.planner.cases import raw, table

ONE = {"nodes": [{"gpu": "l40s", "gpus_per_node": 1, "usd_per_gpu_hour": 1.0}]}
SMALL = {"max_num_seqs": [32, 128], "max_num_batched_tokens": [2048], "serving": ["aggregated"], "pp": [1]}
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


IDS = [case[0] for case in CASES]


@cache
def asked(number: int) -> Resolver:
    """The resolver of a case, shared: what it solved once it knows."""
    _, model, changes, _, _ = CASES[number]
    return resolver(changes, model)


def resolver(changes: dict[str, Any], model: str = "llama8b") -> Resolver:
    search = Search(make_request(raw(**changes)), table(model))
    assert search.fleet() is None
    return Resolver.of(search)


@pytest.mark.parametrize("number", range(len(CASES)), ids=IDS)
def test_reason_and_relaxations(number: int) -> None:
    _, _, _, reason, helps = CASES[number]
    assert reason in why(asked(number).base_search)
    found = [item.text for item in relaxations(asked(number))]
    for words in helps:
        assert any(words in text for text in found), found


def test_a_plan_that_cannot_be_says_all_that() -> None:
    _, model, changes, _, _ = CASES[1]
    with pytest.raises(Infeasible) as caught:
        plan(make_request(raw(**changes)), table(model))
    message, fields = str(caught.value), caught.value.fields
    assert caught.value.exit_code == 3
    assert fields["changes"] == [item.text for item in relaxations(asked(1))]
    assert fields["conflict"] == list(conflict(asked(1)).names)
    assert CASES[1][3] in message
    assert all(words in message for words in CASES[1][4])


@pytest.mark.parametrize("number", range(2), ids=IDS[:2])
def test_every_relaxation_is_feasible(number: int) -> None:
    found = list(relaxations(asked(number)))
    assert found
    for item in found:
        if item.isl == item.osl == 1:
            assert Search(item.request, asked(number).table).fleet() is not None, item.text


def test_relaxations_are_small() -> None:
    """A rate 2 % above the one offered is infeasible, and so is one node fewer."""
    _, model, changes, _, _ = CASES[0]
    found = list(relaxations(asked(0)))
    rate = next(i for i in found if "request_rate" in i.text).request.workload.request_rate
    assert rate is not None
    more = {**changes, "workload": {**changes["workload"], "request_rate": rate * 1.02}}
    assert Search(make_request(raw(**more)), table(model)).fleet() is None
    nodes = next(i for i in found if i.text.startswith("inventory")).request.inventory.nodes[0].count
    fewer = {**changes, "inventory": {"nodes": [{**ONE["nodes"][0], "count": nodes - 1}]}}
    assert Search(make_request(raw(**fewer)), table(model)).fleet() is None


# -- conflicts -----------------------------------------------------------------------------


def kept_alone(number: int, names: set[str]) -> Request:
    """The request with nothing but the named parts."""
    request = asked(number).start.request
    for part in parts(asked(number)):
        if part.name not in names:
            request = part.left_out(request)
    return request


@pytest.mark.parametrize("number", range(2), ids=IDS[:2])
def test_a_conflict_is_infeasible_and_minimal(number: int) -> None:
    names = set(conflict(asked(number)).names)
    assert names
    known = asked(number).table
    assert Search(kept_alone(number, names), known).fleet() is None
    for name in names:
        assert Search(kept_alone(number, names - {name}), known).fleet() is not None, name


def test_the_conflict_names_what_clashes() -> None:
    names = conflict(asked(1)).names
    assert "slo.tpot_mean_ms: 18" in names
    assert not any("ttft" in name or "request_rate" in name for name in names)


TWICE = {"slo": {"tpot_mean_ms": 0.001, "ttft_mean_ms": 0.001}, "inventory": ONE, "constraints": SMALL}


def test_pairs_help_where_no_single_change_does() -> None:
    twice = resolver(TWICE)
    assert not list(relaxations(twice))
    found = list(pairs(twice, conflict(twice)))
    assert [("tpot" in item.text, "ttft" in item.text) for item in found] == [(True, True)]
    assert Search(found[0].request, table()).fleet() is not None
    error = explained(twice)
    assert error.fields["changes"] == [found[0].text]
    assert error.fields["complete"]


def test_what_the_time_did_not_allow_is_said() -> None:
    found = infeasible(asked(0).base_search, time_limit=0.0)
    assert "Time ran out" in str(found)
    assert found.fields["complete"] is False
