"""What formats per part buy under an accuracy budget: the best mixed engine against the best of one format.

    python benchmarks/mixed_formats.py [--models llama-3.1-70b ...] [--gpus h100_sxm ...]

For every model, GPU and budget one search of a chat workload (2,000 tokens in, 500 out, TPOT at most 40 ms)
prices all engines on one node of eight; the table shows the most requests/s per GPU that an engine of one
format carries, the most that a mixed one does, and what that one is made of. The last column is the time of
one search in seconds, and how much of it goes into finding mixtures.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from planc.passes.tabulate import load_table
from planc.planner import candidates as listing
from planc.planner.offers import Offer
from planc.planner.request import make_request
from planc.planner.search import Search

ROOT = Path(__file__).parents[1]
MODELS = ("llama-3.1-70b", "qwen3-32b", "qwen3-235b-a22b")
GPUS = ("h100_sxm", "l40s")
BUDGETS = (0.001, 0.003, 0.006, 0.009)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--gpus", nargs="+", default=GPUS)
    given = parser.parse_args()
    words = f"{'one format':>10} {'mixed':>8} {'gain':>6}  s (mixing)  made of"
    print(f"{'model':16} {'GPU':9} {'budget':>6} {words}")
    for model in given.models:
        for gpu in given.gpus:
            for budget in BUDGETS:
                print(f"{model:16} {gpu:9} {budget:6} {compared(model, gpu, budget)}", flush=True)


def compared(model: str, gpu: str, budget: float) -> str:
    """The rest of a line."""
    place = ROOT / f"examples/models/{model}.json"
    request = make_request(
        {
            "model": str(place),
            "inventory": {"nodes": [{"gpu": gpu, "gpus_per_node": 8}]},
            "workload": {"isl": 2000, "osl": 500, "request_rate": "max"},
            "slo": {"tpot_mean_ms": 40},
            "objective": "max_goodput",
            "constraints": {"max_accuracy_drop": budget, "serving": "aggregated"},
        }
    )
    table, spent = load_table(place), 0.0
    find = listing.mixtures

    def timed(*arguments: object) -> object:
        nonlocal spent
        start = time.process_time()
        found = find(*arguments)  # type: ignore[arg-type]
        spent += time.process_time() - start
        return found

    listing.mixtures = timed  # type: ignore[assignment]
    start = time.process_time()
    try:
        offers = Search(request, table).offers
    finally:
        listing.mixtures = find
    whole = time.process_time() - start
    plain = best([offer for offer in offers if not offer.engine.candidate.shape.formats])
    mixed = best([offer for offer in offers if offer.engine.candidate.shape.formats])
    rates = [rate(one) for one in (plain, mixed)]
    gain = f"{100 * (rates[1] / rates[0] - 1):+5.1f}%" if all(rates) else "     -"
    made = "" if mixed is None else mixed.engine.candidate.label().partition(" ")[2]
    return f"{rates[0]:10.3f} {rates[1]:8.3f} {gain}  {whole:4.1f} ({spent:.2f})  {made}"


def best(offers: Sequence[Offer]) -> Offer | None:
    return max(offers, key=rate, default=None)


def rate(offer: Offer | None) -> float:
    """Requests/s per GPU."""
    return 0.0 if offer is None else offer.capacity / offer.engine.candidate.shape.world


if __name__ == "__main__":
    main()
