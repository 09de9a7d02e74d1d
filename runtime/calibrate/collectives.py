"""Collectives between processes of this machine: gloo on a CPU, NCCL on GPUs."""

from __future__ import annotations

import math
import os
import socket
import statistics
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from planc.cost_model.calibration import TableDocument
from planc.cost_model.collectives import Constants, Kind, alpha_beta
from planc.cost_model.profile import TableInfo
from planc.errors import ToolFailed
from planc.runtime.calibrate.cases import Grid
from planc.runtime.calibrate.samples import Worker

KINDS: tuple[Kind, ...] = ("all_reduce", "all_gather", "all_to_all")
_REPEATS, _WARM_UP = 11, 3


def tables(worker: Worker, grid: Grid, ranks: int, source: str, date: str) -> tuple[TableDocument, ...]:
    """A table (ranks, bytes) per kind of collective, for groups of 2, 4 ... `ranks`. Raises ToolFailed."""
    groups = [2**power for power in range(1, int(math.log2(ranks)) + 1)]
    seconds = {group: measure(worker.device, group, grid.messages) for group in groups}
    found = []
    for kind in KINDS:
        times = np.array([seconds[group][kind] for group in groups])
        alpha = float(times[0, 0])
        rate = max(grid.messages[-1] / (float(times[0, -1]) - alpha), 1e6) if times[0, -1] > alpha else 1e9
        of = {"alpha_us": 1e6 * alpha, "per_step_us": 0.0, "bytes_s": rate}
        sizes = np.array(grid.messages, dtype=np.float64)
        start = Constants(alpha_us=of["alpha_us"], per_step_us=of["per_step_us"], share=1.0)
        expected = [alpha_beta(kind, sizes, group, start, rate) for group in groups]
        info = TableInfo(
            name=f"links {kind}",
            key={"kind": kind, "engine": "gloo" if worker.device == "cpu" else "nccl"},
            axes=("ranks", "bytes"),
            ideal=of,
            rows=times.size,
            error=0.0,
            source=source,
            date=date,
        )
        found.append(
            TableDocument(
                family="links",
                info=info,
                axes={"ranks": tuple(map(float, groups)), "bytes": tuple(map(float, grid.messages))},
                values=tuple(np.round(np.log(times / np.array(expected)), 4).reshape(-1).tolist()),
            )
        )
    return tuple(found)


def measure(device: str, ranks: int, messages: Sequence[int]) -> dict[str, list[float]]:
    """Seconds of each kind by message size (bytes of the full tensor), over `ranks` processes."""
    from torch.multiprocessing import get_context
    from torch.multiprocessing.spawn import spawn

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    answers = get_context("spawn").SimpleQueue()
    try:
        spawn(_rank, (ranks, port, device, tuple(messages), answers), nprocs=ranks)  # type: ignore[no-untyped-call]
    except Exception as error:
        raise ToolFailed(
            tool=f"collectives over {ranks} processes",
            reason=str(error).splitlines()[-1],
            mend="Ask for fewer --ranks.",
        ) from None
    found: dict[str, list[float]] = answers.get()
    return found


def _rank(rank: int, ranks: int, port: int, device: str, messages: tuple[int, ...], answers: Any) -> None:
    import torch
    import torch.distributed as dist

    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group("nccl" if device == "cuda" else "gloo", rank=rank, world_size=ranks)
    found: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for size in messages:
        whole = torch.zeros(max(size // 2 // ranks, 1) * ranks, dtype=torch.bfloat16, device=device)
        part, other = torch.zeros_like(whole[: whole.numel() // ranks]), torch.zeros_like(whole)
        calls = {
            "all_reduce": partial(dist.all_reduce, whole),
            "all_gather": partial(dist.all_gather_into_tensor, whole, part),
            "all_to_all": partial(dist.all_to_all_single, other, whole),
        }
        for kind, call in calls.items():
            times = []
            for _ in range(_WARM_UP + _REPEATS):
                dist.barrier()
                if device == "cuda":
                    torch.cuda.synchronize()
                start = time.perf_counter()
                call()
                if device == "cuda":
                    torch.cuda.synchronize()
                times.append(time.perf_counter() - start)
            found[kind].append(statistics.median(times[_WARM_UP:]))
    if rank == 0:
        answers.put(found)
    dist.destroy_process_group()
