"""The named efficiencies of softmax attention, fitted to measured rows of all GPUs but one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import scipy.optimize

from planc.cost_model import catalogue, softmax
from planc.cost_model.efficiency import efficiencies
from planc.cost_model.features import Array
from planc.cost_model.fitting.attention_rows import Rows
from planc.cost_model.softmax import Constants, Machine, Work

#: rows of a table that a fit looks at
_SAMPLE = 250
#: fitted for each phase; the others are facts of the hardware
_FITTED = {
    "decode": ("decode_kcycles", "split_kcycles", "decode_block_kcycles", "decode_memory", "decode_peak"),
    "prefill": ("prefill_kcycles", "prefill_block_kcycles", "prefill_memory", "prefill_peak"),
}


@dataclass(frozen=True, slots=True)
class Sample:
    """Rows of one table, with the machine and the work that the physics counts."""

    gpu: str
    part: str
    on: Machine
    work: Work
    seconds: Array

    @staticmethod
    def of(rows: Rows, gpu: str, count: int | None = _SAMPLE) -> Sample:
        """Of `count` rows at most, drawn with a fixed seed; None: all. Decode rows that are faster than
        memory could bring their keys and values are left out: they lay in the L2 cache of a benchmark's
        loop, where a model's layers evict each other."""
        if rows.key["part"] == "decode":
            rows = rows.take(rows.seconds >= rows.cached / catalogue.gpu(gpu).memory_bytes_s)
        if count is not None and rows.seconds.size > count:
            drawn = np.zeros(rows.seconds.size, dtype=bool)
            drawn[np.random.default_rng(0).permutation(rows.seconds.size)[:count]] = True
            rows = rows.take(drawn)
        known, part = catalogue.gpu(gpu), str(rows.key["part"])
        heads, reach, _ = rows.coords.values()
        width = 4.0 * float(rows.key["head_dim"])
        decode = part == "decode"
        queries = np.ones_like(reach) if decode else np.minimum(reach, softmax.TILE)
        tokens = heads if decode else heads * reach
        exps = rows.flops / width
        seen = rows.flops / width / (heads * rows.coords["group"] if decode else tokens)
        blocks = heads if decode else heads * np.maximum(reach / softmax.TILE, 1.0)
        loop = seen if decode else softmax.longest_loop(seen, reach, 0.0)
        on = Machine(
            known.peak_flops(rows.precision),
            known.memory_bytes_s,
            float(known.sm_count),
            known.clock_mhz * 1e6,
            efficiencies().on("attention_exp_per_cycle", known),
        )
        work = Work(rows.flops, exps, rows.cached, rows.new, blocks, queries, seen, loop)
        return Sample(gpu, part, on, work, rows.seconds)

    def ratio(self, known: Constants) -> Array:
        """Predicted over measured."""
        run = softmax.decode_seconds if self.part == "decode" else softmax.prefill_seconds
        return run(known, self.on, self.work)[0] / self.seconds


def shipped() -> Constants:
    named = efficiencies()
    return Constants(**{name: named.value(f"attention_{name}") for name in Constants.names()})


def fit(samples: Sequence[Sample], without: str = "") -> Constants:
    """Constants of both phases with the least mean absolute error in the logarithm, every GPU weighing the
    same and no row more than a factor of e; samples of the GPU `without` are not looked at."""
    known = shipped()
    for part in _FITTED:
        known = _fit_part([s for s in samples if s.part == part and s.gpu != without], _FITTED[part], known)
    return known


def _fit_part(samples: Sequence[Sample], names: Sequence[str], known: Constants) -> Constants:
    sizes = {gpu: sum(s.seconds.size for s in samples if s.gpu == gpu) for gpu in {s.gpu for s in samples}}

    def at(logs: Array) -> Constants:
        return replace(known, **dict(zip(names, np.exp(logs), strict=True)))

    def loss(logs: Array) -> float:
        now = at(logs)
        return float(sum(np.sum(_error(s.ratio(now))) / sizes[s.gpu] for s in samples))

    start = np.log([getattr(known, name) for name in names])
    options = {"maxiter": 150, "xatol": 1e-2, "fatol": 1e-4}
    return at(scipy.optimize.minimize(loss, start, method="Nelder-Mead", options=options).x)


def _error(ratio: Array) -> Array:
    return np.minimum(np.abs(np.log(ratio)), 1.0)
