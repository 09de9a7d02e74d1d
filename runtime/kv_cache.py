"""The paged KV cache's book-keeping: which block and which state row belongs to which sequence.

Torch-free: the executor and a simulator share it. The tensors themselves are the executor's.
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
    _free: list[int] = field(init=False, repr=False)
    _taken: set[int] = field(init=False, repr=False, default_factory=set)

    def __post_init__(self) -> None:
        self._free = list(range(self.size - 1, -1, -1))

    @property
    def free(self) -> int:
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """`count` places. The caller asks `free` first; to ask for more is a bug."""
        assert 0 <= count <= len(self._free), f"{count} places wanted, {len(self._free)} free"
        taken = [self._free.pop() for _ in range(count)]
        self._taken.update(taken)
        return taken

    def give_back(self, places: Sequence[int]) -> None:
        for place in places:
            assert place in self._taken, f"place {place} is not taken"
            self._taken.remove(place)
            self._free.append(place)


@dataclass(slots=True)
class Holding:
    """What one sequence holds of the cache."""

    blocks: list[int]
    state: int


@dataclass(slots=True)
class KVCache:
    """Blocks and state rows of all running sequences.

    blocks       number of blocks             block_size   tokens per block
    states       sequences that may hold a state row at once
    """

    blocks: int
    block_size: int
    states: int
    _blocks: Pool = field(init=False, repr=False)
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
        self._blocks = Pool(self.blocks)
        self._states = Pool(self.states)

    @property
    def free_blocks(self) -> int:
        return self._blocks.free

    def blocks_for(self, tokens: int) -> int:
        """Blocks that `tokens` tokens of one sequence fill."""
        return -(-tokens // self.block_size)

    def grow(self, sequence: int, tokens: int) -> bool:
        """Makes room for a sequence's first `tokens` tokens; False, and nothing taken, if there is none."""
        held = self._held.get(sequence)
        wanted = self.blocks_for(tokens) - (len(held.blocks) if held else 0)
        if wanted > self._blocks.free or (held is None and not self._states.free):
            return False
        if held is None:
            held = self._held[sequence] = Holding([], self._states.take(1)[0])
        held.blocks.extend(self._blocks.take(max(wanted, 0)))
        return True

    def release(self, sequence: int) -> None:
        """Gives back all that a sequence holds."""
        held = self._held.pop(sequence)
        self._blocks.give_back(held.blocks)
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
