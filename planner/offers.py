"""What the search deals in: offers (an engine with limits and what it carries) and fleets of them."""

from __future__ import annotations

from dataclasses import dataclass

from planc.cost_model.energy import watts
from planc.planner import solve
from planc.planner.candidates import Candidate
from planc.planner.evaluate import Engine, Limits, Precise
from planc.planner.steady_state import Steady
from planc.planner.traffic import Traffic

SAME = 1e-3  # capacities that differ by less count as equal when limits are chosen
HEADROOM = 1.5  # capacity over load that trimmed batch limits keep, where there is that much
NEAR = 0.95  # candidates within this share of a better one are evaluated precisely too


@dataclass(frozen=True, slots=True)
class Deployed:
    """`count` identical engines, each carrying `load` (requests/s or users); `capacity` is what each
    could carry within the objectives."""

    engine: Engine
    limits: Limits
    count: int
    load: float
    capacity: float

    @property
    def candidate(self) -> Candidate:
        return self.engine.candidate

    def state(self, load: Traffic, scale: float = 1.0) -> Steady:
        return Precise(self.engine, self.limits, load).at(self.load, scale)


@dataclass(frozen=True, slots=True)
class Fleet:
    """The search's answer. `objective` names the unit of the solver's value."""

    items: tuple[Deployed, ...]
    solution: solve.Solution
    objective: str

    @property
    def gpus(self) -> int:
        return sum(item.count * item.candidate.shape.world for item in self.items)

    @property
    def usd(self) -> float:
        return sum(item.count * item.candidate.usd for item in self.items)

    @property
    def capacity(self) -> float:
        return sum(item.count * item.capacity for item in self.items)

    @property
    def watts(self) -> float:
        """Power of all GPUs when none is idle."""
        return sum(
            item.count * item.candidate.shape.world * float(watts(item.candidate.group.gpu, 1.0))
            for item in self.items
        )


@dataclass(frozen=True, slots=True)
class Offer:
    """What one candidate can do at best, by interpolation: with which limits, up to which load."""

    engine: Engine
    limits: Limits
    capacity: float
