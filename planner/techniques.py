"""Techniques besides shapes and formats as requests and plans state them: speculative decoding, and caches
that lie beyond the GPU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from planc.cost_model.offload import Reuse
from planc.cost_model.speculative import Speculation
from planc.planner.inventory import Group
from planc.planner.request import Constraints


def speculations(allowed: Constraints) -> list[Speculation]:
    """The ways of speculation that a request offers, one per number of drafted tokens."""
    return [
        Speculation(
            way.method, draft, way.acceptance_rate, way.draft_model or "", way.draft_parameters or 0.0
        )
        for way in allowed.speculative or ()
        for draft in sorted(set(way.num_speculative_tokens))
    ]


def stated(speculation: Speculation | None) -> dict[str, Any] | None:
    """As a plan's replica has it."""
    if speculation is None:
        return None
    found: dict[str, Any] = {
        "method": speculation.method,
        "num_speculative_tokens": speculation.draft,
        "acceptance_rate": speculation.acceptance,
    }
    if speculation.model:
        found["model"] = speculation.model
    if speculation.parameters:
        found["draft_parameters"] = speculation.parameters
    return found


def read(found: Mapping[str, Any] | None) -> Speculation | None:
    """What a replica of a plan states; None where nothing says how often drafts are accepted."""
    if not found or "acceptance_rate" not in found:
        return None
    return Speculation(
        found["method"],
        int(found["num_speculative_tokens"]),
        float(found["acceptance_rate"]),
        str(found.get("model", "")),
        float(found.get("draft_parameters", 0.0)),
    )


def offload(reuse: Reuse | None, group: Group, world: int) -> dict[str, Any] | None:
    """As a plan's replica has it: the share of the input tokens that it finds and the mean time to load them;
    per tier its part of the prefixes that recur, the speed at which a GPU loads them, and whether they are
    loaded or, below the break-even bandwidth, computed again. `gib` is the whole engine's."""
    if reuse is None:
        return None
    gib = {name: size * world for name, size, _ in group.stores}
    return {
        "hit_rate": reuse.hit_rate,
        "load_ms": 1e3 * reuse.load_s,
        "break_even_gbytes_s": reuse.break_even / 1e9,
        "tiers": [
            {
                "tier": part.tier.name,
                "share": part.share,
                "loaded": part.loaded,
                **({"gbytes_s": part.tier.bytes_s / 1e9} if part.tier.name in gib else {}),
                **({"gib": gib[part.tier.name]} if part.tier.name in gib else {}),
            }
            for part in reuse.held
        ],
    }
