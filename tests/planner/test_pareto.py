"""Fronts: undominated, complete against brute force where that is possible, each point a plan of its own."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planc.codegen import bundle
from planc.errors import Infeasible, InvalidBundle
from planc.planner import pareto
from planc.planner.check import check
from planc.planner.compile import plan
from planc.planner.front import Axis, Front, Point, balanced, undominated
from planc.planner.offers import Fleet
from planc.planner.pareto import front
from planc.planner.plan import Plan, load_plan
from planc.planner.referee import Judgement, Verdict
from planc.planner.request import make_request
from planc.planner.search import Search
from tests.codegen.plans import plan as by_hand
from tests.planner.cases import request, table

AXES = (Axis.of("usd_per_hour"), Axis.of("tpot_mean_ms"), Axis.of("output_tok_s"))
PLAN = by_hand()


#: little to decide, so that a front takes a second
FEW = {
    "weights": ["fp8"],
    "kv": ["bf16"],
    "pp": [1],
    "max_num_batched_tokens": [2048],
    "max_num_seqs": [32, 128],
    "serving": ["aggregated"],
}


@pytest.fixture(autouse=True, scope="module")
def _short() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pareto, "_STEPS", 3)
        patch.setattr(pareto, "_MOST", 8)
        yield


@pytest.fixture(scope="module")
def found() -> Front:
    return front(request(constraints=FEW), table())


def points(*values: tuple[float, float, float]) -> list[Point]:
    return [Point(PLAN, value) for value in values]


@given(st.lists(st.tuples(*[st.integers(1, 5).map(float)] * 3), min_size=1, max_size=20))
def test_filter_is_exact(values: list[tuple[float, float, float]]) -> None:
    """What is kept is beaten by none; what is left out is equalled or beaten by one that is kept."""

    def no_worse(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
        return a[0] <= b[0] and a[1] <= b[1] and a[2] >= b[2]

    kept = [point.values for point in undominated(points(*values), AXES)]
    assert len(set(kept)) == len(kept)
    for value in values:
        assert any(no_worse(one, value) for one in kept)
    for one in kept:
        assert not any(no_worse(value, one) and value != one for value in values)


def test_balance_does_not_depend_on_the_ends() -> None:
    middle = points((1, 40, 1), (2, 10, 1), (8, 5, 1))
    assert balanced(middle, AXES) == 1
    assert balanced([*middle, *points((900, 4.9, 1))], AXES) == 1


def test_front_of_a_request(found: Front) -> None:
    """One price per size of fleet, falling latencies, and the cheapest plan is min_cost's."""
    assert found.complete
    assert len(found.points) >= 2
    assert undominated(found.points, found.axes) == list(found.points)
    cheapest = plan(request(constraints=FEW), table())
    assert found.points[0].values[0] == cheapest.predicted["usd_per_hour"].value


def test_points_are_plans_of_their_own_requests(found: Front) -> None:
    for point in found.points:
        assert point.plan.sealed().fingerprint.plan == point.plan.fingerprint.plan
        assert check(point.plan, table()) == []
    last = found.points[-1].plan
    again = plan(make_request(last.request), table())
    assert again.canonical() == last.canonical()


def test_same_request_same_front(found: Front) -> None:
    again = front(request(constraints=FEW), table())
    assert [p.plan.canonical() for p in again.points] == [p.plan.canonical() for p in found.points]
    assert again.chosen == found.chosen


def test_out_of_time_returns_what_there_is() -> None:
    short = front(request(constraints=FEW), table(), time_limit=1e-3)
    assert not short.complete
    assert len(short.points) == 1


def test_without_a_stated_load() -> None:
    asked = request(workload={"isl": 1000, "osl": 200, "rate": "max"}, slo={}, constraints=FEW)
    made = front(asked, table())
    assert made.axes[0].key == "usd_per_million_tokens"
    assert len(made.points) > 2


class Stern:
    """A referee that accepts only fleets of at most so many GPUs, and cuts nothing that would help."""

    def __init__(self, gpus: int) -> None:
        self.gpus = gpus

    def judge(self, search: Search, fleet: Fleet) -> Judgement:
        within = fleet.gpus <= self.gpus
        failing = () if within else fleet.items
        verdict = Verdict(fleet.items, {}, within, 1.0 if within else 9.0, failing)
        return Judgement((verdict,), {"tpot_ms": {"mean": 1.0}})


def test_points_are_played(found: Front) -> None:
    least = sum(len(replica.gpus) for replica in found.points[0].plan.replicas())
    played = front(request(constraints=FEW), table(), referee=Stern(least))
    assert 1 <= len(played.points) <= len(found.points)
    assert all(point.plan.simulated for point in played.points)
    with pytest.raises(Infeasible, match="simulated"):
        front(request(constraints={**FEW, "tp": [1], "max_num_seqs": [32]}), table(), referee=Stern(0))


def test_infeasible_is_told() -> None:
    with pytest.raises(Infeasible):
        front(request(slo={"tpot_mean_ms": 0.01}, constraints=FEW), table(), time_limit=0.5)


def test_compile_and_the_bundle(tmp_path: Path) -> None:
    made: Plan = plan(request(objective="pareto", constraints=FEW), table())
    assert made in made.front
    bundle.write(made, tmp_path / "b")
    raw = json.loads((tmp_path / "b" / "front.json").read_text())
    assert raw["points"][raw["chosen"]]["plan"] == "plan.json"
    assert all((tmp_path / "b" / point["plan"]).is_file() for point in raw["points"])
    back = load_plan(tmp_path / "b")
    assert back.front == made.front
    assert back._evidence is not None
    bundle.write(back, tmp_path / "c")
    for file in ("plan.json", "front.json", "report.json", "report.html"):
        assert (tmp_path / "c" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    (tmp_path / "b" / "front.json").write_text("{")
    with pytest.raises(InvalidBundle, match="front"):
        load_plan(tmp_path / "b")


def test_points_of_whole_fleets(tmp_path: Path) -> None:
    """A front of two traffic classes has prefill and decode pools; every point is checked, has a bundle of
    its own, and is what its own request gives."""
    classes = [
        {"name": "chat", "isl": 500, "osl": 200, "weight": 0.75},
        {"name": "papers", "isl": 6000, "osl": 150, "weight": 0.25},
    ]
    few = {**FEW, "max_num_seqs": [96], "tp": [1, 2], "dp": [1]}
    asked = request(
        workload={"classes": classes, "request_rate": 6},
        inventory={"nodes": [{"gpu": "h100_sxm", "gpus_per_node": 4, "usd_per_gpu_hour": 2.5}]},
        slo={},
        constraints={key: value for key, value in few.items() if key != "serving"},
    )
    made = front(asked, table())
    roles = {pool.role for plan in made.plans for pool in plan.pools}
    assert roles == {"aggregated", "prefill", "decode"}
    for number, one in enumerate(made.plans):
        assert check(one, table(), asked) == []
        bundle.write(one, tmp_path / str(number))
        assert load_plan(tmp_path / str(number)) == one
    halves = next(p for p in made.plans if any(pool.role == "decode" for pool in p.pools))
    assert plan(make_request(halves.request), table()).canonical() == halves.canonical()
