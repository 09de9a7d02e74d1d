"""How fast the serving simulator is, on one core: events, steps and requests per second, and memory.

    python benchmarks/simulator.py [--requests N] [--trace FILE.csv]

Llama-3.1-70B in fp8 on 4 x H200 under vLLM's rules. Four loads: a closed loop as benchmark harnesses
run it; production chat (19,366 requests of one hour; with --trace the Azure trace itself, otherwise
drawn with its means); a million requests; the same rate on too small a cache, which preempts. Seconds
are CPU time of this process, what a core of its own would take; peak memory is its own (getrusage).
"""

from __future__ import annotations

import argparse
import csv
import resource
import sys
import time
from datetime import datetime
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from planc.cost_model import catalogue
from planc.cost_model.collectives import Fabric
from planc.cost_model.shape import EngineShape
from planc.cost_model.step import StepModel
from planc.runtime.simulator import Clock, Load, Records, Rules, Server, closed_loop, open_loop, simulate
from planc.runtime.simulator.load import gamma, lognormal, poisson, uniform
from tests.sample_tables import llama70b

BLOCKS, BLOCK = 24_000, 16


def server(clock: Clock, blocks: int = BLOCKS, **rules: object) -> Server:
    return Server(clock, Rules.of(catalogue.engine("vllm"), **rules), blocks, BLOCK)  # type: ignore[arg-type]


def azure(path: Path) -> Load:
    """TIMESTAMP, ContextTokens, GeneratedTokens."""
    with path.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    times = np.array([datetime.fromisoformat(row["TIMESTAMP"][:26]).timestamp() for row in rows])
    lengths = [[max(int(row[name]), 1) for row in rows] for name in ("ContextTokens", "GeneratedTokens")]
    return open_loop(times - times[0], *lengths)


def report(name: str, of: Server, load: Load) -> Records:
    start = time.process_time()
    found = simulate(of, load)
    seconds = time.process_time() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    said = found.summary()
    print(
        f"{name:<34}{load.requests:>10,} requests{seconds:>9.2f} s{load.requests / seconds:>10,.0f} req/s"
        f"{found.events / seconds:>10,.0f} events/s{found.steps / seconds:>12,.0f} steps/s"
        f"{said['preemptions']:>9,} preempted{peak:>8,.0f} MiB peak"
    )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--requests", type=int, default=1_000_000, help="of the long trace")
    parser.add_argument("--trace", type=Path, help="AzureLLMInferenceTrace_conv.csv")
    given = parser.parse_args()
    gpu, engine = catalogue.gpu("h200_sxm"), catalogue.engine("vllm")
    shape = EngineShape("vllm", "h200_sxm", tp=4, weights="fp8", activations="fp8", kv="fp8")
    start = time.process_time()
    model = StepModel(llama70b(), shape, gpu, Fabric(8), engine)
    clock = Clock(model)
    print(f"step model and clock: {1e3 * (time.process_time() - start):.1f} ms")
    for clients in (64, 64, 512):
        load = closed_loop(clients, 10 * clients, uniform(820, 1024), uniform(820, 1024))
        report(f"closed loop, {clients} clients", server(clock, max_num_seqs=clients), load)
    if given.trace:
        chat = azure(given.trace)
    else:
        chat = open_loop(gamma(5.4, 19_366, 1.3), lognormal(1155, 0.95, 14_000), lognormal(211, 0.8, 1000))
    report("chat, one hour", server(clock), chat)
    arrivals = poisson(6.0, given.requests)
    load = open_loop(arrivals, lognormal(1155, 0.95, 14_000), lognormal(211, 0.8, 1000))
    report("chat, long", server(clock), load)
    few = min(given.requests, 100_000)
    load = open_loop(arrivals[:few], lognormal(1155, 0.95, 8_000), lognormal(211, 0.8, 1000))
    report("chat, small cache", server(clock, 4_000), load)


if __name__ == "__main__":
    main()
