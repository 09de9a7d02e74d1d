"""Which replica takes the next request: decided by playing the found fleet behind each kind of router.

Where nothing tells routers apart, requests go to the replica with the fewest open ones for its share.

The fleet was sized for replicas that each hold whatever recurs; behind a router that heeds caches each need
hold its part only. That is stated as what the router gains, not used to take fewer replicas.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, get_args, runtime_checkable

from planc.planner.offers import Fleet
from planc.planner.plan import Policy, Routing
from planc.planner.search import Search

DEFAULT: Policy = "least_loaded"
POLICIES: tuple[Policy, ...] = get_args(Policy)
#: share by which another router has to be better than the default one
_BETTER = 0.02


@runtime_checkable
class Routes(Protocol):
    """What can play a fleet behind routers."""

    def routes(
        self, search: Search, fleet: Fleet, policies: Sequence[Policy]
    ) -> Mapping[Policy, Mapping[str, float]]:
        """Per policy `hit_rate`, `ttft_ms`, `tpot_ms`, `e2e_ms` (means), and `excess`: the largest objective
        as a multiple of its limit, at least 1."""
        ...


def decided(search: Search, fleet: Fleet, player: object = None) -> Routing | None:
    """The router of a fleet; None where a single replica takes all requests.

    player   plays the fleet; what is no `Routes` leaves the default
    """
    if sum(item.count for item in fleet.items if item.role != "decode") < 2:
        return None
    reason = _nothing_to_choose(search, fleet)
    if reason or not isinstance(player, Routes):
        return Routing(policy=DEFAULT, reason=reason or "the fleet was not simulated")
    found = {policy: dict(values) for policy, values in player.routes(search, fleet, POLICIES).items()}
    best = min(POLICIES, key=lambda policy: (found[policy]["excess"], found[policy]["e2e_ms"]))
    kept = (found[best][name] > (1 - _BETTER) * found[DEFAULT][name] for name in ("excess", "e2e_ms"))
    chosen = DEFAULT if all(kept) else best
    return Routing(policy=chosen, reason="simulated behind each router", compared=found)


def words(routing: Routing) -> str:
    """The decision and what it gains, in a sentence."""
    found = routing.compared
    if routing.policy == DEFAULT or not found:
        return f"{routing.policy}: {routing.reason}"
    mine, usual = found[routing.policy], found[DEFAULT]
    gains = (
        f"{100 * mine['hit_rate']:.3g} % of prompts found instead of {100 * usual['hit_rate']:.3g} %",
        f"mean TTFT {mine['ttft_ms']:.3g} ms instead of {usual['ttft_ms']:.3g}",
        f"mean TPOT {mine['tpot_ms']:.3g} ms instead of {usual['tpot_ms']:.3g}",
    )
    return f"{routing.policy}: {', '.join(gains)} behind {DEFAULT}"


def _nothing_to_choose(search: Search, fleet: Fleet) -> str:
    """Why the fleet is not played behind several routers; "" where it is."""
    flow = search.traffic
    if not flow.hit_rate or flow.prefix_tokens is None:
        return "every replica finds the same: the workload does not say how much recurs (prefix_tokens)"
    if flow.concurrency is not None:
        return "a closed loop"
    if any(item.role != "aggregated" for item in fleet.items):
        return "prefill and decode are apart"
    if len({item.stream.classes for item in fleet.items if item.stream is not None}) > 1:
        return "traffic classes have pools of their own"
    if any(item.candidate.shape.dp > 1 for item in fleet.items):
        return "engines share out requests among their data-parallel ranks themselves"
    if any(item.engine.reuse is not None and item.engine.reuse.offloads for item in fleet.items):
        return "caches beyond the GPU are not simulated"
    return ""
