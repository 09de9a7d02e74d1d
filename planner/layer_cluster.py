"""Machines that hold ranges of a model's layers, the links between them, and the tokens they carry.

A token enters from the coordinator, passes machines whose ranges join up to all layers, and returns to the
coordinator. A machine passes at most `tokens_s[k - 1]` tokens/s while it holds k layers; a link passes at
most its own `tokens_s`. Where ranges must meet exactly, machine i hands over to j when i ends where j
starts; with partial ranges allowed, anywhere inside j's range, whose remaining layers j then runs
(Mei et al., "Helix: Serving Large Language Models over Heterogeneous GPUs and Network via Max-Flow",
ASPLOS 2025, section 4).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from planc.errors import InvalidField

#: name of the source and sink of all tokens
COORDINATOR = "coordinator"

#: whole units of flow in one token per second, rounded against the flow
_UNIT = 1 << 20

#: layers [start, end) of one machine; None holds none
Range = tuple[int, int] | None


@dataclass(frozen=True, slots=True)
class Machine:
    """A machine, and the tokens per second it passes holding 1, 2, ... layers, as many as fit."""

    name: str
    tokens_s: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Link:
    """One direction between two machines, or a machine and `COORDINATOR`: tokens/s and latency."""

    source: str
    target: str
    tokens_s: float
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Flow:
    """Tokens per second of all tokens, of each used link by names, and a token's mean time on links."""

    tokens_s: float
    links: tuple[tuple[str, str, float], ...]
    seconds: float


class Cluster:
    """Machines and links as arrays; raises InvalidField for what cannot be one.

    between, latency   [machines + 1, machines + 1]: tokens/s and seconds; the last is the coordinator
    """

    def __init__(self, machines: Sequence[Machine], links: Sequence[Link], layers: int) -> None:
        self.machines, self.layers = tuple(machines), layers
        place = {machine.name: at for at, machine in enumerate(self.machines)}
        _validate(self.machines, links, layers, place)
        place[COORDINATOR] = size = len(self.machines)
        self.between: NDArray[np.float64] = np.zeros((size + 1, size + 1))
        self.latency: NDArray[np.float64] = np.zeros((size + 1, size + 1))
        for link in links:
            self.between[place[link.source], place[link.target]] += link.tokens_s
            self.latency[place[link.source], place[link.target]] = link.seconds

    def rate(self, machine: int, held: int) -> float:
        return self.machines[machine].tokens_s[held - 1]

    @cached_property
    def groups(self) -> tuple[tuple[int, ...], ...]:
        """Machines between any two of which no link can ever bind, greedily in order."""
        most = np.array([max(machine.tokens_s, default=0.0) for machine in self.machines])
        size = len(self.machines)
        need = np.minimum(most[:, None], most[None, :])
        wide = (self.between[:size, :size] >= need) & (need <= self.between[:size, :size].T)
        found: list[list[int]] = []
        for machine in range(size):
            home = next((group for group in found if wide[machine, group].all()), None)
            if home is None:
                found.append([machine])
            else:
                home.append(machine)
        return tuple(tuple(group) for group in found)

    def reachable(self, tokens_s: float) -> tuple[tuple[int, ...], ...]:
        """Machines joined by links that carry this many tokens/s alone, in either direction."""
        size = len(self.machines)
        wide = self.between[:size, :size] >= tokens_s
        wide = wide | wide.T
        left, found = set(range(size)), []
        while left:
            grown = frontier = {min(left)}
            while frontier:
                frontier = {int(j) for i in frontier for j in np.flatnonzero(wide[i])} - grown
                grown = grown | frontier
            found.append(tuple(sorted(grown)))
            left -= grown
        return tuple(found)

    def flow(self, ranges: Sequence[Range], partial: bool = False) -> Flow:
        """The maximum flow of a placement, exact to about 1e-6 tokens/s (push-relabel on whole units)."""
        from ortools.graph.python import max_flow  # type: ignore[import-untyped]

        size, solver = len(self.machines), max_flow.SimpleMaxFlow()
        hub, out = size, size + 1  # the coordinator sends from `hub`; tokens return to node 2 size + 1

        def add(tail: int, head: int, rate: float) -> int:
            return int(solver.add_arc_with_capacity(tail, head, int(min(rate, 1e11) * _UNIT)))

        arcs: dict[int, tuple[int, int]] = {}
        held = [(at, span) for at, span in enumerate(ranges) if span is not None]
        for i, (start, end) in held:
            add(i, out + i, self.rate(i, end - start))
            if start == 0:
                arcs[add(hub, i, self.between[size, i])] = (size, i)
            if end == self.layers:
                arcs[add(out + i, 2 * size + 1, self.between[i, size])] = (i, size)
            for j, (first, last) in held:
                if i != j and (first == end or (partial and first < end < last)) and self.between[i, j] > 0:
                    arcs[add(out + i, j, self.between[i, j])] = (i, j)
        if not arcs or solver.solve(hub, 2 * size + 1) != solver.OPTIMAL:
            return Flow(0.0, (), 0.0)
        total = solver.optimal_flow() / _UNIT
        used = {pair: solver.flow(arc) / _UNIT for arc, pair in arcs.items() if solver.flow(arc)}
        names = [*(machine.name for machine in self.machines), COORDINATOR]
        seconds = sum(rate * self.latency[pair] for pair, rate in used.items())
        return Flow(
            total,
            tuple((names[i], names[j], rate) for (i, j), rate in sorted(used.items())),
            float(seconds / total) if total else 0.0,
        )


def _validate(machines: Sequence[Machine], links: Sequence[Link], layers: int, place: dict[str, int]) -> None:
    def wrong(field: str, value: object, reason: str, mend: str) -> InvalidField:
        return InvalidField(where="layer placement", field=field, value=value, reason=reason, mend=mend)

    if layers < 1:
        raise wrong("layers", layers, "a model has at least one layer", "Give the model's layers.")
    if not machines:
        raise wrong("machines", [], "there is no machine", "Give at least one.")
    if len(place) < len(machines) or COORDINATOR in place:
        names = [machine.name for machine in machines]
        double = next(name for name in names if names.count(name) > 1 or name == COORDINATOR)
        raise wrong("machines", double, "the name is taken", "Name every machine differently.")
    for machine in machines:
        if not all(math.isfinite(rate) and rate >= 0 for rate in machine.tokens_s):
            raise wrong(
                f"machines.{machine.name}.tokens_s", machine.tokens_s, "not tokens/s", "Use finite rates."
            )
    for link in links:
        for end in (link.source, link.target):
            if end not in place and end != COORDINATOR:
                raise wrong("links", end, "no machine of that name", "Name a machine or the coordinator.")
        if link.source == link.target:
            raise wrong("links", link.source, "the link joins a machine to itself", "Leave it out.")
        if not (link.tokens_s >= 0 and link.seconds >= 0 and math.isfinite(link.seconds)):
            raise wrong(
                f"links.{link.source}-{link.target}",
                (link.tokens_s, link.seconds),
                "negative or no number",
                "Use rates and times that are at least 0.",
            )
