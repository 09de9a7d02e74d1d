"""The search of `benchmarks/vs_aiconfigurator.py` on a made-up cost function: no aiconfigurator is needed."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def search() -> Iterator[Any]:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    yield importlib.import_module("vs_aiconfigurator_search")
    sys.path.remove(str(ROOT / "benchmarks"))


class Made:
    """Answers as the worker gives them: a TPOT of (4 + batch / 8) / tp^0.5 ms, and prefill workers of 2 tp
    requests/s; formats named fast are twice as fast."""

    def __init__(
        self, shapes: Sequence[Sequence[int]], *, same_tp: bool = False, halves: bool = True
    ) -> None:
        self.shapes = {"agg": shapes, "prefill": shapes, "decode": shapes, "experts": "", "same_tp": same_tp}
        self.halves, self.asked = halves, 0

    def ask(self, do: str, task: Any) -> dict[str, Any]:
        return self.shapes

    def estimate(self, each: Sequence[dict[str, Any]], *, anew: bool = False) -> list[dict[str, Any]]:
        self.asked += len(each)
        return [self._one(one) for one in each]

    def _one(self, one: dict[str, Any]) -> dict[str, Any]:
        fast = 2.0 if one.get("gemm_quant_mode") == "fast" else 1.0
        if one["mode"] == "agg":
            tp, batch = one["tp_size"], one["batch_size"]
            tpot = (4 + batch / 8) / tp**0.5 / fast
            good = {"ttft_ms": 100.0, "tpot_ms": tpot, "tokens_s": 700 * batch / tpot, "queues": batch > 300}
            return {**good, "prefill_s": 0.0, "decode_s": 0.0}
        if not self.halves or one["decode_batch_size"] > 300:
            return {"error": "OOM"}
        tpot = (4 + one["decode_batch_size"] / 8) / one["decode_tp_size"] ** 0.5 / fast
        return {
            "ttft_ms": 900.0 * one["prefill_batch_size"] / one["prefill_tp_size"],
            "tpot_ms": tpot,
            "tokens_s": 0.0,
            "prefill_s": 2.0 * one["prefill_tp_size"],
            "decode_s": one["decode_batch_size"] / tpot,
            "queues": False,
        }


DENSE = [[tp, 1, 1, 1, 1] for tp in (1, 2, 4)]


@pytest.mark.parametrize("edge", [1, 2, 9, 63, 64, 65, 300, 511, 512])
def test_the_largest_batch_within_limits_is_found(search: Any, edge: int) -> None:
    asked: list[int] = []

    def loads(batches: Sequence[int]) -> list[float]:
        asked.extend(batches)
        return [float(b) if b <= edge else 0.0 for b in batches]

    assert search.best_batch(loads, 1, 512) == (edge, edge)
    assert len(asked) == len(set(asked)) < 60


def test_a_batch_that_fills_its_last_step_is_found(search: Any) -> None:
    """Near where limits break, every batch is looked at: odd ones waste half a step here."""
    load, batch = search.best_batch(
        lambda batches: [b - 20.0 * (b % 2) if b <= 101 else 0.0 for b in batches], 1, 512
    )
    assert (load, batch) == (100.0, 100)


def test_nothing_within_limits(search: Any) -> None:
    assert search.best_batch(lambda batches: [0.0] * len(batches), 1, 512) == (0.0, 0)


def test_replicas_of_unlike_shapes_use_every_gpu(search: Any) -> None:
    task = search.Task("m", "s", 7, tpot_ms=5)
    menu = search.Menu(task, Made(DENSE, halves=False)).priced()
    fleet = menu.fleet(chunks=True, formats=True)
    assert fleet.status == "optimal"
    assert sum(count * choice.gpus for choice, count in fleet.items) == 7
    alone = max(task.gpus // choice.gpus * choice.load for choice in menu.choices if choice.role == "agg")
    assert fleet.tokens_s > alone
    assert search.confirmed(menu, fleet) == pytest.approx(fleet.tokens_s, rel=1e-5)


def test_every_choice_keeps_the_objectives(search: Any) -> None:
    task = search.Task("m", "s", 8, tpot_ms=12, ttft_ms=1000)
    menu = search.Menu(task, Made(DENSE)).priced()
    assert {choice.role for choice in menu.choices} == {"agg", "prefill", "decode"}
    for choice in menu.choices:
        (answer,) = menu.oracle.estimate([dict(choice.arguments)])
        if choice.role != "prefill":
            assert answer["tpot_ms"] <= 12
        if choice.role != "decode":
            assert answer["ttft_ms"] <= 1000
        assert not answer["queues"]


def test_more_freedom_is_never_worse(search: Any) -> None:
    task = search.Task("m", "s", 8, tpot_ms=12, formats={"fast": {"gemm_quant_mode": "fast"}})
    menu = search.Menu(task, Made(DENSE)).priced()
    fleets = [
        menu.fleet(chunks=False, formats=False),
        menu.fleet(chunks=True, formats=False),
        menu.fleet(chunks=True, formats=True),
    ]
    values = [fleet.tokens_s for fleet in fleets]
    assert values == sorted(values)
    assert values[2] > 1.5 * values[1]
    for fleet in fleets:
        assert len({choice.formats for choice, _ in fleet.items}) == 1
        assert search.confirmed(menu, fleet) == pytest.approx(fleet.tokens_s, rel=1e-5)


def test_halves_of_like_width_only_where_caches_ask_for_it(search: Any) -> None:
    task = search.Task("m", "s", 8, tpot_ms=9, ttft_ms=1000)
    menu = search.Menu(task, Made(DENSE, same_tp=True)).priced()
    menu.choices = [choice for choice in menu.choices if choice.role != "agg"]
    fleet = menu.fleet(chunks=True, formats=True)
    widths: dict[str, set[int]] = {"prefill": set(), "decode": set()}
    for choice, _ in fleet.items:
        widths[choice.role].add(choice.shape[0])
    assert widths["prefill"] == widths["decode"]


def test_engines_over_several_nodes_take_them_whole(search: Any) -> None:
    assert search.Task("m", "s", 20).islands == (8, 8, 4)
    menu = search.Menu(search.Task("m", "s", 20), Made([[16, 1, 1, 1, 1]], halves=False)).priced()
    fleet = menu.fleet(chunks=True, formats=True)
    assert [(choice.gpus, count) for choice, count in fleet.items] == [(16, 1)]


def test_a_row_of_theirs_is_priced_as_it_was_asked(search: Any) -> None:
    menu = search.Menu(search.Task("m", "s", 7), Made(DENSE)).priced()
    row = {
        "tp": 2,
        "pp": 1,
        "dp": 1,
        "moe_tp": 1,
        "moe_ep": 1,
        "bs": 8,
        "ctx_tokens": 4000,
        "num_total_gpus": 2,
    }
    assert search.repriced(menu, row) == pytest.approx(3 * 700 * 8 / (5 / 2**0.5))
