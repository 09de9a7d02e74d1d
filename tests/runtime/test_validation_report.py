"""Errors by group, ranks, picks, lint and fits, on made-up points."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from planc.cost_model import catalogue
from planc.cost_model.collectives import Fabric
from planc.cost_model.memory import memory_map
from planc.cost_model.shape import EngineShape
from planc.errors import InvalidField, UnknownName
from planc.runtime.simulator import Clock
from planc.runtime.validation.constants import NAMES, Constants
from planc.runtime.validation.fit import NEUTRAL, Linear, calibrated, chosen_points, fit, left_out
from planc.runtime.validation.harness import harness
from planc.runtime.validation.lint import lint
from planc.runtime.validation.points import Point
from planc.runtime.validation.predict import Prediction, Predictor
from planc.runtime.validation.report import Row, ValidationReport, spearman, summary
from planc.runtime.validation.setups import Engine, Setup, Unpredictable, setup
from planc.runtime.validation.validate import validate
from tests.sample_tables import llama8b

TABLE = llama8b()
VLLM = catalogue.engine("vllm")


def point(row: int, tpot: float = 10.0, ttft: float = 100.0, **changes: object) -> Point:
    made = Point(
        row=row,
        id=f"p{row}",
        model="llama-3.1-8b",
        gpu="h100_sxm",
        engine="vllm",
        engine_version="0.19",
        weights="bf16",
        mode="agg",
        isl=1024,
        osl=1024,
        concurrency=16,
        tp=1,
        pp=1,
        attention_dp=1,
        moe_tp=1,
        moe_ep=1,
        gpus=1,
        prefill=None,
        decode=None,
        ttft_ms=ttft,
        tpot_ms=tpot,
    )
    return replace(made, **changes)  # type: ignore[arg-type]


def prepared(item: Point) -> Setup:
    gpu, profile = catalogue.gpu(item.gpu), catalogue.engine(item.engine)
    shape = EngineShape(item.engine, item.gpu, tp=item.tp)
    limits = {"max_num_seqs": 64, "max_num_batched_tokens": 8192, "max_model_len": 4096}
    memory = memory_map(TABLE, shape, gpu, profile, **limits)  # type: ignore[arg-type]
    engine = Engine(1, shape, memory, 64, 8192)
    return Setup(item, harness(item), TABLE, gpu, profile, Fabric(8), engine)


def row(item: Point, tpot: float, throughput: tuple[float, float] = (1.0, 1.0)) -> Row:
    """Predicted TPOT and throughput of a point; TTFT is predicted exactly."""
    found = Prediction(
        tpot_ms=tpot,
        ttft_ms=item.ttft_ms or 1.0,
        ttft_steady_ms=1.0,
        throughput=throughput[0],
        source="fitted",
        bands={
            "tpot": (0.9 * tpot, 1.1 * tpot),
            "ttft": (0.0, 1e9),
            "throughput": (0.0, 1e9),
        },
    )
    return Row(item, found, {"tpot": item.tpot_ms, "ttft": item.ttft_ms, "throughput": throughput[1]})


def test_errors_are_relative_and_bands_are_the_points_own() -> None:
    found = summary([row(point(1), 12.0), row(point(2), 10.5), row(point(3), 9.0)])
    assert found["n"] == 3
    assert found["tpot_mape"] == pytest.approx((20 + 5 + 10) / 3, abs=1e-3)
    assert (found["tpot_median_ape"], found["tpot_bias"]) == (10.0, 5.0)
    assert found["ttft_mape"] == 0.0
    assert found["ttft_burst"] == pytest.approx(100 * (1 - 1 / point(1).ttft_ms), abs=1e-3)
    assert found["tpot_within_band"] == pytest.approx(1 / 3, abs=1e-4)
    assert found["within_band"] == pytest.approx(7 / 9, abs=1e-4)
    assert found["spearman"] is None  # one parallel shape


def test_points_without_a_time_count_but_are_not_scored() -> None:
    found = summary([row(point(1), 12.0), row(replace(point(2), tpot_ms=None), 9.0)])
    assert (found["n"], found["tpot_n"], found["ttft_n"]) == (2, 1, 2)


def test_ranks_and_picks_of_a_family() -> None:
    rows = [
        row(point(1, tpot=10.0, tp=1, gpus=1), 11.0, (100.0, 90.0)),
        row(point(2, tpot=20.0, tp=1, gpus=1, concurrency=32), 21.0, (150.0, 100.0)),
        row(point(3, tpot=40.0, tp=2, gpus=2, concurrency=64), 35.0, (200.0, 200.0)),
        row(point(4, tpot=25.0, tp=2, gpus=2, concurrency=48), 32.0, (170.0, 125.0)),
    ]
    found = summary(rows)
    assert (found["n_families"], found["spearman"]) == (1, 1.0)
    assert found["pick_meets_slo"] == 1.0  # the second row is picked
    assert found["pick_regret"] == pytest.approx(1 - 100 / 125)


def test_spearman_of_ties_and_of_reversed_ranks() -> None:
    assert spearman([1, 2, 3], [3, 2, 1]) == -1.0
    assert spearman([1, 1, 2], [5, 5, 9]) == 1.0


def test_groups_hold_what_was_not_predicted_too() -> None:
    from planc.runtime.validation.points import Rejected

    missed = Rejected(2, "p2", "no kernels", {"gpu": "l4"})
    body = ValidationReport((row(point(1), 10.0),), (missed,), ("gpu",), blind=False).to_json()
    assert [(g["gpu"], g["n"], g["n_unpredicted"]) for g in body["groups"]] == [
        ("h100_sxm", 1, 0),
        ("l4", 0, 1),
    ]
    assert body["total"]["n_unpredicted"] == body["n_unpredicted"] == 1


# -- lint ------------------------------------------------------------------------------


def flagged(*points: Point) -> dict[int, tuple[str, ...]]:
    return lint([prepared(item) for item in points])


def test_a_sweep_that_falls_loses_its_fewest_rows() -> None:
    sweep = [
        point(i, tpot=t, concurrency=c) for i, (c, t) in enumerate([(4, 10), (8, 30), (16, 12), (32, 15)])
    ]
    assert flagged(*sweep) == {1: ("monotone",)}
    noise = [point(i, tpot=t, concurrency=c) for i, (c, t) in enumerate([(4, 10), (8, 9.8), (16, 12)])]
    assert flagged(*noise) == {}


def test_unlike_duplicates_are_all_flagged() -> None:
    found = flagged(point(1, tpot=10.0), point(2, tpot=13.0), point(3, tpot=20.0, concurrency=32))
    assert found == {1: ("duplicates",), 2: ("duplicates",)}


def test_rates_beyond_the_gpu_are_flagged() -> None:
    assert flagged(point(1, tpot=0.01, ttft=1.0, concurrency=512)) == {1: ("rate",)}


def test_prompts_that_wait_longer_than_all_prompts_take_are_flagged() -> None:
    found = flagged(point(1, tpot=10.0, ttft=60_000.0), point(2, tpot=11.0, ttft=90.0, concurrency=32))
    assert found == {1: ("stalled",)}


# -- fits ------------------------------------------------------------------------------


def linear(change: dict[str, float], noise: dict[int, float] | None = None) -> Linear:
    """Points of four cells whose times are exactly those of moved constants."""
    setups, base, slopes, measured = [], [], [], []
    shift = np.array([change.get(name, 0.0) for name in NAMES])
    for i in range(24):
        batch = 4 * 2 ** (i % 6)
        item = point(i, concurrency=batch, weights=f"f{i // 6}", isl=1024 if i % 2 else 8192)
        setups.append(replace(prepared(point(i, concurrency=batch)), point=item))
        t0 = np.array([10.0 + 0.1 * batch, 100.0 + batch])
        one = {"per_sequence_us": 1e-3 * batch, "kernel_factor": 8.0, "prefill_factor": 0.05 * batch}
        two = {"request_ms": 1.0, "lag_steps": t0[0], "prefill_factor": 2.0 * batch}
        slope = np.array([[of.get(name, 0.0) for name in NAMES] for of in (one, two)])
        base.append(t0)
        slopes.append(slope)
        measured.append((t0 + slope @ shift) * (noise or {}).get(i, 1.0))
    return Linear(tuple(setups), np.array(base), np.array(slopes), np.array(measured))


def test_a_fit_finds_constants_and_shrugs_off_an_outlier() -> None:
    wanted = {"per_sequence_us": 10.0, "request_ms": 40.0}
    found = fit(linear(wanted, {3: 8.0}))
    exact = linear(wanted)
    start = NEUTRAL.vector() - Constants.shipped(VLLM).vector()
    before = np.abs(exact.times(start) / exact.measured - 1).mean()
    after = np.abs(exact.times(found.change(VLLM)) / exact.measured - 1).mean()
    assert after < 0.4 * before


def test_a_cell_is_predicted_without_its_own_rows() -> None:
    here = linear({"per_sequence_us": 10.0}, dict.fromkeys(range(6), 3.0))
    cell = here.setups[0].point.cell
    blind = left_out(here)[cell].change(VLLM)
    others = fit(here.rows(np.array([s.point.cell != cell for s in here.setups]))).change(VLLM)
    assert np.allclose(blind, others)
    assert np.abs(here.times(blind)[6:] / here.measured[6:] - 1).mean() < 0.05


def test_three_points_pull_the_rest_of_their_cell() -> None:
    here = linear({"kernel_factor": 0.1, "request_ms": 30.0})
    rows = list(range(6))
    picked = chosen_points(here, rows)
    labels = [(here.setups[i].point.isl, here.setups[i].point.concurrency) for i in picked]
    assert labels == [(1024, 8), (1024, 128), (8192, 16)]
    change = calibrated(here.rows(np.isin(np.arange(24), picked)), np.zeros(len(NAMES)))
    before = np.abs(here.base[:6] / here.measured[:6] - 1).mean(axis=0)
    after = np.abs(here.times(change)[:6] / here.measured[:6] - 1).mean(axis=0)
    assert np.all(after < 0.6 * before)


def test_constants_move_and_go_onto_a_profile() -> None:
    profile = catalogue.engine("vllm")
    moved = Constants.shipped(profile).moved(np.arange(len(NAMES), dtype=float))
    assert moved.on(profile).layer_us == profile.layer_us + NAMES.index("layer_us")


# -- setups ----------------------------------------------------------------------------


def test_what_no_engine_can_run_is_said() -> None:
    item = point(1, weights="nvfp4")
    with pytest.raises(Unpredictable, match="no kernels for nvfp4"):
        setup(item, harness(item), lambda name: TABLE)
    item = point(1, tp=3, gpus=3)
    with pytest.raises(Unpredictable, match="divide"):
        setup(item, harness(item), lambda name: TABLE)


def test_formats_are_those_that_the_engine_runs() -> None:
    item = point(1, weights="fp8")
    found = setup(item, harness(item), lambda name: TABLE).decode.shape
    assert (found.weights, found.activations, found.kv) == ("fp8", "fp8", "bf16")


def test_no_fit_makes_a_wait_negative() -> None:
    shipped = Constants.shipped(VLLM)
    moved = shipped.moved(np.full(len(NAMES), -1e3))
    assert (moved.request_ms, moved.lag_steps) == (0.0, 0.0)
    assert moved.layer_us == shipped.layer_us - 1e3


def test_a_cell_without_others_cannot_be_left_out(tmp_path: Path) -> None:
    path = tmp_path / "points.csv"
    path.write_text(
        "model,gpu,engine,weights,isl,osl,concurrency,ttft_ms,tpot_ms\n"
        "llama-3.1-8b,h100_sxm,vllm,bf16,1024,128,4,60,8\n",
        encoding="utf-8",
    )
    with pytest.raises(InvalidField, match="no other cell"):
        validate(path, lambda _: TABLE, leave_out_cells=True)


def test_a_row_without_a_price_is_counted_and_the_others_predicted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "points.csv"
    path.write_text(
        "model,gpu,engine,weights,isl,osl,concurrency,ttft_ms,tpot_ms\n"
        "llama-3.1-8b,h100_sxm,vllm,bf16,1024,128,4,60,8\n"
        "llama-3.1-8b,h100_sxm,vllm,bf16,1024,128,8,60,8\n",
        encoding="utf-8",
    )
    clock = Predictor.clock

    def refusing(self: Predictor, found: Setup, engine: Engine, constants: Constants) -> Clock:
        if found.point.concurrency == 8:
            raise UnknownName(field="link", value="none", kind="link", mend="")
        return clock(self, found, engine, constants)

    monkeypatch.setattr(Predictor, "clock", refusing)
    found = validate(path, lambda _: TABLE)
    assert [row.point.concurrency for row in found.rows] == [4]
    assert [(item.row, "none" in item.reason) for item in found.unpredicted] == [(2, True)]


def test_a_wrong_option_is_one_error_not_one_per_row(tmp_path: Path) -> None:
    path = tmp_path / "points.csv"
    path.write_text(
        "model,gpu,engine,weights,isl,osl,concurrency,ttft_ms,tpot_ms\n"
        "llama-3.1-8b,h100_sxm,vllm,bf16,1024,128,4,60,8\n",
        encoding="utf-8",
    )
    with pytest.raises(InvalidField, match="scheduling"):
        validate(path, lambda _: TABLE, options={"scheduling": "best"})
