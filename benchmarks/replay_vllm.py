"""A recorded run of vLLM against its replay: what the simulator says of the same arrivals.

    PLANC_DATA=... python benchmarks/replay_vllm.py [--steps] [--mixed] [--json FILE]

The run: vLLM 0.19, Llama-3.1-8B in bf16 on one RTX PRO 6000, 300 requests. It is replayed twice, with
step times straight from the layer times that were recorded on the same machine (what is wrong then is the
simulator or the host's share), and with planc's own cost model.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from planc.cost_model import catalogue
from planc.cost_model.collectives import Fabric
from planc.cost_model.shape import EngineShape
from planc.cost_model.step import StepLoad, StepModel
from planc.passes.tabulate import load_table
from planc.planner.trace import read
from planc.runtime.simulator import Clock, Rules, Server, open_loop, simulate
from planc.runtime.simulator.clock import Line, StepTimes

Array = NDArray[np.float64]

RUN = "replay/RTXPRO6000/Llama-3.1-8B"
LAYERS = "operators/llmservingsim/perf/RTXPRO6000/meta-llama/Llama-3.1-8B/bf16/tp1"
MODEL = "models/llama-3.1-8b.json"
PER_LAYER = (
    "qkv_proj",
    "rotary_emb",
    "o_proj",
    "layernorm",
    "layernorm",
    "gate_up_proj",
    "act_fn",
    "down_proj",
)
DEPTH = 32
ATTENTION = ("prefill_chunk", "kv_prefill", "n_decode", "kv_decode")
#: nested mappings, an axis each, with seconds at the leaves
Tree = dict[int, Any]


def _table(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def _curves(path: Path, axis: str) -> dict[str, tuple[Array, Array]]:
    """layer -> (axis, seconds)."""
    found: dict[str, list[tuple[float, float]]] = {}
    for row in _table(path):
        found.setdefault(row["layer"], []).append((float(row[axis]), float(row["time_us"]) * 1e-6))
    return {name: tuple(np.array(sorted(points)).T) for name, points in found.items()}  # type: ignore[misc]


@dataclass
class Recorded:
    """Step times from recorded layer times, in the form of `planc.runtime.simulator.Clock`.

    Attention is linear between recorded points; chunks beyond a step's first add what they take alone, less
    a kernel's floor. What kernels measured alone leave out is as in the engine's profile; the host's work per
    sequence is hidden behind the device's, as vLLM 0.19 schedules the next step while one runs.
    """

    folder: Path
    profile: catalogue.EngineProfile
    stages: int = 1

    @cached_property
    def dense(self) -> Mapping[str, tuple[Array, Array]]:
        return _curves(self.folder / "dense.csv", "tokens")

    @cached_property
    def logits(self) -> Mapping[str, tuple[Array, Array]]:
        return _curves(self.folder / "per_sequence.csv", "sequences")

    @cached_property
    def lattices(self) -> tuple[Tree, Tree, Tree]:
        """Seconds by chunk, cached, decoding sequences, context: without chunks, for chunks of powers of 1.5
        (contexts from 512 on), and for chunks of powers of two."""
        found: tuple[Tree, Tree, Tree] = ({}, {}, {})
        for row in _table(self.folder / "attention.csv"):
            chunk, cached, seqs, context = (int(row[name]) for name in ATTENTION)
            which = 0 if not chunk else 2 if _power(chunk) else 1
            leaf = found[which].setdefault(chunk, {}).setdefault(cached, {}).setdefault(seqs, {})
            leaf[context] = float(row["time_us"]) * 1e-6
        return found

    def attention(self, chunk: float, cached: float, seqs: float, context: float) -> float:
        if not chunk and not seqs:
            return 0.0
        plain, fine, coarse = self.lattices
        near = chunk <= max(fine) and (context >= 512 or not seqs)
        return _at(fine if chunk and near else coarse if chunk else plain, (chunk, cached, seqs, context))

    def _step(self, rows: float, sampled: float, attention: float) -> float:
        layer = sum(float(np.interp(rows, *self.dense[name])) for name in PER_LAYER)
        once = sum(float(np.interp(rows, *self.dense[name])) for name in ("embedding", "final_layernorm"))
        head = sum(float(np.interp(sampled, *self.logits[name])) for name in ("lm_head", "sampler"))
        engine = self.profile
        device = engine.kernel_factor * (DEPTH * (layer + attention) + once + head)
        hidden = engine.per_sequence_us * sampled * 1e-6
        return max(device, hidden) + (engine.step_us + DEPTH * engine.layer_us) * 1e-6

    def line(self, seqs: int, context: float, draft: int = 0) -> Line:
        padded = min(size for size in self.profile.cuda_graphs.sizes(512) if size >= seqs)
        now = self._step(padded, seqs, self.attention(0, 0, seqs, context))
        ahead = 64
        slope = (
            DEPTH
            * (self.attention(0, 0, seqs, context + ahead) - self.attention(0, 0, seqs, context))
            / ahead
        )
        return Line(now, slope, ahead)

    def mixed(
        self, seqs: int, context: float, chunks: Sequence[tuple[int, int]], draft: int = 0
    ) -> tuple[float, float]:
        (new, cached), *more = chunks
        attention = self.attention(new, cached, seqs, context)
        floor = self.attention(16, 0, 0, 0)
        attention += sum(max(self.attention(n, p, 0, 0) - floor, 0.0) for n, p in more)
        rows = seqs + sum(n for n, _ in chunks)
        return self._step(rows, seqs + len(chunks), attention), 0.0


def _power(value: int) -> bool:
    return value & (value - 1) == 0


def _at(tree: Tree | float, point: Sequence[float]) -> float:
    """Linear along every axis; beyond its last value in proportion to it."""
    if not isinstance(tree, dict):
        return tree
    (x, *rest), axis = point, sorted(tree)
    right = int(np.searchsorted(axis, x, side="right"))
    if right == 0 or len(axis) == 1:
        return _at(tree[axis[0]], rest)
    low = axis[right - 1]
    if right == len(axis):
        return _at(tree[low], rest) * x / low
    share = (x - low) / (axis[right] - low)
    below = _at(tree[low], rest)
    return below + share * (_at(tree[axis[right]], rest) - below) if share else below


METRICS = ("ttft_ms", "tpot_ms", "e2e_ms")
STATS: Mapping[str, Callable[[Array], float]] = {
    "mean": lambda x: float(np.mean(x)),
    "p50": lambda x: float(np.percentile(x, 50)),
    "p90": lambda x: float(np.percentile(x, 90)),
    "p99": lambda x: float(np.percentile(x, 99)),
}


def measured(folder: Path) -> dict[str, Array]:
    """Milliseconds of each request as its client saw them: from its arrival, in the engine's clock."""
    rows = [json.loads(line) for line in (folder / "requests.jsonl").read_text().splitlines()]
    columns = {name: np.array([row[name] for row in rows]) for name in rows[0] if name != "request_id"}
    # two clocks, apart by an unknown constant: a request is queued no sooner than it has arrived
    sent = columns["arrival_time"] + float(np.min(columns["queued_ts"] - columns["arrival_time"]))
    first, last = columns["first_token_ts"], columns["last_token_ts"]
    return {
        "ttft_ms": 1e3 * (first - sent),
        "tpot_ms": 1e3 * (last - first) / (columns["output_toks"] - 1),
        "e2e_ms": 1e3 * (last - sent),
    }


def replayed(folder: Path, clock: StepTimes, profile: catalogue.EngineProfile) -> dict[str, Array]:
    """The same of the run's replay with its engine's settings; its cache was never full."""
    settings = json.loads((folder / "meta.json").read_text())["engine_kwargs"]
    rules = Rules.of(profile, settings["max_num_seqs"], settings["max_num_batched_tokens"])
    rows = list(read(folder / "requests.jsonl", "vllm"))
    load = open_loop([r.arrival_s for r in rows], [r.prompt for r in rows], [r.output for r in rows])
    found = simulate(Server(clock, rules, kv_blocks=1 << 16, block_size=16), load)
    return {name: 1e3 * getattr(found, name.replace("_ms", "_s")) for name in METRICS}


def own(data: Path, profile: catalogue.EngineProfile, seqs: int) -> StepModel:
    shape = EngineShape("vllm", "rtx_pro_6000")
    table = load_table(data / MODEL)
    return StepModel(table, shape, catalogue.gpu(shape.gpu), Fabric(1), profile, max_num_seqs=seqs)


def errors(found: Mapping[str, Array], truth: Mapping[str, Array]) -> dict[str, float]:
    """Relative error of each statistic, e.g. "ttft_ms p99"."""
    return {
        f"{metric} {stat}": of(found[metric]) / of(truth[metric]) - 1
        for metric in METRICS
        for stat, of in STATS.items()
    }


def replays(data: Path) -> tuple[dict[str, Array], dict[str, dict[str, Array]]]:
    """What was measured, and the replays by the name of their step times."""
    profile, run = catalogue.engine("vllm"), data / RUN
    clocks: dict[str, StepTimes] = {
        "recorded layers": Recorded(data / LAYERS, profile),
        "planc": Clock(own(data, profile, 128)),
    }
    return measured(run), {name: replayed(run, clock, profile) for name, clock in clocks.items()}


def steps(data: Path) -> None:
    """Seconds of some steps, by both."""
    profile = catalogue.engine("vllm")
    recorded, model = Recorded(data / LAYERS, profile), own(data, profile, 128)
    print(
        f"\n{'seqs':>6}{'context':>9}{'chunk':>7}{'cached':>8}{'recorded ms':>13}{'planc ms':>10}{'error':>8}"
    )
    plain = [(n, c, 0, 0) for n in (1, 16, 64, 128) for c in (512, 1024, 2048)]
    for n, context, chunk, cached in [
        *plain,
        (0, 0, 512, 0),
        (0, 0, 2048, 0),
        (64, 1024, 512, 0),
        (127, 1024, 1024, 0),
    ]:
        layers = (
            recorded.mixed(n, context, [(chunk, cached)])[0] if chunk else recorded.line(n, context).seconds
        )
        mine = float(model.seconds(StepLoad(n, context, chunk, 1.0 if chunk else 0.0, cached)))
        error = 100 * (mine / layers - 1)
        print(f"{n:6}{context:9}{chunk:7}{cached:8}{1e3 * layers:13.2f}{1e3 * mine:10.2f}{error:+7.1f}%")


def mixed(data: Path) -> None:
    """What decode attention takes beside prompts: times what it takes alone, per query head of a group."""
    print("\ndecode attention beside prompts / alone / query heads of a group: in all, and quartiles of rows")
    for file in sorted((data / "operators/llmservingsim/perf").rglob("attention.csv")):
        group = 8 if "Qwen" in str(file) else 4
        times = {tuple(int(r[c]) for c in ATTENTION): float(r["time_us"]) for r in _table(file)}
        rows = [
            (both - times[chunk, cached, 0, 0], times[0, 0, seqs, context])
            for (chunk, cached, seqs, context), both in times.items()
            if 0 < chunk <= 1024 and seqs >= 16 and 256 <= context <= 4096
            if (0, 0, seqs, context) in times and (chunk, cached, 0, 0) in times
        ]
        beside, alone = np.array(rows).T
        low, middle, high = np.percentile(beside / alone, (25, 50, 75)) / group
        name = "/".join(file.parts[-6:-1])
        total = beside.sum() / alone.sum() / group
        print(f"{name:60}{len(rows):6} rows {total:.2f}   {low:.2f} {middle:.2f} {high:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", action="store_true", help="also compare the times of single steps")
    parser.add_argument(
        "--mixed", action="store_true", help="also show what mixing prompts with decodes costs"
    )
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    if "PLANC_DATA" not in os.environ:
        raise SystemExit("Set PLANC_DATA to the folder with the recorded run.")
    data = Path(os.environ["PLANC_DATA"])
    truth, found = replays(data)
    print(f"{'':14}{'measured':>10}" + "".join(f"{name:>18}{'error':>8}" for name in found))
    for metric in METRICS:
        for stat, of in STATS.items():
            cells = "".join(
                f"{of(times[metric]):18.1f}{100 * (of(times[metric]) / of(truth[metric]) - 1):+7.1f}%"
                for times in found.values()
            )
            print(f"{metric:8}{stat:>6}{of(truth[metric]):10.1f}{cells}")
    if options.json:
        document = {
            "run": "vLLM 0.19, Llama-3.1-8B in bf16 on one RTX PRO 6000, 300 requests",
            "measured": {f"{m} {stat}": of(truth[m]) for m in METRICS for stat, of in STATS.items()},
            "errors": {name: errors(times, truth) for name, times in found.items()},
        }
        options.json.write_text(json.dumps(document, indent=1, default=float))
    if options.steps:
        steps(data)
    if options.mixed:
        mixed(data)


if __name__ == "__main__":
    main()
