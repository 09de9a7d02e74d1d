"""The roofline against public measurements nobody tuned it to row by row. Needs `PLANC_DATA`.

Limits are wide: this is physics with one set of named efficiencies, inside its own band. Fitted
profiles are held to narrower ones.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from planc.cost_model import catalogue
from planc.cost_model.collectives import Fabric, seconds
from planc.cost_model.kernels import Attention, AttentionLoad, Gemm
from planc.cost_model.memory import memory_map
from planc.cost_model.roofline import Roofline
from planc.cost_model.shape import EngineShape
from planc.cost_model.step import StepLoad, StepModel
from tests.sample_tables import llama8b, llama70b, qwen32b

DATA = Path(os.environ.get("PLANC_DATA", ""))
pytestmark = pytest.mark.skipif("PLANC_DATA" not in os.environ, reason="PLANC_DATA names no measured data")


def read(path: str) -> Iterator[dict[str, str]]:
    with (DATA / path).open(encoding="utf-8") as file:
        yield from csv.DictReader(file)


def median_error(pairs: list[tuple[float, float]]) -> float:
    """Of (predicted, measured)."""
    ratios = np.array(pairs)
    return float(np.median(np.abs(ratios[:, 0] / ratios[:, 1] - 1)))


TABLES = {"llama-3.1-70b": llama70b(), "llama-3.1-8b": llama8b(), "qwen3-32b": qwen32b()}

#: cells of dense models, and the cache format they ran with where it is not fp8 (found from where
#: queueing begins); Llama-3.1-8B on H200 in vLLM is left out: its rows imply impossible prompt rates
CELLS = [
    ("llama-3.1-70b", "h100_sxm", "vllm", "fp8", "bf16"),
    ("llama-3.1-70b", "b200_sxm", "vllm", "fp8", "fp8"),
    ("llama-3.1-70b", "b200_sxm", "vllm", "nvfp4", "fp8"),
    ("llama-3.1-70b", "h200_sxm", "trtllm", "fp8", "fp8"),
    ("llama-3.1-8b", "h200_sxm", "sglang", "fp8", "bf16"),
    ("qwen3-32b", "h100_sxm", "trtllm", "fp8", "fp8"),
]


@pytest.mark.parametrize("cell", CELLS, ids=lambda c: "-".join(c[:4]))
def test_time_per_output_token_of_dense_models(cell: tuple[str, ...]) -> None:
    """Closed form of a closed loop: a decode step, and the other requests' prompts spread over its tokens."""
    model, gpu, engine, weights, kv = cell
    table, profile, entry = TABLES[model], catalogue.engine(engine), catalogue.gpu(gpu)
    steps: dict[int, tuple[StepModel, float]] = {}
    pairs = []
    for row in read("serving/points.csv"):
        if (row["model"], row["gpu"], row["engine"], row["weights"], row["mode"]) != (*cell[:4], "agg"):
            continue
        tp = int(row["tp"])
        if tp not in steps:
            shape = EngineShape(engine, gpu, tp=tp, weights=weights, activations=weights, kv=kv)
            limits = {"max_num_seqs": 256, "max_num_batched_tokens": 8192, "max_model_len": 9216}
            room = memory_map(table, shape, entry, profile, **limits).kv_tokens  # type: ignore[arg-type]
            steps[tp] = StepModel(table, shape, entry, Fabric(8), profile), float(room)
        step, room = steps[tp]
        isl, osl = 0.9 * float(row["isl"]), 0.9 * float(row["osl"])  # lengths are drawn from 0.8-1.0 of these
        batch = min(float(row["concurrency"]), room / (isl + 0.6 * osl))
        decode = float(step.seconds(StepLoad(batch, isl + osl / 2)))
        chunk = min(8192 - batch, isl)
        mixed = float(step.seconds(StepLoad(batch, isl + osl / 2, chunk, 1, (isl - chunk) / 2)))
        prompt = (mixed - decode) * isl / chunk
        pairs.append((1e3 * (decode + (batch - 1) / osl * prompt), float(row["tpot_ms"])))
    assert len(pairs) >= 40
    assert median_error(pairs) < 0.15


def test_attention_on_a_workstation_gpu() -> None:
    """Llama-3.1-8B, vLLM 0.19, RTX PRO 6000: prompts or decodes alone."""
    price = Roofline(catalogue.gpu("rtx_pro_6000"))
    kernels = {
        part: price.attention(
            [Attention("attention", part, 2.0, q_heads=32, kv_heads=8, qk_dim=128, v_dim=128)]  # type: ignore[arg-type]
        )
        for part in ("prefill", "decode")
    }
    pairs = []
    path = "operators/llmservingsim/perf/RTXPRO6000/meta-llama/Llama-3.1-8B/bf16/tp1/attention.csv"
    for row in read(path):
        chunk, cached, seqs, context = (
            float(row[name]) for name in ("prefill_chunk", "kv_prefill", "n_decode", "kv_decode")
        )
        if chunk and seqs:
            continue
        part = "prefill" if chunk else "decode"
        tokens, sequences = chunk + seqs, 1.0 if chunk else seqs
        attended = chunk * cached + chunk * (chunk + 1) / 2 + seqs * context
        keys = (cached + chunk) * bool(chunk) + seqs * context
        one = lambda value: np.array([[value]])  # noqa: E731
        load = AttentionLoad(
            one(attended * 4 * 32 * 128),
            one(keys * 2 * 8 * 128),
            one(tokens * 80 * 128),
            np.array([tokens]),
            np.array([sequences]),
            np.array([context if seqs else cached]),
        )
        pairs.append((1e6 * kernels[part](load).seconds[0, 0], float(row["time_us"])))
    assert len(pairs) > 100
    assert median_error(pairs) < 0.25


def test_linears_on_a_workstation_gpu() -> None:
    """The same run: the four linears of a layer at 1-2,048 tokens."""
    shapes = {
        "qkv_proj": (6144, 4096),
        "o_proj": (4096, 4096),
        "gate_up_proj": (28672, 4096),
        "down_proj": (4096, 14336),
    }
    price = Roofline(catalogue.gpu("rtx_pro_6000"))
    kernels = {name: price.gemm([Gemm(n, k, "bf16", "bf16")]) for name, (n, k) in shapes.items()}
    path = "operators/llmservingsim/perf/RTXPRO6000/meta-llama/Llama-3.1-8B/bf16/tp1/dense.csv"
    pairs = [
        (1e6 * kernels[row["layer"]](np.array([[float(row["tokens"])]])).seconds[0, 0], float(row["time_us"]))
        for row in read(path)
        if row["layer"] in shapes
    ]
    assert len(pairs) > 400
    assert median_error(pairs) < 0.15


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_library_all_reduce_on_a_node_of_h100(ranks: int) -> None:
    link = Fabric(8).inner(catalogue.gpu("h100_sxm"), ranks)
    pairs = [
        (1e3 * float(seconds("all_reduce", float(row["size"]), ranks, link)), measured)
        for row in read("operators/vidur/network/h100_dgx/all_reduce.csv")
        if int(row["num_workers"]) == ranks
        and (measured := float(row["time_stats.all_reduce.median"])) > 0
        and int(row["devices_per_node"]) == ranks
    ]
    assert len(pairs) > 20
    assert median_error(pairs) < 0.30
