"""Collectives from measured tables, in a node and over several."""

from __future__ import annotations

import csv
import os
import statistics
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

from planc.cost_model import catalogue
from planc.cost_model.collectives import Constants, Fabric, alpha_beta, group_seconds
from planc.cost_model.kernels import Priced
from planc.cost_model.measured import links
from planc.cost_model.profile import Profile, Table, TableInfo
from planc.cost_model.roofline import Roofline

H100 = catalogue.gpu("h100_sxm")
VLLM, TRTLLM = catalogue.engine("vllm"), catalogue.engine("trtllm")
NODE = Fabric(8)
SIZES = 2.0 ** np.arange(8, 31, 2)
START = Constants(alpha_us=4.0, per_step_us=0.5, share=1.0)


def table(kind: str, engine: str, ratio: float) -> Table:
    return Table(
        TableInfo(
            name=f"{kind}/{engine}",
            key={"kind": kind, "engine": engine},
            axes=("ranks", "bytes"),
            ideal={"alpha_us": START.alpha_us, "per_step_us": START.per_step_us, "bytes_s": 450e9},
            rows=1,
            error=0.0,
            source="test",
            date="2026-11-21",
        ),
        (np.array([2.0, 4.0, 8.0]), SIZES),
        np.full((3, SIZES.size), np.log(ratio)),
    )


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> None:
    made = (
        table("all_reduce", "vllm", 2.0),
        table("all_reduce", "nccl", 3.0),
        table("all_gather", "nccl", 1.5),
        table("reduce_scatter", "nccl", 1.5),
    )
    monkeypatch.setattr(links, "shipped", lambda family, gpu: Profile(gpu, "links", made))


@pytest.mark.usefixtures("tables")
def test_an_engine_takes_its_own_kernels_and_else_the_librarys() -> None:
    for engine, ratio in ((VLLM, 2.0), (TRTLLM, 3.0)):
        price = links.prepare("all_reduce", 8, NODE, H100, engine, Roofline(H100))
        want = ratio * alpha_beta("all_reduce", SIZES, 8, START, 450e9)
        assert price(SIZES) == pytest.approx(want, rel=1e-6)
        assert isinstance(price, Priced)
        assert price.sources == ("measured",)
    assert links.prepare("all_reduce", 8, NODE, H100, VLLM, Roofline(H100))(np.zeros(2)).tolist() == [0, 0]


@pytest.mark.usefixtures("tables")
def test_groups_over_nodes_are_measured_inside_and_assumed_outside() -> None:
    price = links.prepare("all_reduce", 16, NODE, H100, VLLM, Roofline(H100))
    size = np.array([1e6, 64e6])
    inside = sum(1.5 * alpha_beta(kind, size, 8, START, 450e9) for kind in ("reduce_scatter", "all_gather"))
    outside = group_seconds("all_reduce", size / 8, 2, H100, Fabric(1))
    assert price(size) == pytest.approx(inside + outside, rel=1e-6)
    assert isinstance(price, Priced)
    assert price.sources == ("assumed",)


def test_without_a_table_the_roofline_answers() -> None:
    gpu = catalogue.gpu("mi300x")
    roofline = Roofline(gpu)
    price = links.prepare("all_reduce", 4, NODE, gpu, VLLM, roofline)
    assert price(SIZES) == pytest.approx(roofline.collective("all_reduce", 4, NODE)(SIZES))


@pytest.mark.parametrize("gpu", ["a100_sxm", "h100_sxm", "h200_sxm", "b200_sxm", "gb300", "l40s"])
@pytest.mark.parametrize("engine", ["vllm", "sglang", "trtllm"])
def test_shipped_tables_grow_with_size(gpu: str, engine: str) -> None:
    here, profile = catalogue.gpu(gpu), catalogue.engine(engine)
    size = np.geomspace(256, 4e9, 200)
    for kind in ("all_reduce", "all_gather"):
        for ranks in (2, 3, 4):
            for table in links.find(kind, here, profile):  # type: ignore[arg-type]
                seconds = links.curve(table, kind, ranks)(size)  # type: ignore[arg-type]
                assert np.all(np.diff(seconds) > -0.02 * seconds[:-1])
                assert seconds[-1] > 20 * seconds[0]


@pytest.mark.parametrize(("folder", "gpu"), [("h100_dgx", "h100_sxm"), ("a100_dgx", "a100_sxm")])
def test_large_all_reduces_lie_near_anothers_measurements(folder: str, gpu: str) -> None:
    """NCCL through torch, timed by Vidur's authors; its small messages pay torch's launches besides."""
    data = os.environ.get("PLANC_DATA")
    if not data:
        pytest.skip("PLANC_DATA is not set: no measured network tables")
    path = Path(data) / "operators" / "vidur" / "network" / folder / "all_reduce.csv"
    here = catalogue.gpu(gpu)
    errors = defaultdict(list)
    with path.open() as file:
        for row in csv.DictReader(file):
            size, ranks = float(row["size"]), int(row["num_workers"])
            if size >= 16e6 and 1 < ranks == int(row["devices_per_node"]):
                price = links.prepare("all_reduce", ranks, NODE, here, VLLM, Roofline(here))
                measured = 1e-3 * float(row["time_stats.all_reduce.median"])
                errors[ranks].append(abs(float(price(np.array([size]))[0]) / measured - 1.0))
    assert errors
    for ranks, found in errors.items():
        assert statistics.median(found) < 0.2, ranks
