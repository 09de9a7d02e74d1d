"""How a fleet's traffic is shared: every traffic class is served, and the fullest engine is as empty as
can be (a linear program, solved by GLOP)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from planc.errors import ToolFailed
from planc.planner.solve import Column, Limits, carried, integer_loads


def loads(columns: Sequence[Column], counts: Sequence[int], limits: Limits) -> list[float]:
    """What one engine of each column carries, in the demand's unit; 0 for columns that are not bought.

    Engines of one flow are equally full. Without a demand the fleet carries the most that it can.
    """
    bought = [n * column.load for n, column in zip(counts, columns, strict=True)]
    if limits.demand is None:
        units = integer_loads(columns, None)
        unit = max(column.load for column in columns) / max(units)
        demand = carried(columns, limits, counts, units) * unit
    else:
        demand = limits.demand
    flows = sorted({column.flow for column, amount in zip(columns, bought, strict=True) if amount})
    capacity = {f: sum(a for c, a in zip(columns, bought, strict=True) if c.flow == f) for f in flows}
    if len(flows) == 1:
        full = {flows[0]: min(demand / capacity[flows[0]], 1.0)}
    else:
        full = _fullness(capacity, limits, demand)
    return [
        column.load * full[column.flow] if amount else 0.0
        for column, amount in zip(columns, bought, strict=True)
    ]


def _fullness(capacity: dict[int, float], limits: Limits, demand: float) -> dict[int, float]:
    """Share of each flow's capacity that is used."""
    from ortools.math_opt.python import mathopt  # type: ignore[import-untyped]

    model = mathopt.Model(name="shares")
    full = {flow: model.add_variable(lb=0.0, ub=1.0 + 1e-6) for flow in capacity}
    fullest = model.add_variable(lb=0.0)
    for used in full.values():
        model.add_linear_constraint(used <= fullest)
    for number, share in enumerate(limits.classes):
        served: Any = 0
        halves: dict[int, dict[str, Any]] = {}
        for flow, most in capacity.items():
            kind = limits.flows[flow]
            part = kind.shares[number] * most / demand * full[flow]
            if kind.role == "whole":
                served += part
            else:
                sides = halves.setdefault(kind.split, {})
                sides[kind.role] = sides.get(kind.role, 0) + part
        for sides in halves.values():
            both = model.add_variable(lb=0.0)
            for role in ("prefill", "decode"):
                model.add_linear_constraint(sides.get(role, 0) - both == 0)
            served += both
        model.add_linear_constraint(served >= share * (1 - 1e-6))
    model.minimize(fullest + 1e-4 * sum(full.values()))
    result = mathopt.solve(model, mathopt.SolverType.GLOP)
    if result.termination.reason != mathopt.TerminationReason.OPTIMAL:
        raise ToolFailed(
            tool="GLOP",
            reason=f"{result.termination.reason.name}: {result.termination.detail}",
            mend="Please report the request.",
        )
    values = result.variable_values()
    return {flow: float(values[used]) for flow, used in full.items()}
