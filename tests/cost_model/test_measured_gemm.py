"""Products and pointwise kernels from tables: what made-up measurements come out as."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from planc.cost_model import catalogue
from planc.cost_model.fitting import gemm as fitting
from planc.cost_model.fitting import gemm_physics as physics
from planc.cost_model.fitting import pointwise as casts
from planc.cost_model.kernels import Gemm
from planc.cost_model.measured import gemm, pointwise
from planc.cost_model.measured.gemm import ascending, ideal_seconds, peaks
from planc.cost_model.profile import Profile, expect, shipped
from planc.cost_model.roofline import Roofline
from planc.errors import InvalidField

pandas = pytest.importorskip("pandas", reason="fitting needs the measured extra")
pytest.importorskip("pyarrow", reason="fitting needs the measured extra")

H100 = catalogue.gpu("h100_sxm")
VLLM = catalogue.engine("vllm")
M = [1, 2, 4, 8, 16, 17, 32, 64, 128, 129, 256, 1024, 4096, 32768]
SIDES = [128, 512, 1024, 2048, 4096, 8192, 16384, 65536]
SLOWER = 1.3

Measure = Callable[[float, float, float], float]


def cast_ms(m: float, k: float) -> float:
    """A made-up static cast to fp8."""
    return 1e3 * (1.5e-6 + 3.0 * m * k / H100.memory_bytes_s)


def product_ms(weights: str, activations: str) -> Measure:
    spec = Gemm(1, 1, weights, activations)
    of = peaks(H100, weights, activations)
    return lambda m, n, k: 1e3 * SLOWER * float(ideal_seconds(m, n, k, spec, of))


def block_layer_ms(m: float, n: float, k: float) -> float:
    """The same in blocks: one pass over the inputs, and the product."""
    return product_ms("fp8_block", "fp8")(m, n, k) + cast_ms(m, k)


def layer_ms(m: float, n: float, k: float) -> float:
    """An fp8 layer as collectors time it: scales, cast and product."""
    return product_ms("fp8", "fp8")(m, n, k) + 2 * cast_ms(m, k)


def write(folder: Path, family: str, engine: str, table: str, rows: list[dict[str, object]]) -> None:
    path = folder / "h100_sxm" / family / engine / "1.0"
    path.mkdir(parents=True, exist_ok=True)
    pandas.DataFrame(rows).to_parquet(path / f"{table}.parquet")


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two engines on one GPU. The first has one spike and an fp8_block table that times something else."""
    folder = tmp_path_factory.mktemp("tables")
    timed: dict[str, dict[str, Measure]] = {
        "sglang": {"fp8_block": block_layer_ms},
        "vllm": {
            "bfloat16": product_ms("bf16", "bf16"),
            "fp8": layer_ms,
            "fp8_block": lambda *at: 0.2 + block_layer_ms(*at),
        },
    }
    for engine, formats in timed.items():
        rows: list[dict[str, object]] = []
        for form, measure in formats.items():
            for m, n, k in product(M, SIDES, SIDES):
                spike = 0.02 if (form, m, n, k) == ("bfloat16", 64, 4096, 4096) else 0.0
                latency = measure(m, n, k) + spike
                rows.append({"gemm_dtype": form, "m": m, "n": n, "k": k, "latency": latency})
        write(folder, "gemm", engine, "gemm_perf", rows)
    grid = [{"m": m, "k": k, "quant_dtype": "fp8", "latency": cast_ms(m, k)} for m, k in product(M, SIDES)]
    for name in ("computescale_perf", "scale_matrix_perf"):
        write(folder, "quantize", "vllm", name, grid)
    return folder


@pytest.fixture(scope="module")
def profile(tables: Path) -> Profile:
    (found,) = fitting.fit(tables)
    return Profile.from_bytes(found.to_bytes())


@pytest.fixture
def made_up(profile: Profile, monkeypatch: pytest.MonkeyPatch) -> None:
    """The profile of the made-up rows in place of the shipped ones; no other GPU has any."""
    monkeypatch.setattr(gemm, "shipped", lambda family, gpu: profile if gpu == "h100_sxm" else None)


def seconds(spec: Gemm, m: object, gpu: str = "h100_sxm", engine: str = "vllm") -> np.ndarray:
    entry = catalogue.gpu(gpu)
    price = gemm.prepare([spec], entry, catalogue.engine(engine), Roofline(entry))
    return price(np.atleast_2d(np.asarray(m, dtype=float))).seconds[0]


def test_tables_hold_the_product_alone_and_say_so(profile: Profile) -> None:
    assert [table.info.name for table in profile.tables] == ["sglang/fp8_block", "vllm/bfloat16", "vllm/fp8"]
    for table in profile.tables:
        off = np.abs(table.values - np.log(SLOWER))
        assert np.quantile(off, 0.98) < 0.01, table.info.name
        assert off[:, table.axes[1] >= 1024].max() < 0.03, (
            table.info.name
        )  # narrow ones are mostly quantization
        assert table.info.error < 0.01
    (fp8,) = profile.find(weights="fp8")
    assert "net of activation quantization" in fp8.info.note


def test_a_table_that_times_something_else_is_left_out(profile: Profile) -> None:
    assert not profile.find(engine="vllm", weights="fp8_block")


def test_a_spike_that_no_neighbour_shares_goes(made_up: None) -> None:
    spec = Gemm(4096, 4096, "bf16", "bf16")
    around = seconds(spec, [32, 64, 128])
    assert around[1] < 1.1 * around[0]
    assert np.all(np.diff(around) >= 0)


@pytest.mark.parametrize(
    ("m", "n", "k"),
    [(3, 3000, 5000), (100, 128256, 8192), (200_000, 4096, 4096), (7, 200, 90_000), (5000, 152_064, 5120)],
    ids=["between", "head", "rows", "depth", "head-rows"],
)
def test_off_the_grid_the_ideal_leads(made_up: None, m: float, n: float, k: float) -> None:
    spec = Gemm(n, k, "bf16", "bf16")
    expected = SLOWER * ideal_seconds(m, n, k, spec, peaks(H100, "bf16", "bf16"))
    assert seconds(spec, m)[0] == pytest.approx(float(expected), rel=0.03)


def test_no_rows_cost_nothing(made_up: None) -> None:
    assert seconds(Gemm(4096, 4096, "bf16", "bf16"), [0.0])[0] == 0.0


@pytest.mark.parametrize(
    ("gpu", "engine", "weights", "activations", "source"),
    [
        ("h100_sxm", "vllm", "bf16", "bf16", "measured"),
        ("h100_sxm", "vllm", "fp16", "fp16", "measured"),
        ("h100_sxm", "vllm", "fp8_block", "fp8", "fitted"),  # SGLang's
        ("h100_sxm", "trtllm", "fp8", "fp8", "fitted"),  # vLLM's
        ("h100_sxm", "vllm", "w4a16", "bf16", "fitted"),  # bf16's residuals
        ("h100_sxm", "vllm", "nvfp4", "nvfp4", "roofline"),
        ("h200_sxm", "vllm", "bf16", "bf16", "roofline"),  # the chip's residuals
        ("mi300x", "vllm", "bf16", "bf16", "roofline"),
    ],
)
def test_every_price_says_where_it_is_from(
    made_up: None, gpu: str, engine: str, weights: str, activations: str, source: str
) -> None:
    entry = catalogue.gpu(gpu)
    specs = [Gemm(4096, 4096, weights, activations)]
    price = gemm.prepare(specs, entry, catalogue.engine(engine), Roofline(entry))
    assert price.sources == (source,)  # type: ignore[attr-defined]


def test_where_nothing_was_measured_the_roofline_answers(made_up: None) -> None:
    entry = catalogue.gpu("mi300x")
    spec, m = Gemm(4096, 4096, "bf16", "bf16"), np.array([[1.0, 300.0, 9000.0]])
    expected = Roofline(entry).gemm([spec])(m)
    found = gemm.prepare([spec], entry, VLLM, Roofline(entry))(m)
    assert np.array_equal(found.seconds, expected.seconds)
    assert np.array_equal(found.bound, expected.bound)


def test_narrower_weights_stream_faster_from_borrowed_residuals(made_up: None) -> None:
    wide, narrow = (seconds(Gemm(8192, 8192, form, "bf16"), [1, 8192]) for form in ("bf16", "w4a16"))
    assert narrow[0] < 0.5 * wide[0]
    assert narrow[1] == pytest.approx(wide[1], rel=0.02)


@pytest.mark.parametrize("gpu", ["h100_sxm", "b200_sxm", "l40s", "a100_sxm"])
@pytest.mark.parametrize("engine", ["vllm", "sglang", "trtllm"])
def test_more_rows_never_take_less_time(gpu: str, engine: str) -> None:
    for n, k in ((4096, 4096), (10240, 1024), (57344, 8192), (128256, 5120), (1280, 8192)):
        for form in ("bf16", "fp8"):
            found = seconds(Gemm(n, k, form, form), np.arange(1, 9000), gpu, engine)
            assert np.all(np.diff(found) >= -1e-15), (n, k, form)


def test_ascending_keeps_what_ascends() -> None:
    rising = np.array([1.0, 2.0, 2.0, 5.0])
    assert ascending(rising) == pytest.approx(rising)
    assert ascending(np.array([1.0, 4.0, 2.0, 8.0])) == pytest.approx([1.0, np.sqrt(8), np.sqrt(8), 8.0])


@pytest.mark.parametrize(("gpu", "family"), [("h200_sxm", "gemm"), ("h100_sxm", "links")])
def test_a_profile_of_another_gpu_or_family_is_refused(profile: Profile, gpu: str, family: str) -> None:
    with pytest.raises(InvalidField, match="asked for"):
        expect(profile, family, gpu)  # type: ignore[arg-type]


@pytest.mark.parametrize("gpu", ["h100_sxm", "h200_sxm", "b200_sxm"])
def test_shipped_tables_state_what_they_are(gpu: str) -> None:
    profile = shipped("gemm", gpu)
    assert profile is not None
    for table in profile.tables:
        info = table.info
        assert info.rows > 1000
        assert 0 < info.error < 0.08
        assert info.source
        assert info.ideal["bytes_s"] == catalogue.gpu(gpu).memory_bytes_s
        assert not np.isnan(table.values).any()


@pytest.mark.skipif("PLANC_DATA" not in os.environ, reason="PLANC_DATA names no measured data")
@pytest.mark.parametrize(("tp", "limit"), [(1, 0.05), (2, 0.08)])
def test_another_measurement_of_the_same_gpu_agrees(tp: int, limit: float) -> None:
    """Linears of Llama-3.1-8B in vLLM 0.19 on RTX PRO 6000 (LLMServingSim), which no table was made from."""
    shapes = {
        "qkv_proj": (6144 // tp, 4096),
        "o_proj": (4096, 4096 // tp),
        "gate_up_proj": (28672 // tp, 4096),
        "down_proj": (4096, 14336 // tp),
    }
    path = f"operators/llmservingsim/perf/RTXPRO6000/meta-llama/Llama-3.1-8B/bf16/tp{tp}/dense.csv"
    with (Path(os.environ["PLANC_DATA"]) / path).open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["layer"] in shapes]
    errors = [
        seconds(Gemm(*shapes[row["layer"]], "bf16", "bf16"), float(row["tokens"]), "rtx_pro_6000")[0]
        / (1e-6 * float(row["time_us"]))
        - 1
        for row in rows
    ]
    assert len(errors) > 400
    assert np.median(np.abs(errors)) < limit


def test_the_roofline_fits_itself() -> None:
    """Rows that the roofline made are predicted exactly, and by no other values."""
    named = physics.with_values(physics.shipped_values())
    specs = [Gemm(n, k, "bf16", "bf16") for n, k in product(SIDES, SIDES)]
    m = np.array([float(M[i % len(M)]) for i in range(len(specs))])
    made = Roofline(H100, named).gemm(specs)(m[:, None]).seconds[:, 0]
    rows = physics.Rows("h100_sxm", "made up", m, specs, made)
    assert np.abs(rows.errors(named)).max() < 1e-12
    slower = physics.with_values({**physics.shipped_values(), "gemm_memory": 0.5})
    assert np.median(rows.errors(slower)) > 0.05


def test_a_pointwise_kernel_costs_its_floor_then_its_bytes(
    tables: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (profile,) = casts.fit(tables)
    monkeypatch.setattr(pointwise, "shipped", lambda family, gpu: profile)
    roofline = Roofline(H100)
    price = pointwise.prepare(np.array([[1.0], [0.0]]), H100, VLLM, roofline)
    nbytes = np.array([[0.0, 1e4, 3e9], [0.0, 1e4, 3e9]])
    own, riding = price(nbytes).seconds
    assert own[0] == riding[0] == 0.0
    assert own[1] == pytest.approx(roofline.elementwise_floor)
    assert riding[1] < 0.1e-6
    assert own[2] == pytest.approx(1.5e-6 + 3e9 / H100.memory_bytes_s, rel=0.02)
    assert own[2] - riding[2] == pytest.approx(1.5e-6, rel=0.1)
