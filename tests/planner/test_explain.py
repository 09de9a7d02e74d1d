"""Explanations: prices and ablations are differences of optima, alternatives lose for the stated reason."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import pytest

from planc.cost_model import catalogue
from planc.errors import InvalidField, PlancError, UnknownField, UnknownName
from planc.planner.accounts import gpu_time
from planc.planner.breakdown import bounds, breakdown
from planc.planner.check import check
from planc.planner.explain import Explanation, explain
from planc.planner.explain_ablation import ablations
from planc.planner.explain_prices import Price, prices
from planc.planner.explain_why_not import WhyNot, why_not
from planc.planner.loosen import constrained, with_load, with_objective
from planc.planner.request import Request, make_request
from planc.planner.search import Search
from planc.planner.traffic import traffic
from planc.planner.variations import Outcome, Resolver, Variation, hardware
from tests.planner.cases import Strict, planned, raw, table

LIMITS = {
    "weights": ["bf16", "fp8"],
    "max_num_seqs": [32, 128],
    "max_num_batched_tokens": [2048],
    "serving": ["aggregated"],
    "pp": [1],
}
#: two L40S cards or so hold the objectives, one does not
BUSY = {"workload": {"isl": 1000, "osl": 200, "request_rate": 12}, "constraints": LIMITS}


@cache
def asked(text: str = json.dumps(BUSY)) -> Resolver:
    found = Resolver(make_request(raw(**json.loads(text))), table())
    assert found.base is not None
    return found


def of(changes: dict[str, Any]) -> Resolver:
    return asked(json.dumps(changes))


def base(resolver: Resolver) -> Outcome:
    assert resolver.base is not None
    return resolver.base


def value(request: Request) -> float | None:
    """The optimum, found from scratch."""
    fleet = Search(request, table()).fleet()
    return None if fleet is None else fleet.solution.value


@cache
def priced() -> dict[str, Price]:
    return {price.name: price for price in prices(asked(), base(asked()))}


# -- variations ----------------------------------------------------------------------------

REQUEST = make_request(raw(**BUSY))
VARIED = {
    "objective": with_objective(REQUEST, "tpot_mean_ms", 35.0),
    "no objective": with_objective(REQUEST, "ttft_p99_ms", 1e9),
    "load": REQUEST.changed(workload=with_load(REQUEST.workload, 2.5, False)),
    "load and objective": with_objective(
        REQUEST.changed(workload=with_load(REQUEST.workload, 9.0, False)), "tpot_mean_ms", 90.0
    ),
    "limit of the fleet": constrained(REQUEST, max_replicas=1),
    "limit of engines": constrained(REQUEST, tp=[2]),
}


@pytest.mark.parametrize("name", VARIED)
def test_a_variation_has_the_optimum_of_its_request(name: str) -> None:
    found = asked().solve(Variation(VARIED[name]))
    assert (found.value if found else None) == pytest.approx(value(VARIED[name]))


def test_more_memory_holds_for_the_variation_alone() -> None:
    before = catalogue.gpu("l40s").memory_gib
    with hardware(Variation(REQUEST, {"l40s": 4.0})):
        assert catalogue.gpu("l40s").memory_gib == before + 4.0
        assert catalogue.gpu("h100_sxm").memory_gib < before * 4
    assert catalogue.gpu("l40s").memory_gib == before
    plain = asked().solve(Variation(REQUEST))
    more = asked().solve(Variation(REQUEST, {"l40s": 4.0}))
    assert plain is not None
    assert more is not None
    room = [max(r.memory.kv_cache_gib for r in found.plan.replicas()) for found in (plain, more)]
    assert room[1] == pytest.approx(room[0] + 4.0 * 0.92, abs=0.4)


def test_all_that_is_compared_is_judged_alike() -> None:
    """A referee that halves what engines carry: every fleet keeps to it, and costs more than formulas say."""
    strict = Strict(0.6)
    resolver = Resolver(REQUEST, table(), referee=strict)
    judged = [resolver.base, *(resolver.solve(Variation(VARIED[name])) for name in ("objective", "load"))]
    for found in judged:
        assert found is not None
        assert strict.judge(found.search, found.fleet).accepted
        by_formulas = value(found.variation.request)
        assert by_formulas is not None
        assert found.value >= by_formulas - 1e-9
    assert base(resolver).value > base(asked()).value


def test_what_was_cut_under_other_objectives_is_free_again() -> None:
    resolver = Resolver(REQUEST, table(), referee=Strict(0.6))
    cut = set(base(resolver).search.cuts)
    assert cut
    same = resolver.search(Variation(VARIED["load"]))
    looser = resolver.search(Variation(VARIED["objective"]))
    assert same is not None
    assert looser is not None
    for search, kept in ((same, True), (looser, False)):
        held = {s.key(engine) for s in search.streams for engine in s.bench.engines}
        assert bool(held & cut) == kept


# -- prices --------------------------------------------------------------------------------


def test_every_stated_constraint_is_priced() -> None:
    names = set(priced())
    assert {"workload.request_rate", "slo.tpot_mean_ms", "slo.ttft_p99_ms"} <= names
    assert {f"constraints.{name}" for name in LIMITS} <= names
    assert {"inventory.nodes[0].count", "inventory: single l40s", "memory of each l40s"} <= names


def test_prices_are_differences_of_optima() -> None:
    whole = base(asked()).value
    for name, change in (("workload.request_rate", "load"), ("slo.tpot_mean_ms", "slo")):
        price = priced()[name]
        assert price.stated is not None
        for step, shown, sign in ((price.step, price.looser, -1.0), (-price.step, price.tighter, 1.0)):
            at = price.stated + step
            varied = (
                REQUEST.changed(workload=with_load(REQUEST.workload, at, False))
                if change == "load"
                else with_objective(REQUEST, "tpot_mean_ms", at)
            )
            best = value(varied)
            assert best is not None
            assert sign * (best - whole) == pytest.approx(shown, abs=1e-6)


def test_the_first_value_that_pays_pays_and_the_stated_one_does_not() -> None:
    whole = base(asked()).value
    price = priced()["workload.request_rate"]
    assert price.verdict == "limits"
    assert price.pays_at is not None
    assert price.stated is not None
    assert price.pays_at < price.stated
    less = value(REQUEST.changed(workload=with_load(REQUEST.workload, price.pays_at, False)))
    assert less is not None
    assert whole - less == pytest.approx(price.pays)
    nearly = value(REQUEST.changed(workload=with_load(REQUEST.workload, price.pays_at * 1.1, False)))
    assert nearly == pytest.approx(whole)


def test_what_is_slack_gains_nothing_when_left_out() -> None:
    slack = [price for price in priced().values() if price.verdict == "slack"]
    assert slack
    assert all(not price.without and not price.looser for price in slack)


def test_the_marginal_of_the_load_is_that_of_the_cheapest_capacity() -> None:
    """Divisible engines carry the load at the best price per request/s: 1 % less saves 1 % of the bound."""
    price = priced()["workload.request_rate"]
    assert price.marginal is not None
    best = min(column.weight / column.load for _, column in base(asked()).search.rough())
    assert price.marginal == pytest.approx(0.12 * best, rel=1e-3)
    assert price.looser == 0


def test_a_cap_that_costs_goodput_binds() -> None:
    capped = {
        "workload": {"isl": 1000, "osl": 200, "request_rate": "max"},
        "objective": "max_goodput",
        "constraints": {**LIMITS, "max_gpus": 2},
    }
    found = {price.name: price for price in prices(of(capped), base(of(capped)))}
    price = found["constraints.max_gpus"]
    assert price.verdict == "binds"
    assert price.reached == 2
    more = value(make_request(raw(**{**capped, "constraints": {**LIMITS, "max_gpus": 3}})))
    assert more is not None
    assert price.looser == pytest.approx(more - base(of(capped)).value)
    assert found["inventory.nodes[0].count"].verdict == "slack"


# -- decisions -----------------------------------------------------------------------------


def test_an_ablation_is_the_optimum_without_the_decision() -> None:
    found = {a.decision: a for a in ablations(asked(), base(asked()))}
    whole = base(asked()).value
    fp8 = found["weights=fp8"]
    best = value(constrained(REQUEST, weights=["bf16"], activations=None))
    assert best is not None
    assert fp8.loss == pytest.approx(best - whole)
    assert "bf16/bf16" in fp8.fleet
    assert all(a.tried and (a.loss is None or a.loss >= 0) for a in found.values())
    assert all(set(a.metrics) or a.reason for a in found.values())
    assert any(name.startswith("fusion ") for name in found)


def test_a_plan_of_defaults_has_no_formats_to_take_back() -> None:
    plain = {"constraints": {**LIMITS, "weights": ["bf16"], "max_gpus": 2}}
    names = [a.decision for a in ablations(of(plain), base(of(plain)))]
    assert not any(name.startswith(("weights", "kv", "activations")) for name in names)


# -- alternatives --------------------------------------------------------------------------

#: what is asked, verdict, words of the reason
ALTERNATIVES: list[tuple[str, str, str]] = [
    ("tp=3", "illegal", "do not divide by 3"),
    ("tp=8", "illegal", "NVLink domain"),
    ("ep=2", "illegal", "no routed experts"),
    ("weights=fp8,tp=1", "chosen", "already"),
    ("weights=bf16", "worse", "costs more"),
    ("tp=2", "worse", "costs more"),
    ("max_num_seqs=8", "capacity", "with more nodes"),
    ("tp=1,gpu_memory_utilization=0.2", "memory", "lacks"),
    ("replicas=1", "objectives", ""),
    ("replicas=40", "illegal", "the inventory holds"),
]


@cache
def answer(text: str) -> WhyNot:
    return why_not(asked(), base(asked()), text)


@pytest.mark.parametrize(("text", "verdict", "words"), ALTERNATIVES, ids=[a[0] for a in ALTERNATIVES])
def test_an_alternative_is_sunk_by(text: str, verdict: str, words: str) -> None:
    found = answer(text)
    assert found.verdict == verdict, found
    assert words in found.reason
    json.dumps(found.to_json())


def test_a_dearer_alternative_shows_what_it_takes_more_of() -> None:
    found = answer("tp=2")
    assert found.value is not None
    assert found.plan_value is not None
    assert found.value > found.plan_value
    assert found.metrics["usd_per_hour"] == pytest.approx(found.value)
    assert {term.name for term in found.terms} >= {"GPUs"}
    assert all(term.change > 0 for term in found.terms if term.unit == "GPU-ms per token")
    assert any("all-reduce" in term.name for term in found.terms)


def test_an_objective_that_cannot_be_met_says_by_how_much() -> None:
    tight = {**BUSY, "slo": {"tpot_mean_ms": 18}}
    found = why_not(of(tight), base(of(tight)), "weights=bf16,tp=1")
    assert found.verdict == "objectives"
    key, best, limit = found.missed[0]
    assert (key, limit) == ("tpot_mean_ms", 18)
    assert best > limit


def test_what_the_request_forbids_is_evaluated_and_said() -> None:
    found = answer("kv=fp8")
    assert found.forbidden
    assert found.fleet
    assert answer("weights=w4a16").forbidden == ("constraints.weights is bf16, fp8",)


@pytest.mark.parametrize(
    ("text", "error", "words"),
    [
        ("tp", InvalidField, "NAME=VALUE"),
        ("tp=zero", InvalidField, "whole number"),
        ("shards=2", UnknownField, "Known: tp"),
        ("weights=fp7", UnknownName, "fp8"),
        ("gpu=h200_sxm", InvalidField, "not in the inventory"),
        ("gpu=h2000", UnknownName, "h200"),
        ("serving=mixed", InvalidField, "disaggregated"),
    ],
)
def test_what_cannot_be_named(text: str, error: type[PlancError], words: str) -> None:
    with pytest.raises(error, match=words):
        why_not(asked(), base(asked()), text)


# -- time and memory -----------------------------------------------------------------------


def test_shares_of_a_step_sum_to_one_and_peaks_are_not_exceeded() -> None:
    rows = breakdown(planned(), table())
    for shares in bounds(rows).values():
        assert sum(share for name, share in shares.items() if name != "ms") == pytest.approx(1.0)
    worked = [row for row in rows if row.get("flops")]
    assert worked
    assert all(0 < row["peak_compute"] < 1.1 for row in worked if row["bound"] == "compute")
    assert all(0 < row["peak_bandwidth"] < 1.2 for row in worked if row["bound"] == "memory")


def test_gpu_time_adds_up_to_gpus_over_throughput() -> None:
    plan = planned()
    request = make_request(plan.request)
    found = gpu_time(plan, table(), request, traffic(request, "causal_lm"))
    gpus = sum(len(replica.gpus) for replica in plan.replicas())
    assert sum(found.values()) == pytest.approx(1e3 * gpus / plan.predicted["output_tok_s"].value)
    assert found["decode: linear layers"] > found["decode: norms and other pointwise"] > 0


# -- all of it -----------------------------------------------------------------------------


def explained(**choices: Any) -> Explanation:
    return explain(base(asked()).plan, table(), request=REQUEST, **choices)


def test_no_time_is_said_and_leaves_the_breakdown() -> None:
    found = explained(time_limit=1e-9)
    assert not found.complete
    assert all(price.verdict == "not tried" for price in found.prices)
    assert not any(ablation.tried for ablation in found.ablations)
    assert found.engines
    assert found.engines[0].count == len(base(asked()).plan.replicas())
    assert any("time ran out" in note for note in found.notes)


def test_an_alternative_alone() -> None:
    found = explained(alternative="tp=3")
    assert found.why_not is not None
    assert found.why_not.verdict == "illegal"
    assert not found.prices
    assert found.complete
    assert not found.simulated
    assert any("formulas alone" in note for note in found.notes)
    body = json.dumps(found.to_json(), sort_keys=True)
    assert body == json.dumps(explained(alternative="tp=3").to_json(), sort_keys=True)


def test_outcomes_are_plans() -> None:
    assert check(base(asked()).plan, table(), REQUEST) == []
