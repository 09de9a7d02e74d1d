"""Published maximum throughputs of TensorRT-LLM v1.0 against planc's prediction of the same run.

    python benchmarks/trtllm_throughput.py TABLE.csv [--models DIR] [--json FILE] [--rows]

The table has a row per (model, GPU, weights, parallel shape, lengths) with output tokens/s of the whole
instance. It was taken with `trtllm-bench throughput`: a stated number of requests, all of equal lengths, all
submitted at once, offline. That run is simulated, with the settings that the publication names:

    requests            by lengths, from its table (`REQUESTS`)
    batch and budget    the tool's own tuning, from its estimate of the room in the cache (`bench_limits`)
    graphs              of the batches in its llm_options
    cache               FP8, 0.95 of the memory left
    MoE                 attention data parallel over the TP ranks, experts on ranks (its llm_options), in
                        CUTLASS's kernels, the default of that version
    prompts             whole, reserved with their answers at admission; no streaming
    host                no token is sent on its way: without pipeline stages kernels hide the host's time per
                        sequence (`EngineProfile.offline`)

No number is fitted to these rows. Round ones were chosen with them in view: hosts of GB200 take 1.5 times as
long as x86 ones (`host_slowdown`), and a sequence takes 20 us of the host beside kernels
(`hidden_sequence_us`). Which kernels, graphs and buffers run was looked up where rows disagreed.

Prints errors per model and GPU and in total, and how often the parallel shape that is predicted best, of
those measured for one model, GPU and pair of lengths, is the best measured or within 2 % of it.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np

from planc.cost_model import catalogue
from planc.cost_model.catalogue import Gpu
from planc.cost_model.collectives import Fabric
from planc.cost_model.memory import memory_map
from planc.cost_model.shape import EngineShape, refusals
from planc.cost_model.step import StepModel
from planc.cost_model.table import CostTable
from planc.errors import PlancError
from planc.runtime.simulator import Clock, Rules, Server, open_loop, simulate
from planc.runtime.validation.setups import Tables, Unpredictable, model_tables

ROOT = Path(__file__).resolve().parents[1]
GPUS = {
    "B200": "b200_sxm",
    "GB200": "gb200",
    "H100": "h100_sxm",
    "H200": "h200_sxm",
    "RTX6000Pro": "rtx_pro_6000",
}
WEIGHTS = {"FP4": "nvfp4", "FP8": "fp8"}
#: (input, output) tokens -> requests of a run
REQUESTS = {
    (128, 128): 30_000,
    (128, 2048): 3000,
    (128, 4096): 1500,
    (500, 2000): 3000,
    (1000, 1000): 3000,
    (1000, 2000): 1500,
    (2048, 128): 3000,
    (2048, 2048): 1500,
    (5000, 500): 1500,
    (20000, 2000): 1000,
}
CACHE_SHARE = 0.95
BYTES = {"nvfp4": 0.5, "fp8": 1.0}
GRAPHS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 384, 512, 1024, 2048, 4096, 8192)
EXPERTS = {"nvfp4": "trtllm/nvfp4/cutlass"}


@dataclass(frozen=True, slots=True)
class Row:
    model: str
    gpu: str
    weights: str
    tp: int
    pp: int
    gpus: int
    isl: int
    osl: int
    measured: float

    @property
    def group(self) -> tuple[object, ...]:
        """What a user would choose a parallel shape for."""
        return self.model, self.gpu, self.weights, self.isl, self.osl


@dataclass(frozen=True, slots=True)
class Prediction:
    """tokens_s   output tokens/s of the whole instance     batch   sequences that one scheduler seats"""

    row: Row
    tokens_s: float
    batch: int
    shape: str

    @property
    def error(self) -> float:
        return self.tokens_s / self.row.measured - 1


def rows(path: Path) -> list[Row]:
    with path.open(newline="") as file:
        return [
            Row(
                model=raw["model"],
                gpu=GPUS[raw["gpu"]],
                weights=WEIGHTS[raw["weight_dtype"]],
                tp=int(raw["tp"]),
                pp=int(raw["pp"]),
                gpus=int(raw["num_gpus"]),
                isl=int(raw["isl"]),
                osl=int(raw["osl"]),
                measured=float(raw["out_tok_s_total"]),
            )
            for raw in csv.DictReader(file)
        ]


def bench_requests(table: CostTable, gpu: Gpu, row: Row) -> float:
    """How many requests trtllm-bench thinks that the instance's cache holds: it counts nothing but weights
    and cache, and every TP rank one head of keys at least."""
    weights = BYTES[row.weights] * sum(cls.count * cls.parameters for cls in table.classes)
    copies = max(row.tp / max(cls.kv_units for cls in table.classes), 1.0)
    per_token = copies * sum(cls.count * cls.kv_elements for cls in table.classes)
    return CACHE_SHARE * (row.gpus * gpu.memory_bytes - weights) / (per_token * (row.isl + row.osl))


def bench_limits(seqs: float, isl: int, osl: int, pp: int) -> tuple[int, int]:
    """(max_batch_size, max_num_tokens) that trtllm-bench chooses where the cache holds `seqs` requests: per
    pipeline stage, the tokens in the ratio of the lengths, both rounded up, within its floors and caps; a
    prompt beside a full batch at least (tensorrt_llm/bench/build/tuning.py, Apache-2.0)."""
    up = lambda value, step: step * math.ceil(value / step)  # noqa: E731
    batch = min(seqs, 4096.0) / pp
    tokens = min(batch * (1 + isl / osl), 32768.0)
    wide = 32 if batch < 256 else 128 if batch < 1024 else 256
    long = 256 if tokens < 4096 else 512 if tokens < 8192 else 1024
    seats = max(64, up(batch, wide))
    return seats, max(2048, up(tokens, long), isl + seats)


class Predictor:
    """Predicts rows; step times are kept by engine shape and batch, up to which graphs are captured."""

    def __init__(self, tables: Tables) -> None:
        self.tables = tables
        self.profile = catalogue.engine("trtllm")
        graphs = self.profile.cuda_graphs.model_copy(update={"listed": GRAPHS, "largest": GRAPHS[-1]})
        self.profile = self.profile.model_copy(update={"cuda_graphs": graphs})
        self.clocks: dict[tuple[str, EngineShape, int], Clock] = {}

    def __call__(self, row: Row) -> Prediction:
        """Raises Unpredictable or PlancError where planc has no such model, format or room."""
        table, gpu = self.tables(row.model.lower().replace(" ", "-")), catalogue.gpu(row.gpu)
        profile = self.profile.model_copy(update={"expert_table": EXPERTS.get(row.weights)})
        profile = profile.offline(row.pp)
        ranks = row.tp if table.model.experts and row.tp > 1 else 1
        shape = EngineShape(
            engine=profile.name,
            gpu=gpu.name,
            tp=row.tp // ranks,
            pp=row.pp,
            dp=ranks,
            ep=ranks,
            weights=row.weights,
            activations=row.weights,
            kv="fp8",
        )
        refused = refusals(shape, table, gpu, profile)
        if refused:
            raise Unpredictable(refused[0].reason)

        batch, tokens = bench_limits(bench_requests(table, gpu, row), row.isl, row.osl, row.pp)
        held = memory_map(
            table,
            shape,
            gpu,
            profile,
            max_num_seqs=batch,
            max_num_batched_tokens=tokens,
            max_model_len=row.isl + row.osl,
            utilization=CACHE_SHARE,
        )
        if not held.fits:
            raise Unpredictable(f"{held.weights / 2**30:.0f} GiB of weights leave no room for a request")
        key = (row.model, shape, batch)
        if key not in self.clocks:
            model = StepModel(table, shape, gpu, Fabric(gpus_per_node=8), profile, max_num_seqs=batch)
            self.clocks[key] = Clock(model)
        # a simulated step is a cycle of pp micro-batches, each of which has the batch and budget to itself
        rules = Rules.of(
            profile, batch * row.pp, tokens * row.pp, chunked=False, asynchronous=row.pp == 1
        ).offline()
        server = Server(self.clocks[key], rules, kv_blocks=held.kv_blocks, block_size=held.block_size)
        mine = math.ceil(REQUESTS[row.isl, row.osl] / ranks)
        records = simulate(server, open_loop(np.zeros(mine), row.isl, row.osl))
        rate = ranks * mine * row.osl / records.duration_s
        seats = int(min(batch * row.pp, held.sequences(row.isl + row.osl), mine))
        return Prediction(row, rate, seats, f"tp{shape.tp} pp{shape.pp} dp{shape.dp} ep{shape.ep}")


def score(found: Sequence[Prediction]) -> dict[str, float | int]:
    """Errors in percent; `bias` is the median with sign."""
    errors = [100 * item.error for item in found]
    return {
        "n": len(errors),
        "median_ape": median(map(abs, errors)),
        "mape": fmean(map(abs, errors)),
        "bias": median(errors),
    }


def choices(found: Sequence[Prediction], worth: Callable[[Row], float]) -> dict[str, float | int]:
    """How often the shape predicted best is the best measured or within 2 %, over groups with several.

    worth   what a token/s of a row's instance counts: 1, or one over its GPUs
    """
    groups: dict[object, list[Prediction]] = defaultdict(list)
    for item in found:
        groups[item.row.group].append(item)
    several = [group for group in groups.values() if len(group) > 1]
    good = 0
    for group in several:
        pick = max(group, key=lambda item: item.tokens_s * worth(item.row))
        best = max(item.row.measured * worth(item.row) for item in group)
        good += pick.row.measured * worth(pick.row) >= 0.98 * best
    return {"groups": len(several), "right": good, "share": good / len(several) if several else math.nan}


def document(found: Sequence[Prediction], missing: Sequence[tuple[Row, str]]) -> dict[str, Any]:
    groups: dict[tuple[str, str], list[Prediction]] = defaultdict(list)
    lengths: dict[str, list[Prediction]] = defaultdict(list)
    for item in found:
        groups[item.row.model, item.row.gpu].append(item)
        lengths[f"{item.row.isl}/{item.row.osl}"].append(item)
    return {
        "total": score(found),
        "choice_instance": choices(found, lambda row: 1.0),
        "choice_per_gpu": choices(found, lambda row: 1.0 / row.gpus),
        "groups": [{"model": m, "gpu": g, **score(items)} for (m, g), items in sorted(groups.items())],
        "lengths": {name: score(items) for name, items in lengths.items()},
        "rows": [
            {**asdict(item.row), "predicted": item.tokens_s, "batch": item.batch, "shape": item.shape}
            for item in found
        ],
        "unpredicted": [{**asdict(row), "reason": reason} for row, reason in missing],
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("table", type=Path)
    parser.add_argument("--models", type=Path, default=ROOT / "examples" / "models")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rows", action="store_true", help="every row, not only the sums")
    given = parser.parse_args(arguments)
    predict = Predictor(model_tables((given.models,)))
    found: list[Prediction] = []
    missing: list[tuple[Row, str]] = []
    start = time.perf_counter()
    for row in rows(given.table):
        try:
            found.append(predict(row))
        except (Unpredictable, PlancError) as error:
            missing.append((row, str(error)))
    seconds = time.perf_counter() - start
    result = document(found, missing)
    if given.rows:
        for item in found:
            row = item.row
            print(
                f"{row.model:18} {row.gpu:13} {item.shape:20} {row.isl:6}/{row.osl:<5} batch {item.batch:5} "
                f"{item.tokens_s:9.0f} of {row.measured:9.0f}  {100 * item.error:+6.1f} %"
            )
    for group in result["groups"]:
        print(f"{group['model']:18} {group['gpu']:13} {_line(group)}")
    print(f"{'in total':32} {_line(result['total'])}, {len(missing)} not predicted, {seconds:.0f} s")
    for name in ("choice_instance", "choice_per_gpu"):
        item = result[name]
        print(f"{name}: right or within 2 % in {item['right']} of {item['groups']} groups")
    if given.json:
        given.json.write_text(json.dumps(result, indent=1))
    return 0


def _line(item: dict[str, Any]) -> str:
    return (
        f"{item['n']:3} rows: median {item['median_ape']:5.1f} %, mean {item['mape']:5.1f} %, "
        f"bias {item['bias']:+6.1f} %"
    )


if __name__ == "__main__":
    raise SystemExit(main())
