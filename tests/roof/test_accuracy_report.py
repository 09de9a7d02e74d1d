"""The accuracy report from small made-up results, and what its benchmarks ask and count."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from planc.cost_model import catalogue
from planc.planner.estimate import estimate
from planc.runtime.load_test import load_test
from planc.runtime.validation.harness import Harness
from planc.runtime.validation.points import Point, PoolLabel
from tests.planner.cases import request, table

ROOT = Path(__file__).resolve().parents[2]
LABELS = {"model": "llama-3.1-70b", "gpu": "h200_sxm", "engine": "trtllm", "weights": "fp8", "mode": "agg"}


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a script of docs/ or benchmarks/ by its name."""
    for folder in ("docs", "benchmarks"):
        monkeypatch.syspath_prepend(str(ROOT / folder))

    def load(name: str) -> ModuleType:
        __import__(name)
        return sys.modules[name]

    return load


def figures(n: int, tpot: float) -> dict[str, Any]:
    found: dict[str, Any] = {"n": n, "n_unpredicted": 0, "within_band": 0.5, "n_families": 3}
    for metric in ("tpot", "ttft", "throughput"):
        found |= {f"{metric}_median_ape": tpot, f"{metric}_mape": tpot + 1, f"{metric}_bias": -tpot}
    return found | {"spearman": 0.99, "pick_meets_slo": 1.0, "pick_regret": 0.01}


def blind() -> dict[str, Any]:
    return {
        **figures(20, 12.5),
        "by": list(LABELS),
        "linted": figures(18, 8.0),
        "groups": [{**LABELS, **figures(20, 12.5)}],
        "lint": {"n_flagged": 2, "share_passed": 0.9, "rules": {"monotone": 2}},
        "unpredicted": [],
    }


def predictions() -> str:
    """A CSV of points whose TPOT is predicted 20 % too low at high concurrency, and well at low."""
    names = ["id", *LABELS, "isl", "concurrency", "gpus", "lint", "unpredicted", "ttft_steady_ms"]
    metrics = ("tpot_ms", "ttft_ms", "throughput")
    names += [f"{metric}{end}" for metric in metrics for end in ("", "_low", "_high", "_measured")]
    lines = [",".join(names)]
    for i in range(20):
        value = 8.0 if i >= 10 else 10.0
        numbers = [value, 0.9 * value, 1.1 * value, 10.0] * 3
        lines.append(
            ",".join(map(str, [f"p{i}", *LABELS.values(), 1024, 2**i, 4, "", "", value / 2, *numbers]))
        )
    return "\n".join(lines)


def test_a_report_of_nothing_says_so(script: Any, tmp_path: Path) -> None:
    text = script("accuracy").report({}, tmp_path, "2026-01-01")
    assert text.count("Not run") == len(script("accuracy").SECTIONS)
    assert "No result is present" in text


def test_a_report_shows_what_the_runs_found(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script("accuracy"), "KEPT", tmp_path / "none")
    results = tmp_path / "results"
    results.mkdir()
    (results / "blind.json").write_text(json.dumps(blind()))
    (results / "predictions.csv").write_text(predictions())
    assert script("accuracy").main(["--results", str(results), "--out", str(tmp_path)]) == 0
    text = (tmp_path / "accuracy.md").read_text()
    assert "12.5 / 13.5 / -12.5" in text
    assert "8.0 / 9.0 / -8.0" in text
    assert "| 10 | 9 | 4 | 50 % |" in text  # TTFT measured, predicted, steady; the start's part
    assert "monotone 2" in text
    assert "+0 % below the middle concurrency and -20 % above it" in text
    assert "Bands too narrow for llama-3.1-70b" in text
    assert text.count("Not run") == 6
    plots = {path.name for path in (tmp_path / "accuracy").glob("*.svg")}
    assert plots == {"tpot.svg", "ttft.svg", "groups.svg", "bands.svg"}


def test_the_same_results_give_the_same_plots(script: Any, tmp_path: Path) -> None:
    plot = script("accuracy_plots")
    pairs = [("a", 1.0, 1.1), ("b", 2.0, 1.9)]
    for name in ("one.svg", "two.svg"):
        plot.scatter(tmp_path / name, pairs, "TPOT, ms")
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()


def test_a_run_that_fails_leaves_the_last_result(script: Any, tmp_path: Path) -> None:
    accuracy = script("accuracy")
    (tmp_path / "x.json").write_text("1")
    (tmp_path / "y.json").write_text("1")
    runs = {"x.json": "false > FILE", "y.json": "echo 2 > FILE"}
    accuracy.run(accuracy.Section("s", "S", runs, lambda *_: []), tmp_path)
    assert (tmp_path / "x.json").read_text() == "1"
    assert (tmp_path / "y.json").read_text() == "2\n"
    assert not list(tmp_path.glob(".*"))


# -- benchmarks --------------------------------------------------------------------------


def point(**changes: Any) -> Point:
    base: dict[str, Any] = {
        **LABELS,
        "row": 1,
        "id": "a",
        "engine_version": "",
        "isl": 1000,
        "osl": 100,
        "concurrency": 64,
        "tp": 4,
        "pp": 1,
        "attention_dp": 1,
        "moe_tp": 1,
        "moe_ep": 1,
        "gpus": 4,
        "prefill": None,
        "decode": None,
        "ttft_ms": 100.0,
        "tpot_ms": 10.0,
    }
    return Point(**{**base, **changes})


HARNESS = Harness(True, 10, 0.8, 1.0, 1, 1, 0, kv="fp8")
KNOWN = ["meta-llama/Meta-Llama-3.1-70B", "nvidia/Llama-3.1-70B-Instruct-FP8", "openai/gpt-oss-120b"]


def test_aiconfigurator_is_asked_for_the_same_configuration(script: Any) -> None:
    first = script("aiconfigurator_questions").attempts(point(), HARNESS, KNOWN)[0]
    assert first["model_path"] == "meta-llama/Meta-Llama-3.1-70B"
    assert (first["isl"], first["osl"]) == (900, 90)
    assert (first["tp_size"], first["batch_size"]) == (4, 64)
    assert (first["gemm_quant_mode"], first["kvcache_quant_mode"]) == ("fp8", "fp8")


def test_what_a_point_leaves_open_is_asked_in_turns(script: Any) -> None:
    ask = script("aiconfigurator_questions").attempts
    open_kernel = ask(point(model="gpt-oss-120b", gpu="b200_sxm", weights="mxfp4"), HARNESS, KNOWN)
    assert [item.get("moe_quant_mode") for item in open_kernel] == ["w4a8_mxfp4_mxfp8"] * 2 + [None] * 2
    dp = ask(point(attention_dp=4, tp=1), HARNESS, KNOWN)[0]
    assert (dp["batch_size"], dp["attention_dp_size"]) == (16, 4)


def test_pools_are_asked_pool_by_pool(script: Any) -> None:
    pools = {"prefill": PoolLabel(2, 4, 1, 1), "decode": PoolLabel(1, 1, 8, 8)}
    asked = script("aiconfigurator_questions").attempts(point(mode="disagg", **pools), HARNESS, KNOWN)[0]
    assert (asked["prefill_num_workers"], asked["prefill_moe_tp_size"]) == (2, 4)
    assert (asked["decode_batch_size"], asked["decode_moe_ep_size"]) == (8, 8)


def test_a_model_that_it_does_not_know_is_not_asked(script: Any) -> None:
    questions = script("aiconfigurator_questions")
    with pytest.raises(questions.Unaskable, match="no checkpoint"):
        questions.attempts(point(model="glm-5"), HARNESS, KNOWN)


def test_limits_of_a_throughput_run(script: Any) -> None:
    limits = script("trtllm_throughput").bench_limits
    assert limits(10, 1000, 1000, 1) == (64, 2048)
    assert limits(300, 1000, 1000, 1) == (384, 2048)
    assert limits(300, 2048, 128, 1) == (384, 5120)
    assert limits(1e6, 20000, 2000, 1) == (4096, 32768)
    assert limits(1e6, 128, 128, 8) == (512, 2048)
    assert limits(100, 5000, 5000, 1) == (128, 5128)  # a whole prompt beside the batch


def test_graphs_of_a_throughput_run_end_at_its_batch(script: Any) -> None:
    bench = script("trtllm_throughput")
    predict = bench.Predictor(lambda name: table())
    for isl, osl in ((5000, 500), (20000, 2000)):
        predict(bench.Row("Llama 3.1 8B", "h200_sxm", "fp8", 1, 1, 1, isl, osl, 1.0))
    largest = {batch: clock.model.graph_sizes[-1] for (_, _, batch), clock in predict.clocks.items()}
    assert len(largest) == 2
    assert all(size == batch for batch, size in largest.items())


def test_choices_count_what_lies_within_two_percent(script: Any) -> None:
    bench = script("trtllm_throughput")
    row = lambda tp, measured: bench.Row("m", "g", "fp8", tp, 1, tp, 1, 1, measured)  # noqa: E731
    near = [bench.Prediction(row(1, 99.0), 120.0, 1, ""), bench.Prediction(row(2, 100.0), 110.0, 1, "")]
    assert bench.choices(near, lambda row: 1.0) == {"groups": 1, "right": 1, "share": 1.0}
    far = [bench.Prediction(row(1, 50.0), 120.0, 1, ""), near[1]]
    assert bench.choices(far, lambda row: 1.0)["right"] == 0
    assert bench.choices(far, lambda row: 1.0 / row.gpus)["right"] == 1
    assert bench.choices(far[:1], lambda row: 1.0)["groups"] == 0


def test_offline_runs_are_what_rate_max_estimates(script: Any) -> None:
    """`planc estimate` with the run's settings gives the benchmark's throughput."""
    bench = script("trtllm_throughput")
    row = bench.Row("Llama 3.1 8B", "h200_sxm", "fp8", 1, 1, 1, 5000, 500, 1.0)
    found = bench.Predictor(lambda name: table())(row)
    seats = bench.bench_requests(table(), catalogue.gpu("h200_sxm"), row)
    batch, tokens = bench.bench_limits(seats, 5000, 500, 1)
    wanted = request(
        inventory={"nodes": [{"gpu": "h200_sxm", "gpus_per_node": 1}]},
        workload={
            "isl": 5000,
            "osl": 500,
            "rate": "max",
            "load_test": {"requests": bench.REQUESTS[5000, 500], "length_low": 1, "length_high": 1},
        },
        slo={},
        constraints={"engines": ["trtllm"]},
    )
    engine = estimate(
        wanted,
        table(),
        weights="fp8",
        kv="fp8",
        max_num_seqs=batch,
        max_num_batched_tokens=tokens,
        gpu_memory_utilization=bench.CACHE_SHARE,
        replicas=1,
    )
    told = load_test(wanted, table(), engine.replica, 1)
    assert told.rates["output_tok_s"] == pytest.approx(found.tokens_s, rel=0.03)
