"""Every model configuration through the front end: sizes, cache, trace time and layer classes.

    python benchmarks/models.py [NAME ...]        default: all of examples/models

Traces at full depth on meta and tabulates; nothing comes from or goes to the cache. Prints one line
per model, or the error that it ends in.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

from planc.errors import PlancError
from planc.ir.trace import trace
from planc.passes.tabulate import tabulate

MODELS = Path(__file__).resolve().parents[1] / "examples" / "models"
HEADER = ("model", "parameters", "active", "KV el/token", "format", "nodes", "trace s", "table s", "classes")
LINE = "{:22} {:>15} {:>15} {:>11} {:>7} {:>6} {:>8} {:>8}  {}"


def main(names: list[str]) -> int:
    """Prints the table; returns how many models failed."""
    print(LINE.format(*HEADER))
    failed = 0
    for path in [MODELS / f"{name}.json" for name in names] or sorted(MODELS.glob("*.json")):
        try:
            print(line(path), flush=True)
        except PlancError as error:
            failed += 1
            print(f"{path.stem:22} {error}", flush=True)
    return failed


def line(path: Path) -> str:
    """One model's line. Raises PlancError."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        graph = trace(path, cache=Path(folder))
    traced = time.perf_counter()
    table = tabulate(graph)
    done = time.perf_counter()
    classes = " ".join(f"{each.name} x{each.count}" for each in table.classes)
    facts = table.model
    return LINE.format(
        path.stem,
        f"{facts.parameters:,}",
        f"{facts.active_parameters:,}",
        table.kv_elements_per_token(),
        facts.native_format,
        len(graph.module.graph.nodes),
        f"{traced - start:.1f}",
        f"{done - traced:.1f}",
        classes + (f"  generic: {' '.join(facts.generic_ops)}" if facts.generic_ops else ""),
    )


if __name__ == "__main__":
    sys.exit(min(main(sys.argv[1:]), 1))
