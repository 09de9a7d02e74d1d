"""The profile document, what it does while in use, and the micro-benchmarks that make one."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from planc.cost_model import calibration, catalogue
from planc.cost_model.calibration import ProfileDocument, load_profile
from planc.cost_model.collectives import Fabric
from planc.cost_model.efficiency import efficiencies
from planc.cost_model.kernels import Attention, AttentionLoad, Gemm
from planc.cost_model.measured import costs_for
from planc.cost_model.step import StepLoad
from planc.errors import (
    FileMissing,
    FileUnreadable,
    InvalidField,
    PlancError,
    ToolFailed,
    UnknownField,
    UnknownName,
)
from planc.planner.assemble import profile_fingerprint
from planc.runtime.calibrate import collectives, tables
from planc.runtime.calibrate.cases import Grid, grid
from planc.runtime.calibrate.device import Settings, _identified, calibrate
from planc.runtime.calibrate.engine import Served, _least_squares, _model, fitted
from planc.runtime.calibrate.samples import Run, Sample, Worker
from planc.runtime.simulator import Rules
from tests.sample_tables import dense_table

IDEAL = {"flops_s": 1e11, "bytes_s": 1e10, "launch_s": 1e-6}


def table(family: str, key: dict[str, Any], axes: dict[str, list[float]], value: float) -> dict[str, Any]:
    info = {
        "name": f"{family} {key}",
        "key": key,
        "axes": list(axes),
        "ideal": IDEAL,
        "rows": 4,
        "error": 0.01,
    }
    count = math.prod(len(axis) for axis in axes.values())
    info |= {"source": "a test", "date": "2026-11-21"}
    return {"family": family, "info": info, "axes": axes, "values": [value] * count}


DOCUMENT: dict[str, Any] = {
    "kind": "planc.profile",
    "schema_version": 1,
    "planc_version": "0.1.0",
    "date": "2026-11-21",
    "source": "a test",
    "device": {
        "name": "cpu",
        "peak_tflops": {"bf16": {"value": 0.4, "rows": 9}},
        "memory_gbytes_s": {"value": 30.0},
        "facts": {"memory_gib": 20.0},
    },
    "tables": [
        table("gemm", {"precision": "bf16"}, {"m": [1, 16], "n": [256, 1024], "k": [256, 1024]}, math.log(2)),
        table(
            "attention",
            {"part": "decode", "dim": 64, "group": 4},
            {"sequences": [1, 16], "context": [16, 1024]},
            math.log(3),
        ),
    ],
    "efficiencies": {"gemm_launch_us": {"any": {"value": 3.0}}},
    "engines": {"vllm": {"step_us": {"value": 1234.0, "rows": 8, "error": 0.02}}},
    "serving": {"vllm": {"request_ms": {"value": 7.0}}},
}


def document(**changes: Any) -> ProfileDocument:
    return ProfileDocument.model_validate({**DOCUMENT, **changes})


def written(folder: Path, body: Any) -> Path:
    path = folder / "profile.json"
    path.write_text(body if isinstance(body, str) else json.dumps(body))
    return path


def test_a_profile_reads_back_as_it_was_written(tmp_path: Path) -> None:
    profile = document()
    profile.save(tmp_path / "new" / "profile.json")
    again = load_profile(tmp_path / "new" / "profile.json")
    assert again == profile
    assert again.fingerprint == profile.fingerprint
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["profile.json"]


def test_numbers_hold_while_in_use_and_not_after() -> None:
    before = catalogue.gpu("cpu"), catalogue.engine("vllm"), efficiencies(), profile_fingerprint()
    with calibration.using(document()):
        cpu = catalogue.gpu("cpu")
        assert cpu.peak_flops("bf16") == pytest.approx(4e11)
        assert (cpu.memory_bytes_s, cpu.memory_gib) == (3e10, 20.0)
        assert catalogue.engine("vllm").step_us == 1234.0
        assert efficiencies().on("gemm_launch_us", cpu) == 3.0
        assert efficiencies().on("gemm_launch_us", catalogue.gpu("l4")) != 3.0
        assert catalogue.gpu("h100_sxm") == before[0].__class__.model_validate(
            catalogue.gpu("h100_sxm").model_dump()
        )
        assert Rules.of(catalogue.engine("vllm")).request_ms == 7.0
        inner = profile_fingerprint()
        with calibration.using(document(date="2026-11-22")):
            assert profile_fingerprint() not in (inner, before[3])
        assert profile_fingerprint() == inner != before[3]
    assert (catalogue.gpu("cpu"), catalogue.engine("vllm"), efficiencies(), profile_fingerprint()) == before
    assert Rules.of(catalogue.engine("vllm")).request_ms != 7.0


def test_kernels_are_priced_from_its_tables() -> None:
    """Twice and three times the ideal that the tables state; other hardware and other work are untouched."""
    product, engine = Gemm(512, 512, "bf16", "bf16"), catalogue.engine("vllm")
    attend = Attention(
        "attention", "decode", kv_bytes=2.0, q_heads=16, kv_heads=4, qk_dim=64, v_dim=64, key_width=512
    )
    one = np.ones((1, 1))
    with calibration.using(document()):
        costs = costs_for(catalogue.gpu("cpu"), engine)
        nbytes = 2.0 * (512 * 512 + 4 * 512 + 4 * 512)
        seconds = costs.gemm([product])(4 * one).seconds
        assert seconds[0, 0] == pytest.approx(2 * (1e-6 + nbytes / 1e10), rel=1e-3)
        assert costs.gemm([product])(0 * one).seconds[0, 0] == 0
        load = AttentionLoad(1e9 * one, 1e3 * one, one, np.ones(1), np.ones(1), np.full(1, 64.0))
        assert costs.attention([attend])(load).seconds[0, 0] == pytest.approx(3 * (1e-6 + 1e-2), rel=1e-3)
        packed = Gemm(512, 512, "w4a16", "bf16")
        plain = costs_for(catalogue.gpu("l4"), engine).gemm([product])(4 * one).seconds
        assert costs.gemm([packed])(4 * one).seconds[0, 0] != pytest.approx(seconds[0, 0])
    assert costs_for(catalogue.gpu("l4"), engine).gemm([product])(4 * one).seconds == pytest.approx(plain)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"device": {"name": "h999"}}, UnknownName, "h999"),
        ({"device": {"name": "cpu", "memory_gbytes_s": {"value": -1}}}, InvalidField, "memory_gbytes_s"),
        ({"device": {"name": "cpu", "memory_gbytes_s": {"value": "fast"}}}, InvalidField, "memory_gbytes_s"),
        ({"engines": {"vllm": {"name": {"value": 1}}}}, UnknownField, "'name'"),
        ({"engines": {"vlm": {}}}, UnknownName, "vllm"),
        ({"efficiencies": {"gem_peak": {}}}, UnknownName, "gemm_peak"),
        ({"serving": {"vllm": {"request_s": {"value": 1}}}}, InvalidField, "request_ms"),
        ({"colour": "red"}, UnknownField, "'colour'"),
        ({"schema_version": 9}, InvalidField, "schema_version"),
        ({"kind": "something"}, FileUnreadable, "planc.profile"),
        ({"tables": [{**DOCUMENT["tables"][0], "values": [0.0]}]}, InvalidField, "1 values"),
        ({"tables": [table("gemm", {}, {"m": [2, 1]}, 0.0)]}, InvalidField, "ascend"),
    ],
)
def test_a_wrong_profile_is_refused(
    changes: dict[str, Any], error: type[PlancError], words: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=words):
        load_profile(written(tmp_path, {**DOCUMENT, **changes}))


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", json.dumps(DOCUMENT)[:200]])
def test_a_corrupt_file_is_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(FileUnreadable):
        load_profile(written(tmp_path, text))
    with pytest.raises(FileMissing):
        load_profile(tmp_path / "nowhere.json")


def test_a_profile_of_other_hardware_is_refused() -> None:
    calibration.require(["l4"], where="no profile in use")
    with calibration.using(document()):
        calibration.require(["l4", "cpu"], where="a mixed inventory")
        with pytest.raises(InvalidField, match="measured on cpu, and this is about l4"):
            calibration.require(["l4"], where="profile")


# -- fitting ---------------------------------------------------------------------------------


def _run(chosen: Grid) -> Run:
    """Samples of a device that runs at 1e11 FLOP/s and 1e10 bytes/s behind launches of 1 us."""
    found = []
    for case in chosen.cases():
        seconds = 1e-6
        if case["op"] == "gemm":
            m, n, k = case["m"], case["n"], case["k"]
            seconds += max(2 * m * n * k / 1e11, 2 * (n * k + m * k + m * n) / 1e10)
        found.append(Sample(case, seconds, 0.0, 9))
    return Run({}, tuple(found), ())


def test_a_device_that_is_ideal_gives_a_flat_table() -> None:
    peaks = tables.Peaks(1e11, 1e10, 1e-6)
    found = tables.products(_run(grid("cpu", True)), "bf16", peaks, "a test", "2026-11-21")
    assert found is not None
    assert set(found.values) == {0.0}
    assert found.info.error == 0.0
    assert found.info.rows == math.prod(len(axis) for axis in found.axes.values())


def test_cells_that_were_not_measured_take_their_neighbour() -> None:
    whole = _run(grid("cpu", True))
    some = Run({}, tuple(s for s in whole.samples if s.case.get("m") != 16 or s.case.get("n") != 256), ())
    found = tables.products(some, "bf16", tables.Peaks(1e11, 1e10, 1e-6), "a test", "2026-11-21")
    assert found is not None
    assert np.isfinite(found.values).all()


def test_host_constants_are_never_negative() -> None:
    rows = np.array([[1.0, layers, batch] for layers in (2, 10) for batch in (1, 4, 8, 16)])
    true = np.array([1e-3, 2e-5, 3e-5])
    assert _least_squares(rows, rows @ true, np.ones(8)) == pytest.approx(true)
    step, layer, sequence = _least_squares(rows, rows @ [1e-3, -2e-5, 3e-5], np.ones(8))
    assert layer == 0.0
    assert min(step, sequence) > 0


def test_an_engine_s_constants_are_found_again() -> None:
    shapes = (dense_table(2, 512, 8, 2, 1408, 32000), dense_table(10, 512, 8, 2, 1408, 32000))
    shapes += (dense_table(3, 1280, 20, 4, 3456, 32000),)
    true = {"kernel_factor": 1.2, "step_us": 1500.0, "layer_us": 40.0, "per_sequence_us": 60.0}
    true |= {"prefill_factor": 1.1}
    numbers = {name: {"value": value} for name, value in true.items()}
    served = []
    with calibration.using(document(engines={"vllm": numbers})):
        for each in shapes:
            model, layers = _model(each, "cpu"), each.model.layers
            steps = {(b, 50.0): float(model.seconds(StepLoad(b, 50.0))) for b in (1, 4, 8, 16)}
            first = {n: 5e-3 + float(model.seconds(StepLoad(0, 1, n, 1))) for n in (16, 256, 512)}
            served.append(Served(layers, each, steps, first))
    profile = fitted(document(), served)
    found = profile.engines["vllm"]
    assert {name: found[name].value for name in true} == pytest.approx(true, rel=1e-2)
    assert profile.serving["vllm"]["request_ms"].value == pytest.approx(5.0, rel=1e-2)
    assert found["step_us"].error == pytest.approx(0.0, abs=1e-3)


# -- measuring -------------------------------------------------------------------------------


def test_a_quick_calibration_is_a_whole_profile(tmp_path: Path) -> None:
    seen: list[int] = []
    settings = Settings("cpu", quick=True)
    profile = calibrate(settings, "2026-11-21", "a test", lambda done, total, what: seen.append(done))
    profile.save(tmp_path / "profile.json")
    assert load_profile(tmp_path / "profile.json") == profile
    assert seen == sorted(seen)
    assert {document.family for document in profile.tables} == {"gemm", "attention"}
    assert all(np.isfinite(document.values).all() for document in profile.tables)
    with calibration.using(profile):
        cpu = catalogue.gpu("cpu")
        assert 1e8 < cpu.memory_bytes_s < 1e13
        assert 1e8 < cpu.peak_flops("bf16") < 1e15
        rows = np.array([[1.0, 16.0, 128.0]])
        seconds = costs_for(cpu, catalogue.engine("vllm")).gemm([Gemm(1024, 1024, "bf16", "bf16")])(rows)
        assert (seconds.seconds > 0).all()


@pytest.mark.parametrize(
    ("called", "memory_gib", "name"),
    [
        ("NVIDIA H100 80GB HBM3", 79.2, "h100_sxm"),
        ("NVIDIA H100 PCIe", 79.1, "h100_pcie"),
        ("NVIDIA A100-SXM4-80GB", 79.2, "a100_sxm"),
        ("NVIDIA H200", 139.8, "h200_sxm"),
        ("NVIDIA L40S", 44.4, "l40s"),
        ("NVIDIA GeForce RTX 4090", 23.5, "rtx_4090"),
    ],
)
def test_a_device_is_told_by_its_name(called: str, memory_gib: float, name: str) -> None:
    run = Run({"name": called, "memory_gib": memory_gib}, (), ())
    assert _identified(Settings("cuda"), run).name == name


def test_a_strange_device_must_be_named() -> None:
    run = Run({"name": "Acme Accelerator", "memory_gib": 80.0}, (), ())
    with pytest.raises(InvalidField, match="Acme"):
        _identified(Settings("cuda"), run)
    assert _identified(Settings("cuda", gpu="h100"), run).name == "h100_sxm"


def test_a_spent_budget_says_so() -> None:
    with pytest.raises(ToolFailed, match="budget"):
        calibrate(Settings("cpu", quick=True, budget_s=0.0), "2026-11-21", "a test")


def test_an_interpreter_without_torch_is_named(tmp_path: Path) -> None:
    with pytest.raises(ToolFailed, match="nowhere"):
        Worker("cpu", python=str(tmp_path / "nowhere")).run(grid("cpu", True), [])
    fake = tmp_path / "python"
    fake.write_text(f"#!/bin/sh\nexec {sys.executable} -c 'raise SystemExit(\"no module named torch\")'\n")
    fake.chmod(0o755)
    with pytest.raises(ToolFailed, match="no module named torch"):
        Worker("cpu", python=str(fake)).run(grid("cpu", True), [{"op": "launch"}])


@pytest.mark.slow
def test_collectives_between_processes() -> None:
    found = collectives.tables(Worker("cpu"), grid("cpu", True), 2, "a test", "2026-11-21")
    assert {document.info.key["kind"] for document in found} == set(collectives.KINDS)
    with calibration.using(document(tables=[t.model_dump() for t in found])):
        costs = costs_for(catalogue.gpu("cpu"), catalogue.engine("vllm"))
        small, large = costs.collective("all_reduce", 2, Fabric(gpus_per_node=2))(np.array([4096.0, 1 << 20]))
        assert 0 < small < large


@pytest.mark.gpu
def test_a_gpu_calibrates_itself() -> None:
    profile = calibrate(Settings("cuda", quick=True), "2026-11-21", "a test")
    assert catalogue.gpu(profile.device.name).vendor != "cpu"
    assert profile.device.peak_tflops["bf16"].value > 1
