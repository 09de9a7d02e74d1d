"""What a scheduler decides: one step, in full for an executor or in short for a simulator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from planc.runtime.decoding import Sequence


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
    taken              blocks that the group begins to fill
    held               decoding sequences that the budget leaves out
    """

    decodes: int = 0
    context: int = 0
    chunks: tuple[Chunk, ...] = ()
    preempted: tuple[Sequence, ...] = ()
    resumed: tuple[Sequence, ...] = ()
    swapped: int = 0
    adapters: int = 0
    taken: int = 0
    held: tuple[Sequence, ...] = ()

    @property
    def plain(self) -> bool:
        """Nothing but decoding: the next steps will be the same until something happens."""
        return not (self.chunks or self.preempted or self.resumed or self.held or self.adapters)


def chunk_of(sequence: Sequence, tokens: int) -> Chunk:
    """The next tokens of a sequence."""
    stop = sequence.computed + tokens
    return Chunk(sequence, sequence.computed, tokens, samples=stop == sequence.tokens)
