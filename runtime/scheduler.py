"""Continuous batching: which sequences run in the next step, and how many of their tokens.

One scheduler for planc's executor, which asks for every step, and for its simulator, which jumps over
runs of steps that only decode. Its rules are those of today's engines, as `Limits` states them: decodes
first and prompts in what is left of the token budget, or prompts first; whole prompts or chunks of
them; output reserved at admission, or the latest arrival preempted when the cache is full. Torch-free,
deterministic, and blind to token values.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, field
from heapq import heappop, heappush
from typing import Literal, NamedTuple

from planc.errors import InvalidField
from planc.runtime.decoding import Decoding, Sequence
from planc.runtime.kv_cache import KVCache

#: decode steps ahead that SGLang looks when it sets the reserved share anew after a preemption
_RETRACT_STEPS = 20


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


class Chunk(NamedTuple):
    """`tokens` of a prompt (or of one computed again) after `start` cached ones."""

    sequence: Sequence
    start: int
    tokens: int
    samples: bool


@dataclass(slots=True)
class Batch:
    """A step in short: the decoding group is not listed.

    decodes, context   sequences of the group and the tokens they attend to, all together
    swapped            tokens whose cache moves between device and host
    resumed            swapped-in sequences that decode from the next step on
    adapters           adapters that must be loaded first
    """

    decodes: int = 0
    context: int = 0
    chunks: list[Chunk] = field(default_factory=list)
    preempted: list[Sequence] = field(default_factory=list)
    resumed: list[Sequence] = field(default_factory=list)
    swapped: int = 0
    adapters: int = 0
    taken: int = 0
    held: list[Sequence] = field(default_factory=list)

    @property
    def plain(self) -> bool:
        """Nothing but decoding: the next steps will be the same until something happens."""
        return not (self.chunks or self.preempted or self.resumed or self.held or self.adapters)


class Scheduler:
    """Drives sequences through the cache.

    `add` requests; then `schedule` and `advance` in turn, as an executor does, or `plan`, `runway` and
    `commit`, which jump.
    """

    def __init__(self, limits: Limits, cache: KVCache) -> None:
        self.limits, self.cache = limits, cache
        self.decoding = Decoding(cache.block_size)
        self.owed = 0  # tokens that running sequences may still ask for
        self._waiting: list[tuple[int, int, Sequence]] = []
        self._running: dict[int, Sequence] = {}
        self._prefilling: list[Sequence] = []
        self._arrivals = 0
        self.ranked = False
        self._ahead = 0  # tokens of each member, between plan and commit, whose blocks are taken
        self._steps = 0  # decode steps so far
        self._reserved = (limits.reserved_output, 0)  # share, and the step at which it was set
        self._batch = Batch()
        self._grows = limits.reserved_output < 1
        self._adapters: dict[int, int] = {}  # users of each loaded adapter, the least recently used first

    @property
    def busy(self) -> bool:
        return bool(self._waiting or self._running)

    @property
    def running(self) -> tuple[Sequence, ...]:
        """Sequences that hold a seat, in order of admission."""
        return tuple(self._running.values())

    @property
    def seated(self) -> int:
        return len(self._running)

    @property
    def queued(self) -> int:
        return len(self._waiting)

    def add(
        self,
        sequence: int,
        prompt: int,
        max_new_tokens: int,
        *,
        priority: int = 0,
        adapter: int | None = None,
        prefix: tuple[int, ...] = (),
    ) -> Sequence:
        """A new request of `prompt` tokens. Raises InvalidField if it could never fit the cache."""
        if prompt < 1 or max_new_tokens < 1:
            raise InvalidField(
                where=f"request {sequence}",
                field="prompt" if prompt < 1 else "max_new_tokens",
                value=prompt if prompt < 1 else max_new_tokens,
                reason="must be at least 1",
                mend="Give at least one token, and ask for at least one.",
            )
        # the last token is never fed back, but drafts may run past it
        cached = prompt + max_new_tokens - 1 + math.ceil(self.limits.tokens_per_step - 1)
        if self.cache.blocks_for(cached) > self.cache.blocks:
            raise InvalidField(
                where=f"request {sequence}",
                field="prompt + max_new_tokens",
                value=prompt + max_new_tokens,
                reason=f"the whole KV cache holds {self.cache.blocks * self.cache.block_size} tokens",
                mend="Give the cache more blocks, or ask for fewer tokens.",
            )
        made = Sequence(sequence, prompt, max_new_tokens, self._arrivals, priority, adapter, prefix)
        self._arrivals += 1
        self.ranked |= priority != 0
        heappush(self._waiting, (priority, made.order, made))
        return made

    # -- step by step --------------------------------------------------------------------

    def schedule(self) -> Step:
        """The next step; blocks for its tokens are taken and named. Empty only when nothing is left."""
        batch = self._batch = self.plan()
        for sequence in batch.preempted:
            self.cache.forget(sequence.id)
        parts = [
            Part(member.id, at, at + 1, samples=True)
            for member in self._running.values()
            if member.decoding and batch.decodes
            for at in (self.decoding.position(member),)
        ]
        parts += [Part(c.sequence.id, c.start, c.start + c.tokens, c.samples) for c in batch.chunks]
        for part in parts:
            self.cache.grow(part.sequence, part.stop)
        return Step(tuple(parts), tuple(s.id for s in batch.preempted))

    def advance(self, step: Step, stopped: Collection[int] = ()) -> tuple[int, ...]:
        """Books what a step computed; `stopped` sampled an end token. Returns the finished sequences."""
        finished = self.commit(self._batch, stopped=stopped)
        for sequence in finished:
            self.cache.forget(sequence.id)
        return tuple(sequence.id for sequence in finished)

    # -- in jumps ------------------------------------------------------------------------

    def plan(self) -> Batch:
        """The next step; blocks for its tokens are taken."""
        batch = Batch()
        if self.limits.scheduling == "prefill_first":
            budget = self._continue(batch, self.limits.max_num_batched_tokens)
            if not batch.preempted:
                self._admit(batch, budget)
            if batch.chunks or batch.resumed:
                return batch
            self._decode(batch, self.limits.max_num_batched_tokens)
            return batch
        budget = self._decode(batch, self.limits.max_num_batched_tokens)
        budget = self._continue(batch, budget)
        if not batch.preempted:
            self._admit(batch, budget)
        return batch

    def runway(self, batch: Batch) -> int:
        """How many steps like this one follow each other before a sequence ends or the cache is full.
        New arrivals may end the run earlier; then `commit` fewer."""
        if not batch.plain:
            return 1
        if self._waiting and self._restless:
            return 1
        tokens = self.decoding.until_end()
        steps = self._steps_for(tokens)
        if self._grows:
            room = self.decoding.lasts(self.cache.free_blocks + batch.taken)
            if room < tokens:
                steps = self._steps_for(room + 1) - 1
        return max(steps, 1)

    def commit(self, batch: Batch, steps: int = 1, stopped: Collection[int] = ()) -> list[Sequence]:
        """Books what a step computed, `steps` times if it only decodes. Returns the finished sequences."""
        finished: list[Sequence] = []
        if batch.decodes:
            tokens = self.ahead(steps)
            if self._grows and steps > 1:
                self.cache.take(self.decoding.filled(tokens) - batch.taken)
            self.owed -= tokens * batch.decodes
            self._steps += steps
            self._ahead = 0
            for member in self.decoding.advance(tokens):
                self._settle(member)
                finished.append(member)
            for member in [self._running[i] for i in stopped if i in self._running]:
                if member.decoding:
                    self._leave_group(member)
                    finished.append(member)
        for chunk in batch.chunks:
            if self._absorb(chunk, stopped):
                finished.append(chunk.sequence)
        for member in batch.held + batch.resumed:
            self.decoding.join(member)
        for sequence in finished:
            self._release(sequence)
        return finished

    def ahead(self, steps: int) -> int:
        """Tokens that each decoding sequence makes in its next steps."""
        pace = self.limits.tokens_per_step
        if pace == 1:
            return steps
        return int(pace * (self._steps + steps)) - int(pace * self._steps)

    def _steps_for(self, tokens: int) -> int:
        """Steps in which each decoding sequence makes at least so many tokens."""
        pace = self.limits.tokens_per_step
        if pace == 1:
            return tokens
        steps = max(int(tokens / pace) - 1, 0)
        while self.ahead(steps) < tokens:
            steps += 1
        return steps

    # -- parts of a step -----------------------------------------------------------------

    def _decode(self, batch: Batch, budget: int) -> int:
        """Every decoding sequence gets a token and room for it; the latest arrivals give way."""
        group = self.decoding
        if group.size > budget:
            late = [s for s in self._running.values() if s.decoding][budget:]
            for member in late:
                self._leave_group(member)
            batch.held = late
        ahead = self.ahead(1)
        if self._grows:
            while (needed := group.filled(ahead)) > self.cache.free_blocks:
                self._preempt(self._latest(), batch)
            self.cache.take(needed)
            batch.taken = needed
        batch.held = [member for member in batch.held if member.id in self._running]
        batch.decodes = group.size
        batch.context = group.cached + group.size
        self._ahead = ahead if group.size else 0
        return budget - group.size

    def _admit(self, batch: Batch, budget: int) -> None:
        """Waiting sequences take seats while seats, budget and cache last, in order."""
        limits = self.limits
        most = limits.prompts_per_step or limits.max_num_seqs
        passed_over = []
        while self._waiting and budget > 0 and len(self._running) < limits.max_num_seqs and most:
            sequence = self._waiting[0][2]
            if self._gated(sequence):
                passed_over.append(heappop(self._waiting))
                continue
            hit = self._hits(sequence)
            start = sequence.computed or hit * self.cache.prefix_block
            left = sequence.tokens - start
            back = sequence.swapped and left == 1  # it decodes from the next step on
            count = 0 if back else min(left, budget)
            if count < left and not back and not limits.chunked:
                if batch.chunks:
                    break
                count = left
            needed = self._needed(sequence, start + count, start if back else sequence.tokens, hit)
            if needed is None:
                break
            heappop(self._waiting)
            self._seat(sequence, start, hit, needed, batch)
            if back:
                batch.resumed.append(sequence)
                continue
            self._prefilling.append(sequence)
            batch.chunks.append(_chunk(sequence, count))
            budget -= count
            most -= 1
        for item in passed_over:
            heappush(self._waiting, item)

    def _needed(self, sequence: Sequence, stop: int, known: int, hit: int) -> int | None:
        """Blocks that a newcomer takes for its first `stop` tokens, or for the `known` ones where output is
        reserved; None if they are not to be had now."""
        cache, share = self.cache, self.limits.reserved_output
        if not self._running:
            self._reserved = (share, self._steps)
        free = cache.free_blocks
        if hit:
            free -= cache.idle_among(sequence.prefix[:hit])
        if share == 1:
            stop = sequence.prompt + sequence.max_new_tokens - 1
        elif share:
            stop = known
        needed = cache.blocks_for(stop) - hit * cache.span
        if not share or share == 1 or not self._running:
            return needed if needed <= free else None
        later = self._share() * (self.owed + sequence.max_new_tokens - sequence.generated)
        return needed if needed + later / cache.block_size <= free else None

    @property
    def _restless(self) -> bool:
        """Whether the head of the queue may fit after a step in which nothing ends: the reserved share
        falls, or the output asked for shrinks while whole blocks are not yet full."""
        limits = self.limits
        if not 0 < limits.reserved_output < 1 or len(self._running) >= limits.max_num_seqs:
            return False
        falls = limits.reserved_floor is not None and self._share() > limits.reserved_floor
        return falls or self.cache.block_size > 1

    def _share(self) -> float:
        limits = self.limits
        if limits.reserved_floor is None:
            return limits.reserved_output
        share, since = self._reserved
        fall = (limits.reserved_output - limits.reserved_floor) / limits.reserved_steps
        return max(share - fall * (self._steps - since), limits.reserved_floor)

    def _hits(self, sequence: Sequence) -> int:
        """Leading hashes whose blocks are in the cache; the last token is computed in any case."""
        if not sequence.prefix or sequence.computed:
            return 0
        most = (sequence.tokens - 1) // self.cache.prefix_block
        return self.cache.found(sequence.prefix[:most])

    def _seat(self, sequence: Sequence, start: int, hit: int, needed: int, batch: Batch) -> None:
        cache = self.cache
        if hit:
            sequence.shared.extend(sequence.prefix[:hit])
            cache.use(sequence.shared)
            sequence.hit += start
        if sequence.swapped:
            batch.swapped += sequence.computed
            sequence.swapped = False
        sequence.computed = start
        cache.take(needed)
        sequence.blocks = needed
        self._running[sequence.id] = sequence
        self.owed += sequence.max_new_tokens - sequence.generated
        if sequence.adapter is not None:
            self._load(sequence.adapter, batch)

    def _continue(self, batch: Batch, budget: int) -> int:
        """Prompts that have begun get their next chunks."""
        for sequence in list(self._prefilling):
            if budget <= 0:
                break
            if sequence.id not in self._running:  # preempted in this very step
                continue
            count = min(sequence.pending, budget)
            stop = self.cache.blocks_for(sequence.computed + count)
            needed = max(stop - sequence.blocks - len(sequence.shared) * self.cache.span, 0)
            while needed > self.cache.free_blocks and sequence.id in self._running:
                self._preempt(self._latest(), batch)
            if sequence.id in self._running:
                self.cache.take(needed)
                sequence.blocks += needed
                batch.chunks.append(_chunk(sequence, count))
                budget -= count
        return budget

    def _absorb(self, chunk: Chunk, stopped: Collection[int]) -> bool:
        """Books a chunk; whether its sequence has made its last token."""
        sequence, cache = chunk.sequence, self.cache
        sequence.computed = chunk.start + chunk.tokens
        if sequence.prefix:
            full = min(sequence.computed, sequence.prompt) // cache.prefix_block
            for name in sequence.prefix[chunk.start // cache.prefix_block : full]:
                if cache.keep(name):
                    sequence.shared.append(name)
                    sequence.blocks -= cache.span
        if not chunk.samples:
            return False
        sequence.generated += 1
        self.owed -= 1
        self._prefilling.remove(sequence)
        if sequence.generated == sequence.max_new_tokens or sequence.id in stopped:
            return True
        self.decoding.join(sequence)
        return False

    # -- seats ---------------------------------------------------------------------------

    def _latest(self) -> Sequence:
        """Who gives way: the last one admitted, or the latest of the lowest priority."""
        if self.ranked:
            return max(self._running.values(), key=lambda s: (s.priority, s.order))
        return next(reversed(self._running.values()))

    def _preempt(self, victim: Sequence, batch: Batch) -> None:
        if victim.decoding:
            if self._ahead:
                batch.decodes -= 1
                batch.context -= self.decoding.position(victim) + 1
            self._leave_group(victim)
        elif victim in self._prefilling:
            self._prefilling.remove(victim)
            batch.chunks = [chunk for chunk in batch.chunks if chunk.sequence is not victim]
        self._release(victim)
        victim.preemptions += 1
        if self.limits.preemption == "swap":
            victim.swapped = True
            batch.swapped += victim.computed
        else:
            victim.computed = 0
        if 0 < self.limits.reserved_output < 1:
            asked = sum(s.max_new_tokens for s in self._running.values())
            ahead = _RETRACT_STEPS * len(self._running)
            used = (asked - self.owed + ahead) / asked if asked else self.limits.reserved_output
            self._reserved = (min(used, 1.0), self._steps)
        batch.preempted.append(victim)
        heappush(self._waiting, (victim.priority, victim.order, victim))

    def _leave_group(self, member: Sequence) -> None:
        self.decoding.leave(member)
        self._settle(member)

    def _settle(self, member: Sequence) -> None:
        """Counts the blocks that a member took while it was in the group."""
        if self._grows:
            held = self.cache.blocks_for(member.computed + self._ahead)
            member.blocks = held - len(member.shared) * self.cache.span

    def _release(self, sequence: Sequence) -> None:
        """Gives up a seat and all that goes with it."""
        del self._running[sequence.id]
        self.owed -= sequence.max_new_tokens - sequence.generated
        self.cache.give(sequence.blocks)
        self.cache.leave(sequence.shared)
        sequence.blocks = 0
        sequence.shared.clear()
        if sequence.adapter is not None:
            self._adapters[sequence.adapter] -= 1

    # -- adapters ------------------------------------------------------------------------

    def _gated(self, sequence: Sequence) -> bool:
        """Whether a sequence waits for its adapter's turn."""
        most, name = self.limits.max_adapters, sequence.adapter
        if most is None or name is None or self._adapters.get(name):
            return False
        return sum(users > 0 for users in self._adapters.values()) >= most

    def _load(self, name: int, batch: Batch) -> None:
        """Counts a user of an adapter; loads it if it is not there, in place of the longest unused one."""
        if name not in self._adapters:
            batch.adapters += 1
            if self.limits.max_adapters is not None and len(self._adapters) >= self.limits.max_adapters:
                del self._adapters[next(n for n, users in self._adapters.items() if not users)]
        self._adapters[name] = self._adapters.pop(name, 0) + 1


def _chunk(sequence: Sequence, count: int) -> Chunk:
    stop = sequence.computed + count
    return Chunk(sequence, sequence.computed, count, samples=stop == sequence.tokens)
