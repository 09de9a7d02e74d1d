"""The rules of a scheduler, as data: how engines differ."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from planc.errors import InvalidField


@dataclass(frozen=True, slots=True)
class Limits:
    """The rules of one scheduler.

    max_num_seqs            sequences running at once
    max_num_batched_tokens  tokens in one step
    scheduling              "mixed": decodes first, prompts beside them. "prefill_first": steps of prompts
                            alone as long as one can be admitted
    chunked                 prompts may be cut at the budget; if not, a longer one has a step to itself
    prompts_per_step        prompts that may begin in one step; None: as many as fit
    reserved_output         share of the output still asked for, by the newcomer and all that run, that must
                            be free at admission; 1: it is taken at once, and nothing is ever preempted
    reserved_floor          what that share falls to, evenly over `reserved_steps` decode steps; idleness
                            resets it, and so does preemption, to what the running ones have used up
    preemption              what becomes of the preempted one's cache: computed again, or swapped out to
                            the host and back
    max_adapters            LoRA adapters that may run at once
    tokens_per_step         of a decoding sequence, on average; above 1 with speculative decoding
    rows_per_step           of a decoding sequence: what it takes of the token budget
    """

    max_num_seqs: int
    max_num_batched_tokens: int
    scheduling: Literal["mixed", "prefill_first"] = "mixed"
    chunked: bool = True
    prompts_per_step: int | None = None
    reserved_output: float = 0.0
    reserved_floor: float | None = None
    reserved_steps: int = 600
    preemption: Literal["recompute", "swap"] = "recompute"
    max_adapters: int | None = None
    tokens_per_step: float = 1.0
    rows_per_step: int = 1

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_num_batched_tokens", "prompts_per_step", "max_adapters"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InvalidField(
                    where="scheduler",
                    field=name,
                    value=value,
                    reason="must be at least 1",
                    mend="Raise it.",
                )
        floor = self.reserved_output if self.reserved_floor is None else self.reserved_floor
        if not 0 <= floor <= self.reserved_output <= 1:
            raise InvalidField(
                where="scheduler",
                field="reserved_output",
                value=self.reserved_output,
                reason=f"is a share of the requested output, and falls to {floor}",
                mend="Give a number from 0 to 1, and a floor below it.",
            )
        if self.tokens_per_step < 1:
            raise InvalidField(
                where="scheduler",
                field="tokens_per_step",
                value=self.tokens_per_step,
                reason="a step makes at least one token of every sequence",
                mend="Give 1 or more.",
            )
