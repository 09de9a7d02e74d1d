"""Simulated load tests of one configuration: what is told to the generator shows in what it reports."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import pytest

from planc import api
from planc.errors import InvalidField, UnknownField
from planc.planner.estimate import estimate
from planc.planner.workload import LoadTest
from planc.runtime.load_test import Simulated, load_test
from tests.planner.cases import request, table


@cache
def _found(text: str) -> Simulated:
    told = json.loads(text)
    test = told.pop("test", {})
    wanted = request(workload={"isl": 1000, "osl": 100, "load_test": test, **told})
    engine = estimate(wanted, table(), tp=2, replicas=2, max_num_seqs=64)
    return load_test(wanted, table(), engine.replica, engine.replicas)


def found(workload: dict[str, Any], **test: Any) -> Simulated:
    return _found(json.dumps({**workload, "test": test}, sort_keys=True))


CLOSED, OPEN, OFFLINE = {"concurrency": 32}, {"request_rate": 2}, {"rate": "max"}


def test_the_start_burst_is_told_apart() -> None:
    burst, ramp = found(CLOSED), found(CLOSED, burst=False)
    assert burst.load["kind"] == "closed loop"
    assert burst.load["requests"] == 320
    assert burst.burst_ttft_ms > 5 * abs(ramp.burst_ttft_ms)
    assert burst.load_test["ttft_ms"]["mean"] > burst.steady["ttft_ms"]["mean"]
    assert burst.steady["tpot_ms"]["mean"] == pytest.approx(ramp.steady["tpot_ms"]["mean"], rel=0.1)


def test_more_requests_dilute_the_burst() -> None:
    assert found(CLOSED, requests_per_client=40).burst_ttft_ms < 0.5 * found(CLOSED).burst_ttft_ms


def test_a_closed_loop_obeys_littles_law() -> None:
    told = found(CLOSED, requests_per_client=40)
    clients = told.rates["requests_s"] * told.load_test["e2e_ms"]["mean"] * 1e-3
    assert clients == pytest.approx(32, rel=0.05)  # the last answers leave clients without work


def test_clients_see_what_the_engine_streams() -> None:
    plain, held = found(OPEN), found(OPEN, stream_interval=10)
    steps = (held.steady["ttft_ms"]["mean"] - plain.steady["ttft_ms"]["mean"]) / plain.steady["tpot_ms"][
        "mean"
    ]
    assert steps == pytest.approx(9, rel=0.15)


def test_a_requests_way_is_added_to_its_first_token() -> None:
    near, far = found(OPEN, request_ms=0), found(OPEN, request_ms=100)
    more = far.steady["ttft_ms"]["mean"] - near.steady["ttft_ms"]["mean"]
    assert more == pytest.approx(100, abs=10)


def test_an_open_loop_carries_what_arrives() -> None:
    told = found(OPEN)
    assert told.load["kind"] == "open loop"
    assert told.rates["requests_s"] == pytest.approx(2, rel=0.1)
    assert told.load["burst"] is None


def test_offline_fills_the_seats() -> None:
    told = found(OFFLINE)
    assert told.load["kind"] == "offline"
    assert told.rates["utilisation"] == pytest.approx(1, abs=0.02)
    assert told.rates["output_tok_s"] > found(CLOSED).rates["output_tok_s"]


def test_cached_prefixes_shorten_prompts() -> None:
    assert (
        found({**OPEN, "prefix_hit_rate": 0.8}).steady["ttft_ms"]["mean"]
        < 0.7 * found(OPEN).steady["ttft_ms"]["mean"]
    )


def test_the_same_seed_draws_the_same_test() -> None:
    one, other = found(OPEN, seed=1), found(OPEN, seed=2)
    again = _found.__wrapped__(json.dumps({**OPEN, "test": {"seed": 1}}, sort_keys=True))
    assert one.to_json() == again.to_json()
    assert one.load_test != other.load_test


def test_what_was_assumed_is_shown() -> None:
    told = found(CLOSED).to_json()
    assert {"stream_interval", "recv_interval", "request_ms", "lag_steps", "max_num_batched_tokens"} <= set(
        told["engine"]
    )
    assert {"burst", "requests_per_client", "length_low", "length_high", "seed"} <= set(told["load"])
    low, high = told["bands"]["tpot_ms"]
    assert low < told["load_test"]["tpot_ms"]["mean"] < high
    assert json.loads(json.dumps(told)) == told


def test_settings_of_the_load_test_are_told_from_those_of_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "cost_table", lambda *_, **__: table())
    wanted = request(workload={"isl": 1000, "osl": 100, **CLOSED})
    told = api.estimate(wanted, tp="2", max_num_seqs=64, burst="false", requests="64").simulated
    assert told is not None
    assert (told["load"]["burst"], told["load"]["requests"]) == (False, 64)
    assert api.estimate(wanted, tp=2, simulate=False).simulated is None
    with pytest.raises(InvalidField, match=r"workload\.load_test"):
        api.estimate(wanted, length_low=1.0, length_high=0.5)
    with pytest.raises(InvalidField, match="stream_interval"):
        api.estimate(wanted, stream_interval=0)
    with pytest.raises(UnknownField, match="stream_interval"):
        api.estimate(wanted, stream_intervall=2)


def test_plans_and_documents_carry_the_load_test() -> None:
    wanted = request(workload={"isl": 1000, "osl": 100, "load_test": {"burst": False}, **CLOSED})
    assert wanted.dump()["workload"]["load_test"] == {"burst": False}
    assert wanted.overridden({"workload.load_test.seed": 3}).workload.load_test == LoadTest(
        burst=False, seed=3
    )
