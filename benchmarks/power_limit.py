"""What large products take in an engine, beside kernel tables with and without the power limit.

    PLANC_DATA=... python benchmarks/power_limit.py

bf16 linears of 2,048 tokens and more, as recorded by others (Vidur, LLMServingSim) on A100, H100 and RTX PRO
6000, over the seconds of planc's tables, which were taken in short runs of one kernel. `slower` is what
`planc.cost_model.power_limit` says of the same products.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from planc.cost_model import catalogue, power_limit
from planc.cost_model.features import Array
from planc.cost_model.kernels import Gemm
from planc.cost_model.measured import costs_for

LEAST = 2048
#: (source, GPU, folder or file under PLANC_DATA)
VIDUR = (
    ("a100_sxm", "operators/vidur/compute/a100/Llama-2-70b-hf"),
    ("a100_sxm", "operators/vidur/compute/a100/Meta-Llama-3-8B"),
    ("h100_sxm", "operators/vidur/compute/h100/Llama-2-70b-hf"),
)
SIM = "operators/llmservingsim"
#: rows of the product, its columns, its depth, recorded seconds
Product = tuple[float, float, float, float]


def vidur(folder: Path) -> Iterator[Product]:
    """Products of whole layers on one GPU."""
    with (folder / "mlp.csv").open() as file:
        for row in csv.DictReader(file):
            tokens, ranks = float(row["num_tokens"]), float(row["num_tensor_parallel_workers"])
            if tokens < LEAST or ranks > 1:
                continue
            hidden, inner = float(row["n_embd"]), float(row["n_expanded_embd"])
            wide = hidden * (1 + 2 * float(row["n_kv_head"]) / float(row["n_head"]))
            for name, columns, depth in (
                ("attn_pre_proj", wide, hidden),
                ("attn_post_proj", hidden, hidden),
                ("mlp_up_proj", 2 * inner, hidden),
                ("mlp_down_proj", hidden, inner),
            ):
                yield tokens, columns, depth, 1e-3 * float(row[f"time_stats.{name}.median"])


def llama(file: Path, columns: dict[str, str], scale: float, hidden: int, inner: int) -> Iterator[Product]:
    """Linears of a Llama by LLMServingSim's names of columns: layer, tokens, time."""
    wide = hidden + 2048  # eight key and value heads of 128
    shapes = {
        "qkv_proj": (wide, hidden),
        "q_proj": (hidden, hidden),
        "o_proj": (hidden, hidden),
        "gate_proj": (inner, hidden),
        "up_proj": (inner, hidden),
        "gate_up_proj": (2 * inner, hidden),
        "down_proj": (hidden, inner),
    }
    with file.open() as lines:
        for row in csv.DictReader(lines):
            shape, tokens = shapes.get(row[columns["layer"]]), float(row[columns["tokens"]])
            if shape and tokens >= LEAST:
                yield tokens, *shape, scale * float(row[columns["time"]])


def ratios(gpu: str, products: list[Product]) -> tuple[Array, Array]:
    """(recorded over the tables' seconds, what the limit says), for each product."""
    device = catalogue.gpu(gpu)
    costs = costs_for(device, catalogue.engine("vllm"))
    recorded, limit = [], []
    for tokens, columns, depth, seconds in products:
        price = costs.gemm([Gemm(columns, depth, "bf16", "bf16")])
        alone = price(np.array([[tokens]])).seconds
        energy = np.array([[2.0 * tokens * columns * depth * power_limit.joules(device, "bf16")]])
        recorded.append(seconds / float(alone[0, 0]))
        limit.append(float(power_limit.slowdown(device, energy, alone)[0, 0]))
    return np.array(recorded), np.array(limit)


def main() -> None:
    if "PLANC_DATA" not in os.environ:
        raise SystemExit("Set PLANC_DATA to the folder with recorded layers.")
    data = Path(os.environ["PLANC_DATA"])
    seventy = {"layer": "layer_name", "tokens": "input", "time": "latency(ns)"}
    eight = {"layer": "layer", "tokens": "tokens", "time": "time_us"}
    found = [(gpu, folder.split("/", 3)[-1], list(vidur(data / folder))) for gpu, folder in VIDUR]
    h100 = data / SIM / "h100/Llama-3.1-70B/tp1/layers.csv"
    rtx = data / SIM / "perf/RTXPRO6000/meta-llama/Llama-3.1-8B/bf16/tp1/dense.csv"
    found.append(("h100_sxm", "llmservingsim", list(llama(h100, seventy, 1e-9, 8192, 28672))))
    found.append(("rtx_pro_6000", "llmservingsim", list(llama(rtx, eight, 1e-6, 4096, 14336))))
    print(f"{'GPU':14}{'source':28}{'products':>9}{'recorded / table':>20}{'slower':>8}")
    for gpu, source, products in found:
        recorded, limit = ratios(gpu, products)
        low, middle, high = np.percentile(recorded, (25, 50, 75))
        print(
            f"{gpu:14}{source:28}{len(products):9}{middle:8.2f} ({low:.2f}-{high:.2f}){np.median(limit):9.2f}"
        )


if __name__ == "__main__":
    main()
