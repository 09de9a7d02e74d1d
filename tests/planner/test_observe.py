"""Evidence: what is said of a plan besides its decisions adds up, and is no part of the plan."""

from __future__ import annotations

import pytest

from planc.planner.evidence import Evidence
from planc.planner.plan import Plan
from tests.planner.cases import planned


def of(plan: Plan) -> Evidence:
    assert plan._evidence is not None
    return plan._evidence


@pytest.fixture(scope="module")
def plan() -> Plan:
    return planned(constraints={"weights": ["bf16", "fp8"], "max_num_seqs": [32], "pp": [1]})


def test_steps_are_taken_apart_whole(plan: Plan) -> None:
    steps = {step.phase: step for step in of(plan).steps}
    assert set(steps) == {"prefill", "decode"}
    for step in steps.values():
        assert step.ms == pytest.approx(sum(op.ms for op in step.ops))
    # a step of the sequences that run is what a token takes, but for the stalls of prompts
    assert 0.7 < steps["decode"].ms / plan.predicted["tpot_ms"].value < 1.1


def test_ops_stay_below_their_roofs(plan: Plan) -> None:
    """Products and attention, which cannot be left in a cache."""
    (roof,) = of(plan).roofs
    for step in of(plan).steps:
        for op in step.ops:
            if op.flops > 1e9:
                peak = min(roof.flops_s[op.precision], op.flops / op.nbytes * roof.bytes_s)
                assert op.flops / (op.ms / 1e3) <= 1.1 * peak, op


def test_curves_pass_through_the_plans_percentiles(plan: Plan) -> None:
    curves = {curve.metric: curve for curve in of(plan).latency}
    assert set(curves) == {"ttft", "tpot", "e2e"}
    for metric, curve in curves.items():
        assert curve.ms == sorted(curve.ms)
        at = dict(zip(curve.levels, curve.ms, strict=True))
        stated = plan.predicted[f"{metric}_ms"].percentiles
        assert at[0.5] == pytest.approx(stated["p50"])
        assert at[0.99] == pytest.approx(stated["p99"])


def test_no_fleet_that_was_seen_is_cheaper(plan: Plan) -> None:
    """A plan for least cost: whatever of one kind meets the objectives costs as much at least."""
    seen = of(plan).seen
    assert any(one.meets for one in seen)
    assert min(one.values["usd_per_hour"] for one in seen if one.meets) >= plan.solver.value * (1 - 1e-9)


def test_evidence_is_no_part_of_the_plan(plan: Plan) -> None:
    bare = plan.model_copy()
    bare._evidence = None
    assert bare == plan
    assert bare.sealed().fingerprint == plan.fingerprint
    assert Evidence.model_validate_json(of(plan).canonical()).canonical() == of(plan).canonical()
