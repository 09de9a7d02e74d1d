"""Constants of `planc.cost_model.softmax`, fitted to measured rows of all GPUs or all but one.

    python -m planc.cost_model.fitting.attention_physics [--tables DIR]

prints those of all GPUs, as they stand in `data/efficiencies.yaml` (general) and `data/attention.yaml` (of
kernels). All constants are fitted to all rows first, every GPU weighing the same; then each kernel's own to
its rows, with the others as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import click
import numpy as np
import scipy.optimize

from planc.cost_model import attention_kernels, catalogue, softmax
from planc.cost_model.efficiency import efficiencies
from planc.cost_model.features import Array
from planc.cost_model.fitting import attention_rows, sources
from planc.cost_model.fitting.attention_rows import Rows
from planc.cost_model.roofline import Roofline
from planc.cost_model.softmax import Constants, Machine, Work

#: rows of a table that a fit looks at
_SAMPLE = 100
#: errors (nat) up to which the loss is quadratic; further off it grows with the logarithm
_USUAL = 0.1
#: pull of every constant towards where it started, in rows that are off by as many nat
_PULL = 1e-3
#: fitted to all kernels, and those of them that are then a kernel's own
_FITTED = {
    "decode": (
        "decode_kcycles",
        "split_kcycles",
        "decode_narrow_kcycles",
        "decode_block_kcycles",
        "decode_memory",
        "decode_peak",
    ),
    "prefill": (
        "prefill_kcycles",
        "prefill_narrow_kcycles",
        "prefill_block_kcycles",
        "prefill_memory",
        "prefill_peak",
        "narrow_gain",
        "overlap",
    ),
}
_OWN = {
    "decode": ("decode_kcycles", "split_kcycles", "decode_narrow_kcycles", "decode_block_kcycles"),
    "prefill": (
        "prefill_kcycles",
        "prefill_narrow_kcycles",
        "prefill_block_kcycles",
        "prefill_memory",
        "prefill_peak",
    ),
}


@dataclass(frozen=True, slots=True)
class Sample:
    """Rows of one kernel, with the machine and the work that the physics counts; `weight` of each row."""

    gpu: str
    part: str
    kernel: str
    on: Machine
    work: Work
    seconds: Array
    weight: Array

    @staticmethod
    def of(rows: Rows, gpu: str, count: int | None = _SAMPLE) -> Sample:
        """Of `count` rows at most, drawn with a fixed seed; None: all. Decode rows that are faster than
        memory could bring their keys and values are left out: they lay in the L2 cache of a benchmark's
        loop, where a model's layers evict each other."""
        known, key = catalogue.gpu(gpu), rows.key
        if key["part"] == "decode":
            rows = rows.take(rows.seconds >= rows.cached / known.memory_bytes_s)
        if count is not None and rows.seconds.size > count:
            drawn = np.zeros(rows.seconds.size, dtype=bool)
            drawn[np.random.default_rng(0).permutation(rows.seconds.size)[:count]] = True
            rows = rows.take(drawn)
        narrow = float(key["kv_bytes"]) <= 1.0
        choice = attention_kernels.kernels().choice(
            known.arch, str(key["engine"]), int(key["head_dim"]), narrow
        )
        multiplies = choice is not None and choice.narrow_products and "fp8" in known.peak_tflops
        heads, reach, group = rows.coords.values()
        decode, pairs = key["part"] == "decode", rows.flops / (4.0 * float(key["head_dim"]))
        work = Work(
            flops=rows.flops,
            exps=pairs,
            cached=rows.cached,
            new=rows.new,
            blocks=heads,
            reach=pairs / (heads * (group if decode else reach)),
            loop=np.zeros_like(heads),
            narrow=float(narrow),
            narrow_products=float(narrow and multiplies),
        )
        if not decode:
            work = work.tiled(reach, 0.0, heads)
        kernel = "" if choice is None else choice.kernel
        on = Roofline(known).machine()
        return Sample(gpu, str(key["part"]), kernel, on, work, rows.seconds, np.ones_like(rows.seconds))

    @staticmethod
    def joined(samples: Sequence[Sample]) -> Sample:
        """All rows as one, every GPU weighing the same."""
        total = dict.fromkeys((s.gpu for s in samples), 0)
        for sample in samples:
            total[sample.gpu] += sample.seconds.size
        weight = np.concatenate([np.full(s.seconds.size, 1.0 / total[s.gpu]) for s in samples])
        return replace(
            samples[0],
            on=Machine(*_columns([s.on for s in samples], samples)),
            work=Work(*_columns([s.work for s in samples], samples)),
            seconds=np.concatenate([s.seconds for s in samples]),
            weight=weight * weight.size / len(total),
        )

    def ratio(self, known: Constants) -> Array:
        """Predicted over measured."""
        run = softmax.decode_seconds if self.part == "decode" else softmax.prefill_seconds
        return run(known, self.on, self.work)[0] / self.seconds


def _columns(of: Sequence[Machine] | Sequence[Work], samples: Sequence[Sample]) -> list[Array]:
    """Each field over all samples' rows."""
    sizes = [sample.seconds.shape for sample in samples]
    return [
        np.concatenate([np.broadcast_to(getattr(one, f.name), n) for one, n in zip(of, sizes, strict=True)])
        for f in fields(of[0])
    ]


@dataclass(frozen=True, slots=True)
class Physics:
    """General constants, and by kernel with its own in their place; a kernel without rows has none."""

    general: Constants
    kernels: Mapping[str, Constants]

    def ratio(self, sample: Sample) -> Array:
        return sample.ratio(self.kernels.get(sample.kernel, self.general))


def samples_of(folder: Path) -> list[Sample]:
    gpus = tuple(dict.fromkeys(sources.GPUS.values()))
    return [Sample.of(rows, gpu) for gpu in gpus for rows in attention_rows.softmax(folder, gpu)]


def fit(samples: Sequence[Sample], without: str = "") -> Physics:
    """With samples of the GPU `without` left out."""
    seen = [s for s in samples if s.gpu != without and s.seconds.size]
    named = efficiencies()
    general = Constants.of({name: named.value(f"attention_{name}") for name in Constants.names()})
    for part, names in _FITTED.items():
        general = _fitted([s for s in seen if s.part == part], names, general)
    own = {}
    for kernel in dict.fromkeys(s.kernel for s in seen):
        own[kernel] = general
        for part, names in _OWN.items():
            own[kernel] = _fitted(
                [s for s in seen if (s.part, s.kernel) == (part, kernel)], names, own[kernel]
            )
    return Physics(general, own)


def _fitted(samples: Sequence[Sample], names: Sequence[str], known: Constants) -> Constants:
    """`known`, with the constants of these names that leave the least errors in the logarithm."""
    if not samples:
        return known
    rows = Sample.joined(samples)

    def at(logs: Array) -> Constants:
        return replace(known, **dict(zip(names, np.exp(logs).tolist(), strict=True)))

    def errors(logs: Array) -> Array:
        pull = np.sqrt(_PULL * rows.weight.size) * (logs - start)
        return np.concatenate([np.sqrt(rows.weight) * np.log(rows.ratio(at(logs))), pull])

    start = np.log([getattr(known, name) for name in names])
    return at(scipy.optimize.least_squares(errors, start, loss="cauchy", f_scale=_USUAL, max_nfev=60).x)


@click.command()
@click.option("--tables", type=click.Path(exists=True, file_okay=False, path_type=Path), default=None)
def main(tables: Path | None) -> None:
    found = fit(samples_of(tables or sources.root()))
    for part in _FITTED.values():
        for name in part:
            click.echo(f"attention_{name}: {getattr(found.general, name):.3g}")
    for kernel, own in found.kernels.items():
        numbers = ", ".join(f"{name}: {getattr(own, name):.3g}" for part in _OWN.values() for name in part)
        click.echo(f"{kernel}: {{{numbers}}}")


if __name__ == "__main__":
    main()
