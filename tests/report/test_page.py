"""Reports in a real browser: everything is there, nothing is asked for, nothing overlaps or is cut."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from planc.codegen import report
from planc.planner.compile import plan
from planc.planner.plan import Plan
from tests.codegen.plans import plan as by_hand
from tests.codegen.plans import replica
from tests.planner.cases import raw, request, table
from tests.report.browser import Browser, Page, browser

PROGRAM = os.environ.get("PLANC_CHROMIUM", "")
SHOTS = os.environ.get("PLANC_SCREENSHOTS", "")
LAYOUT = (Path(__file__).parent / "layout.js").read_text()

pytestmark = pytest.mark.skipif(not PROGRAM, reason="needs Chromium: make test-report")

FEW = {"weights": ["bf16", "fp8"], "max_num_seqs": [32, 128], "max_num_batched_tokens": [2048]}


def chat() -> Plan:
    return plan(request(constraints={**FEW, "serving": ["aggregated"]}), table())


def mixed() -> Plan:
    """Two types of GPUs, more load than either carries alone."""
    nodes = [
        {"gpu": "l40s", "gpus_per_node": 4, "count": 3, "usd_per_gpu_hour": 1.0},
        {"gpu": "h100_sxm", "gpus_per_node": 8, "count": 1, "usd_per_gpu_hour": 4.0, "name": "big"},
    ]
    load = {"isl": 1000, "osl": 200, "request_rate": 60}
    limits = {**FEW, "serving": ["aggregated"], "pp": [1]}
    return plan(request(inventory={"nodes": nodes}, workload=load, constraints=limits), table())


def split() -> Plan:
    """Prefill and decode pools."""
    nodes = [{"gpu": "h100_sxm", "gpus_per_node": 8, "count": 2}]
    load = {"isl": 4000, "osl": 200, "request_rate": 20}
    limits = {**FEW, "serving": ["disaggregated"], "pp": [1]}
    return plan(request(inventory={"nodes": nodes}, workload=load, constraints=limits), table())


def sliced() -> Plan:
    """MIG slices."""
    nodes = [{"gpu": "h100_sxm:3g.40gb", "gpus_per_node": 16, "count": 2, "usd_per_gpu_hour": 1.0}]
    limits = {**FEW, "serving": ["aggregated"]}
    return plan(request(inventory={"nodes": nodes}, constraints=limits), table())


def spared() -> Plan:
    """One replica may fail."""
    limits = {**FEW, "serving": ["aggregated"], "spare_replicas": 1, "pp": [1]}
    load = {"isl": 1000, "osl": 200, "request_rate": 9}
    nodes = [{"gpu": "l40s", "gpus_per_node": 4, "count": 2, "usd_per_gpu_hour": 1.0}]
    return plan(request(inventory={"nodes": nodes}, workload=load, constraints=limits), table())


def front() -> Plan:
    return plan(request(objective="pareto", constraints={**FEW, "weights": ["fp8"], "pp": [1]}), table())


def classes() -> Plan:
    load = [
        {"name": "chat", "weight": 3, "isl": 500, "osl": 200, "slo": {"ttft_p99_ms": 2000}},
        {"name": "documents", "weight": 1, "isl": 6000, "osl": 300},
    ]
    body = raw(constraints={**FEW, "serving": ["aggregated"], "pp": [1]}, slo={"tpot_mean_ms": 60})
    body["workload"] = {"classes": load, "request_rate": 3}
    from planc.planner.request import make_request

    return plan(make_request(body), table())


def hostile() -> Plan:
    """Names that are long, and that would be markup."""
    name = "<b>bold</b>&\"'" + "x" * 150
    return by_hand(replica(gpus=["<img src=//a.example/x>/0"], weights="w" * 40), name=name)


PLANS = {f.__name__: cache(f) for f in (chat, mixed, split, sliced, spared, front, classes, hostile)}
SECTIONS = ("summary", "fleet", "memory", "predicted", "layers", "rejected", "proof", "coverage")
DRAWN = ("tradeoff", "time", "roofline", "latency", "objectives")


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with browser(PROGRAM) as found:
        yield found


@pytest.fixture(scope="module", params=sorted(PLANS))
def page_file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("report") / f"{request.param}.html"
    file.write_text(report.html(PLANS[request.param]()), encoding="utf-8")
    return file


@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_page(chromium: Browser, page_file: Path, width: int, dark: bool) -> None:
    page = Page(chromium, page_file, width, dark)
    if SHOTS:
        Path(SHOTS).mkdir(parents=True, exist_ok=True)
        page.screenshot(Path(SHOTS) / f"{page_file.stem}-{width}-{'dark' if dark else 'light'}.png")
    ids = page.run("[...document.querySelectorAll('[id]')].map(one => one.id)")
    assert set(SECTIONS) <= set(ids)
    if page_file.stem != "hostile":
        assert set(DRAWN) <= set(ids)
    assert page.requests == [page_file.as_uri()], "the page asks for something"
    assert page.complaints == []
    assert page.run(LAYOUT) == []
    assert page.run("document.scripts.length") == 0


def test_plots_are_drawn(chromium: Browser, page_file: Path) -> None:
    """Every plot has a size, marks inside it, and titles to hover over."""
    page = Page(chromium, page_file, 1280)
    plots = page.run(
        """[...document.querySelectorAll('figure.plot .canvas')].map(one => {
          const at = one.getBoundingClientRect();
          const marks = [...one.querySelectorAll('.mark')].map(mark => mark.getBoundingClientRect());
          return {
            wide: at.width, high: at.height, marks: marks.length,
            titled: one.querySelectorAll('.mark title').length,
            inside: marks.every(m => m.left > at.left - 20 && m.right < at.right + 20
              && m.top > at.top - 20 && m.bottom < at.bottom + 20),
          };
        })"""
    )
    assert len(plots) >= (1 if page_file.stem == "hostile" else 4)
    for plot in plots:
        assert plot["wide"] > 150
        assert plot["high"] > 150
        assert plot["marks"] == plot["titled"] > 0
        assert plot["inside"]


def test_gpus_are_pictured(chromium: Browser, page_file: Path) -> None:
    """As many coloured GPUs as the plan uses, identical nodes counted."""
    page = Page(chromium, page_file, 1280)
    shown = page.run(
        """[...document.querySelectorAll('.node')].map(one => {
          const times = one.querySelector('.times');
          const busy = one.querySelectorAll('.block:not(.idle) .gpus i').length;
          return (times ? +times.textContent.slice(1) : 1) * busy;
        }).reduce((sum, one) => sum + one, 0)"""
    )
    used = PLANS[page_file.stem]().replicas()
    assert shown == sum(len(one.gpus) for one in used)


def test_the_checks_find_faults(chromium: Browser, tmp_path: Path) -> None:
    """A page with every fault that the others are checked for."""
    file = tmp_path / "bad.html"
    file.write_text(
        """<!doctype html><meta charset=utf-8><meta name=viewport content="width=device-width">
        <img src="http://127.0.0.1:9/x.png"><p style="position:absolute;top:50px">one text here</p>
        <p style="position:absolute;top:54px">another</p>
        <p style="position:absolute;top:200px;left:380px;white-space:nowrap">beyond the edge</p>
        <p style="position:absolute;top:300px;width:40px;overflow:hidden;white-space:nowrap">cut in half</p>
        <p style="position:absolute;top:400px;color:#ccc">pale</p><script>console.error("no")</script>"""
    )
    page = Page(chromium, file, 400)
    told = " | ".join(page.run(LAYOUT))
    for fault in ("wide, not", "leaves the page", "overlap", "is cut", "contrast"):
        assert fault in told
    assert len(page.requests) == 2
    assert page.complaints


def test_replicas_that_may_fail_are_hatched(chromium: Browser, page_file: Path) -> None:
    page = Page(chromium, page_file, 1280)
    lost = page.run("document.querySelectorAll('.bar i.lost').length")
    assert lost == (1 if page_file.stem == "spared" else 0)
