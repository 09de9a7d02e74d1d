"""What the search deals in: offers (an engine with limits and what it carries) and fleets of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from planc.cost_model.energy import watts
from planc.planner import solve
from planc.planner.candidates import Candidate
from planc.planner.evaluate import Engine, Limits, Precise
from planc.planner.operating_point import Steady
from planc.planner.traffic import Part, Traffic

if TYPE_CHECKING:
    from planc.planner.stream import Stream

SAME = 1e-3  # capacities that differ by less count as equal when limits are chosen
HEADROOM = 1.5  # capacity over load that trimmed batch limits keep, where there is that much
NEAR = 0.95  # candidates within this share of a better one are evaluated precisely too


@dataclass(frozen=True, slots=True)
class Deployed:
    """`count` identical engines, each carrying `load` (requests/s or users); `capacity` is what each
    could carry within the objectives. `stream`: whose requests they serve; None: all of the request's."""

    engine: Engine
    limits: Limits
    count: int
    load: float
    capacity: float
    stream: Stream | None = None

    @property
    def candidate(self) -> Candidate:
        return self.engine.candidate

    @property
    def role(self) -> Part:
        return self.stream.role if self.stream is not None else "aggregated"

    def requests_s(self, load: Traffic) -> float:
        """Requests/s of one engine; in a closed loop what its users make of it."""
        if load.concurrency is None or self.role in ("prefill", "decode"):
            return self.load
        return float(self.state(load).rate[0, 0]) * self.candidate.shape.dp

    def state(self, load: Traffic, scale: float = 1.0) -> Steady:
        """The steady state at its load; `load` is the traffic where there is no stream."""
        if self.stream is not None:
            return self.stream.evaluator(self.engine, self.limits).at(self.load, scale)
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
        """Requests that its engines can begin."""
        return sum(item.count * item.capacity for item in self.items if item.role != "decode")

    @property
    def watts(self) -> float:
        """Power of all GPUs when none is idle."""
        return sum(
            item.count * item.candidate.shape.world * float(watts(item.candidate.group.gpu, 1.0))
            for item in self.items
        )


@dataclass(frozen=True, slots=True)
class Offer:
    """What one candidate can do at best for a stream: with which limits, up to which load. In a closed
    loop a decode engine holds so many `users` while it runs at `feed` requests/s, below its capacity."""

    engine: Engine
    limits: Limits
    capacity: float
    stream: Stream
    users: float = 0.0
    feed: float = 0.0

    @property
    def load(self) -> float:
        """What it carries in the demand's unit."""
        return self.users if self.feed else self.capacity

    def precise(self) -> Offer:
        """Its capacity by the step model itself."""
        return self.stream.precise(self)

    def trimmed(self, load: float) -> Offer:
        """Limits no larger than this load needs."""
        return self.stream.trimmed(self, load)

    def column(self, load: float, weight: float | None = None) -> solve.Column:
        return self.stream.column(self, load, weight)
