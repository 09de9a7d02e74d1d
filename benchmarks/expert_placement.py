"""How even expert placement makes skewed routing: the fullest rank over the mean, and the time it takes.

    python benchmarks/expert_placement.py [--experts 256] [--layers 16]

Popularity follows the law by which routed experts are priced where nothing was counted
(`planc.cost_model.routing.usual`).
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from planc.cost_model.expert_placement import contiguous, place_experts
from planc.cost_model.routing import usual


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--layers", type=int, default=16)
    options = parser.parse_args()
    columns = ("in order", "placed", "1 extra", "2 extra", "over bound", "ms")
    print(f"{'ranks':>5}" + "".join(f"{name:>11}" for name in columns))
    for ranks in (ranks for ranks in (8, 16, 32, 64) if options.experts % ranks == 0):
        loads = usual(options.experts).counts[: options.layers]
        ordered = np.mean([contiguous(load, ranks).imbalance for load in loads])
        started = time.perf_counter()
        placed = [[place_experts(load, ranks, extra) for load in loads] for extra in (0, 1, 2)]
        spent = (time.perf_counter() - started) / (3 * len(loads))
        even = [float(np.mean([one.imbalance for one in row])) for row in placed]
        gap = max(one.gap for row in placed for one in row)
        shares = "".join(f"{value:11.3f}" for value in (ordered, *even))
        print(f"{ranks:5}{shares}{gap:11.2%}{spent * 1e3:11.1f}")


if __name__ == "__main__":
    main()
