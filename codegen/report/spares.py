"""Replicas that may fail: of each pool, how many the others can do without, and what these carry then."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from planc.codegen.report.fleet import Kind, seats
from planc.planner.plan import Plan

#: replicas of a pool that are drawn one by one; of larger pools the others are one block
_MOST = 24


@dataclass(frozen=True, slots=True)
class Block:
    """A replica, or all the others: `percent` of the pool's traffic; `lost` in the worst case."""

    title: str
    paint: str
    percent: float
    lost: bool


@dataclass(frozen=True, slots=True)
class Spare:
    """A pool of `whole` replicas of which any `count` may fail; the others then carry `more` percent of what
    they usually do, where the largest are lost."""

    role: str
    classes: tuple[str, ...]
    count: int
    whole: int
    more: float
    blocks: tuple[Block, ...]


def spares(plan: Plan, kinds: Sequence[Kind]) -> list[Spare]:
    """One for each pool, where the request asks for spare replicas."""
    limits = plan.request.get("constraints") or {}
    count = int(limits.get("spare_replicas") or 0)
    if not count:
        return []
    paints = {seat.number: seat.kind.paint for seat in seats(plan, kinds).values()}
    found, number = [], 0
    for pool in plan.pools:
        numbered = [(number + i, replica) for i, replica in enumerate(pool.replicas)]
        number += len(numbered)
        numbered.sort(key=lambda one: (-one[1].traffic_share, one[0]))
        total = sum(replica.traffic_share for _, replica in numbered) or 1.0
        share = [replica.traffic_share / total for _, replica in numbered]
        rest = 1.0 - sum(share[:count])
        if len(numbered) <= count or rest <= 0:
            continue
        blocks = [
            Block(
                f"replica {i}: {100 * part:.3g} % of the pool's traffic" + (", lost" if at < count else ""),
                paints.get(i, "c-grey"),
                round(100 * part, 3),
                at < count,
            )
            for at, ((i, _), part) in enumerate(zip(numbered, share, strict=True))
        ]
        if len(blocks) > _MOST:
            others = sum(block.percent for block in blocks[_MOST:])
            title = f"{len(blocks) - _MOST} others: {others:.3g} % of the pool's traffic"
            blocks = [*blocks[:_MOST], Block(title, "c-grey", round(others, 3), False)]
        more = 100 / rest
        found.append(
            Spare(pool.role, tuple(pool.classes), count, len(numbered), round(more, 1), tuple(blocks))
        )
    return found
