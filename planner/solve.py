"""The master problem: how many engines of which kind, on which nodes.

Columns are engines at a load (planner.evaluate). Identical engines are counted, never told apart,
so there is no symmetry to break. Coefficients are integers (loads in millionths of the demand,
rounded against the plan), so a solution is checked exactly after rounding. Solved by HiGHS through
OR-Tools' MathOpt, to a gap of zero (or `Limits.gap`), objective after objective: the request's own,
then least accuracy loss, then most spare capacity, then canonical order.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, Literal

from planc.errors import ToolFailed
from planc.planner.columns import (
    UNIT,
    Column,
    Flow,
    Limits,
    Solution,
    carried,
    greedy,
    integer_loads,
    integer_weights,
    keeps,
    outdoes,
    replaces,
    undominated,
)
from planc.planner.inventory import chain_limits, is_chain, patterns

__all__ = [
    "UNIT",
    "Column",
    "Flow",
    "Limits",
    "Master",
    "Relaxation",
    "Solution",
    "carried",
    "families",
    "integer_loads",
    "integer_weights",
    "outdoes",
    "relaxation",
    "replaces",
    "solve",
    "undominated",
]


def solve(
    columns: Sequence[Column],
    limits: Limits,
    *,
    time_limit: float | None = None,
    first_only: bool = False,
) -> Solution | None:
    """The best fleet; None when the demand cannot be met.

    With a demand: least total weight that carries it. Without: most load (ties: least weight).
    Families are solved one by one and the best is kept; ties go to less accuracy loss, more load,
    then the earlier columns.

    time_limit   seconds for all of it
    first_only   stop after the primary objective

    Raises ToolFailed when time runs out before any fleet was found.
    """
    deadline = None if time_limit is None else time.perf_counter() + time_limit
    best: tuple[tuple[float, ...], Solution] | None = None
    bounds, proved = [], True
    for mine in families(columns):
        master = Master([columns[i] for i in mine], limits, columns, deadline)
        found = master.run(first_only)
        if found is None:
            if master.out_of_time:  # it may hold a better fleet than was found: its bound counts
                bounds.append(master.relaxed())
                proved = False
            continue
        rank, solution = found
        bounds.append(solution.bound)
        proved = proved and solution.status == "optimal"
        if best is None or rank < best[0]:
            counts = dict(zip(mine, solution.counts, strict=True))
            whole = tuple(counts.get(i, 0) for i in range(len(columns)))
            best = rank, replace(solution, counts=whole)
    if best is None:
        if not proved:
            raise ToolFailed(
                tool="HiGHS",
                reason=f"no fleet was found in {time_limit:g} s",
                mend="Give --time-limit more seconds, or a smaller inventory.",
            )
        return None
    if not keeps(columns, limits, best[1].counts):
        raise ToolFailed(
            tool="HiGHS",
            reason="its solution breaks a constraint after rounding",
            mend="Please report the request.",
        )
    bound = best[1].value if proved else (min(bounds) if limits.demand is not None else max(bounds))
    whole_fleet = replace(best[1], bound=bound)
    met = proved or whole_fleet.gap == 0
    return replace(whole_fleet, status="optimal" if met else "feasible")


def families(columns: Sequence[Column]) -> list[list[int]]:
    """Columns that are solved together: those of one family; all of them where several models have families
    of their own to choose."""
    if len({column.owner for column in columns}) > 1:
        return [list(range(len(columns)))]
    found: dict[str, list[int]] = {}
    for i, column in enumerate(columns):
        found.setdefault(column.family, []).append(i)
    return list(found.values())


@dataclass(frozen=True, slots=True)
class Relaxation:
    """The master problem with divisible engines: its value bounds that of any fleet, and a fleet with an
    engine of column i is worse than that bound by `reduced_costs[i]` at least."""

    bound: float
    reduced_costs: tuple[float, ...]


def relaxation(columns: Sequence[Column], limits: Limits) -> Relaxation | None:
    """Of columns of one family; None when the demand cannot be met."""
    return Master(columns, limits, columns, None, relaxed=True).price()


class Master:
    """One integer program, solved for one objective after another."""

    def __init__(
        self,
        columns: Sequence[Column],
        limits: Limits,
        every: Sequence[Column],
        deadline: float | None,
        relaxed: bool = False,
    ) -> None:
        """`every`: the columns of all families, which share the integer scales. `relaxed`: engines are
        divisible."""
        from ortools.math_opt.python import mathopt  # type: ignore[import-untyped]

        self.mathopt = mathopt
        self.whole_engines = not relaxed
        self.columns, self.limits, self.deadline = columns, limits, deadline
        self.model = mathopt.Model(name="fleet")
        whole = limits.demand if limits.demand is not None else max(c.load for c in every)
        self.unit = max(whole, 1e-300) / UNIT
        self.loads = integer_loads(columns, max(whole, 1e-300))
        self.feeds = [math.ceil(c.feed / max(whole, 1e-300) * UNIT - 1e-9) for c in columns]
        self.weights, self.scale = integer_weights([c.weight for c in columns], [c.weight for c in every])
        self.counts = [
            self.model.add_variable(lb=0, ub=self.most(c), is_integer=self.whole_engines, name=f"n{i}")
            for i, c in enumerate(columns)
        ]
        self._place()
        if len({column.owner for column in columns}) > 1:
            self._one_family_each()
        if limits.plain:
            self.carried = self.total(self.loads)
            if limits.demand is not None:
                self.model.add_linear_constraint(self.carried >= UNIT)
        else:
            self.carried = self._carried()
        if limits.max_gpus is not None:
            self.model.add_linear_constraint(self.total([c.gpus for c in columns]) <= limits.max_gpus)
        if limits.max_replicas is not None:
            self.model.add_linear_constraint(self.total([1] * len(columns)) <= limits.max_replicas)
        if limits.max_watts is not None:
            watts = [math.ceil(c.watts) for c in columns]
            self.model.add_linear_constraint(self.total(watts) <= math.floor(limits.max_watts))

    def most(self, column: Column) -> int:
        """Engines of one column that fit."""
        return sum(island // column.size for island in self.limits.islands[column.group]) // column.pieces

    def total(self, factors: Sequence[float]) -> Any:
        """A sum over all engines."""
        return sum(f * n for f, n in zip(factors, self.counts, strict=True))

    def _one_family_each(self) -> None:
        """Every model keeps to one family."""
        chosen: dict[int, dict[str, Any]] = {}
        for i, column in enumerate(self.columns):
            families = chosen.setdefault(column.owner, {})
            if column.family not in families:
                families[column.family] = self.model.add_variable(lb=0, ub=1, is_integer=self.whole_engines)
            self.model.add_linear_constraint(
                self.counts[i] <= self.counts[i].upper_bound * families[column.family]
            )
        for families in chosen.values():
            self.model.add_linear_constraint(sum(families.values()) <= 1)

    def _carried(self) -> Any:
        """Constraints of the flows; returns the demand that they carry, as it is or to be maximised."""
        limits, model = self.limits, self.model
        most = UNIT * sum(map(sum, limits.islands))
        known = limits.demand is not None
        whole = model.add_variable(
            lb=UNIT if known else 0, ub=UNIT if known else most, is_integer=self.whole_engines
        )
        used = {i for i, c in enumerate(self.columns)}
        firm = {i for i in used if self.columns[i].firm}
        self._cover(used, whole, limits.spare)
        if limits.firm_share and firm != used:
            self._cover(firm, limits.firm_share * whole, 0)
        return whole

    def _cover(self, chosen: set[int], whole: Any, spare: int) -> None:
        """The chosen columns carry `whole` of the demand, with `spare` engines of each flow to spare."""
        model, limits = self.model, self.limits
        carried: dict[int, Any] = {}
        for flow in sorted({self.columns[i].flow for i in chosen}):
            mine = sorted(i for i in chosen if self.columns[i].flow == flow)
            load = sum(self.loads[i] * self.counts[i] for i in mine)
            if spare:
                largest = model.add_variable(lb=0.0)
                for i in mine:
                    used = model.add_variable(lb=0, ub=1, is_integer=self.whole_engines)
                    model.add_linear_constraint(self.counts[i] <= self.counts[i].upper_bound * used)
                    model.add_linear_constraint(largest >= self.loads[i] * used)
                load -= spare * largest
            carried[flow] = model.add_variable(lb=0.0)
            model.add_linear_constraint(carried[flow] <= load)
        fed = self._feed(chosen, carried)
        for number, share in enumerate(limits.classes):
            halves: dict[int, dict[str, Any]] = {}
            served: Any = 0
            for flow, amount in carried.items():
                kind = limits.flows[flow]
                part = kind.shares[number] * amount
                if kind.role == "whole":
                    served += part
                else:
                    sides = halves.setdefault(kind.split, {})
                    sides[kind.role] = sides.get(kind.role, 0) + part
            for split, sides in halves.items():
                if split in fed:
                    served += sides["decode"]
                elif len(sides) == 2:
                    both = model.add_variable(lb=0.0)
                    for side in sides.values():
                        model.add_linear_constraint(both <= side)
                    served += both
            model.add_linear_constraint(served - share * whole >= 0)

    def _feed(self, chosen: set[int], carried: dict[int, Any]) -> set[int]:
        """Decode engines that hold users get their requests from prefill engines of their split; returns
        these splits."""
        needs: dict[int, Any] = {}
        for i in sorted(chosen):
            if self.columns[i].feed:
                split = self.limits.flows[self.columns[i].flow].split
                needs[split] = needs.get(split, 0) + self.feeds[i] * self.counts[i]
        for split, need in needs.items():
            halves = [(f, self.limits.flows[f]) for f in carried]
            given = [carried[f] for f, half in halves if half.split == split and half.role == "prefill"]
            self.model.add_linear_constraint(sum(given) - need >= 0)
        return set(needs)

    def _place(self) -> None:
        """Pieces fit into islands: exactly, by slots when sizes form a chain, else by filling patterns."""
        for group, islands in enumerate(self.limits.islands):
            mine = [i for i, c in enumerate(self.columns) if c.group == group]
            sizes = sorted({self.columns[i].size for i in mine})
            if not sizes:
                continue
            need = {
                size: sum(
                    self.columns[i].pieces * self.counts[i] for i in mine if self.columns[i].size == size
                )
                for size in sizes
            }
            if is_chain(sizes):
                for factors, most in chain_limits(sizes, islands):
                    self.model.add_linear_constraint(sum(f * need[s] for s, f in factors.items()) <= most)
                continue
            given = dict.fromkeys(sizes, 0)
            for island in sorted(set(islands)):
                ways = patterns([s for s in sizes if s <= island], island) if sizes[0] <= island else []
                if not ways:
                    continue
                used = [
                    self.model.add_variable(lb=0, ub=islands.count(island), is_integer=self.whole_engines)
                    for _ in ways
                ]
                self.model.add_linear_constraint(sum(used) <= islands.count(island))
                for way, count in zip(ways, used, strict=True):
                    for size, pieces in way.items():
                        given[size] = given[size] + pieces * count
            for size in sizes:
                self.model.add_linear_constraint(need[size] <= given[size])

    def price(self) -> Relaxation | None:
        """The linear relaxation; None when even divisible engines do not suffice."""
        covering = self.limits.demand is not None
        (self.model.minimize if covering else self.model.maximize)(
            self.total(self.weights) if covering else self.carried
        )
        result = self.mathopt.solve(self.model, self.mathopt.SolverType.GLOP)
        if result.termination.reason != self.mathopt.TerminationReason.OPTIMAL:
            return None
        unit = 1 / self.scale if covering else self.unit
        sign = 1.0 if covering else -1.0
        costs = result.reduced_costs()  # of columns at their upper bound they have the other sign
        worse = tuple(max(sign * costs[n], 0.0) * unit for n in self.counts)
        return Relaxation(result.objective_value() * unit, worse)

    def run(self, first_only: bool) -> tuple[tuple[float, ...], Solution] | None:
        """(rank for comparing families, solution); None when nothing is feasible."""
        weights, loads = self.total(self.weights), self.total(self.loads)
        drops = [round(c.drop * 1e6 * load / UNIT) for c, load in zip(self.columns, self.loads, strict=True)]
        covering = self.limits.demand is not None
        goal = (weights, True, 1 / self.scale) if covering else (self.carried, False, self.unit)
        first = self.optimise(goal[0], minimise=goal[1])
        if first is None and self.out_of_time:
            first = self._simple()
        if first is None or (not covering and first[0] <= 0):
            return None
        found, bound, proved = first
        if not first_only and proved:
            if not covering:
                self.optimise(weights, minimise=True)
            if any(drops):
                self.optimise(self.total(drops), minimise=True)
            if covering:
                self.optimise(loads, minimise=False)
            order = [(i + 1) * 1009 + i * i for i in range(len(self.columns))]
            self.optimise(self.total(order), minimise=True)
        weight, drop, load = (
            sum(n * v for n, v in zip(self.best, values, strict=True))
            for values in (self.weights, drops, self.loads)
        )
        rank = (weight, drop, -load) if covering else (-found, weight, drop)
        status: Literal["optimal", "feasible"] = "optimal" if proved else "feasible"
        return rank, Solution(self.best, status, found * goal[2], bound * goal[2])

    def _simple(self) -> tuple[float, float, bool] | None:
        """When time ran out before any solution: a fleet bought greedily, or else the first that the solver
        finds, however long that takes; and the relaxed bound."""
        counts = greedy(self.columns, self.limits, self.loads, self.weights)
        if counts is None or not carried(self.columns, self.limits, counts, self.loads):
            counts = self._any()
        if counts is None:
            return None
        self.best = counts
        if self.limits.demand is not None:
            value = float(sum(n * w for n, w in zip(counts, self.weights, strict=True)))
            return value, self.relaxed() * self.scale, False
        return (
            float(carried(self.columns, self.limits, counts, self.loads)),
            self.relaxed() / self.unit,
            False,
        )

    def relaxed(self) -> float:
        """The bound of the problem without placement: every GPU and every piece of load divisible at will.
        In the objective's own unit."""
        pairs = [(c, w, n) for c, w, n in zip(self.columns, self.weights, self.loads, strict=True) if n]
        if self.limits.demand is not None:
            return UNIT * min((w / load for _, w, load in pairs), default=math.inf) / self.scale
        gpus = min(self.limits.max_gpus or math.inf, sum(map(sum, self.limits.islands)))
        return max((load / c.gpus for c, _, load in pairs), default=0.0) * gpus * self.unit

    def optimise(
        self, expression: Any, *, minimise: bool, slack: float = 0.0
    ) -> tuple[float, float, bool] | None:
        """(value, bound, proved) of one objective, which is then fixed for the following ones. `slack`: an
        absolute gap at which to stop."""
        if isinstance(expression, int):
            return 0.0, 0.0, True
        goal = self.model.minimize if minimise else self.model.maximize
        goal(expression)
        parameters = self.mathopt.SolveParameters(
            relative_gap_tolerance=self.limits.gap,
            absolute_gap_tolerance=slack,
            random_seed=0,
            node_limit=self.limits.nodes,
            time_limit=timedelta(seconds=max(self.deadline - time.perf_counter(), 0.02))
            if self.deadline is not None
            else None,
        )
        result = self._highs(parameters)
        reason = result.termination.reason
        kinds = self.mathopt.TerminationReason
        if reason in (kinds.INFEASIBLE, kinds.INFEASIBLE_OR_UNBOUNDED):
            return None
        if not result.has_primal_feasible_solution():
            if reason == kinds.NO_SOLUTION_FOUND:
                self.out_of_time = True
                return None
            raise ToolFailed(
                tool="HiGHS",
                reason=f"{reason.name}: {result.termination.detail}",
                mend="Please report the request.",
            )
        values = result.variable_values()
        self.best = tuple(round(values[n]) for n in self.counts)
        rounded = round(result.objective_value())
        bound = result.termination.objective_bounds.dual_bound
        if minimise:
            self.model.add_linear_constraint(expression <= rounded)
        else:
            self.model.add_linear_constraint(expression >= rounded)
        proved = reason == kinds.OPTIMAL and (self.limits.gap == 0 or abs(bound - rounded) < 1)
        return rounded, float(rounded) if proved else bound, proved

    def _any(self) -> tuple[int, ...] | None:
        """The first fleet that meets the constraints and carries a thousandth of the largest engine's load;
        None where there is none."""
        if self.limits.demand is None:
            self.model.add_linear_constraint(self.carried >= UNIT // 1000)
        result = self._highs(self.mathopt.SolveParameters(random_seed=0, solution_limit=1))
        if not result.has_primal_feasible_solution():
            return None
        values = result.variable_values()
        return tuple(round(values[n]) for n in self.counts)

    def _highs(self, parameters: Any) -> Any:
        with _stdout_kept():
            return self.mathopt.solve(self.model, self.mathopt.SolverType.HIGHS, params=parameters)

    best: tuple[int, ...] = ()
    out_of_time = False


@contextmanager
def _stdout_kept() -> Iterator[None]:
    """HiGHS prints a line of its own now and then; standard output may be somebody's JSON."""
    sys.stdout.flush()
    try:
        kept = os.dup(1)
    except OSError:  # there is none
        yield
        return
    try:
        os.dup2(2, 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
