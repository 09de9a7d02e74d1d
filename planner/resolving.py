"""What all re-solving of varied requests has in common: outcomes are remembered, fleets are judged alike, and
time runs out."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Generic, Protocol, TypeVar

from planc.errors import ToolFailed
from planc.planner.referee import Agreed, Proposal, Propose, Referee, agreed
from planc.planner.search import Search

#: relative difference of objective values that counts as none
SAME = 1e-5


class OutOfTime(Exception):
    """The time for re-solving is up; what was found so far stands."""


class Varied(Protocol):
    """A request with something changed."""

    def key(self) -> Hashable: ...


class Found(Protocol):
    """The best there is of it. `value` is the objective's, in the unit that `objective` names."""

    @property
    def value(self) -> float: ...

    @property
    def objective(self) -> str: ...


V = TypeVar("V", bound=Varied)
F = TypeVar("F", bound=Found)


class Resolving(Generic[V, F]):
    """Solves variations of what `start` is, each once.

    seconds   of wall clock, from `begin` on; then `solve` raises OutOfTime. None: no end
    referee   plays the workload against every fleet; None: formulas alone
    """

    start: V

    def __init__(
        self,
        seconds: float | None = None,
        progress: Callable[[str], None] | None = None,
        referee: Referee | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.say = progress or (lambda message: None)
        self._seconds, self._clock, self._referee = seconds, clock, referee
        self._end: float | None = None
        self._known: dict[Hashable, F | None] = {}
        self.missed = ""
        self.solved = 0

    # -- time ------------------------------------------------------------------------------

    def begin(self) -> None:
        """From now on time is counted."""
        self._end = None if self._seconds is None else self._clock() + self._seconds

    def left(self) -> float | None:
        """Seconds that are left; None: no end. Raises OutOfTime where there are none."""
        if self._end is None:
            return None
        seconds = self._end - self._clock()
        if seconds <= 0:
            raise OutOfTime
        return seconds

    @contextmanager
    def within(self, share: float) -> Iterator[None]:
        """Leaves this share of the remaining time to what is done until the block ends."""
        end = self._end
        if end is not None:
            now = self._clock()
            self._end = now + share * max(end - now, 0.0)
        try:
            yield
        finally:
            self._end = end

    # -- solving ---------------------------------------------------------------------------

    @property
    def judges(self) -> bool:
        """Whether fleets are judged by playing the workload."""
        return self._referee is not None

    def solve(self, variation: V) -> F | None:
        """The best there is; None when there is none or it contradicts itself. Raises OutOfTime."""
        key = variation.key()
        if key not in self._known:
            self.left()
            self._known[key] = self._solve(variation)
            self.solved += 1
        return self._known[key]

    def _solve(self, variation: V) -> F | None:
        raise NotImplementedError

    def settled(self, searches: Sequence[Search], propose: Propose) -> Agreed | None:
        """What is proposed and, where a referee judges, accepted."""
        left = self.left()
        try:
            first = propose(searches, left)
            if first is None or self._referee is None:
                return None if first is None else Agreed(tuple(searches), first, ())

            def again(mine: Sequence[Search], _: float | None) -> Proposal | None:
                return propose(mine, self.left())

            return agreed(searches, first, again, self._referee, proving=False)
        except ToolFailed:
            if self._end is not None and self._clock() >= self._end:
                raise OutOfTime from None
            raise

    # -- comparing -------------------------------------------------------------------------

    @property
    def maximising(self) -> bool:
        return False

    def gain(self, found: F | None, than: F) -> float | None:
        """By how much `found` is better, in the objective's unit; None where the two have no common unit
        or nothing was found."""
        if found is None or found.objective != than.objective:
            return None
        gain = found.value - than.value if self.maximising else than.value - found.value
        return 0.0 if abs(gain) <= SAME * abs(than.value) else gain

    def marginal(self, base: F, looser: V) -> float | None:
        """What a looser constraint would gain if engines could be bought in parts; None: not known."""
        return None
