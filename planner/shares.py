"""How a fleet's traffic is shared: every traffic class is served, and the fullest engine is as empty as
can be (a linear program, solved by GLOP)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from planc.errors import ToolFailed
from planc.planner.solve import Column, Limits, carried, integer_loads

#: (flow, firm): engines that are equally full
_Kind = tuple[int, bool]


def loads(columns: Sequence[Column], counts: Sequence[int], limits: Limits) -> list[float]:
    """What one engine of each column carries, in the demand's unit; 0 for columns that are not bought.

    Engines of one flow are equally full, those that may be taken away perhaps less than the others. Without
    a demand the fleet carries the most that it can.
    """
    bought = [n * column.load for n, column in zip(counts, columns, strict=True)]
    if limits.demand is None:
        units = integer_loads(columns, None)
        unit = max(column.load for column in columns) / max(units)
        demand = carried(columns, limits, counts, units) * unit
    else:
        demand = limits.demand
    capacity: dict[_Kind, float] = {}
    for column, amount in zip(columns, bought, strict=True):
        if amount:
            kind = column.flow, column.firm
            capacity[kind] = capacity.get(kind, 0.0) + amount
    fed = {limits.flows[column.flow].split for column in columns if column.feed}
    if len({flow for flow, _ in capacity}) == 1 and not limits.firm_share:
        full = dict.fromkeys(capacity, min(demand / sum(capacity.values()), 1.0))
    else:
        full = _fullness(capacity, limits, demand, fed)
    return [
        column.load * full[column.flow, column.firm] if amount else 0.0
        for column, amount in zip(columns, bought, strict=True)
    ]


def _fullness(
    capacity: dict[_Kind, float], limits: Limits, demand: float, fed: set[int]
) -> dict[_Kind, float]:
    """Share of each kind's capacity that is used. In splits that are `fed` decode engines hold users, and
    prefill engines are as full as they are."""
    from ortools.math_opt.python import mathopt  # type: ignore[import-untyped]

    model = mathopt.Model(name="shares")
    full = {kind: model.add_variable(lb=0.0, ub=1.0 + 1e-6) for kind in capacity}
    fullest = model.add_variable(lb=0.0)
    for used in full.values():
        model.add_linear_constraint(used <= fullest)
    for number, share in enumerate(limits.classes):
        whole: Any = 0
        halves: dict[int, dict[str, Any]] = {}
        spot: dict[str, Any] = {}
        for (flow, firm), most in capacity.items():
            kind = limits.flows[flow]
            part = kind.shares[number] * most / demand * full[flow, firm]
            if kind.role == "whole":
                whole += part
            else:
                sides = halves.setdefault(kind.split, {})
                sides[kind.role] = sides.get(kind.role, 0) + part
            if not firm:
                for role in ("prefill", "decode") if kind.role == "whole" else (kind.role,):
                    spot[role] = spot.get(role, 0) + part
        for split, sides in halves.items():
            if split not in fed:
                model.add_linear_constraint(sides.get("prefill", 0) - sides.get("decode", 0) == 0)
            whole += sides.get("decode", 0)
        model.add_linear_constraint(whole >= share * (1 - 1e-6))
        if limits.firm_share:
            for part in spot.values():
                model.add_linear_constraint(part <= (1 - limits.firm_share) * share)
    for (flow, _), used in full.items():
        for (other, _), least in full.items():
            pair = limits.flows[flow], limits.flows[other]
            if pair[0].split in fed and pair[0].split == pair[1].split and pair[0].role == "prefill":
                model.add_linear_constraint(used >= least)
    model.minimize(fullest + 1e-4 * sum(full.values()))
    result = mathopt.solve(model, mathopt.SolverType.GLOP)
    if result.termination.reason != mathopt.TerminationReason.OPTIMAL:
        raise ToolFailed(
            tool="GLOP",
            reason=f"{result.termination.reason.name}: {result.termination.detail}",
            mend="Please report the request.",
        )
    values = result.variable_values()
    return {kind: float(values[used]) for kind, used in full.items()}
