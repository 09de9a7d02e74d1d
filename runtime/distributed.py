"""Distributed execution: one process per rank on this machine, each with its own part of the model.

Ranks are numbered as in a plan: tensor parallelism fastest, then pipeline stages. Processes are
forked, so graphs and weights need no pickling and are shared until written; they talk through gloo.
This checks plans and tells what a rank would do; engines serve.

    generate(prefill, decode, weights, prompts, 16, layout=Ranks(tp=2, pp=2), blocks=64, block_size=16)
"""

from __future__ import annotations

import datetime
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from planc.errors import CheckFailed, PlancError, ToolFailed
from planc.ir.graph import Graph
from planc.ir.ops.collectives import bound_groups
from planc.passes.parallel import PipelineCut, TensorParallel
from planc.passes.pipeline import Pass
from planc.runtime.binding import bind
from planc.runtime.distributed_stage import PipelineExecutor, run_stage

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Ranks:
    """A parallel layout: `tp` ranks per stage, `pp` stages; ep divides routed experts as whole experts.

    pipeline_layers: layers per stage; empty: dealt out evenly. after: passes applied to each rank's
    graph once it is divided (fusion, quantization).
    """

    tp: int = 1
    pp: int = 1
    ep: bool = False
    pipeline_layers: tuple[int, ...] = ()
    after: tuple[Pass, ...] = ()

    @property
    def world(self) -> int:
        return self.tp * self.pp

    def graph(self, graph: Graph, rank: int) -> Graph:
        """The part of a graph that one rank runs."""
        stage, tp_rank = divmod(rank, self.tp)
        if self.tp > 1:
            graph = TensorParallel(self.tp, tp_rank, self.ep).apply(graph)
        if self.pp > 1:
            graph = PipelineCut(self.pp, stage, self.pipeline_layers).apply(graph)
        for each in self.after:
            graph = each.apply(graph)
        return graph

    def groups(self, rank: int) -> dict[str, dist.ProcessGroup]:
        """This rank's process groups, "tp" and "pp"; every rank must call this, in the same order."""
        found: dict[str, dist.ProcessGroup] = {}
        rows = [[stage * self.tp + i for i in range(self.tp)] for stage in range(self.pp)]
        columns = [[stage * self.tp + i for stage in range(self.pp)] for i in range(self.tp)]
        for name, members in [("tp", row) for row in rows] + [("pp", column) for column in columns]:
            group = dist.new_group(members)
            if rank in members:
                found[name] = group
        return found


def forward(
    graph: Graph,
    weights: Mapping[str, Tensor],
    inputs: Sequence[Tensor],
    *,
    layout: Ranks,
    timeout_s: float = 120.0,
) -> Tensor:
    """Runs a traced graph on `layout.world` processes; its output, which all ranks must agree on.

    Raises CheckFailed where the ranks of the last stage do not agree, InvalidField where the layout
    does not fit the model, ToolFailed where a rank dies.
    """
    parts = [layout.graph(graph, rank) for rank in range(layout.world)]

    def task(rank: int) -> Tensor | None:
        part = parts[rank]
        (module,) = bind((part,), weights)
        with bound_groups(groups := layout.groups(rank)), torch.inference_mode():
            return run_stage(part, module, inputs, (), groups["pp"])

    found = [out for out in run_ranks(layout.world, task, timeout_s=timeout_s) if out is not None]
    for other in found[1:]:
        _agree(torch.equal(found[0], other))
    return found[0]


def generate(
    prefill: Graph,
    decode: Graph,
    weights: Mapping[str, Tensor],
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    layout: Ranks,
    blocks: int,
    block_size: int,
    eos: int | Sequence[int] | None = None,
    timeout_s: float = 300.0,
) -> list[list[int]]:
    """Greedy continuations from the phase graphs of an undivided model, run on `layout.world` processes.

    As `Executor.generate`; every rank schedules alike. Raises as `forward` does.
    """
    parts = [(layout.graph(prefill, rank), layout.graph(decode, rank)) for rank in range(layout.world)]
    vocabulary = int(prefill.module.graph.output_node().all_input_nodes[0].meta["val"].shape[-1])

    def task(rank: int) -> list[list[int]]:
        with bound_groups(groups := layout.groups(rank)):
            executor = PipelineExecutor(
                *parts[rank],
                weights,
                blocks=blocks,
                block_size=block_size,
                vocabulary=vocabulary,
                group=groups["pp"],
            )
            return executor.generate(prompts, max_new_tokens, eos)

    found = run_ranks(layout.world, task, timeout_s=timeout_s)
    for other in found[1:]:
        _agree(found[0] == other)
    return found[0]


def _agree(same: bool) -> None:
    if not same:
        raise CheckFailed(
            what="distributed run",
            reason="ranks that hold the same value do not agree on it",
            mend="Report this with the model's configuration: a sharding rule must be wrong.",
        )


# -- processes ---------------------------------------------------------------------------


def run_ranks(world: int, task: Callable[[int], T], *, timeout_s: float = 120.0) -> list[T]:
    """Runs `task(rank)` in `world` forked processes of one gloo world; their results, by rank.

    The first rank that raises or dies ends them all: a PlancError is raised again here, anything
    else as ToolFailed with the rank's own traceback. So does running longer than `timeout_s`.
    """
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        raise ToolFailed(
            tool="run_ranks",
            reason="CUDA is in use in this process, which cannot be forked any more",
            mend="Start the ranks from a process that has not touched the GPU.",
        )
    fork = get_context("fork")
    with tempfile.TemporaryDirectory(prefix="planc-ranks-") as folder:
        pipes = [fork.Pipe(duplex=False) for _ in range(world)]
        ranks = [
            fork.Process(
                target=_rank_main,
                args=(task, rank, world, Path(folder) / "store", pipes[rank][1], timeout_s),
                daemon=True,
            )
            for rank in range(world)
        ]
        try:
            for process in ranks:
                process.start()
            for _, sender in pipes:
                sender.close()
            return _collect(ranks, [receiver for receiver, _ in pipes], timeout_s)
        finally:
            for process in ranks:
                if process.is_alive():
                    process.kill()
                if process.pid is not None:
                    process.join()
            for receiver, _ in pipes:
                receiver.close()


def _collect(ranks: Sequence[BaseProcess], receivers: Sequence[Connection], timeout_s: float) -> list[Any]:
    """One result per rank; raises at the first failure or death, or when time is up."""
    ends = time.monotonic() + timeout_s
    results: dict[int, Any] = {}
    while len(results) < len(ranks):
        late = [rank for rank in range(len(ranks)) if rank not in results]
        signs = [sign for rank in late for sign in (receivers[rank], ranks[rank].sentinel)]
        if not wait(signs, max(ends - time.monotonic(), 0.0)):
            raise ToolFailed(
                tool=f"rank {late[0]}",
                reason=f"no result after {timeout_s:g} s (ranks still running: {late})",
                mend="Give more time, or look for ranks that wait for each other.",
            )
        heard: dict[int, tuple[str, Any]] = {}
        for rank in late:
            dead = not ranks[rank].is_alive()
            if receivers[rank].poll():
                heard[rank] = pickle.loads(receivers[rank].recv_bytes())  # from our own fork
            elif dead:
                heard[rank] = ("died", None)
        for rank, (kind, value) in sorted(heard.items(), key=lambda item: item[1][0] != "died"):
            match kind:  # a rank that died comes first: others only lost their connection to it
                case "died":
                    raise ToolFailed(
                        tool=f"rank {rank}",
                        reason="the process died without a word",
                        mend="It was killed from outside, often for want of memory.",
                    )
                case "error":
                    raised, fields = value
                    raise raised(**fields)
                case "traceback":
                    raise ToolFailed(
                        tool=f"rank {rank}", reason=f"it raised\n{value}", mend="See its traceback."
                    )
                case _:
                    results[rank] = value
    return [results[rank] for rank in range(len(receivers))]


def _rank_main(
    task: Callable[[int], Any], rank: int, world: int, store: Path, pipe: Connection, timeout_s: float
) -> None:
    """A rank's process: one thread, loopback only. Says how it went through the pipe, once."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)  # a forked child must not enter its parent's thread pool
    try:
        dist.init_process_group(
            "gloo",
            store=torch._C._distributed_c10d.FileStore(str(store), world),
            rank=rank,
            world_size=world,
            timeout=datetime.timedelta(seconds=timeout_s),
        )
        message = ("result", task(rank))
        dist.barrier()
    except PlancError as error:
        message = ("error", (type(error), error.fields))
    except Exception:  # anything a rank raises is the parent's to report
        message = ("traceback", traceback.format_exc(limit=8))
    pipe.send_bytes(pickle.dumps(message))
    if message[0] != "result":
        time.sleep(timeout_s)  # until the parent ends it: closed connections would make others fail too
    dist.destroy_process_group()
