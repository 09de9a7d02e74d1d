"""The report: one escaped page whose drawings are to scale."""

from __future__ import annotations

import math
from html.parser import HTMLParser
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planc.codegen import report
from planc.codegen.report import draw, fleet, latency, objectives, palette, steps, summary, tradeoff
from planc.codegen.report.spares import spares
from planc.planner.evidence import Curve, Evidence, Op, Roof, Seen, Step
from planc.planner.front import Axis, Front, Point
from planc.planner.plan import Plan, Pool
from tests.codegen.plans import memory, plan, replica


class Tags(HTMLParser):
    """Balanced tags, which there are, and the page's text."""

    void = frozenset({"meta", "br", "img", "link", "rect", "line", "polyline", "path"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.text: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)
        found = dict(attrs)
        self.ids += [found["id"]] if found.get("id") else []  # type: ignore[list-item]
        self.links += [str(found["href"])] if "href" in found else []
        if tag not in self.void or tag in ("path", "polyline"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def op(**changes: Any) -> Op:
    parts: dict[str, Any] = {
        "layer_class": "decoder",
        "site": "mlp.down_proj",
        "op": "aten::linear",
        "ms": 3.0,
        "bound": "memory",
        "source": "measured",
        "flops": 3e11,
        "nbytes": 1e10,
        "precision": "bf16",
    }
    return Op(**(parts | changes))


def evidence(gpu: str = "h200_sxm") -> Evidence:
    ops = [
        op(),
        op(site="self_attn", op="planc::paged_attention", ms=5.0, flops=2e10),
        op(site="self_attn.o_proj", op="all_reduce", ms=1.0, bound="link", flops=0, nbytes=0, precision=""),
        op(layer_class="step", site="", op="host and hand-over", ms=1.0, bound="launch", flops=0, nbytes=0),
    ]
    return Evidence(
        steps=[
            Step(role="aggregated", engine="1 x h200_sxm", gpu=gpu, phase="decode", load="16", ms=10, ops=ops)
        ],
        roofs=[Roof(gpu=gpu, bytes_s=4.8e12, flops_s={"bf16": 989e12, "fp8": 1979e12})],
        latency=[Curve(metric="tpot", of="all requests", levels=[0.1, 0.5, 0.99], ms=[15.0, 20.0, 40.0])],
        seen=[
            Seen(label=f"{n} x h100", values={"tpot_ms": 60.0 / n, "usd_per_hour": 2.0 * n}, meets=n > 1)
            for n in (1, 2, 3, 4)
        ],
    )


def shown(made: Plan, *, with_evidence: bool = True) -> Plan:
    if with_evidence:
        made._evidence = evidence()
    return made


REQUEST = {
    "model": "model.json",
    "inventory": {"nodes": [{"gpu": "h200_sxm", "gpus_per_node": 8, "count": 3}]},
    "workload": {"isl": 100, "osl": 10, "request_rate": 1},
    "slo": {"tpot_mean_ms": 25, "ttft_p99_ms": 800},
}


def test_one_escaped_page() -> None:
    name = "<script>alert(1)</script>\"'&"
    made = shown(plan(replica(gpus=["<img src=x>/0"]), name=name, request={"slo": {"tpot_mean_ms": 1}}))
    page = report.html(made)
    tags = Tags(page)
    assert tags.open == []
    assert not tags.seen & {"script", "img", "link", "iframe", "object", "a:http"}
    assert all(link.startswith("#") for link in tags.links)
    text = "".join(tags.text)
    assert name in text
    for words in ("tp=2", "memory: 150 GiB of 126", "host overhead of sampling", "roofline", "KV cache"):
        assert words in text
    assert "http" not in page.replace("http-equiv", "")


def test_every_link_of_the_page_leads_somewhere() -> None:
    for made in (shown(plan()), shown(plan(), with_evidence=False)):
        tags = Tags(report.html(made))
        assert {link.removeprefix("#") for link in tags.links} <= set(tags.ids)
        assert len(tags.ids) == len(set(tags.ids))


def test_same_plan_same_page() -> None:
    assert report.html(shown(plan())) == report.html(shown(plan()))


# -- parts ---------------------------------------------------------------------------------


def test_memory_bar_is_to_scale() -> None:
    parts = fleet.slices(memory(weights_gib=70.0, capacity_gib=140.0, graphs_gib=0.0))
    shares = {part.name: part.percent for part in parts}
    assert shares["weights"] == 50.0
    assert "CUDA graphs" not in shares


def test_bands_are_drawn_to_scale() -> None:
    band = next(b for b in summary.bands(plan()) if b.title == "Time per output token")
    assert band.mark == pytest.approx(100 * 21 / 27, abs=0.01)
    assert band.left == pytest.approx(100 * 17 / 27, abs=0.01)
    assert band.left + band.width == pytest.approx(100, abs=0.02)


def test_objectives_say_what_is_missed() -> None:
    found = {goal.name: goal for goal in objectives.objectives(plan(request=REQUEST))}
    assert found["TPOT mean"].met
    assert not found["TTFT p99"].met  # 900 of 800 ms
    assert found["TPOT mean"].fill < found["TPOT mean"].mark


def test_bars_of_a_step_are_whole() -> None:
    (view,) = steps.views(evidence())
    for bar in view.bars:
        assert sum(part.percent for part in bar.parts) == pytest.approx(100, abs=0.01)
    assert {part.name for part in view.bars[0].parts} == {
        "attention",
        "MLP",
        "communication",
        "host and hand-over",
    }
    assert view.rows[0].op.op == "planc::paged_attention"


def test_an_op_under_the_roofline_is_where_it_should_be() -> None:
    (roof,) = steps.rooflines(evidence())
    assert len(roof.plot.marks) == 2  # what does no arithmetic is not there
    (view,) = steps.views(evidence())
    row = next(row for row in view.rows if row.op.site == "mlp.down_proj")
    assert row.intensity == pytest.approx(30)
    assert row.tflops == pytest.approx(100)
    assert row.roof == pytest.approx(100 * 100 / (30 * 4.8), rel=1e-6)
    line = roof.plot.lines[0]
    assert line.points[0][0] < line.points[1][0] < line.points[2][0] == 100


@pytest.mark.parametrize(
    ("site", "name", "kind"),
    [
        ("self_attn.q_proj+self_attn.k_proj", "aten::linear", "attention projections"),
        ("mlp.experts", "planc::experts", "experts"),
        ("lm_head", "aten::linear", "LM head"),
        ("input_layernorm", "planc::rms_norm", "norms, activations, copies"),
        ("stem.0", "aten::conv2d", "matrix products"),
    ],
)
def test_kinds_of_work(site: str, name: str, kind: str) -> None:
    assert palette.work("decoder", site, name, "memory") == kind


def test_nodes_that_look_alike_are_one_picture() -> None:
    twins = [replica(tp=4, gpus=[f"node{n}/{4 * h + i}" for i in range(4)]) for n in (0, 1) for h in (0, 1)]
    made = plan(*twins, request=REQUEST)
    (group,) = fleet.placement(made, fleet.kinds(made))
    assert [(node.names, node.count) for node in group.nodes] == [("node0 – node1", 2), ("node2", 1)]
    assert [len(block.gpus) for block in group.nodes[0].blocks] == [4, 4]
    assert group.nodes[1].blocks[0].kind is None
    assert (group.used, group.gpus) == (16, 24)


def test_roles_have_colours_of_their_own() -> None:
    pools = [
        Pool(role="prefill", replicas=[replica(), replica(tp=2)]),
        Pool(role="decode", replicas=[replica()]),
    ]
    found = fleet.kinds(plan(pools=pools))
    assert len({kind.colour for kind in found}) == 3


def test_a_replica_over_several_nodes_says_so() -> None:
    long = replica(tp=8, pp=2, gpus=[f"node{n}/{i}" for n in (0, 1) for i in range(8)])
    made = plan(long, request=REQUEST)
    (group,) = fleet.placement(made, fleet.kinds(made))
    assert "8 of 16 GPUs" in group.nodes[0].blocks[0].caption


def test_the_largest_replicas_are_the_spare_ones() -> None:
    shares = (0.5, 0.2, 0.3)
    members = [replica(traffic_share=one, gpus=[f"node0/{i}"]) for i, one in enumerate(shares)]
    pools = [Pool(role="aggregated", replicas=members)]
    made = plan(replica()).model_copy(update={"pools": pools})
    assert spares(made, fleet.kinds(made)) == []
    asked = made.model_copy(update={"request": {**made.request, "constraints": {"spare_replicas": 1}}})
    (found,) = spares(asked, fleet.kinds(asked))
    assert (found.count, found.whole, found.more) == (1, 3, 200.0)
    assert [block.lost for block in found.blocks] == [True, False, False]
    assert [block.percent for block in found.blocks] == pytest.approx([50, 30, 20])
    assert "Replicas that may fail" in report.html(asked)


def test_percentiles_of_the_plan_are_drawn_without_evidence() -> None:
    found = latency.distributions(plan(request=REQUEST), None)
    assert [one.title for one in found] == ["Time to first token"]
    assert "p99 limit 800 ms" in found[0].limits


def test_what_the_search_saw() -> None:
    parts = plan().predicted | {"usd_per_hour": plan().predicted["tpot_ms"].model_copy(update={"value": 4.0})}
    plot = tradeoff.of_search(plan(request=REQUEST, predicted=parts), evidence())
    assert plot is not None
    assert sum(mark.shape == "diamond" for mark in plot.marks) == 1
    assert plot.marks[-1].shape == "star"


def test_a_front_is_a_table_and_plots() -> None:
    axes = (Axis.of("usd_per_hour"), Axis.of("tpot_mean_ms"), Axis.of("ttft_p99_ms"))
    points = tuple(Point(plan(replica(tp=n)), (float(n), 40.0 / n, 900.0)) for n in (1, 2, 4))
    made = plan(replica(tp=2))
    made._front = Front("r", axes, points, 1, 9, True)
    text = "".join(Tags(report.html(made)).text)
    assert "Pareto front" in text
    assert "1 × h200_sxm TP4 bf16" in text
    assert len(tradeoff.of_front(made._front)) == 2


# -- scales --------------------------------------------------------------------------------


@given(st.lists(st.floats(1e-6, 1e9), min_size=1, max_size=6), st.booleans())
def test_scales_hold_their_values_and_have_ticks(values: list[float], log: bool) -> None:
    scale = draw.Scale.over(values, log=log)
    places = [scale.at(value) for value in values]
    assert all(0 <= place <= 100 for place in places)
    ticks = scale.ticks()
    assert 2 <= len(ticks) <= 12
    assert [tick.at for tick in ticks] == sorted(tick.at for tick in ticks)
    assert all(math.isfinite(tick.at) for tick in ticks)


def test_labels_do_not_cover_each_other() -> None:
    marks = [draw.Mark(50 + dx, 50, "", "blue", label=f"label {dx}") for dx in (0, 1, 2, 3, 30)]
    found = draw.placed(marks)
    boxes = [draw._box(label) for label in found]
    assert not any(draw._meet(a, b) for i, a in enumerate(boxes) for b in boxes[:i])
    assert {"label 0", "label 30"} <= {label.text for label in found}
