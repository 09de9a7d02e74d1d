"""The page of a diff in a real browser: nothing is asked for, nothing overlaps or is cut, bars are drawn."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

from planc.codegen.diff_page import html
from planc.planner.diff import diff
from planc.planner.plan import Plan
from tests.planner.cases import planned, table
from tests.report.browser import Browser, Page, browser

PROGRAM = os.environ.get("PLANC_CHROMIUM", "")
SHOTS = os.environ.get("PLANC_SCREENSHOTS", "")
LAYOUT = (Path(__file__).parent / "layout.js").read_text()

pytestmark = pytest.mark.skipif(not PROGRAM, reason="needs Chromium: make test-report")


def few() -> tuple[Plan, Plan]:
    return planned(), planned(constraints={"weights": ["fp8"], "tp": [2], "max_num_seqs": [32]})


def pools() -> tuple[Plan, Plan]:
    """Other traffic, other prices, other roles."""
    nodes = {"nodes": [{"gpu": "l40s", "gpus_per_node": 4, "usd_per_gpu_hour": 0.8}]}
    load = {"isl": 2000, "osl": 200, "request_rate": 4}
    limits = {"weights": ["fp8"], "serving": ["disaggregated"]}
    return planned(), planned(workload=load, inventory=nodes, constraints=limits)


def strange() -> tuple[Plan, Plan]:
    """Nothing that can be attributed, and long names."""
    one, other = few()
    name = "<b>bold</b>&\"'" + "x" * 150
    return one, other.model_copy(update={"model": other.model.model_copy(update={"name": name})})


PAIRS: dict[str, Callable[[], tuple[Plan, Plan]]] = {f.__name__: cache(f) for f in (few, pools, strange)}


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with browser(PROGRAM) as found:
        yield found


@pytest.fixture(scope="module", params=sorted(PAIRS))
def page_file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("diff") / f"diff-{request.param}.html"
    pair = PAIRS[request.param]()
    file.write_text(html(*pair, diff(*pair, table())), encoding="utf-8")
    return file


@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_page(chromium: Browser, page_file: Path, width: int, dark: bool) -> None:
    page = Page(chromium, page_file, width, dark)
    if SHOTS:
        Path(SHOTS).mkdir(parents=True, exist_ok=True)
        page.screenshot(Path(SHOTS) / f"{page_file.stem}-{width}-{'dark' if dark else 'light'}.png")
    assert page.requests == [page_file.as_uri()], "the page asks for something"
    assert page.complaints == []
    assert page.run(LAYOUT) == []
    assert page.run("document.scripts.length") == 0
    bars = page.run(
        "[...document.querySelectorAll('.fall rect')].map(one => one.getBoundingClientRect().width)"
    )
    assert all(width > 0 for width in bars)
    assert bool(bars) == (page_file.stem != "diff-strange")
