"""Techniques besides shapes and formats: speculative decoding as requests, plans and engines have it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from planc.cost_model.speculative import Speculation
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
