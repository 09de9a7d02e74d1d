"""How fast the cost model is: configuration-steps per second of one core, on a 70B model.

    python benchmarks/cost_model.py [TABLE.json]

A configuration-step is one (engine shape, load) pair priced; times are those of the process.
Without a table the analytic one of the
tests is used. Run with OMP_NUM_THREADS=1 for a figure of one core.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from planc.cost_model import catalogue
from planc.cost_model.collectives import Fabric
from planc.cost_model.shape import EngineShape
from planc.cost_model.step import StepLoad, StepModel
from planc.cost_model.table import CostTable

#: what a planner asks: batches x contexts, decode only and with a prompt chunk
SEQS = np.array([1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512], dtype=float)
CONTEXTS = np.array([500, 1000, 2000, 4000, 8000, 16000, 32000], dtype=float)
CHUNKS = np.array([0, 512, 2048, 8192], dtype=float)


def shapes() -> list[EngineShape]:
    """TP x PP x formats on one GPU type."""
    formats = [
        ("bf16", "bf16", "bf16"),
        ("fp8", "fp8", "bf16"),
        ("fp8", "fp8", "fp8"),
        ("w4a16", "bf16", "fp8"),
    ]
    return [
        EngineShape("vllm", "h200_sxm", tp=tp, pp=pp, weights=weights, activations=acts, kv=kv)
        for tp in (1, 2, 4, 8)
        for pp in (1, 2)
        for weights, acts, kv in formats
    ]


def main(arguments: list[str]) -> None:
    if arguments:
        table = CostTable.from_json(Path(arguments[0]).read_text(encoding="utf-8"))
    else:
        from tests.sample_tables import llama70b

        table = llama70b()
    gpu, profile, fabric = catalogue.gpu("h200_sxm"), catalogue.engine("vllm"), Fabric(8)
    load = StepLoad(SEQS[:, None, None], CONTEXTS[None, :, None], CHUNKS[None, None, :], 2, 1000)
    size = SEQS.size * CONTEXTS.size * CHUNKS.size
    candidates = shapes()

    start = time.process_time()
    models = [StepModel(table, shape, gpu, fabric, profile) for shape in candidates]
    built = time.process_time() - start
    start = time.process_time()
    fastest = min(float(model.seconds(load).min()) for model in models)
    priced = time.process_time() - start
    steps = size * len(candidates)
    print(f"{table.model.name}: {len(candidates)} shapes x {size} loads = {steps:,} configuration-steps")
    each, one = 1e3 * built / len(candidates), 1e6 * priced / steps
    print(f"building {each:.2f} ms per shape, pricing {one:.2f} us per configuration-step")
    print(f"{steps / priced:,.0f} configuration-steps/s, {steps / (priced + built):,.0f} with building")
    print(f"fastest step of all: {1e3 * fastest:.2f} ms")


if __name__ == "__main__":
    main(sys.argv[1:])
