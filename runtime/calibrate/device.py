"""`planc calibrate --device`: what the local device's kernels take, as a profile document."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from planc.cost_model import catalogue
from planc.cost_model.calibration import Device, Machine, Number, ProfileDocument, TableDocument
from planc.cost_model.catalogue import Gpu, Precision
from planc.errors import InvalidField, ToolFailed
from planc.runtime.calibrate import collectives
from planc.runtime.calibrate.cases import Grid, Kind, grid
from planc.runtime.calibrate.samples import Progress, Run, Worker
from planc.runtime.calibrate.tables import Peaks, attention, products
from planc.version import __version__

_FORMS = {"pcie", "nvl"}  # words that devices say of themselves
_UNSAID = {"sxm", "40gb"}  # and words of the catalogue that they may not
_LARGE = 4 * 2**20  # bytes of weights beside which a launch is nothing


@dataclass(frozen=True, slots=True)
class Settings:
    """gpu      the catalogue's name of the device; None: told by what the device calls itself
    python   interpreter whose kernels are measured; None: this one
    engine   whose kernels: "torch" or "vllm"
    ranks    processes of the largest group that collectives are measured with; 1: none
    """

    device: Kind
    gpu: str | None = None
    python: str | None = None
    engine: str = "torch"
    threads: int = 1
    quick: bool = False
    budget_s: float = 600.0
    ranks: int = 1


def calibrate(
    settings: Settings, date: str, source: str, progress: Progress | None = None
) -> ProfileDocument:
    """Measures and fits. Raises ToolFailed where nothing could be measured, UnknownName for a GPU that
    the catalogue does not know."""
    chosen = grid(settings.device, settings.quick)
    worker = _worker(settings)
    run = worker.run(chosen, list(chosen.cases()), progress)
    if not run.of("gemm") or not run.of("read"):
        reason = run.failed[0][1] if run.failed else "no case was measured"
        raise ToolFailed(
            tool="calibration",
            reason=f"no matrix product or no memory rate: {reason}",
            mend="Allow more --budget.",
        )
    gpu = _identified(settings, run)
    peaks = _peaks(run, chosen)
    tables = _tables(run, chosen, peaks, source, date)
    if settings.ranks > 1:
        tables += collectives.tables(worker, chosen, settings.ranks, source, date)
    return ProfileDocument(
        kind="planc.profile",
        schema_version=1,
        planc_version=__version__,
        date=date,
        source=source,
        machine=machine(settings.threads, run.facts),
        device=Device(
            name=gpu.name,
            peak_tflops={
                precision: Number(
                    value=round(rate.flops_s / 1e12, 4), rows=len(run.of("gemm", dtype=precision))
                )
                for precision, rate in peaks.items()
            },
            memory_gbytes_s=Number(
                value=round(next(iter(peaks.values())).bytes_s / 1e9, 3), rows=len(run.of("read"))
            ),
            facts=_facts(settings, run),
        ),
        tables=tables,
        efficiencies=_efficiencies(run, gpu, chosen, peaks),
    )


def _worker(settings: Settings) -> Worker:
    known = Worker(
        settings.device, engine=settings.engine, threads=settings.threads, budget_s=settings.budget_s
    )
    if settings.python is None:
        return known
    return Worker(settings.device, settings.python, settings.engine, settings.threads, settings.budget_s)


def local_device() -> Kind:
    """ "cuda" where torch sees a GPU."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _identified(settings: Settings, run: Run) -> Gpu:
    """The catalogue's entry of the device that was measured."""
    if settings.gpu is not None:
        return catalogue.gpu(settings.gpu, field="--gpu")
    if settings.device == "cpu":
        return catalogue.gpu("cpu")
    called = str(run.facts.get("name", "")).lower().replace("-", " ")
    room = float(run.facts.get("memory_gib", 0.0))
    fits = [
        gpu
        for gpu in catalogue.gpus().values()
        if _like(gpu, called) and abs(gpu.memory_gib / room - 1) < 0.1
    ]
    if len(fits) != 1:
        raise InvalidField(
            where="planc calibrate",
            field="--gpu",
            value=run.facts.get("name", ""),
            reason="the device's own name does not tell which entry of the catalogue it is",
            mend="Name it with --gpu; planc hardware lists them.",
        )
    return fits[0]


def _like(gpu: Gpu, called: str) -> bool:
    """Whether a device's name holds the words of an entry: "nvidia h100 80gb hbm3" those of h100_sxm."""
    words, parts = set(called.split()), set(gpu.name.split("_")) - _UNSAID
    return gpu.vendor != "cpu" and parts <= words and not (_FORMS & words) - parts


def _peaks(run: Run, chosen: Grid) -> dict[Precision, Peaks]:
    """Highest rates seen: of products in each precision, and of reading memory."""
    launch = min(sample.seconds for sample in run.of("launch")) if run.of("launch") else 2e-6
    reads = [sample.case["mib"] * 2**20 / sample.seconds for sample in run.of("read")]
    streams = _streams(run)  # a product can stream weights faster than a sum reads
    bandwidth = max([*reads, *([float(np.median(streams))] if streams else [])])
    found: dict[Precision, Peaks] = {}
    for precision in chosen.precisions:
        rates = [
            2.0 * s.case["m"] * s.case["n"] * s.case["k"] / s.seconds for s in run.of("gemm", dtype=precision)
        ]
        if rates:
            found[precision] = Peaks(max(rates), bandwidth, launch)
    return found


def _streams(run: Run) -> list[float]:
    """Bytes of weights per second, of products with one row whose weights are large."""
    sizes = [(s.case["n"] * s.case["k"] * 2.0, s.seconds) for s in run.of("gemm", m=1, dtype="bf16")]
    return [nbytes / seconds for nbytes, seconds in sizes if nbytes >= _LARGE]


def _tables(
    run: Run, chosen: Grid, peaks: Mapping[Precision, Peaks], source: str, date: str
) -> tuple[TableDocument, ...]:
    any_peak = next(iter(peaks.values()))
    found = [products(run, precision, peak, source, date) for precision, peak in peaks.items()]
    for heads in chosen.heads:
        found += [attention(run, heads, part, any_peak, source, date) for part in ("decode", "prefill")]
    return tuple(table for table in found if table is not None)


def _efficiencies(
    run: Run, gpu: Gpu, chosen: Grid, peaks: Mapping[Precision, Peaks]
) -> dict[str, dict[Precision | Any, Number]]:
    """The roofline's efficiencies, for what tables do not cover."""
    any_peak = next(iter(peaks.values()))
    microseconds = Number(value=round(1e6 * any_peak.launch_s, 3), rows=1)
    found: dict[str, dict[Any, Number]] = {"gemm_peak": {p: Number(value=1.0) for p in peaks}}
    streams = _streams(run)
    if streams:
        share = min(float(np.median(streams)) / any_peak.bytes_s, 1.0)
        found["gemm_memory"] = {"any": Number(value=round(share, 4), rows=len(streams))}
    moved = run.of("pointwise")
    if len(moved) > 1:
        size = lambda s: 4.0 * s.case["rows"] * s.case["width"]  # noqa: E731
        small, large = min(moved, key=size), max(moved, key=size)
        rate = (size(large) - size(small)) / max(large.seconds - small.seconds, 1e-9)
        share = Number(value=round(min(rate / any_peak.bytes_s, 1.0), 4), rows=len(moved))  # type: ignore[assignment]
        found["elementwise_memory"] = {"any": share}  # type: ignore[dict-item]
    if gpu.vendor == "cpu":  # on a GPU these are floors inside a CUDA graph, which nothing here measured
        for name in ("gemm_launch_us", "attention_launch_us", "elementwise_launch_us"):
            found[name] = {"any": microseconds}
    return found


def _facts(settings: Settings, run: Run) -> dict[Any, float]:
    if settings.device == "cuda":
        return {
            name: float(run.facts[name]) for name in ("memory_gib", "sm_count", "l2_mib") if name in run.facts
        }
    found = {"memory_gib": round(memory_gib(), 2), "sm_count": float(settings.threads)}
    cache = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
    if cache.is_file() and (text := cache.read_text().strip()).endswith("K"):
        found["l2_mib"] = float(text[:-1]) / 1024
    return found


def memory_gib() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


def machine(threads: int, facts: Mapping[str, Any]) -> Machine:
    """The host, for the reader of a profile."""
    named = "model name"
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    processor = next((line.partition(":")[2].strip() for line in lines if line.startswith(named)), "")
    versions = {name: str(facts[name]) for name in ("torch", "vllm", "cuda") if facts.get(name)}
    return Machine(
        system=f"{platform.system()} {platform.machine()}",
        processor=processor or platform.processor(),
        cores=os.cpu_count() or 1,
        threads=threads,
        memory_gib=round(memory_gib(), 2),
        versions={"python": platform.python_version(), **versions},
    )
