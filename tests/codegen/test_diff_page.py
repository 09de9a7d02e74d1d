"""The page of a diff: whole, self-contained, escaped, and adding up."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest

from planc.codegen.diff_page import html, waterfalls
from planc.planner.diff import PlanDiff, diff
from planc.planner.diff_table import sheet
from planc.planner.plan import Plan
from tests.planner.cases import planned, table

_VOID = {"meta", "br", "line", "rect"}


class _Reader(HTMLParser):
    """Collects text and checks that elements are closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.tags: set[str] = set()
        self.words = ""

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.links += [str(value) for name, value in attributes if name in ("src", "href")]
        if tag not in _VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in _VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data


def read(page: str) -> _Reader:
    reader = _Reader()
    reader.feed(page)
    assert not reader.open
    return reader


@pytest.fixture(scope="module")
def plans() -> tuple[Plan, Plan]:
    fast = planned(constraints={"weights": ["fp8"], "tp": [2], "max_num_seqs": [32]})
    return planned(), fast


@pytest.fixture(scope="module")
def found(plans: tuple[Plan, Plan]) -> PlanDiff:
    return diff(*plans, table())


def test_nothing_is_fetched_or_run(plans: tuple[Plan, Plan], found: PlanDiff) -> None:
    page = html(*plans, found)
    reader = read(page)
    assert not reader.links
    assert not {"script", "link", "img", "iframe"} & reader.tags
    assert "url(" not in page
    assert "://" not in page
    assert html(*plans, found) == page


def test_every_decision_and_metric_is_there(plans: tuple[Plan, Plan], found: PlanDiff) -> None:
    words = read(html(*plans, found)).words
    for text in (
        "tp: 1 → 2",
        "weights: bf16 → fp8",
        "Time per output token",
        "Price per hour",
        "What changed",
    ):
        assert text in words
    assert "1 x vllm on 2 l40s tp=2, fp8/fp8/bf16" in words


def test_bars_meet(plans: tuple[Plan, Plan], found: PlanDiff) -> None:
    assert found.attribution is not None
    made = sheet(found.attribution)
    for fall in waterfalls(made):
        ends = [bar.end for bar in fall.bars]
        assert all(0 <= end <= 100 for end in ends)
        assert ends[-1] == pytest.approx(ends[-2], abs=1e-6)
        for before, bar in zip(fall.bars, fall.bars[1:-1], strict=False):
            low, high = bar.left, bar.left + bar.width
            assert min(abs(before.end - low), abs(before.end - high)) < 0.31
    price = next(fall for fall in waterfalls(made) if fall.title == "Price per hour")
    assert [bar.text for bar in price.bars] == ["1.000", "+1.000", "2.000"]
    assert price.bars[1].tone == "bad"


def test_texts_of_plans_are_escaped(plans: tuple[Plan, Plan]) -> None:
    one, other = plans
    named = other.model.model_copy(update={"name": "<script>alert(1)</script>"})
    evil = other.model_copy(update={"model": named})
    page = html(one, evil, diff(one, evil, table()))
    assert "script" not in read(page).tags
    assert "different models" in page


def test_plans_without_difference_or_table(plans: tuple[Plan, Plan]) -> None:
    one, other = plans
    assert "do not differ" in html(one, one, diff(one, one))
    words = read(html(one, other, diff(one, other, without="there is no model"))).words
    assert re.search(r"not shared out among decisions: there is no model", words)
    assert "What changed" in words
