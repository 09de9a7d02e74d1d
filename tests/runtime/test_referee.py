"""The propose-simulate-cut loop: what the simulator does not accept is not planned."""

from __future__ import annotations

import pytest

from planc.errors import Infeasible
from planc.planner.check import check
from planc.planner.compile import plan
from planc.planner.referee import accepted
from planc.planner.search import Search
from planc.runtime.referee import Simulation
from tests.planner.cases import Strict, request, table

BUSY = {"workload": {"isl": 1000, "osl": 200, "request_rate": 9}}


def test_cuts_lead_to_a_fleet_that_is_accepted_with_an_honest_bound() -> None:
    search = Search(request(**BUSY), table())
    fleet = search.fleet()
    assert fleet is not None
    found = accepted(search, fleet, Strict(0.6))
    assert found is not None
    _, settled, judgement = found
    assert judgement.accepted
    assert settled.usd >= fleet.usd - 1e-9
    assert fleet.solution.value - 1e-9 <= settled.solution.bound <= settled.solution.value + 1e-9
    if settled.solution.gap > 1e-9:
        assert settled.solution.status == "feasible"


def test_what_is_accepted_at_once_stays_as_it_was() -> None:
    search = Search(request(), table())
    fleet = search.fleet()
    assert fleet is not None
    referee = Strict(2.0)
    found = accepted(search, fleet, referee)
    assert found is not None
    assert found[1] is fleet
    assert referee.asked == 1


def test_no_fleet_left_is_said() -> None:
    with pytest.raises(Infeasible, match="simulated"):
        plan(request(**BUSY), table(), referee=Strict(0.0))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"workload": {"isl": 1000, "osl": 200, "concurrency": 40}, "slo": {"tpot_mean_ms": 60}},
        {
            "workload": {
                "classes": [
                    {"name": "chat", "isl": 300, "osl": 100, "request_rate": 2, "slo": {"ttft_p95_ms": 600}},
                    {"name": "long", "isl": 4000, "osl": 100, "request_rate": 0.3},
                ]
            },
            "slo": {"tpot_mean_ms": 70},
        },
        {
            "inventory": {"nodes": [{"gpu": "h100_sxm", "gpus_per_node": 8, "usd_per_gpu_hour": 1.0}]},
            "workload": {"isl": 4000, "osl": 200, "request_rate": 6},
            "slo": {"tpot_mean_ms": 20, "ttft_p99_ms": 3000},
            "constraints": {"serving": "disaggregated", "weights": ["bf16"], "tp": [1, 2], "pp": [1]},
        },
    ],
    ids=["open loop", "closed loop", "classes", "disaggregated"],
)
def test_a_simulated_plan_keeps_its_objectives_in_the_simulation(changes: dict[str, object]) -> None:
    wanted = request(**changes)
    found = plan(wanted, table(), referee=Simulation())
    assert check(found, table(), wanted) == []
    assert set(found.simulated) >= {"ttft_ms", "tpot_ms", "e2e_ms"}
    for slo in wanted.slos():
        if slo.metric == "tpot" and slo.quantile is None:
            assert found.simulated["tpot_ms"]["mean"] <= slo.limit * 1e3 * 1.02
    again = plan(wanted, table(), referee=Simulation())
    assert again.canonical() == found.canonical()
