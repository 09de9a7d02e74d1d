"""The paged KV cache's book-keeping: how many blocks are taken, which are whose, which prefixes are kept.

Torch-free: the executor and the simulator share it. The tensors themselves are the executor's. A
scheduler counts blocks (`take`, `give`); who needs their numbers names them (`grow`, `table`), so a
simulation of a million requests pays for no names.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from planc.errors import InvalidField


@dataclass(slots=True)
class Pool:
    """A fixed number of numbered places, taken and given back; the last one given back is taken first.

    Invariant: every place is either free or taken, never both, never twice.
    """

    size: int
    _fresh: int = field(init=False, repr=False, default=0)
    _back: list[int] = field(init=False, repr=False, default_factory=list)
    _taken: set[int] = field(init=False, repr=False, default_factory=set)

    @property
    def free(self) -> int:
        return self.size - len(self._taken)

    def take(self, count: int) -> list[int]:
        """`count` places. The caller asks `free` first; to ask for more is a bug."""
        assert 0 <= count <= self.free, f"{count} places wanted, {self.free} free"
        taken = [self._back.pop() for _ in range(min(count, len(self._back)))]
        fresh = count - len(taken)
        taken.extend(range(self._fresh, self._fresh + fresh))
        self._fresh += fresh
        self._taken.update(taken)
        return taken

    def give_back(self, places: Sequence[int]) -> None:
        for place in places:
            assert place in self._taken, f"place {place} is not taken"
            self._taken.remove(place)
            self._back.append(place)


@dataclass(slots=True)
class Holding:
    """What one sequence holds of the cache, by name."""

    blocks: list[int]
    state: int


@dataclass(slots=True)
class KVCache:
    """Blocks and state rows of all running sequences, and prompt prefixes that outlive their sequences.

    blocks       number of blocks             block_size   tokens per block
    states       sequences that may hold a state row at once
    prefix_block tokens that one prefix hash stands for, whole blocks; 0: no prefix is kept

    free_blocks  may be taken: unused ones, and those of kept prefixes that no sequence uses

    Invariant: `blocks` = blocks that sequences took + kept prefixes in use + free_blocks.
    """

    blocks: int
    block_size: int
    states: int
    prefix_block: int = 0
    free_blocks: int = field(init=False)
    _idle: dict[int, None] = field(init=False, repr=False, default_factory=dict)
    _users: dict[int, int] = field(init=False, repr=False, default_factory=dict)
    _names: Pool = field(init=False, repr=False)
    _states: Pool = field(init=False, repr=False)
    _held: dict[int, Holding] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        for name, value in (
            ("blocks", self.blocks),
            ("block_size", self.block_size),
            ("states", self.states),
        ):
            if value < 1:
                raise InvalidField(
                    where="KV cache",
                    field=name,
                    value=value,
                    reason="must be at least 1",
                    mend="Give the cache more memory.",
                )
        if self.prefix_block % self.block_size:
            raise InvalidField(
                where="KV cache",
                field="prefix_block",
                value=self.prefix_block,
                reason=f"is no multiple of the block size {self.block_size}",
                mend="Hash prefixes in whole blocks.",
            )
        self.free_blocks = self.blocks
        self._names = Pool(self.blocks)
        self._states = Pool(self.states)

    # -- counted -------------------------------------------------------------------------

    @property
    def span(self) -> int:
        """Blocks of one prefix hash."""
        return self.prefix_block // self.block_size

    def blocks_for(self, tokens: int) -> int:
        """Blocks that `tokens` tokens of one sequence fill."""
        return -(-tokens // self.block_size)

    def take(self, count: int) -> None:
        """Takes blocks; idle prefixes give way, the least recently used first."""
        self.free_blocks -= count
        assert self.free_blocks >= 0, f"{-self.free_blocks} blocks more were taken than are free"
        while self._idle and self.free_blocks < len(self._idle) * self.span:
            oldest = next(iter(self._idle))
            del self._idle[oldest], self._users[oldest]

    def give(self, count: int) -> None:
        """Gives blocks back."""
        self.free_blocks += count
        assert self.free_blocks <= self.blocks, "more blocks given back than taken"

    # -- prefixes ------------------------------------------------------------------------

    def found(self, hashes: Sequence[int]) -> int:
        """How many hashes are kept, counted from the first on."""
        count = 0
        for name in hashes:
            if name not in self._users:
                break
            count += 1
        return count

    def idle_among(self, hashes: Sequence[int]) -> int:
        """Blocks of kept prefixes that count as free until somebody uses them."""
        return self.span * sum(name in self._idle for name in hashes)

    def use(self, hashes: Sequence[int]) -> None:
        """One more sequence reads these kept prefixes."""
        for name in hashes:
            self._users[name] += 1
            if name in self._idle:
                del self._idle[name]
                self.free_blocks -= self.span

    def keep(self, name: int) -> bool:
        """Turns a sequence's own blocks, full of a prefix, into a kept prefix that it uses. False if the
        prefix is kept already; the sequence's copy stays its own then."""
        if name in self._users:
            return False
        self._users[name] = 1
        return True

    def leave(self, hashes: Sequence[int]) -> None:
        """A sequence no longer uses these prefixes; the longest goes idle first, so it is lost first."""
        for name in reversed(hashes):
            self._users[name] -= 1
            if not self._users[name]:
                self._idle[name] = None
                self.free_blocks += self.span

    # -- named ---------------------------------------------------------------------------

    def grow(self, sequence: int, tokens: int) -> None:
        """Names blocks, which were taken before, for a sequence's first `tokens` tokens."""
        held = self._held.get(sequence)
        if held is None:
            held = self._held[sequence] = Holding([], self._states.take(1)[0])
        held.blocks.extend(self._names.take(max(self.blocks_for(tokens) - len(held.blocks), 0)))

    def forget(self, sequence: int) -> None:
        """Gives back the names that a sequence holds, if it holds any."""
        held = self._held.pop(sequence, None)
        if held is not None:
            self._names.give_back(held.blocks)
            self._states.give_back([held.state])

    def table(self, sequence: int) -> list[int]:
        """The sequence's blocks, in order."""
        return self._held[sequence].blocks

    def state_slot(self, sequence: int) -> int:
        return self._held[sequence].state

    def slots(self, sequence: int, start: int, stop: int) -> list[int]:
        """Where tokens `start .. stop` of a sequence are written: block * block_size + offset."""
        blocks, size = self._held[sequence].blocks, self.block_size
        return [blocks[at // size] * size + at % size for at in range(start, stop)]
