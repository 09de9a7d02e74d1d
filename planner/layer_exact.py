"""All placements of a small cluster, by CP-SAT: the largest maximum flow, and proof that it is.

Variables: machine i holds layers [s, s + k); flow of i to j while j starts, or takes over, at layer p.
Rates are whole ten-millionths of the bound, rounded down, so the flow is what the links and machines carry.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from planc.planner.layer_cluster import Cluster, Range

_UNIT = 10_000_000

#: flow variables of clusters that are solved before anything else is tried, and of those tried at all
TINY, SMALL = 100, 1000

#: CP-SAT's deterministic seconds
_WORK = 2.0


@dataclass(frozen=True, slots=True)
class Exact:
    """The best ranges found, and tokens/s that none exceeds."""

    ranges: list[Range]
    bound: float


def size(cluster: Cluster) -> int:
    """Flow variables, about."""
    return len(cluster.machines) ** 2 * cluster.layers


def solve(cluster: Cluster, partial: bool, start: Sequence[Range], bound: float, deadline: float) -> Exact:
    """The best placement found in limited work from one that is known, and what is proved."""
    from ortools.sat.python import cp_model

    machines, layers = len(cluster.machines), cluster.layers
    units = lambda rate: min(int(rate / bound * _UNIT), _UNIT)  # noqa: E731
    model = cp_model.CpModel()
    held: list[dict[tuple[int, int], cp_model.IntVar]] = []
    starts: dict[tuple[int, int], list[cp_model.IntVar]] = {}
    ends: dict[tuple[int, int], list[cp_model.IntVar]] = {}
    inside: dict[tuple[int, int], list[cp_model.IntVar]] = {}
    for i, machine in enumerate(cluster.machines):
        spans = {
            (s, s + k): model.new_bool_var("")
            for k in range(1, len(machine.tokens_s) + 1)
            for s in range(layers - k + 1)
        }
        model.add_at_most_one(spans.values())
        for (first, last), chosen in spans.items():
            starts.setdefault((i, first), []).append(chosen)
            ends.setdefault((i, last), []).append(chosen)
            model.add_hint(chosen, start[i] == (first, last))
            for at in range(first, last):
                inside.setdefault((i, at), []).append(chosen)
        held.append(spans)
    arrives: list[list[cp_model.IntVar]] = [[] for _ in range(machines)]
    leaves: list[list[cp_model.IntVar]] = [[] for _ in range(machines)]
    total: list[cp_model.IntVar] = []

    def arc(rate: float, *gates: Sequence[cp_model.IntVar]) -> list[cp_model.IntVar]:
        """The flow of a link that is open while one of every gate is chosen; [] where it never is."""
        if units(rate) == 0 or not all(gates):
            return []
        flow = model.new_int_var(0, units(rate), "")
        for gate in gates:
            model.add(flow <= units(rate) * sum(gate))
        return [flow]

    entry = inside if partial else starts
    for i in range(machines):
        received = arc(cluster.between[machines, i], starts.get((i, 0), ()))
        arrives[i] += received
        total += received
        leaves[i] += arc(cluster.between[i, machines], ends.get((i, layers), ()))
        for j in (j for j in range(machines) if j != i):
            for at in range(1, layers):
                joint = arc(cluster.between[i, j], ends.get((i, at), ()), entry.get((j, at), ()))
                leaves[i] += joint
                arrives[j] += joint
    for i, machine in enumerate(cluster.machines):
        model.add(sum(arrives[i]) == sum(leaves[i]))
        model.add(
            sum(arrives[i])
            <= sum(units(machine.tokens_s[end - s - 1]) * chosen for (s, end), chosen in held[i].items())
        )
    model.maximize(sum(total))
    solver = cp_model.CpSolver()
    solver.parameters.num_workers, solver.parameters.random_seed = 1, 0
    solver.parameters.linearization_level = 2
    solver.parameters.max_deterministic_time = _WORK
    solver.parameters.max_time_in_seconds = max(deadline - time.monotonic(), 0.01)
    status = solver.solve(model)
    if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        return Exact(list(start), bound)
    found: list[Range] = [
        next((span for span, chosen in spans.items() if solver.value(chosen)), None) for spans in held
    ]
    # a cut's links and machines were rounded down by less than a unit each
    slack = (machines + 1) ** 2
    return Exact(found, (solver.best_objective_bound + slack) / _UNIT * bound)
