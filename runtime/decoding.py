"""Sequences that decode together: one token each per step, all positions advanced at once.

A member's position is where it stood when it joined plus what the group has made since; what changes
with every step (blocks that fill up, members that end) is known from counts and one heap. So a step
costs the same for one member as for a thousand, and many steps cost what one does.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from heapq import heappop, heappush


@dataclass(slots=True, eq=False)
class Sequence:
    """A request on its way.

    generated, computed   tokens it has made, and tokens of it that are in the cache. While it decodes
                          these are as of when it joined; `Decoding.position` says where it stands
    order                 of arrival; ties of priority are broken by it
    priority              lower runs first
    prefix                hashes of the prompt's leading blocks; `shared` are those it uses of the cache
    blocks                that it took for itself, likewise as of when it joined
    hit                   tokens that were found in the cache instead of computed
    swapped               its cache lies on the host
    """

    id: int
    prompt: int
    max_new_tokens: int
    order: int = 0
    priority: int = 0
    adapter: int | None = None
    prefix: tuple[int, ...] = ()
    generated: int = 0
    computed: int = 0
    preemptions: int = 0
    hit: int = 0
    swapped: bool = False
    blocks: int = 0
    shared: list[int] = field(default_factory=list)
    decoding: bool = False
    joined: int = 0
    ends_at: int = 0

    @property
    def tokens(self) -> int:
        return self.prompt + self.generated

    @property
    def pending(self) -> int:
        """Tokens that must be computed before the next one can be sampled."""
        return self.prompt + self.generated - self.computed


class Decoding:
    """The group of decoding sequences.

    pace     tokens that a member makes in a step, on average; above 1 when drafts are accepted
    made     tokens that each member has made since the beginning of time, in `steps`
    size     members                          cached   tokens of all members in the cache
    """

    def __init__(self, block_size: int, pace: float = 1.0) -> None:
        self.block_size, self.pace = block_size, pace
        self.made = self.steps = self.size = self.cached = 0
        self._phase = [0] * block_size  # members by (position - made) modulo the block size
        self._ends: list[tuple[int, int, Sequence]] = []

    def join(self, member: Sequence) -> None:
        member.decoding = True
        member.joined = self.made
        member.ends_at = self.made + member.max_new_tokens - member.generated
        self.size += 1
        self.cached += member.computed
        self._phase[(member.computed - self.made) % self.block_size] += 1
        heappush(self._ends, (member.ends_at, member.order, member))

    def leave(self, member: Sequence) -> None:
        """Takes a member out and brings its own counts up to date."""
        since = self.made - member.joined
        member.computed += since
        member.generated += since
        member.decoding = False
        self.size -= 1
        self.cached -= member.computed
        self._phase[(member.computed - self.made) % self.block_size] -= 1

    def position(self, member: Sequence) -> int:
        """Tokens of a member in the cache."""
        return member.computed + self.made - member.joined

    def ahead(self, steps: int) -> int:
        """Tokens that each member makes in the next steps."""
        if self.pace == 1:
            return steps
        return int(self.pace * (self.steps + steps)) - self.made

    def steps_for(self, tokens: int) -> int:
        """Steps in which each member makes at least so many tokens."""
        if self.pace == 1:
            return tokens
        steps = max(int(tokens / self.pace) - 1, 0)
        while self.ahead(steps) < tokens:
            steps += 1
        return steps

    def filled(self, tokens: int) -> int:
        """Blocks that all members together begin while each makes so many tokens."""
        rounds, rest = divmod(tokens, self.block_size)
        at = -self.made % self.block_size
        if rest == 1:
            return rounds * self.size + self._phase[at]
        return rounds * self.size + sum(self._phase[at - i] for i in range(rest))

    def most_filled(self, tokens: int) -> int:
        """No fewer blocks than `filled` says, without a look at the members' phases."""
        return (tokens // self.block_size + 1) * self.size

    def lasts(self, blocks: int) -> int:
        """Tokens that every member can make with so many blocks more."""
        if not self.size:
            return 0
        rounds, left = divmod(blocks, self.size)
        at = -self.made % self.block_size
        tokens = rounds * self.block_size
        for i in range(self.block_size):
            left -= self._phase[at - i]
            if left < 0:
                return tokens + i
        return tokens + self.block_size

    def until_end(self) -> int:
        """Tokens until the first member ends; the group has members."""
        ends = self._ends
        while not ends[0][2].decoding or ends[0][2].ends_at != ends[0][0]:
            heappop(ends)
        return ends[0][0] - self.made

    def advance(self, steps: int) -> list[Sequence]:
        """Every member makes its next tokens; those that have made their last one leave."""
        tokens = self.ahead(steps)
        self.steps += steps
        self.made += tokens
        self.cached += tokens * self.size
        found = []
        ends = self._ends
        while ends and ends[0][0] <= self.made:
            at, _, member = heappop(ends)
            if member.decoding and member.ends_at == at:
                self.leave(member)
                found.append(member)
        return found
