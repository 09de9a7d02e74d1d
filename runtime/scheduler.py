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
from heapq import heappop, heappush

from planc.errors import InvalidField
from planc.runtime.admission import Adapters, Reserve
from planc.runtime.decoding import Decoding, Sequence
from planc.runtime.kv_cache import KVCache
from planc.runtime.limits import Limits
from planc.runtime.steps import Batch, Chunk, Part, Step, chunk_of

__all__ = ["Batch", "Limits", "Part", "Scheduler", "Step"]


class Scheduler:
    """Drives sequences through the cache.

    `add` requests; then `schedule` and `advance` in turn, as an executor does, or `plan`, `runway` and
    `commit`, which jump.
    """

    def __init__(self, limits: Limits, cache: KVCache) -> None:
        self.limits, self.cache = limits, cache
        self.decoding = Decoding(cache.block_size, limits.tokens_per_step)
        self.owed = 0  # tokens that running sequences may still ask for
        self._waiting: list[tuple[int, int, Sequence]] = []
        self._running: dict[int, Sequence] = {}
        self._prefilling: list[Sequence] = []
        self._arrivals = 0
        self.ranked = False
        self.withheld = 0  # seats of prompts that were computed here and whose cache is still to be fetched
        self._ahead = 0  # tokens of each member, between plan and commit, whose blocks are taken
        self._batch = Batch()
        self._grows = limits.reserved_output < 1
        self._adapters = Adapters(limits.max_adapters)
        self._reserve = Reserve(limits)

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
        if self._prefilling:
            budget = self._continue(batch, budget)
        if self._waiting and not batch.preempted:
            self._admit(batch, budget)
        return batch

    def runway(self, batch: Batch) -> int:
        """How many steps like this one follow each other before a sequence ends or the cache is full.
        New arrivals may end the run earlier; then `commit` fewer."""
        if not batch.plain:
            return 1
        seats = len(self._running) + self.withheld < self.limits.max_num_seqs
        if seats and self._waiting and self._reserve.restless(self.decoding.steps, self.cache.block_size):
            return 1
        steps = self.decoding.steps_for(self.decoding.until_end())
        tokens = self.decoding.ahead(steps)  # drafts may carry a sequence past its end
        free = self.cache.free_blocks + batch.taken
        if self._grows and self.decoding.most_filled(tokens) > free:
            room = self.decoding.lasts(free)
            if room < tokens:
                steps = self.decoding.steps_for(room + 1) - 1
        return max(steps, 1)

    def commit(self, batch: Batch, steps: int = 1, stopped: Collection[int] = ()) -> list[Sequence]:
        """Books what a step computed, `steps` times if it only decodes. Returns the finished sequences."""
        finished: list[Sequence] = []
        if batch.decodes:
            tokens = self.decoding.ahead(steps)
            if self._grows and steps > 1:
                self.cache.take(self.decoding.filled(tokens) - batch.taken)
            self.owed -= tokens * batch.decodes
            self._ahead = 0
            for member in self.decoding.advance(steps):
                self._settle(member)
                finished.append(member)
            for member in [self._running[i] for i in stopped] if stopped else ():
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

    # -- parts of a step -----------------------------------------------------------------

    def _decode(self, batch: Batch, budget: int) -> int:
        """Every decoding sequence gets a token and room for it; the latest arrivals give way."""
        group, rows = self.decoding, self.limits.rows_per_step
        if group.size * rows > budget:
            late = [s for s in self._running.values() if s.decoding][budget // rows :]
            for member in late:
                self._leave_group(member)
            batch.held = tuple(late)
        ahead = group.ahead(1)
        if self._grows:
            while (needed := group.filled(ahead)) > self.cache.free_blocks:
                self._preempt(self._latest(), batch)
            self.cache.take(needed)
            batch.taken = needed
        if batch.preempted and batch.held:
            batch.held = tuple(member for member in batch.held if member.id in self._running)
        batch.decodes = group.size
        batch.context = group.cached + group.size
        self._ahead = ahead if group.size else 0
        return budget - group.size * rows

    def _admit(self, batch: Batch, budget: int) -> None:
        """Waiting sequences take seats while seats, budget and cache last, in order."""
        limits = self.limits
        most = limits.prompts_per_step or limits.max_num_seqs
        seats = limits.max_num_seqs - self.withheld
        passed_over = []
        while self._waiting and budget > 0 and len(self._running) < seats and most:
            sequence = self._waiting[0][2]
            if self._adapters.full_for(sequence.adapter):
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
                batch.resumed += (sequence,)
                continue
            self._prefilling.append(sequence)
            batch.chunks += (chunk_of(sequence, count),)
            budget -= count
            most -= 1
        for item in passed_over:
            heappush(self._waiting, item)

    def _needed(self, sequence: Sequence, stop: int, known: int, hit: int) -> int | None:
        """Blocks that a newcomer takes for its first `stop` tokens, or for the `known` ones where output is
        reserved; None if they are not to be had now."""
        cache, share = self.cache, self.limits.reserved_output
        if not self._running:
            self._reserve.reset(self.decoding.steps)
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
        later = self._reserve.share(self.decoding.steps) * (
            self.owed + sequence.max_new_tokens - sequence.generated
        )
        return needed if needed + later / cache.block_size <= free else None

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
            batch.adapters += self._adapters.use(sequence.adapter)

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
                batch.chunks += (chunk_of(sequence, count),)
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
            batch.chunks = tuple(chunk for chunk in batch.chunks if chunk.sequence is not victim)
        self._release(victim)
        victim.preemptions += 1
        if self.limits.preemption == "swap":
            victim.swapped = True
            batch.swapped += victim.computed
        else:
            victim.computed = 0
        if self._reserve.partial:
            asked = sum(s.max_new_tokens for s in self._running.values())
            self._reserve.learn(asked, self.owed, len(self._running), self.decoding.steps)
        batch.preempted += (victim,)
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
            self._adapters.leave(sequence.adapter)
