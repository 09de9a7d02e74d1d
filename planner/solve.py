"""The master problem: how many engines of which kind, on which nodes.

Columns are engines at a load (planner.evaluate). Identical engines are counted, never told apart,
so there is no symmetry to break. Coefficients are integers (loads in millionths of the demand,
rounded against the plan), so a solution is checked exactly after rounding. Solved by HiGHS through
OR-Tools' MathOpt, to a gap of zero, objective after objective: the request's own, then least
accuracy loss, then most spare capacity, then canonical order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, Literal

from planc.errors import ToolFailed
from planc.planner.inventory import chain_limits, is_chain, patterns

#: integer units of the demand
UNIT = 1_000_000


@dataclass(frozen=True, slots=True)
class Column:
    """An engine that may be bought any number of times.

    group, pieces, size   it takes `pieces` pieces of `size` GPUs in islands of node group `group`
    load                  what it carries, in the demand's unit
    weight                what one costs in the primary objective
    drop                  relative accuracy loss
    watts                 power at this load
    family                formats: a fleet keeps to one family, so that all replicas answer alike
    """

    group: int
    pieces: int
    size: int
    load: float
    weight: float
    drop: float
    watts: float
    family: str = ""

    @property
    def gpus(self) -> int:
        return self.pieces * self.size


@dataclass(frozen=True, slots=True)
class Limits:
    """islands: GPUs of each island, per group. `demand` None: carry as much as possible."""

    islands: tuple[tuple[int, ...], ...]
    demand: float | None
    max_gpus: int | None = None
    max_replicas: int | None = None
    max_watts: float | None = None


@dataclass(frozen=True, slots=True)
class Solution:
    """counts per column; `value` and `bound` of the primary objective in its own unit."""

    counts: tuple[int, ...]
    status: Literal["optimal", "feasible"]
    value: float
    bound: float

    @property
    def gap(self) -> float:
        return abs(self.value - self.bound) / max(abs(self.value), 1e-12)


def undominated(columns: Sequence[Column]) -> list[int]:
    """Columns that no other replaces at no loss: same pieces in the same group, no more weight, drop or
    power, no less load. Of equal ones the first stays."""
    kept: list[int] = []
    for i, mine in enumerate(columns):
        if mine.load > 0 and not any(
            replaces(other, mine) and (j < i or not replaces(mine, other))
            for j, other in enumerate(columns)
            if j != i
        ):
            kept.append(i)
    return kept


def replaces(a: Column, b: Column) -> bool:
    """Whether `a` may stand in for `b` everywhere, at no loss."""
    return (
        (a.group, a.pieces, a.size, a.family) == (b.group, b.pieces, b.size, b.family)
        and a.load >= b.load
        and a.weight <= b.weight
        and a.drop <= b.drop
        and a.watts <= b.watts
    )


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

    first_only   stop after the primary objective
    """
    best: tuple[tuple[float, ...], Solution] | None = None
    bounds, proved = [], True
    for family in dict.fromkeys(column.family for column in columns):
        mine = [i for i, column in enumerate(columns) if column.family == family]
        master = _Master([columns[i] for i in mine], limits, columns, time_limit)
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
        return None
    _check(columns, limits, best[1].counts)
    bound = best[1].value if proved else (min(bounds) if limits.demand is not None else max(bounds))
    whole_fleet = replace(best[1], bound=bound)
    met = proved or whole_fleet.gap == 0
    return replace(whole_fleet, status="optimal" if met else "feasible")


class _Master:
    """One integer program, solved for one objective after another."""

    def __init__(
        self, columns: Sequence[Column], limits: Limits, every: Sequence[Column], time_limit: float | None
    ) -> None:
        """`every`: the columns of all families, which share the integer scales."""
        from ortools.math_opt.python import mathopt  # type: ignore[import-untyped]

        self.mathopt = mathopt
        self.columns, self.limits, self.time_limit = columns, limits, time_limit
        self.model = mathopt.Model(name="fleet")
        whole = limits.demand if limits.demand is not None else max(c.load for c in every)
        self.unit = max(whole, 1e-300) / UNIT
        self.loads = integer_loads(columns, max(whole, 1e-300))
        self.weights, self.scale = integer_weights([c.weight for c in columns], [c.weight for c in every])
        self.counts = [
            self.model.add_integer_variable(lb=0, ub=self._most(c), name=f"n{i}")
            for i, c in enumerate(columns)
        ]
        self._place()
        if limits.demand is not None:
            self.model.add_linear_constraint(self._sum(self.loads) >= UNIT)
        if limits.max_gpus is not None:
            self.model.add_linear_constraint(self._sum([c.gpus for c in columns]) <= limits.max_gpus)
        if limits.max_replicas is not None:
            self.model.add_linear_constraint(self._sum([1] * len(columns)) <= limits.max_replicas)
        if limits.max_watts is not None:
            watts = [math.ceil(c.watts) for c in columns]
            self.model.add_linear_constraint(self._sum(watts) <= math.floor(limits.max_watts))

    def _most(self, column: Column) -> int:
        return sum(island // column.size for island in self.limits.islands[column.group]) // column.pieces

    def _sum(self, factors: Sequence[float]) -> Any:
        return sum(f * n for f, n in zip(factors, self.counts, strict=True))

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
                used = [self.model.add_integer_variable(lb=0, ub=islands.count(island)) for _ in ways]
                self.model.add_linear_constraint(sum(used) <= islands.count(island))
                for way, count in zip(ways, used, strict=True):
                    for size, pieces in way.items():
                        given[size] = given[size] + pieces * count
            for size in sizes:
                self.model.add_linear_constraint(need[size] <= given[size])

    def run(self, first_only: bool) -> tuple[tuple[float, ...], Solution] | None:
        """(rank for comparing families, solution); None when nothing is feasible."""
        weights, loads = self._sum(self.weights), self._sum(self.loads)
        drops = [round(c.drop * 1e6 * load / UNIT) for c, load in zip(self.columns, self.loads, strict=True)]
        covering = self.limits.demand is not None
        goal = (weights, True, 1 / self.scale) if covering else (loads, False, self.unit)
        first = self._optimise(goal[0], minimise=goal[1])
        if first is None and self.out_of_time:
            first = self._simple()
        if first is None or (not covering and first[0] <= 0):
            return None
        found, bound, proved = first
        if not first_only and proved:
            if not covering:
                self._optimise(weights, minimise=True)
            if any(drops):
                self._optimise(self._sum(drops), minimise=True)
            if covering:
                self._optimise(loads, minimise=False)
            order = [(i + 1) * 1009 + i * i for i in range(len(self.columns))]
            self._optimise(self._sum(order), minimise=True)
        weight, drop, load = (
            sum(n * v for n, v in zip(self.best, values, strict=True))
            for values in (self.weights, drops, self.loads)
        )
        rank = (weight, drop, -load) if covering else (-load, weight, drop)
        status: Literal["optimal", "feasible"] = "optimal" if proved else "feasible"
        return rank, Solution(self.best, status, found * goal[2], bound * goal[2])

    def _simple(self) -> tuple[float, float, bool] | None:
        """When time ran out before any solution: the best fleet of one kind, and the relaxed bound."""
        limits, found = self.limits, None
        for i, column in enumerate(self.columns):
            most = self._most(column)
            for cap, each in (
                (limits.max_gpus, column.gpus),
                (limits.max_replicas, 1),
                (limits.max_watts, math.ceil(column.watts)),
            ):
                most = min(most, int(cap // each)) if cap is not None else most
            count = most if limits.demand is None else -(-UNIT // max(self.loads[i], 1))
            if not 1 <= count <= most:
                continue
            value = count * (self.weights[i] if limits.demand is not None else -self.loads[i])
            if found is None or value < found[0]:
                found = value, tuple(count if j == i else 0 for j in range(len(self.columns)))
        if found is None:
            return None
        self.best = found[1]
        unit = 1 / self.scale if limits.demand is not None else self.unit
        return abs(found[0]), self.relaxed() / unit, False

    def relaxed(self) -> float:
        """The bound of the problem without placement: every GPU and every piece of load divisible at will.
        In the objective's own unit."""
        pairs = [(c, w, n) for c, w, n in zip(self.columns, self.weights, self.loads, strict=True) if n]
        if self.limits.demand is not None:
            return UNIT * min((w / load for _, w, load in pairs), default=math.inf) / self.scale
        gpus = min(self.limits.max_gpus or math.inf, sum(map(sum, self.limits.islands)))
        return max((load / c.gpus for c, _, load in pairs), default=0.0) * gpus * self.unit

    def _optimise(self, expression: Any, *, minimise: bool) -> tuple[float, float, bool] | None:
        """(value, bound, proved) of one objective, which is then fixed for the following ones."""
        if isinstance(expression, int):
            return 0.0, 0.0, True
        goal = self.model.minimize if minimise else self.model.maximize
        goal(expression)
        parameters = self.mathopt.SolveParameters(
            relative_gap_tolerance=0.0,
            absolute_gap_tolerance=0.0,
            random_seed=0,
            time_limit=timedelta(seconds=self.time_limit) if self.time_limit is not None else None,
        )
        result = self.mathopt.solve(self.model, self.mathopt.SolverType.HIGHS, params=parameters)
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
        proved = reason == kinds.OPTIMAL
        return rounded, float(rounded) if proved else bound, proved

    best: tuple[int, ...] = ()
    out_of_time = False


def integer_loads(columns: Sequence[Column], whole: float | None) -> list[int]:
    """Loads in millionths of `whole` (None: of the largest load), rounded down; a load that was made as an
    exact share of it (1/n) is rounded up, so that n of them reach it."""
    if whole is None:
        whole = max((c.load for c in columns), default=1.0)
    found = []
    for column in columns:
        share = column.load / whole
        exact_share = share > 0 and abs(1 / share - round(1 / share)) < 1e-9
        found.append(min(math.ceil(share * UNIT - 1e-6) if exact_share else math.floor(share * UNIT), 10**12))
    return found


def integer_weights(weights: Sequence[float], every: Sequence[float] = ()) -> tuple[list[int], float]:
    """Weights as integers of at most about 1e6 (over `every` weight), and the scale; exact where all are
    multiples of 1e-4."""
    every = every or weights
    most = max(every, default=0.0)
    if most <= 0:
        return [0] * len(weights), 1.0
    round_ones = most * 1e4 <= 1e7 and all(abs(w * 1e4 - round(w * 1e4)) < 1e-6 for w in every)
    scale = 1e4 if round_ones else 1e6 / most
    return [round(w * scale) for w in weights], scale


def _check(columns: Sequence[Column], limits: Limits, counts: Sequence[int]) -> None:
    """The rounded solution holds exactly, in integers; a solver's tolerance must not leak into a plan."""
    carried = sum(n * load for n, load in zip(counts, integer_loads(columns, limits.demand), strict=True))
    gpus = sum(n * c.gpus for n, c in zip(counts, columns, strict=True))
    ok = limits.demand is None or carried >= UNIT
    ok = ok and (limits.max_gpus is None or gpus <= limits.max_gpus)
    ok = ok and gpus <= sum(sum(islands) for islands in limits.islands)
    if not ok:
        raise ToolFailed(
            tool="HiGHS",
            reason="its solution breaks a constraint after rounding",
            mend="Please report the request.",
        )
