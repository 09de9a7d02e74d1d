"""Workloads as numbers."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from planc.errors import FileUnreadable, InvalidField
from planc.planner.request import Request, make_request
from planc.planner.traffic import traffic
from tests.planner.cases import raw


def requested(workload: object, base: Path | None = None) -> Request:
    request = make_request(raw(workload=workload))
    request._base = base
    return request


def test_fixed_lengths_give_exact_moments() -> None:
    load = traffic(
        requested({"isl": 4000, "osl": 1000, "request_rate": 3, "prefix_hit_rate": 0.25}), "causal_lm"
    )
    assert (load.isl_mean, load.osl_mean, load.rate) == (4000, 1000, 3)
    assert load.new_tokens == 3000
    assert load.decode_steps == 999
    assert load.decode_context == 4500
    assert load.prefill_context == 2500  # the middle of tokens 1000..4000
    assert load.resident_sd == pytest.approx(1000 / math.sqrt(12))
    assert load.longest == 5000


@given(
    p50=st.floats(10, 5000),
    ratio=st.floats(1.1, 6.0),
)
def test_percentiles_are_kept(p50: float, ratio: float) -> None:
    spread = {"p50": p50, "p95": p50 * ratio}
    load = traffic(requested({"isl": spread, "osl": 10, "rate": "max"}), "causal_lm")
    assert load.quantile(load.isl, 0.5) == pytest.approx(p50, rel=0.1)
    assert load.quantile(load.isl, 0.95) == pytest.approx(p50 * ratio, rel=0.15)


@given(mean=st.floats(50, 5000), ratio=st.floats(1.0, 5.0))
def test_a_mean_and_one_percentile_make_a_lognormal(mean: float, ratio: float) -> None:
    load = traffic(
        requested({"isl": {"mean": mean, "p95": mean * ratio}, "osl": 9, "rate": "max"}), "causal_lm"
    )
    assert load.isl_mean == pytest.approx(mean, rel=1e-3)


def test_mean_is_met_by_the_tail() -> None:
    spread = {"mean": 1200, "p50": 800, "p90": 2000}
    load = traffic(requested({"isl": spread, "osl": 10, "rate": "max"}), "causal_lm")
    assert load.isl_mean == pytest.approx(1200, rel=0.02)
    assert load.quantile(load.isl, 0.5) == pytest.approx(800, rel=0.05)


def test_a_mean_that_cannot_be() -> None:
    with pytest.raises(InvalidField, match="no distribution"):
        traffic(
            requested({"isl": {"mean": 10, "p50": 800, "p90": 2000}, "osl": 10, "rate": "max"}), "causal_lm"
        )


def test_classes_mix_by_rate() -> None:
    load = traffic(
        requested([{"isl": 100, "osl": 10, "request_rate": 3}, {"isl": 1000, "osl": 50, "request_rate": 1}]),
        "causal_lm",
    )
    assert load.rate == 4
    assert load.isl_mean == pytest.approx(325)
    assert load.osl_mean == pytest.approx(20)


@pytest.mark.parametrize(
    ("kind", "workload", "field"),
    [
        ("causal_lm", {"isl": 10, "rate": "max"}, "osl"),
        ("causal_lm", {"isl": 10, "osl": 0, "rate": "max"}, "osl"),
        ("causal_lm", {"osl": 10, "rate": "max"}, "isl"),
        ("encoder", {"rate": "max"}, "isl"),
    ],
)
def test_lengths_that_the_model_needs(kind: str, workload: dict[str, object], field: str) -> None:
    with pytest.raises(InvalidField, match=rf"workload\.{field}"):
        traffic(requested(workload), kind)


def test_encoders_have_no_output() -> None:
    load = traffic(requested({"isl": 256, "osl": 0, "request_rate": 5}), "encoder")
    assert load.decode_steps == 0
    assert traffic(requested({"request_rate": 5}), "module").isl_mean == 1


def test_histogram(tmp_path: Path) -> None:
    (tmp_path / "h.csv").write_text("tokens,count\n10,3\n100,1\n")
    load = traffic(requested({"isl": {"histogram": "h.csv"}, "osl": 1, "rate": "max"}, tmp_path), "causal_lm")
    assert load.isl_mean == pytest.approx(32.5, rel=0.05)
    for text in ("", "10,x\n1,1\n5,y\n", "-1,3\n", "10,0\n"):
        (tmp_path / "h.csv").write_text(text)
        with pytest.raises(FileUnreadable, match="histogram"):
            traffic(
                requested({"isl": {"histogram": "h.csv"}, "osl": 1, "rate": "max"}, tmp_path), "causal_lm"
            )


def test_mooncake_trace(tmp_path: Path) -> None:
    rows = [
        {"timestamp": 500 * i, "input_length": 1024, "output_length": 10 + i, "hash_ids": [0, i + 1]}
        for i in range(5)
    ]
    (tmp_path / "t.jsonl").write_text("\n".join(json.dumps(r) for r in rows))
    load = traffic(requested({"trace": "t.jsonl", "format": "mooncake"}, tmp_path), "causal_lm")
    assert load.rate == pytest.approx(2.0)
    assert load.arrival_cv2 == pytest.approx(0.0)
    assert load.hit_rate == pytest.approx(4 / 10)
    assert load.osl_mean == pytest.approx(12)
    faster = traffic(
        requested({"trace": "t.jsonl", "format": "mooncake", "request_rate": 9}, tmp_path), "causal_lm"
    )
    assert faster.rate == 9


def test_other_traces(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:17:03.9799600,4808,10\n2023-11-16 18:17:04.9799600,3180,8\n"
    )
    load = traffic(requested({"trace": "a.csv", "format": "azure"}, tmp_path), "causal_lm")
    assert load.rate == pytest.approx(1.0)
    assert load.isl_mean == 3994
    (tmp_path / "v.jsonl").write_text(
        '{"arrival_time": 1.0, "input_toks": 5, "output_toks": 2}\n'
        '{"arrival_time": 1.5, "input_toks": 7, "output_toks": 4}\n'
    )
    assert traffic(
        requested({"trace": "v.jsonl", "format": "vllm"}, tmp_path), "causal_lm"
    ).rate == pytest.approx(2.0)
    with pytest.raises(FileUnreadable, match="mooncake"):
        traffic(requested({"trace": "v.jsonl", "format": "mooncake"}, tmp_path), "causal_lm")
    (tmp_path / "one.jsonl").write_text('{"arrival_time": 1.0, "input_toks": 5, "output_toks": 2}\n')
    with pytest.raises(FileUnreadable, match="fewer than two"):
        traffic(requested({"trace": "one.jsonl", "format": "vllm"}, tmp_path), "causal_lm")


@pytest.mark.skipif("PLANC_DATA" not in os.environ, reason="PLANC_DATA names no folder of measured data")
def test_recorded_traces() -> None:
    base = Path(os.environ["PLANC_DATA"]) / "traces"
    workload = {"trace": "mooncake_conversation_trace.jsonl", "format": "mooncake"}
    load = traffic(requested(workload, base), "causal_lm")
    assert load.hit_rate == pytest.approx(0.366, abs=0.01)  # published for an unlimited cache
    code = traffic(
        requested({"trace": "AzureLLMInferenceTrace_code.csv", "format": "azure"}, base), "causal_lm"
    )
    assert math.sqrt(code.arrival_cv2) > 3  # bursty
    assert np.isfinite(code.isl_mean)
