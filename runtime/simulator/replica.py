"""One engine under load: runs its scheduler's steps in simulated time and jumps over runs of decodes."""

from __future__ import annotations

import math
from array import array
from dataclasses import dataclass, field
from heapq import heappop, heappush
from typing import Literal, NamedTuple

import numpy as np

from planc.errors import InvalidField
from planc.runtime.decoding import Sequence
from planc.runtime.kv_cache import KVCache
from planc.runtime.scheduler import Batch, Scheduler
from planc.runtime.simulator.clock import Line, StepTimes
from planc.runtime.simulator.records import Gaps, Records, Timeline
from planc.runtime.simulator.rules import Rules

_NAN = math.nan

FirstToken = Literal["prefill", "decode", "again"]


@dataclass(frozen=True, slots=True)
class Server:
    """One scheduler on one engine (one attention-DP rank): its clock, its rules and its cache."""

    clock: StepTimes
    rules: Rules
    kv_blocks: int
    block_size: int


class Sent(NamedTuple):
    """A request on its way to an engine; `at` is when its client sent it."""

    at: float
    id: int
    prompt: int
    output: int
    priority: int = 0
    adapter: int | None = None
    prefix: tuple[int, ...] = ()


class Finished(NamedTuple):
    """An answer: when its client has it."""

    id: int
    at: float


class Planned(NamedTuple):
    """A step to run, or a run of plain ones: how many, all their seconds, those of the last, and what passes
    from the end of a prompt's own part of a pipelined step until it is through."""

    batch: Batch
    steps: int
    seconds: float
    last: float
    drain: float

    @property
    def prompt_tokens(self) -> int:
        return sum(chunk.tokens for chunk in self.batch.chunks)


@dataclass(slots=True)
class Journal:
    """Times of all requests, by id; several replicas may write into one."""

    requests: int
    arrival: array[float] = field(init=False)
    admitted: array[float] = field(init=False)
    first: array[float] = field(init=False)
    finish: array[float] = field(init=False)
    preemptions: array[int] = field(init=False)
    hit: array[int] = field(init=False)
    gaps: Gaps = field(default_factory=Gaps)

    def __post_init__(self) -> None:
        for name in ("arrival", "admitted", "first", "finish"):
            setattr(self, name, array("d", [_NAN]) * self.requests)
        self.preemptions = array("q", [0]) * self.requests
        self.hit = array("q", [0]) * self.requests

    def records(
        self,
        prompt: np.typing.NDArray[np.int64],
        output: np.typing.NDArray[np.int64],
        timeline: Timeline,
        *,
        steps: int = 0,
        events: int = 0,
        wave: int = 0,
    ) -> Records:
        numbers = lambda column: np.frombuffer(column, dtype=np.float64)  # noqa: E731
        counts = lambda column: np.frombuffer(column, dtype=np.int64)  # noqa: E731
        return Records(
            numbers(self.arrival),
            numbers(self.admitted),
            numbers(self.first),
            numbers(self.finish),
            prompt,
            output,
            counts(self.preemptions),
            counts(self.hit),
            self.gaps,
            timeline,
            steps,
            events,
            wave,
        )


class Replica:
    """A running server. `offer` requests in order of time; `step` runs until the next event.

    now      when the next step may begin          steps, events   engine steps run, and in how many jumps
    """

    def __init__(
        self, server: Server, journal: Journal, *, prefix_block: int = 0, jumps: bool = True
    ) -> None:
        rules = server.rules
        self.server, self.rules, self.clock, self.journal = server, rules, server.clock, journal
        kept = prefix_block if rules.prefix_caching else 0
        self.cache = KVCache(server.kv_blocks, server.block_size, rules.max_num_seqs, kept)
        self.scheduler = Scheduler(rules, self.cache)
        self.timeline = Timeline()
        self.now = 0.0
        self.steps = self.events = 0
        self._jumps = jumps
        self._inbox: list[Sent] = []  # a heap by time of sending
        self._stalled: list[tuple[float, int]] = []  # (last token at, members) that missed steps since
        self._silent: dict[int, float] = {}  # last token of preempted sequences
        self._drained: dict[int, float] = {}  # sequences that began so much later than their steps ended
        self._opening: dict[int, int] = {}  # steps until clients have the first token of what was handed over
        self._hidden: list[tuple[int, int]] = []  # (made, id): first tokens that are not streamed yet
        self._pace = 0.0  # seconds of the last decode step, prompts beside it not counted
        self._frontend = 0.0  # when it has dealt with all requests sent so far
        self._decided = 0.0  # until when arrivals can be in the next step
        self._sent = 0.0  # when the frontend has sent all messages so far
        self._patient = rules.max_adapters is None and rules.recv_interval == 1
        self._draft = rules.speculative.draft if rules.speculative else 0

    @property
    def busy(self) -> bool:
        return bool(self._inbox) or self.scheduler.busy

    @property
    def load(self) -> int:
        """Requests that it holds, in whatever state."""
        return len(self._inbox) + self.scheduler.queued + self.scheduler.seated

    @property
    def ready_at(self) -> float:
        """When its next step may begin; inf with nothing to do."""
        if self.scheduler.busy:
            return self.now
        return max(self.now, self._next()) if self._inbox else math.inf

    def _next(self) -> float:
        """When the scheduler can see the first request sent: the frontend takes them one at a time."""
        sent, rules = self._inbox[0], self.rules
        taken = 1e-3 * rules.intake_ms + 1e-6 * rules.intake_us * sent.prompt
        return max(self._frontend, sent.at) + taken + 1e-3 * rules.request_ms

    def offer(self, sent: Sent) -> None:
        heappush(self._inbox, sent)

    def resume(self, sent: Sent, since: float, first_token: FirstToken = "prefill") -> None:
        """Takes a request that another engine has prefilled: its cache arrives at `sent.at`, its first
        token was made at `since`. When the client has that one is as in `Serving.first_token`."""
        if not self.busy:
            self.now = max(self.now, sent.at)
        redone = int(first_token == "again")  # the last token of the prompt is fed once more
        prompt, output = max(sent.prompt - redone, 1), sent.output + redone
        made = self.scheduler.add(sent.id, prompt, output, priority=sent.priority, adapter=sent.adapter)
        made.generated, made.computed, made.swapped = 1, prompt, True
        if first_token == "prefill":
            self._silent[sent.id] = since
        else:
            self._opening[sent.id] = redone

    def idle(self, until: float) -> None:
        """Lets time pass with nothing to run, whatever waits."""
        taken = 1 - self.cache.free_blocks / self.cache.blocks
        held = (0.0, float(self.scheduler.seated), float(self.scheduler.queued), taken)
        self.timeline.add(self.now, until - self.now, held)
        self.now = until

    def step(self, until: float = math.inf) -> list[Finished]:
        """Runs one step, or as many plain decode steps as lead to the next event or past `until`.

        Idle, it waits for the first request offered, but not past `until`.
        """
        planned = self.plan(until)
        return self.run(planned) if planned else []

    def plan(self, until: float = math.inf) -> Planned | None:
        """What `step` would run from `now` on; None where it has nothing to run."""
        if not self._listen(until):
            return None
        batch = self.scheduler.plan()
        if batch.plain and batch.decodes:
            return Planned(batch, *self._run(batch, until), 0.0)
        seconds, drain = self._one(batch)
        return Planned(batch, 1, seconds, seconds, drain)

    def run(self, planned: Planned) -> list[Finished]:
        """Runs it."""
        batch, steps, seconds, last, drain = planned
        scheduler, start, blocks = self.scheduler, self.now, self.cache.blocks
        taken = (blocks - self.cache.free_blocks) / blocks
        self.timeline.add(start, seconds, (1.0, scheduler.seated, scheduler.queued, taken))
        self._sent = self._sent_after(batch.decodes, steps, seconds)
        self.now = start + seconds
        self._decided = self.now - last if self.rules.asynchronous else self.now
        self.steps += steps
        self.events += 1
        for victim in batch.preempted:
            self._silent[victim.id] = start
        finished = scheduler.commit(batch, steps)
        if batch.resumed:
            self._stalled.extend((self._silent.pop(s.id, start), 1) for s in batch.resumed)
            for s in batch.resumed:
                self._open(s.id)
        return self._book(batch, finished, start, drain)

    # -- time ----------------------------------------------------------------------------

    def _listen(self, until: float) -> bool:
        """Hands arrivals to the scheduler when it looks for them; False if there is nothing to run."""
        inbox, scheduler = self._inbox, self.scheduler
        if not scheduler.busy:
            if not inbox or self._next() >= until:
                return False
            self.now = self._decided = max(self.now, self._next())
        elif self.rules.recv_interval > 1 and self.steps % self.rules.recv_interval:
            return True
        while inbox and (seen := self._next()) <= self._decided:
            sent = heappop(inbox)
            self._frontend = seen - 1e-3 * self.rules.request_ms
            if seen < self.now:  # it queued while a run went on
                self.timeline.add(seen, self.now - seen, (0.0, 0.0, 1.0, 0.0))
            scheduler.add(
                sent.id,
                sent.prompt,
                sent.output,
                priority=sent.priority,
                adapter=sent.adapter,
                prefix=sent.prefix if self.cache.prefix_block else (),
            )
        return True

    def _run(self, batch: Batch, until: float) -> tuple[int, float, float]:
        """(steps, seconds, seconds of the last step) of a run of plain decodes."""
        decodes = batch.decodes
        line = self._line(decodes, batch.context / decodes)
        steps = min(self.scheduler.runway(batch), line.steps) if self._jumps else 1
        if steps > 1 and not (self.scheduler.queued and self._patient and not self.scheduler.ranked):
            stop = min(until, self._next()) if self._inbox else until
            if stop <= self.now:  # it waits to be looked at
                steps = min(steps, self.rules.recv_interval - self.steps % self.rules.recv_interval)
            else:
                steps = min(_steps_to(stop - self.now, line, steps) + self.rules.asynchronous, steps)
        last = line.seconds + line.slope * (steps - 1)
        self._gaps(decodes, line.seconds, last, steps)
        self._pace = last
        if self._hidden:
            self._reveal(steps, line, line)
        return steps, steps * (line.seconds + last) / 2, last

    def _line(self, decodes: int, context: float) -> Line:
        """Time of a decode step and how it grows from step to step."""
        line = self.clock.line(decodes, context, self._draft)
        if not self._draft:
            return line
        pace = self.rules.tokens_per_step
        return Line(line.seconds + self._drafting(decodes), line.slope * pace, max(int(line.steps / pace), 1))

    def _drafting(self, decodes: int) -> float:
        """Seconds that drafting takes of a step."""
        how = self.rules.speculative
        return how.draft_s + how.each_s * decodes if how and decodes else 0.0

    def _one(self, batch: Batch) -> tuple[float, float]:
        """(seconds, drain) of a step that is not plain."""
        seconds = drain = 0.0
        decodes = batch.decodes
        context = batch.context / decodes if decodes else 0.0
        if batch.chunks:
            chunks = [(chunk.tokens, chunk.start) for chunk in batch.chunks]
            seconds, drain = self.clock.mixed(decodes, context, chunks, self._draft)
            seconds += self._drafting(decodes)
        elif decodes:
            seconds = self._line(decodes, context).seconds
        if batch.swapped:
            seconds += batch.swapped * self.rules.swap_s_per_token
        seconds += batch.adapters * self.rules.adapter_ms / 1e3
        if decodes:
            self._gaps(decodes, seconds, seconds, 1)
            if self.rules.lag_steps:
                line = self._line(decodes, context)
                self._pace = line.seconds
            if self._hidden:
                self._reveal(1, Line(seconds, 0.0, 1), Line(self._pace, 0.0, 1))
        else:
            stalled = sum(count for _, count in self._stalled)
            if self.scheduler.decoding.size > stalled:
                self._stalled.append((self.now, self.scheduler.decoding.size - stalled))
        return seconds, drain

    # -- what clients see ----------------------------------------------------------------

    def _gaps(self, decodes: int, first: float, last: float, steps: int) -> None:
        gaps = self.journal.gaps
        if self._draft:  # tokens that come with another one
            gaps.add(0.0, (self.scheduler.decoding.ahead(steps) - steps) * decodes)
        if not self._stalled:
            if steps == 1:
                gaps.add(first, decodes)
            else:
                gaps.add_line(first, last, steps, decodes)
            return
        rest = decodes
        for at, count in self._stalled:
            gaps.add(self.now + first - at, min(count, rest))
            rest -= min(count, rest)
        self._stalled.clear()
        if rest:
            gaps.add(first, rest)
        if steps > 1:
            slope = (last - first) / (steps - 1)
            gaps.add_line(first + slope, last, steps - 1, decodes)

    def _sent_after(self, decodes: int, steps: int, seconds: float) -> float:
        """When the frontend has sent all messages of the next `steps` steps, which take `seconds` together:
        at their end, or later. Exact for a run, whose steps get no shorter."""
        work = steps * decodes * self.rules.stream_us * 1e-6 / self.rules.stream_interval
        return max(max(self._sent, self.now) + work, self.now + seconds)

    def _unsent(self) -> float:
        """Seconds that a message waits behind others."""
        return max(self._sent - self.now, 0.0)

    def _first_lag(self) -> float:
        """Seconds from the end of a prompt's last step to its client: `lag_steps` of decoding, and the
        messages before."""
        if not self.rules.lag_steps:
            return self._unsent()
        group = self.scheduler.decoding
        size = max(group.size, 1)
        return self._unsent() + self.rules.lag_steps * self._line(size, group.cached / size + 1).seconds

    def _open(self, request: int) -> None:
        """Says when the client has the first token of a request that was handed over and decodes from now."""
        steps = self._opening.pop(request, None)
        if steps == 0:
            self.journal.first[request] = self.now + self._first_lag()
        elif steps is not None:
            heappush(self._hidden, (self.scheduler.decoding.made + steps, request))

    def _reveal(self, steps: int, line: Line, plain: Line) -> None:
        """First tokens that are streamed in the course of a run of steps that take `line`, and would take
        `plain` without prompts."""
        made, hidden, pace = self.scheduler.decoding.made, self._hidden, self.rules.tokens_per_step
        while hidden and hidden[0][0] <= made + self.scheduler.decoding.ahead(steps):
            token, request = heappop(hidden)
            after = math.ceil((token - made) / pace)
            taken = after * (line.seconds + line.slope * (after - 1) / 2)
            lag = self.rules.lag_steps * (plain.seconds + plain.slope * (after - 1))
            sent = self._sent_after(self.scheduler.decoding.size, after, taken)
            self.journal.first[request] = sent + lag

    def _book(self, batch: Batch, finished: list[Sequence], start: float, drain: float) -> list[Finished]:
        journal, now = self.journal, self.now
        lag = self._first_lag() if batch.chunks else 0.0
        for chunk in batch.chunks:
            sequence = chunk.sequence
            at = sequence.id
            if journal.admitted[at] != journal.admitted[at]:
                journal.admitted[at] = start
            if not chunk.samples:
                continue
            if sequence.generated > 1:
                journal.gaps.add(now - self._silent.pop(at, start), 1)
            elif self.rules.stream_interval == 1 or sequence.max_new_tokens == 1:
                journal.first[at] = now + drain + lag
                if drain:
                    self._drained[at] = drain
            else:
                more = min(self.rules.stream_interval, sequence.max_new_tokens) - 1
                heappush(self._hidden, (self.scheduler.decoding.made + more, at))
        found = []
        for sequence in finished:
            at = sequence.id
            late = self.rules.lag_steps * self._pace + self._unsent() + self._drained.pop(at, 0.0)
            end = max(now + late, journal.first[at])
            journal.finish[at] = end
            journal.preemptions[at] = sequence.preemptions
            journal.hit[at] = sequence.hit
            found.append(Finished(at, end))
        return found


def _steps_to(seconds: float, line: Line, most: int) -> int:
    """The least number of steps that take so long together; `most` if that many do not."""

    def taken(steps: int) -> float:
        return steps * (line.seconds + line.slope * (steps - 1) / 2)

    if taken(most) < seconds:
        return most
    half = line.seconds - line.slope / 2
    root = math.sqrt(max(half * half + 2 * line.slope * seconds, 0.0))
    found = min(max(math.ceil(2 * seconds / (half + root)), 1), most)
    while found > 1 and taken(found - 1) >= seconds:
        found -= 1
    while taken(found) < seconds:
        found += 1
    return found


def check(server: Server) -> None:
    """Raises InvalidField where a server could never run."""
    if server.kv_blocks < 1:
        raise InvalidField(
            where="server",
            field="kv_blocks",
            value=server.kv_blocks,
            reason="weights and activations leave no room for the cache",
            mend="Take more GPUs, or smaller formats.",
        )
