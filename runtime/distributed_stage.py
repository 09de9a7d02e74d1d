"""One pipeline stage at run time: hidden states in from the stage before, out to the one after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.fx import GraphModule

from planc.ir.graph import HIDDEN, Graph
from planc.runtime.executor import Executor
from planc.runtime.scheduler import Step


def run_stage(
    graph: Graph,
    module: GraphModule,
    inputs: Sequence[Tensor],
    caches: Sequence[Tensor],
    group: dist.ProcessGroup,
) -> Tensor | None:
    """Runs one stage. inputs: the undivided graph's own, without caches. None except on the last stage.

    group: the stages, in order, that this rank is one of.
    """
    stage, stages = dist.get_rank(group), dist.get_world_size(group)
    arriving = [n for n in graph.module.graph.nodes if n.op == "placeholder" and n.name.startswith(HIDDEN)]
    hidden = [receive(node.meta["val"].dtype, stage - 1, group) for node in arriving]
    out = module(*inputs, *hidden, *caches)
    if stage == stages - 1:
        result: Tensor = out[0] if isinstance(out, tuple) else out
        return result
    for value in out if isinstance(out, tuple) else (out,):
        transmit(value, stage + 1, group)
    return None


def transmit(value: Tensor, to: int, group: dist.ProcessGroup) -> None:
    """Sends a tensor of any shape (at most eight dimensions): its shape, then its elements."""
    shape = torch.zeros(9, dtype=torch.int64)
    shape[0] = value.dim()
    shape[1 : 1 + value.dim()] = torch.tensor(value.shape)
    rank = dist.get_global_rank(group, to)
    dist.send(shape, rank, group=group)
    dist.send(value.contiguous(), rank, group=group)


def receive(dtype: torch.dtype, sender: int, group: dist.ProcessGroup) -> Tensor:
    """What `transmit` sent."""
    shape = torch.zeros(9, dtype=torch.int64)
    rank = dist.get_global_rank(group, sender)
    dist.recv(shape, rank, group=group)
    value = torch.empty([int(size) for size in shape[1 : 1 + int(shape[0])]], dtype=dtype)
    dist.recv(value, rank, group=group)
    return value


class PipelineExecutor(Executor):
    """An executor of one rank's phase graphs. All ranks run the same schedule on the same tokens; the last
    stage's logits go to every stage."""

    def __init__(
        self,
        prefill: Graph,
        decode: Graph,
        weights: Mapping[str, Tensor],
        *,
        blocks: int,
        block_size: int,
        vocabulary: int,
        group: dist.ProcessGroup,
    ) -> None:
        super().__init__(prefill, decode, weights, blocks=blocks, block_size=block_size)
        self._vocabulary = vocabulary
        self._graphs = {False: prefill, True: decode}
        self._group = group

    @torch.inference_mode()
    def logits(self, step: Step, tokens: Sequence[Sequence[int]]) -> Tensor:
        module = self._decode if step.decode else self._prefill
        graph = self._graphs[step.decode]
        found = run_stage(graph, module, self.inputs(step, tokens), self._caches, self._group)
        last = dist.get_world_size(self._group) - 1
        if last == 0:
            assert found is not None
            return found
        logits = torch.empty(len(step.parts), self._vocabulary) if found is None else found.float()
        dist.broadcast(logits, dist.get_global_rank(self._group, last), group=self._group)
        return logits
