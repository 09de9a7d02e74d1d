"""Runs compiled prefill and decode graphs: several requests of different lengths at once.

The executor owns the tensors (weights, caches); the scheduler and the cache's book-keeping decide
what goes into a step. It runs any pair of phase graphs, whatever passes rewrote them, on CPU or CUDA.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from planc.errors import InvalidField
from planc.ir.graph import PHASE_INPUTS, CacheSpec, Graph
from planc.runtime.binding import bind
from planc.runtime.kv_cache import KVCache
from planc.runtime.scheduler import Limits, Scheduler, Step


@dataclass(frozen=True, slots=True)
class Request:
    """What a caller asks for: token ids in, at most `max_new_tokens` out, ending after any id in `eos`."""

    prompt: tuple[int, ...]
    max_new_tokens: int
    eos: frozenset[int] = frozenset()


class Executor:
    """A compiled model, ready to generate.

    prefill, decode         phase graphs over the same caches
    weights                 the source model's tensors by name; the graphs' weight steps are applied here
    blocks, block_size      size of the paged KV cache: blocks * block_size tokens
    max_num_seqs            sequences running at once
    max_num_batched_tokens  tokens in one step; longer prompts are prefilled in chunks
    """

    def __init__(
        self,
        prefill: Graph,
        decode: Graph,
        weights: Mapping[str, Tensor],
        *,
        blocks: int,
        block_size: int,
        device: str | torch.device = "cpu",
        max_num_seqs: int = 64,
        max_num_batched_tokens: int = 2048,
    ) -> None:
        for graph, stage in ((prefill, "prefill"), (decode, "decode")):
            assert graph.stage == stage, f"a {graph.stage} graph was given as {stage}"
        assert prefill.caches == decode.caches, "the phases do not share their caches"
        self.device = torch.device(device)
        self.limits = Limits(max_num_seqs, max_num_batched_tokens)
        self.cache = KVCache(blocks, block_size, max_num_seqs)
        self._prefill, self._decode = bind((prefill, decode), weights, self.device)
        self._vocabulary = _vocabulary(prefill)
        self._caches = tuple(
            torch.zeros(cache_shape(spec, self.cache), dtype=spec.dtype, device=self.device)
            for spec in prefill.caches
        )

    def generate(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, eos: int | Sequence[int] | None = None
    ) -> list[list[int]]:
        """Greedy continuations, one per prompt: new token ids only, an end token included."""
        ends = frozenset([eos] if isinstance(eos, int) else (eos or ()))
        return self.run([Request(tuple(prompt), max_new_tokens, ends) for prompt in prompts])

    def run(
        self, requests: Sequence[Request], *, observe: Callable[[Step, Tensor], None] | None = None
    ) -> list[list[int]]:
        """Greedy continuations of requests with limits of their own.

        observe   called with every step and its logits [len(step.parts), V]
        """
        scheduler = Scheduler(self.limits, self.cache)
        tokens: list[list[int]] = []
        for index, request in enumerate(requests):
            self._check(index, request)
            tokens.append(list(request.prompt))
        for index, request in enumerate(requests):
            scheduler.add(index, len(request.prompt), request.max_new_tokens)
        while scheduler.busy:
            step = scheduler.schedule()
            logits = self.logits(step, tokens)
            if observe is not None:
                observe(step, logits)
            sampled = logits.argmax(-1).tolist()
            stopped = set()
            for part, token in zip(step.parts, sampled, strict=True):
                if part.samples:
                    tokens[part.sequence].append(token)
                    if token in requests[part.sequence].eos:
                        stopped.add(part.sequence)
            scheduler.advance(step, stopped)
        return [found[len(request.prompt) :] for found, request in zip(tokens, requests, strict=True)]

    @torch.inference_mode()
    def logits(self, step: Step, tokens: Sequence[Sequence[int]]) -> Tensor:
        """Runs one step; `tokens` are the known ids of every sequence. Logits [len(step.parts), V]."""
        inputs = self.inputs(step, tokens)
        module = self._decode if step.decode else self._prefill
        found = module(*inputs, *self._caches)
        assert isinstance(found, Tensor)
        return found

    def inputs(self, step: Step, tokens: Sequence[Sequence[int]]) -> tuple[Tensor, ...]:
        """The phase inputs of a step, in the order of `planc.ir.graph.PHASE_INPUTS`."""
        ids: list[int] = []
        positions: list[int] = []
        starts, contexts, slots, states = [0], [], [], []
        tables = []
        for part in step.parts:
            ids += tokens[part.sequence][part.start : part.stop]
            positions += range(part.start, part.stop)
            starts.append(len(ids))
            contexts.append(part.stop)
            slots += self.cache.slots(part.sequence, part.start, part.stop)
            states.append(self.cache.state_slot(part.sequence))
            tables.append(self.cache.table(part.sequence))
        width = max(len(table) for table in tables)
        padded = [table + [0] * (width - len(table)) for table in tables]
        columns = {
            "input_ids": (torch.int64, [ids]),
            "position_ids": (torch.int64, [positions]),
            "query_starts": (torch.int32, starts),
            "context_lens": (torch.int32, contexts),
            "block_table": (torch.int32, padded),
            "slots": (torch.int64, slots),
            "state_slots": (torch.int64, states),
        }
        return tuple(
            torch.tensor(columns[name][1], dtype=columns[name][0], device=self.device)
            for name in PHASE_INPUTS
        )

    def _check(self, index: int, request: Request) -> None:
        outside = [token for token in request.prompt if not 0 <= token < self._vocabulary]
        if outside:
            raise InvalidField(
                where=f"request {index}",
                field="prompt",
                value=outside[0],
                reason=f"token ids of this model are 0 to {self._vocabulary - 1}",
                mend="Use the tokenizer that belongs to the model.",
            )


def cache_shape(spec: CacheSpec, cache: KVCache) -> tuple[int, ...]:
    """The shape of the tensor that holds one cache of a model."""
    lead = (cache.blocks, cache.block_size) if spec.kind == "paged" else (cache.states,)
    return (*lead, *spec.entry)


def _vocabulary(graph: Graph) -> int:
    (output,) = graph.module.graph.output_node().all_input_nodes
    return int(output.meta["val"].shape[-1])
