"""Why two plans differ: parts add up exactly, either way round; walks avoid what cannot be."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planc.planner.counterfactual import Evaluator, Impossible, Outcome
from planc.planner.diff import PlanDiff, diff
from planc.planner.diff_attribution import UNSEEN, Attribution, attribution, shared_out
from planc.planner.diff_mixture import Decision, Mixture
from planc.planner.diff_table import sheet
from planc.planner.plan import Plan
from tests.planner.cases import planned, table

#: one change at a time, and several
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "fp8": {"constraints": {"weights": ["fp8"], "max_num_seqs": [32], "serving": ["aggregated"]}},
    "tp2": {"constraints": {"weights": ["fp8"], "tp": [2], "max_num_seqs": [32]}},
    "busy": {"workload": {"isl": 1000, "osl": 200, "request_rate": 12}},
    "cheap": {"inventory": {"nodes": [{"gpu": "l40s", "gpus_per_node": 4, "usd_per_gpu_hour": 0.5}]}},
    "h100": {"inventory": {"nodes": [{"gpu": "h100_sxm", "gpus_per_node": 2, "usd_per_gpu_hour": 3.0}]}},
    "halves": {
        "workload": {"isl": 2000, "osl": 200, "request_rate": 4},
        "constraints": {"weights": ["bf16"], "serving": ["disaggregated"]},
    },
    "users": {
        "inventory": {"nodes": [{"gpu": "h100_sxm", "gpus_per_node": 8, "usd_per_gpu_hour": 2.5}]},
        "workload": {"isl": 3000, "osl": 200, "concurrency": 90},
        "slo": {"ttft_mean_ms": 1500, "tpot_mean_ms": 12},
        "constraints": {"weights": ["fp8"], "tp": [1], "max_num_seqs": [64], "serving": ["disaggregated"]},
    },
    "most": {
        "objective": "max_goodput",
        "workload": {"isl": 1000, "osl": 200, "rate": "max"},
        "constraints": {"weights": ["fp8"], "serving": ["aggregated"]},
    },
}


@pytest.fixture(scope="module")
def plans() -> dict[str, Plan]:
    return {name: planned(**changes) for name, changes in VARIANTS.items()}


def add_up(found: Attribution) -> None:
    """To the last bit, in any order."""
    for metric in found.old:
        parts = [part.changes[metric] for part in found.parts]
        assert sum(parts) == sum(reversed(parts)) == found.new[metric] - found.old[metric]
    made = sheet(found, ("ttft_ms.p99",))
    for column in made.columns:
        assert column.old + sum(column.parts) == column.new


def part(found: Attribution, name: str) -> Any:
    return next(part for part in found.parts if name in [d.name for d in part.decisions])


# -- of plans ----------------------------------------------------------------------------


def test_plans_add_up_and_mirror(plans: dict[str, Plan]) -> None:
    for a, b in (
        ("plain", "busy"),
        ("busy", "h100"),
        ("tp2", "most"),
        ("plain", "halves"),
        ("fp8", "cheap"),
        ("users", "halves"),
    ):
        there, back = diff(plans[a], plans[b], table()), diff(plans[b], plans[a], table())
        assert there.attribution is not None, there.unattributed
        assert back == there.mirrored()
        assert there == back.mirrored()
        add_up(there.attribution)


def test_the_evaluator_reproduces_the_planner(plans: dict[str, Plan]) -> None:
    """Nothing is left over, prefill and decode pools, whose transfers are priced for any partner, aside."""
    for a, b in (("plain", "fp8"), ("plain", "most"), ("h100", "tp2"), ("users", "plain")):
        found = attribution(plans[a], plans[b], table())
        assert found.unseen is None, (a, b)
        assert found.old["ttft_ms"] == pytest.approx(plans[a].predicted["ttft_ms"].value, rel=1e-8)


def test_each_metric_goes_to_what_moved_it(plans: dict[str, Plan]) -> None:
    price = attribution(plans["plain"], plans["cheap"], table())
    assert [p.name for p in price.parts] == ["prices"]
    assert part(price, "prices").changes["usd_per_hour"] == -0.5
    assert part(price, "prices").changes["tpot_ms"] == 0.0
    cut = attribution(plans["fp8"], plans["tp2"], table())
    assert part(cut, "tp").changes["usd_per_hour"] == 1.0
    assert part(cut, "tp").changes["tpot_ms"] < 0
    more = attribution(plans["plain"], plans["busy"], table())
    assert part(more, "workload").changes["output_tok_s"] == pytest.approx(2000)
    assert part(more, "replicas").changes["usd_per_hour"] == 1.0


def test_a_smaller_fleet_waits_for_less_traffic(plans: dict[str, Plan]) -> None:
    """The overloaded fleet in between is never looked at."""
    less = attribution(plans["busy"], plans["fp8"], table())
    orders = [[name for group in walk for name in group] for walk in less.walks]
    assert orders[0].index("workload") < orders[0].index("replicas")
    assert orders[1].index("workload") > orders[1].index("replicas")
    assert part(less, "replicas").changes["ttft_ms"] > 0 > part(less, "workload").changes["ttft_ms"]


def test_formats_without_kernels_between_them_change_together(plans: dict[str, Plan]) -> None:
    found = attribution(plans["plain"], plans["fp8"], table())
    both = part(found, "weights")
    assert [d.name for d in both.decisions] == ["weights", "activations"]
    assert "no fp8 x bf16 kernels" in " ".join(both.reasons)
    assert both.text() == "weights: bf16 -> fp8; activations: bf16 -> fp8"


def test_pools_of_another_role_are_one_decision(plans: dict[str, Plan]) -> None:
    found = attribution(plans["plain"], plans["halves"], table())
    assert part(found, "pools").decisions[0].changes == (("", "aggregated", "decode + prefill"),)
    assert part(found, "pools").changes["usd_per_hour"] > 0


def test_speculation_and_caches_beyond_the_gpu() -> None:
    """Techniques are evaluated, too: drafts by the replica, caches by the machines."""
    load = {"isl": 3000, "osl": 200, "request_rate": 1, "prefix_hit_rate": 0.6, "prefix_tokens": 2e6}
    limits = {"weights": ["fp8"], "tp": [1], "pp": [1], "serving": ["aggregated"]}
    limits |= {"max_num_seqs": [32], "max_num_batched_tokens": [2048]}
    nodes = {"gpu": "l40s", "gpus_per_node": 4, "usd_per_gpu_hour": 1.0}
    machine = {**nodes, "host_memory_gib": 512}
    few = planned(workload=load, constraints=limits, inventory={"nodes": [nodes]})
    more = planned(workload=load, constraints=limits, inventory={"nodes": [machine]})
    found = attribution(few, more, table())
    assert part(found, "machines").decisions[0].changes == (("l40s caches", "none", "host 128 GiB"),)
    assert part(found, "machines").changes["ttft_ms"] < 0
    assert found.unseen is None
    draft = {"method": "ngram", "num_speculative_tokens": 3, "acceptance_rate": 0.8}
    replica = few.replicas()[0].model_copy(update={"speculative": draft})
    pool = few.pools[0].model_copy(update={"replicas": [replica]})
    faster = attribution(few, few.model_copy(update={"pools": [pool]}), table())
    assert part(faster, "speculative").changes["tpot_ms"] < 0
    assert faster.unseen is not None  # the document still says what it did without


def test_figures_that_the_evaluator_does_not_see(plans: dict[str, Plan]) -> None:
    one = plans["plain"]
    tpot = one.predicted["tpot_ms"]
    slower = one.predicted | {"tpot_ms": tpot.model_copy(update={"value": 1.5 * tpot.value})}
    print_ = one.fingerprint.model_copy(update={"profile": "another"})
    other = one.model_copy(update={"predicted": slower, "fingerprint": print_})
    found = attribution(one, other, table())
    assert [p.name for p in found.parts] == [UNSEEN]
    assert found.unseen is not None
    assert found.unseen.changes["tpot_ms"] == pytest.approx(0.5 * tpot.value)
    assert found.unseen.changes["ttft_ms"] == 0.0
    assert found.unseen.decisions[0].changes[0][0] == "profile"


def test_what_cannot_be_attributed_says_why(plans: dict[str, Plan]) -> None:
    a, b = plans["plain"], plans["fp8"]
    assert "cost table" in diff(a, b).unattributed
    other = b.model_copy(update={"model": b.model.model_copy(update={"name": "another"})})
    assert diff(a, other, table()).unattributed == "the plans serve different models"
    pool = b.pools[0]
    replica = pool.replicas[0].model_copy(update={"gpu_memory_utilization": 0.1})
    tight = b.model_copy(update={"pools": [pool.model_copy(update={"replicas": [replica]})]})
    assert "does not fit" in diff(a, tight, table()).unattributed
    assert diff(a, tight, table()).mirrored() == diff(tight, a, table())
    unread = a.model_copy(update={"request": {"model": "x"}})
    assert diff(unread, tight, table()).unattributed == diff(tight, unread, table()).unattributed != ""


def test_pools_of_their_own_for_traffic_classes(plans: dict[str, Plan]) -> None:
    """One pool for all requests against one for each class: engines move, classes keep their figures."""
    replica = plans["fp8"].replicas()[0]
    two = {
        "classes": [
            {"name": "chat", "isl": 500, "osl": 200, "weight": 3},
            {"name": "docs", "isl": 1500, "osl": 100, "weight": 1},
        ],
        "request_rate": 4,
    }

    def pool(first: int, count: int, share: float, *classes: str) -> Any:
        each = [
            replica.model_copy(update={"gpus": [f"node0/{first + i}"], "traffic_share": share / count})
            for i in range(count)
        ]
        return plans["fp8"].pools[0].model_copy(update={"classes": list(classes), "replicas": each})

    request = plans["fp8"].request | {"workload": two}
    predicted = plans["fp8"].predicted | {
        "requests_s": plans["fp8"].predicted["requests_s"].model_copy(update={"value": 4.0})
    }
    base = plans["fp8"].model_copy(update={"request": request, "predicted": predicted})
    shared = base.model_copy(update={"pools": [pool(0, 2, 1.0)]})
    apart = base.model_copy(update={"pools": [pool(0, 1, 0.75, "chat"), pool(1, 2, 0.25, "docs")]})
    there, back = diff(shared, apart, table()), diff(apart, shared, table())
    assert back == there.mirrored()
    assert there.attribution is not None, there.unattributed
    add_up(there.attribution)
    assert [pair.name for pair in there.pairs] == ["aggregated(all|chat)", "aggregated(docs)"]
    one = part(there.attribution, "pools")
    assert one.decisions[0].changes == (("", "aggregated", "aggregated (chat) + aggregated (docs)"),)
    assert one.changes["usd_per_hour"] + part(there.attribution, "replicas").changes["usd_per_hour"] == 1.0
    small = apart.pools[0].replicas[0].model_copy(update={"max_num_seqs": 16, "gpus": ["node0/3"]})
    halved = [r.model_copy(update={"traffic_share": 0.375}) for r in (apart.pools[0].replicas[0], small)]
    uneven = apart.pools[0].model_copy(update={"replicas": halved})
    grown = apart.model_copy(update={"pools": [uneven, apart.pools[1]]})
    mixed = diff(shared, grown, table())
    assert mixed.attribution is not None, mixed.unattributed
    assert diff(grown, shared, table()) == mixed.mirrored()
    busier = apart.model_copy(
        update={"request": request | {"workload": {**two, "classes": [two["classes"][0]]}}}
    )
    assert "docs" in diff(apart, busier, table()).unattributed


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("predicted", "requests_s", "value"), 1.0),  # less than is asked for
        (("predicted", "ttft_ms", "value"), float("nan")),
        (("pools", 0, "replicas", 0, "traffic_share"), 0.0),
        (("pools", 0, "replicas", 0, "gpu_memory_utilization"), 1e308),
        (("pools", 0, "replicas", 0, "gpus", 0), "elsewhere/0"),
        (("pools", 0, "replicas", 0, "tp"), -1),
        (("pools", 0, "replicas", 0, "kv"), "fp99"),
        (("request", "workload", "isl"), 10**9),
    ],
)
def test_documents_that_planc_never_wrote(path: tuple[Any, ...], value: Any, plans: dict[str, Plan]) -> None:
    """Compared all the same, alike in both directions; attributed where that is possible."""
    body = plans["plain"].model_dump(mode="json", by_alias=True)
    inner: Any = body
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    odd = Plan.model_validate(body)
    there, back = diff(plans["plain"], odd, table()), diff(odd, plans["plain"], table())
    assert there
    assert repr(back) == repr(there.mirrored())  # NaN is not equal to itself
    assert (there.attribution is None) == bool(there.unattributed) == (path[1] != "requests_s")
    if there.attribution is not None:
        carried = part(there.attribution, "workload").decisions[0].changes
        assert carried == (("carried", "all of it", "as much as objectives allow"),)


def test_a_thousand_replicas_are_a_few_kinds(plans: dict[str, Plan]) -> None:
    one = plans["plain"]
    replica = one.replicas()[0]
    nodes = {"nodes": [{"gpu": "l40s", "gpus_per_node": 4, "count": 400, "usd_per_gpu_hour": 1.0}]}

    def fleet(count: int, seats: int) -> Plan:
        same = [
            replica.model_copy(
                update={
                    "gpus": [f"node{i // 4}/{i % 4}"],
                    "traffic_share": 1 / count,
                    "max_num_seqs": seats if i % 2 else 32,
                }
            )
            for i in range(count)
        ]
        request = one.request | {
            "inventory": nodes,
            "workload": {"isl": 1000, "osl": 200, "request_rate": 900},
        }
        pool = one.pools[0].model_copy(update={"replicas": same})
        return one.model_copy(update={"pools": [pool], "request": request})

    found = diff(fleet(1000, 64), fleet(1200, 16), table())
    assert found.attribution is not None, found.unattributed
    assert len(found.pairs) == 2
    assert found.attribution.change("usd_per_hour") == 0  # the documents' own figures are one plan's
    assert part(found.attribution, "replicas").changes["usd_per_hour"] == 200
    assert part(found.attribution, "max_num_seqs").changes["usd_per_hour"] == 0


@settings(max_examples=4, deadline=None)
@given(st.integers(0, 10**6))
def test_random_plans_mirror(seed: int) -> None:
    """Plans that no search would choose, several kinds of replicas each."""
    draw = random.Random(seed)
    one, other = _shuffled(draw), _shuffled(draw)
    there, back = diff(one, other, table()), diff(other, one, table())
    assert back == there.mirrored()
    if there.attribution is not None:
        add_up(there.attribution)


def _shuffled(draw: random.Random) -> Plan:
    one = planned(**VARIANTS["fp8"])
    replica = one.replicas()[0]
    kinds = draw.randint(1, 2)
    shares = [draw.uniform(0.5, 1.0) for _ in range(kinds)]
    replicas, place = [], 0
    for share in shares:
        tp = draw.choice((1, 2))
        seats = draw.choice((16, 32, 64))
        number = draw.randint(1, 2)
        for _ in range(number):
            replicas.append(
                replica.model_copy(
                    update={
                        "tp": tp,
                        "gpus": [f"node0/{place + i}" for i in range(tp)],
                        "max_num_seqs": seats,
                        "traffic_share": share / number / sum(shares),
                    }
                )
            )
            place += tp
    price = draw.choice((1.0, 2.0))
    nodes = {"nodes": [{"gpu": "l40s", "gpus_per_node": 8, "usd_per_gpu_hour": price}]}
    load = {"isl": draw.choice((500, 1000)), "osl": 200, "request_rate": draw.choice((2, 5))}
    pool = one.pools[0].model_copy(update={"replicas": replicas})
    return one.model_copy(
        update={"pools": [pool], "request": one.request | {"inventory": nodes, "workload": load}}
    )


# -- of figures --------------------------------------------------------------------------


@settings(max_examples=60)
@given(st.integers(1, 5), st.integers(0, 10**6), st.floats(0, 0.7))
def test_any_figures_add_up_and_mirror(count: int, seed: int, gone: float) -> None:
    """Whatever the evaluator says, and whichever configurations cannot be."""
    draw = random.Random(seed)
    names = [f"d{i}" for i in range(count)]
    decisions = tuple(Decision(name, (("", "a", "b"),)) for name in names)
    states = [frozenset(s) for size in range(count + 1) for s in itertools.combinations(names, size)]
    scale = 10.0 ** draw.randint(-6, 9)
    figures = {s: {"x": scale * draw.random(), "y": draw.uniform(-1, 1)} for s in states}
    ends = frozenset[str](), frozenset(names)
    missing = {s for s in states if s not in ends and draw.random() < gone}
    poor = {s for s in states if draw.random() < 0.3}
    stated = tuple({n: v * draw.choice((1.0, 1.0, 1.3)) for n, v in figures[end].items()} for end in ends)

    def evaluate(state: frozenset[str]) -> Outcome:
        if state in missing:
            raise Impossible("missing")
        return Outcome(figures[state], state not in poor)

    def swapped(state: frozenset[str]) -> Outcome:
        return evaluate(ends[1] - state)

    mirrored = tuple(decision.mirrored() for decision in decisions)
    there = shared_out(decisions, evaluate, (stated[0], stated[1]), Decision("rest"))
    back = shared_out(mirrored, swapped, (stated[1], stated[0]), Decision("rest"))
    assert back == there.mirrored()
    for metric in there.old:
        assert sum(p.changes[metric] for p in there.parts) == there.new[metric] - there.old[metric]
    taken = [name for walk in there.walks[:1] for group in walk for name in group]
    assert sorted(taken) == names


def test_additive_figures_are_attributed_exactly() -> None:
    """Where decisions do not interact every order gives the same parts: what each does."""
    effects = {"a": 1.0, "b": -4.0, "c": 0.25}
    decisions = tuple(Decision(name) for name in effects)

    def evaluate(state: frozenset[str]) -> Outcome:
        return Outcome({"x": 16.0 + sum(effects[name] for name in state)}, True)

    found = shared_out(decisions, evaluate, ({"x": 16.0}, {"x": 13.25}), Decision("rest"))
    assert {p.name: p.changes["x"] for p in found.parts} == effects


def test_a_plan_and_itself() -> None:
    one = planned()
    assert diff(one, one, table()) == PlanDiff((), diff(one, one).pairs)
    assert Mixture(one, one).decisions == ()
    assert Evaluator(table()).outcome(*Mixture(one, one).at(frozenset())).meets
