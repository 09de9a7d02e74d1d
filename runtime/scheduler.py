"""Continuous batching: which sequences run in the next step, and how many of their tokens.

The policy is that of vLLM's V1 scheduler, reduced to what planc needs: running sequences first, in
order of arrival, then waiting ones, under a budget of tokens per step. A prompt longer than what is
left of the budget is prefilled in chunks. When the cache is full, the latest arrival gives up its
blocks and is computed again later. Torch-free, deterministic, and blind to token values.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, field

from planc.errors import InvalidField
from planc.runtime.kv_cache import KVCache


@dataclass(frozen=True, slots=True)
class Limits:
    """max_num_seqs: sequences running at once. max_num_batched_tokens: tokens in one step."""

    max_num_seqs: int
    max_num_batched_tokens: int

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_num_batched_tokens"):
            if getattr(self, name) < 1:
                raise InvalidField(
                    where="scheduler",
                    field=name,
                    value=getattr(self, name),
                    reason="must be at least 1",
                    mend="Raise it.",
                )


@dataclass(slots=True)
class Sequence:
    """A request on its way. `tokens` are known (prompt and generated), `computed` are in the cache."""

    id: int
    prompt: int
    max_new_tokens: int
    tokens: int = 0
    computed: int = 0
    preemptions: int = 0

    def __post_init__(self) -> None:
        self.tokens = self.prompt

    @property
    def generated(self) -> int:
        return self.tokens - self.prompt

    @property
    def pending(self) -> int:
        """Tokens that must be computed before the next one can be sampled."""
        return self.tokens - self.computed


@dataclass(frozen=True, slots=True)
class Part:
    """One sequence's share of a step: its tokens `start .. stop`; `samples` if a new token follows."""

    sequence: int
    start: int
    stop: int
    samples: bool


@dataclass(frozen=True, slots=True)
class Step:
    """One model forward. `decode`: every sequence has one query token."""

    parts: tuple[Part, ...]
    preempted: tuple[int, ...] = ()

    @property
    def tokens(self) -> int:
        return sum(part.stop - part.start for part in self.parts)

    @property
    def decode(self) -> bool:
        return all(part.stop - part.start == 1 for part in self.parts)


@dataclass(slots=True)
class Scheduler:
    """Drives sequences through the cache: `add` requests, then `schedule` and `advance` in turn."""

    limits: Limits
    cache: KVCache
    waiting: deque[Sequence] = field(default_factory=deque)
    running: list[Sequence] = field(default_factory=list)

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, sequence: int, prompt: int, max_new_tokens: int) -> None:
        """A new request of `prompt` tokens. Raises InvalidField if it could never fit the cache."""
        where = f"request {sequence}"
        if prompt < 1 or max_new_tokens < 1:
            raise InvalidField(
                where=where,
                field="prompt" if prompt < 1 else "max_new_tokens",
                value=prompt if prompt < 1 else max_new_tokens,
                reason="must be at least 1",
                mend="Give at least one token, and ask for at least one.",
            )
        cached = prompt + max_new_tokens - 1  # the last token is never fed back
        if self.cache.blocks_for(cached) > self.cache.blocks:
            raise InvalidField(
                where=where,
                field="prompt + max_new_tokens",
                value=prompt + max_new_tokens,
                reason=f"the whole KV cache holds {self.cache.blocks * self.cache.block_size} tokens",
                mend="Give the cache more blocks, or ask for fewer tokens.",
            )
        self.waiting.append(Sequence(sequence, prompt, max_new_tokens))

    def schedule(self) -> Step:
        """The next step; blocks for its tokens are taken. Empty only when nothing is left to do."""
        budget = self.limits.max_num_batched_tokens
        parts: list[Part] = []
        preempted: list[Sequence] = []
        queue = deque(self.running)
        while queue and budget:
            sequence = queue.popleft()
            count = min(sequence.pending, budget)
            while not self.cache.grow(sequence.id, sequence.computed + count):
                victim = queue.pop() if queue else sequence
                self._preempt(victim)
                preempted.append(victim)
                if victim is sequence:
                    break
            else:
                parts.append(_part(sequence, count))
                budget -= count
        if not preempted:
            while self.waiting and budget and len(self.running) < self.limits.max_num_seqs:
                sequence = self.waiting[0]
                count = min(sequence.pending, budget)
                if not self.cache.grow(sequence.id, count):
                    break
                self.running.append(self.waiting.popleft())
                parts.append(_part(sequence, count))
                budget -= count
        return Step(tuple(parts), tuple(s.id for s in preempted))

    def advance(self, step: Step, stopped: Collection[int] = ()) -> tuple[int, ...]:
        """Books what a step computed; `stopped` sampled an end token. Returns the finished sequences."""
        by_id = {sequence.id: sequence for sequence in self.running}
        finished = []
        for part in step.parts:
            sequence = by_id[part.sequence]
            sequence.computed = part.stop
            if part.samples:
                sequence.tokens += 1
                if part.sequence in stopped or sequence.generated == sequence.max_new_tokens:
                    finished.append(sequence)
        for sequence in finished:
            self.running.remove(sequence)
            self.cache.release(sequence.id)
        return tuple(sequence.id for sequence in finished)

    def _preempt(self, victim: Sequence) -> None:
        self.running.remove(victim)
        self.cache.release(victim.id)
        victim.computed = 0
        victim.preemptions += 1
        self.waiting.appendleft(victim)


def _part(sequence: Sequence, count: int) -> Part:
    stop = sequence.computed + count
    return Part(sequence.id, sequence.computed, stop, samples=stop == sequence.tokens)
