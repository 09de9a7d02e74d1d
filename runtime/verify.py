"""Proof that compiled graphs compute what the model computes, by running both.

Generation is greedy with the compiled graphs; then the traced model sees each whole sequence at once,
with no cache, and its logits at every generated place are compared with those the executor used. So
one wrong token does not hide what comes after it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from planc.errors import CheckFailed
from planc.ir.graph import Graph
from planc.runtime.binding import bind
from planc.runtime.executor import Executor, Request
from planc.runtime.forward import random_inputs, run_module
from planc.runtime.scheduler import Step


@dataclass(frozen=True, slots=True)
class Agreement:
    """How far compiled graphs agree with the traced model.

    compared        logit rows (or output tensors) compared
    same_tokens     rows whose largest logit is the same token's; None where there are no tokens
    max_abs_error   largest difference of two logits
    row_error       the same for the median row: what rounding does, where the largest may come from a
                    router or an indexer that chose differently between near-equals
    scale           largest logit of the traced model
    """

    compared: int
    same_tokens: int | None
    max_abs_error: float
    row_error: float
    scale: float

    @property
    def relative_error(self) -> float:
        """The largest error as a share of the largest logit."""
        return self.max_abs_error / self.scale if self.scale else self.max_abs_error

    @property
    def typical_error(self) -> float:
        """The median row's largest error as a share of the largest logit."""
        return self.row_error / self.scale if self.scale else self.row_error

    @property
    def tokens_equal(self) -> bool:
        return self.same_tokens in (None, self.compared)

    def require(self, what: str, tolerance: float) -> None:
        """Raises CheckFailed where the error is above `tolerance`, relative to the largest logit."""
        if not self.relative_error <= tolerance:
            raise CheckFailed(
                what=what,
                reason=f"it differs from the traced model by {self.relative_error:.2e} of the largest value "
                f"(allowed: {tolerance:.0e}); {self.same_tokens} of {self.compared} tokens agree",
                mend="Apply the passes one by one with `planc inspect --pass` to find the one at fault.",
            )


def verify_model(
    traced: Graph,
    prefill: Graph,
    decode: Graph,
    weights: Mapping[str, Tensor],
    *,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int = 16,
    block_size: int = 16,
    max_num_batched_tokens: int = 2048,
    device: str | torch.device = "cpu",
) -> Agreement:
    """Generates from `prompts` with the compiled graphs and compares every step with the traced model.

    A small `block_size` and `max_num_batched_tokens` put more of the machinery to the test.
    """
    tokens = sum(-(-(len(prompt) + max_new_tokens) // block_size) for prompt in prompts)
    executor = Executor(
        prefill,
        decode,
        weights,
        blocks=tokens,
        block_size=block_size,
        device=device,
        max_num_seqs=len(prompts),
        max_num_batched_tokens=max_num_batched_tokens,
    )
    rows: list[list[Tensor]] = [[] for _ in prompts]

    def observe(step: Step, logits: Tensor) -> None:
        for part, row in zip(step.parts, logits, strict=True):
            if part.samples:
                rows[part.sequence].append(row.float())

    requests = [Request(tuple(prompt), max_new_tokens) for prompt in prompts]
    generated = executor.run(requests, observe=observe)
    (module,) = bind((traced,), weights, device)
    pairs = []
    for prompt, new, found in zip(prompts, generated, rows, strict=True):
        ids = torch.tensor([[*prompt, *new[:-1]]], device=device)
        positions = torch.arange(ids.shape[1], device=device)[None]
        with torch.inference_mode():
            whole = module(ids, positions)[0, len(prompt) - 1 :].float()
        pairs.append((torch.stack(found), whole))
    same = sum(int((a.argmax(-1) == b.argmax(-1)).sum()) for a, b in pairs)
    return _agreement(pairs, sum(len(a) for a, _ in pairs), same)


def verify_module(
    traced: Graph,
    compiled: Graph,
    weights: Mapping[str, Tensor],
    *,
    inputs: Mapping[str, Tensor] | None = None,
    device: str | torch.device = "cpu",
) -> Agreement:
    """The same for a graph without phases, on the given inputs or on random ones."""
    given = random_inputs(traced) if inputs is None else inputs
    before, after = (run_module(graph, weights, given, device=device) for graph in (traced, compiled))
    pairs = [(a.float(), b.float()) for a, b in zip(after, before, strict=True)]
    return _agreement(pairs, len(pairs), None)


def _agreement(pairs: Sequence[tuple[Tensor, Tensor]], compared: int, same: int | None) -> Agreement:
    """Of (compiled, traced) pairs. A NaN on either side makes the error NaN, which no tolerance allows."""
    errors = torch.cat([(a - b).abs().reshape(-1, a.shape[-1] if a.dim() else 1).amax(-1) for a, b in pairs])
    scale = torch.stack([b.abs().max() for _, b in pairs]).max()
    return Agreement(compared, same, float(errors.max()), float(errors.median()), float(scale))
