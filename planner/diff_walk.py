"""Walks between two configurations, one decision at a time, over configurations that can be.

Configurations are named by the set of decisions that are as in the new plan: none of them at one end, all at
the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, islice

from planc.planner.counterfactual import Impossible, Outcome

_TOGETHER = 3  # decisions taken at once before all that are left are
_TRIES = 200  # sets of decisions looked at for one step

Names = frozenset[str]
Metrics = Mapping[str, float]
OLD: Names = frozenset()


@dataclass(frozen=True, slots=True)
class Step:
    """Decisions `taken` from the new plan, where those in `before` already are; `reason` why several."""

    taken: Names
    before: Names
    reason: str

    @property
    def ends(self) -> tuple[Names, Names]:
        return self.before, self.before | self.taken


class Between:
    """The configurations, each evaluated once. `names`: of all decisions, in canonical order."""

    def __init__(self, names: Sequence[str], evaluate: Callable[[Names], Outcome]) -> None:
        self.names, self.new = tuple(names), frozenset(names)
        self._evaluate = evaluate
        self._known: dict[Names, Outcome | Impossible] = {}

    def outcome(self, state: Names) -> Outcome:
        """What a configuration does. Raises Impossible."""
        if state not in self._known:
            try:
                self._known[state] = self._evaluate(state)
            except Impossible as error:
                self._known[state] = error
        found = self._known[state]
        if isinstance(found, Impossible):
            raise found
        return found

    def ends(self) -> tuple[Metrics, Metrics]:
        """Figures of both plans. Raises Impossible, with all reasons, unless both can be."""
        wrong = set()
        for end in (OLD, self.new):
            try:
                self.outcome(end)
            except Impossible as error:
                wrong.add(str(error))
        if wrong:
            raise Impossible("; ".join(sorted(wrong)))
        return self.outcome(OLD).metrics, self.outcome(self.new).metrics

    def walk(self, start: Names) -> Iterator[Step]:
        """From one end to the other; the steps of a walk from the new end are those of its way back."""
        state, goal = start, self.new - start
        while state != goal:
            left = [name for name in self.names if (name in state) != (name in goal)]
            taken, reason = self._next(state, left)
            yield Step(taken, state - taken, reason)
            state ^= taken

    def _next(self, state: Names, left: Sequence[str]) -> tuple[Names, str]:
        """The first decision that leads to a configuration which keeps the objectives, else to one that can
        be, else the fewest together; with the reason why the first of several cannot be taken alone."""
        refused: dict[str, str] = {}
        poor: list[str] = []
        for name in left:
            try:
                if self.outcome(state ^ {name}).meets:
                    return frozenset((name,)), ""
                poor.append(name)
            except Impossible as error:
                refused[name] = str(error)
        if poor:
            return frozenset(poor[:1]), ""
        sets = (taken for size in range(2, _TOGETHER + 1) for taken in combinations(left, size))
        tried = (frozenset(taken) for taken in islice(sets, _TRIES))
        taken = next((names for names in tried if self._can_be(state ^ names)), frozenset(left))
        first = next(name for name in left if name in taken)
        return taken, f"{first} alone: {refused[first]}" if len(taken) > 1 else ""

    def _can_be(self, state: Names) -> bool:
        try:
            self.outcome(state)
        except Impossible:
            return False
        return True


def joined(groups: Sequence[Names]) -> list[Names]:
    """The finest partition that splits none of the groups."""
    found: list[Names] = []
    for group in groups:
        touching = [other for other in found if other & group]
        found = [other for other in found if not other & group]
        found.append(group.union(*touching))
    return found
