"""Prefix caches beyond the GPU: what of the reusable tokens each tier holds, and whether it pays to load it.

Every tier keeps what the faster ones keep and more (blocks are written through), least recently used out
first. With W tokens of prefixes that recur, all equally often, a tier that has room for C of them holds
min(C / W, 1): what a faster tier does not hold comes from the next one. A token is loaded where that takes
less time than computing it,

    kv bytes per token / bandwidth < prefill seconds per token,

that is above the break-even bandwidth kv bytes / prefill seconds (Mooncake, FAST 2025, section 3 compares the
same two); else it is computed again, as if it were not there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any, Literal

import yaml

Name = Literal["gpu", "host", "nvme", "store"]


@dataclass(frozen=True, slots=True)
class Tier:
    """Where blocks of an engine's cache may lie.

    tokens    that it has room for
    bytes_s   at which one GPU loads its part of a token's cache; infinite where it lies there
    """

    name: Name
    tokens: float
    bytes_s: float = float("inf")

    @property
    def start_s(self) -> float:
        return 0.0 if self.name == "gpu" else constants()["start_ms"][self.name] * 1e-3


@dataclass(frozen=True, slots=True)
class Held:
    """What a tier holds that no faster one does: `share` of the reusable tokens; `loaded`, or recomputed."""

    tier: Tier
    share: float
    loaded: bool


@dataclass(frozen=True, slots=True)
class Reuse:
    """What an engine finds of its prompts.

    hit_rate     share of the input tokens that it need not compute
    load_s       mean seconds that loading adds to a request's TTFT
    break_even   bytes/s of one GPU from which loading is faster than computing
    """

    hit_rate: float
    load_s: float
    break_even: float
    held: tuple[Held, ...]

    @property
    def offloads(self) -> bool:
        """Whether anything is loaded from outside the GPU."""
        return any(part.loaded and part.tier.name != "gpu" for part in self.held)


def break_even_bytes_s(kv_bytes_per_token: float, prefill_s_per_token: float) -> float:
    """Bandwidth from which loading a token's cache is faster than computing the token."""
    return kv_bytes_per_token / prefill_s_per_token


def reuse(
    potential: float,
    prompt: float,
    working_set: float,
    tiers: Sequence[Tier],
    kv_bytes_per_token: float,
    prefill_s_per_token: float,
) -> Reuse:
    """What an engine finds of prompts of `prompt` tokens, of which the share `potential` was seen before.

    working_set   tokens of all prefixes that recur
    tiers         the fastest first

    The bytes of a token are those on the GPU that has most of them.
    """
    even = break_even_bytes_s(kv_bytes_per_token, prefill_s_per_token)
    held: list[Held] = []
    reached = found = load_s = 0.0
    for tier in tiers:
        share = max(min(tier.tokens / working_set, 1.0) - reached, 0.0)
        reached += share
        tokens = share * potential * prompt
        # the start is a request's, so that short prefixes may not be worth it
        seconds = kv_bytes_per_token / tier.bytes_s + tier.start_s / max(potential * prompt, 1.0)
        loaded = share > 0 and seconds < prefill_s_per_token
        held.append(Held(tier, share, loaded))
        if loaded:
            found += share
            load_s += tokens * seconds
    return Reuse(potential * found, load_s, even, tuple(held))


@cache
def constants() -> dict[str, Any]:
    """`data/offload.yaml`."""
    text = resources.files("planc.cost_model.data").joinpath("offload.yaml").read_text(encoding="utf-8")
    found: dict[str, Any] = yaml.safe_load(text)
    return found
