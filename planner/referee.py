"""Propose, judge, cut: the formulas propose a fleet, a referee plays the workload against it, and what does
not hold comes back as a cut, until a fleet is accepted.

A cut leaves an engine a share of the capacity that formulas gave it, in the stream where it failed: 3 % less
than the load at which it failed, up to 25 % less where it missed an objective by far, and ever more the more
often it fails. That is more than was proved, so the bound of the loop is found apart, with each failed engine
allowed all that is below the load at which it failed: no fleet is better that formulas and verdicts do not
rule out.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from planc.errors import ToolFailed
from planc.planner.offers import Deployed, Fleet
from planc.planner.promising import left
from planc.planner.search import Search
from planc.planner.solve import Solution
from planc.planner.stream import Cuts

#: proposals at most; after the first few, engines that were not judged share the cuts of those like them
ROUNDS, ALONE = 14, 5
#: by how much longer the bound is looked for than proposals are
_PATIENCE = 2
#: by how much a cut lowers a capacity: at least, for each excess over a limit, and down to what share
_STEP, _SLOPE, _LEAST = 0.03, 0.25, 0.3


@dataclass(frozen=True, slots=True)
class Verdict:
    """What some engines of a fleet do under the workload.

    items     which of the fleet's
    values    objective -> what was found (seconds)
    within    all objectives hold
    excess    the largest value as a multiple of its limit, of those that do not hold; 1 where all do
    failing   those whose load is too high; the others only share requests with them
    """

    items: tuple[Deployed, ...]
    values: Mapping[str, float]
    within: bool
    excess: float = 1.0
    failing: tuple[Deployed, ...] = ()


@dataclass(frozen=True, slots=True)
class Judgement:
    """Verdicts on all engines of a fleet. `latencies`: metric -> mean, p50, p90 ... (ms) of all requests."""

    verdicts: tuple[Verdict, ...]
    latencies: Mapping[str, Mapping[str, float]]

    @property
    def accepted(self) -> bool:
        return all(verdict.within for verdict in self.verdicts)

    @property
    def missed(self) -> str:
        """By how much objectives are missed, "" where none is."""
        worst = max(verdict.excess for verdict in self.verdicts)
        return "" if self.accepted else f"an objective by {100 * (worst - 1):.2g} % in the simulated workload"


class Referee(Protocol):
    def judge(self, search: Search, fleet: Fleet) -> Judgement: ...


@dataclass(frozen=True, slots=True)
class Proposal:
    """Fleets on one inventory, one per search, and the master problem's solution over all of them."""

    fleets: tuple[Fleet, ...]
    solution: Solution


@dataclass(frozen=True, slots=True)
class Agreed:
    """What the loop ends with: the searches with their cuts, and what the referee found of each fleet."""

    searches: tuple[Search, ...]
    proposal: Proposal
    judgements: tuple[Judgement, ...]


#: fleets of some searches, in so many seconds; None when there are none
Propose = Callable[[Sequence[Search], float | None], Proposal | None]


def agreed(
    searches: Sequence[Search],
    first: Proposal,
    propose: Propose,
    referee: Referee,
    time_limit: float | None = None,
    *,
    proving: bool = True,
) -> Agreed | None:
    """The first proposal of which the referee accepts every fleet; None when cuts left no fleets.

    After `ROUNDS` proposals, or when time runs out, the last one is returned as it is: `Judgement.accepted`
    says so. Its solution has the bound of the loop, for which the problem is solved once more; without
    `proving` that of the last problem.
    """
    deadline = None if time_limit is None else time.perf_counter() + time_limit
    start, found = tuple(searches), first
    mine, proved = start, [dict(search.cuts) for search in start]
    for number in range(ROUNDS):
        mine[0].say("simulating the plan" if not number else f"simulating proposal {number + 1}")
        judged = tuple(referee.judge(*pair) for pair in zip(mine, found.fleets, strict=True))
        if all(judgement.accepted for judgement in judged) or number == ROUNDS - 1 or _over(deadline):
            break
        for known, judgement in zip(proved, judged, strict=True):
            for key, load in cuts_of(judgement.verdicts, 0.0).items():
                known[key] = min(load, known.get(key, 1.0))
        following = tuple(
            search.with_cuts({**search.cuts, **cuts_of(judgement.verdicts, widely=number >= ALONE)})
            for search, judgement in zip(mine, judged, strict=True)
        )
        try:
            proposal = propose(following, left(deadline))
        except ToolFailed:
            if not _over(deadline):
                raise
            break
        if proposal is None:
            return None
        mine, found = following, proposal
    if proving and proved != [search.cuts for search in start]:
        best: Proposal | None = first
        if not _over(deadline):
            free = [search.with_cuts(cuts, _PATIENCE) for search, cuts in zip(start, proved, strict=True)]
            best = propose(free, left(deadline))
        found = replace(found, solution=_bounded(found.solution, best))
    return Agreed(mine, found, judged)


def accepted(
    search: Search, fleet: Fleet, referee: Referee, time_limit: float | None = None
) -> tuple[Search, Fleet, Judgement] | None:
    """`agreed` for one search, with the fleet it has proposed."""
    first = Proposal((fleet,), fleet.solution)
    found = agreed((search,), first, proposed, referee, time_limit)
    if found is None:
        return None
    last, solution = found.proposal.fleets[0], found.proposal.solution
    if solution is not last.solution:
        last = replace(last, solution=solution)
    return found.searches[0], last, found.judgements[0]


def proposed(searches: Sequence[Search], seconds: float | None) -> Proposal | None:
    """The best fleet of one search."""
    fleet = searches[0].fleet(seconds)
    return None if fleet is None else Proposal((fleet,), fleet.solution)


def _over(deadline: float | None) -> bool:
    return deadline is not None and time.perf_counter() >= deadline


def _bounded(solution: Solution, best: Proposal | None) -> Solution:
    """A solution with the loop's bound: that of the best proposal which is not ruled out."""
    bound = best.solution.bound if best is not None else solution.value
    same = abs(solution.value - bound) <= 1e-9 * abs(bound)
    return replace(solution, bound=bound, status=solution.status if same else "feasible")


def cuts_of(verdicts: Sequence[Verdict], step: float = _STEP, widely: bool = False) -> Cuts:
    """Shares of capacity left to engines that failed.

    step     lowers the load of a failure by this share at least, and by as much as was cut before; with 0
             all below that load stays allowed, which is what a failure proves
    widely   engines of the same pool on the same GPUs are cut in proportion, though they were not judged;
             those of prefill and decode pools always are: such a pool is judged as a whole
    """
    found: Cuts = {}
    for verdict in verdicts:
        if verdict.within:
            continue
        for item in verdict.failing:
            stream = item.stream
            assert stream is not None, "the search's own engines have streams"
            offer = next(o for o in stream.offers if o.engine is item.engine)
            allowed = stream.allowed(item.engine)
            formula = max(offer.precise().capacity, item.load) / allowed
            less = max(step, _SLOPE * (1 - 1 / verdict.excess), min(1 - allowed, 0.5)) if step else 1e-6
            share = min((1 - less) * item.load / formula, allowed * (1 - min(less, step)))
            alike = [item.engine]
            if item.role != "aggregated":
                alike = stream.bench.engines
            elif widely:
                home = item.candidate.group.index
                alike = [e for e in stream.bench.engines if e.candidate.group.index == home]
            for engine in alike if step else [item.engine]:
                key = stream.key(engine)
                left = stream.allowed(engine) * share / allowed if engine is not item.engine else share
                found[key] = min(found.get(key, 1.0), left if left >= _LEAST or not step else 0.0)
    return found
