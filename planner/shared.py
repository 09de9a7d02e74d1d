"""Re-solving a fleet of several models when its inventory changes, or what is asked of one of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from planc.cost_model.table import CostTable
from planc.planner.joint import Joint, Together, proposed, shared
from planc.planner.referee import Proposal, Referee
from planc.planner.resolving import Resolving
from planc.planner.search import Search
from planc.planner.variations import Outcome, Resolver, Variation, hardware


@dataclass(frozen=True, slots=True)
class Fleets:
    """What to solve: a variation per model, all on the same inventory, and the limits of the whole fleet."""

    models: Mapping[str, Variation]
    limits: Together

    def key(self) -> tuple[object, ...]:
        named = tuple((name, one.key()) for name, one in self.models.items())
        return named, self.limits.model_dump_json()

    def with_model(self, name: str, one: Variation) -> Fleets:
        """Another variation of one model."""
        return replace(self, models={**self.models, name: one})

    def without_model(self, name: str) -> Fleets:
        return replace(self, models={other: one for other, one in self.models.items() if other != name})

    def on(self, like: Variation) -> Fleets:
        """All models on the inventory and the hardware of one variation."""
        inventory = like.request.inventory
        models = {
            name: replace(one.changed(inventory=inventory), memory_gib=like.memory_gib)
            for name, one in self.models.items()
        }
        return replace(self, models=models)

    def limited(self, **limits: object) -> Fleets:
        return replace(self, limits=self.limits.model_copy(update=limits))


@dataclass(frozen=True, slots=True)
class Shares:
    """The cheapest fleets of several models: the outcome of each, and the price of all."""

    variation: Fleets
    parts: Mapping[str, Outcome]
    value: float
    bound: float

    @property
    def objective(self) -> str:
        return "usd_per_hour"

    @property
    def gpus(self) -> int:
        return sum(part.fleet.gpus for part in self.parts.values())


class SharedResolver(Resolving[Fleets, Shares]):
    """Solves variations of several models that share an inventory.

    seconds, referee   as of `Resolving`; time is counted once `base` is found
    """

    def __init__(
        self,
        joint: Joint,
        tables: Mapping[str, CostTable],
        *,
        seconds: float | None = None,
        progress: Callable[[str], None] | None = None,
        referee: Referee | None = None,
    ) -> None:
        super().__init__(seconds, progress, referee)
        self.single = {
            name: Resolver(request, tables[name], progress=progress)
            for name, request in joint.requests.items()
        }
        models = {name: resolver.start for name, resolver in self.single.items()}
        self.start = Fleets(models, joint.limits)

    @cached_property
    def base(self) -> Shares | None:
        """The fleet as it stands."""
        found = self._solve(self.start)
        if found is not None:
            for name, part in found.parts.items():
                self.single[name].settle(part.search, part.fleet)
        self._known[self.start.key()] = found
        self.begin()
        return found

    @property
    def restricted(self) -> bool:
        return any(resolver.restricted for resolver in self.single.values())

    def _solve(self, variation: Fleets) -> Shares | None:
        if not variation.models:
            return Shares(variation, {}, 0.0, 0.0)
        searches = []
        for name, one in variation.models.items():
            search = self.single[name].search(one)
            if search is None:
                return None
            searches.append(search)

        def propose(mine: Sequence[Search], seconds: float | None) -> Proposal | None:
            return proposed(mine, variation.limits, seconds)

        with hardware(next(iter(variation.models.values()))):
            settled = self.settled(searches, propose)
        if settled is None:
            return None
        if variation == self.start:
            self.missed = next((one.missed for one in settled.judgements if not one.accepted), "")
        solution = settled.proposal.solution
        parts = {
            name: Outcome(one, search, shared(fleet, solution))
            for (name, one), search, fleet in zip(
                variation.models.items(), settled.searches, settled.proposal.fleets, strict=True
            )
        }
        return Shares(variation, parts, solution.value, solution.bound)
