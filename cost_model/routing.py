"""Which experts tokens go to: loads of the fullest rank under skewed routing.

Routers of trained models prefer some experts. An expert's popularity is drawn from a power law of
density x^-1.2 between 1 and 0.8 T, which is how the measured tables of routed experts were driven and what
served models come closest to (balanced routing misses serving points by up to twice the error). Where
counts of a router's own choices are given (`ExpertLoad`), they take the place of the power law, and experts
lie on ranks as `planc.cost_model.expert_placement` puts them instead of in their order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache

import numpy as np

from planc.cost_model.expert_placement import ExpertPlacement, contiguous, place_experts
from planc.cost_model.features import Array

#: exponent of the power law
SKEW = 1.2

#: rows that one expert's tokens are padded to
TILE = 16

_DRAWS = 32
_SEED = 0

#: token counts at which loads are computed; times between them are interpolated
TOKENS: Array = np.array(
    [*(1, 2, 3, 4, 6, 8, 12, 16, 24), *(2.0**i * half for i in range(5, 16) for half in (1, 1.5)), 65536]
)


@dataclass(frozen=True, slots=True, eq=False)
class Routed:
    """Loads of the fullest of `ranks` ranks at each of `TOKENS`, expected over draws of the router.

    touched   experts with a token at least
    pairs     (token, expert) pairs
    padded    pairs, each expert's rounded up to `TILE`
    """

    touched: Array
    pairs: Array
    padded: Array


@dataclass(frozen=True, slots=True, eq=False)
class ExpertLoad:
    """How often a served model's routers chose each expert, [layers, experts], in any unit.

    placed   experts are placed by these counts; False: they lie in their order
    """

    counts: Array
    placed: bool = True
    _placements: dict[tuple[int, int], tuple[ExpertPlacement, ...]] = field(default_factory=dict)

    def placements(self, ranks: int, copies: int = 0) -> tuple[ExpertPlacement, ...]:
        """Where the experts of each layer lie on so many ranks, each with so many slots for second copies."""
        if (ranks, copies) not in self._placements:
            self._placements[ranks, copies] = tuple(
                place_experts(layer, ranks, copies) if self.placed or copies else contiguous(layer, ranks)
                for layer in self.counts
            )
        return self._placements[ranks, copies]

    def imbalance(self, ranks: int, copies: int = 0) -> float:
        """The fullest rank over the mean, averaged over layers."""
        return float(np.mean([layer.imbalance for layer in self.placements(ranks, copies)]))


@cache
def routed(
    experts: int, top_k: int, ranks: int = 1, load: ExpertLoad | None = None, copies: int = 0
) -> Routed:
    """Loads for a layer of `experts`, `top_k` per token, spread whole over `ranks`: means over draws of the
    power law, or of routers whose choices were counted."""
    top_k, found = min(top_k, experts), []
    placed = () if load is None else load.placements(ranks, copies)
    for tokens in TOKENS:
        if load is None:
            counts = _counts(float(tokens), experts, top_k)
            grouped = _in_order(counts, ranks)
        else:
            grouped = _sampled(load.counts, placed, float(tokens), top_k)
        fullest = grouped[np.arange(len(grouped)), grouped.sum(axis=2).argmax(axis=1)]
        tiles = np.ceil(fullest / TILE) * TILE
        found.append(((fullest > 0).sum(axis=1).mean(), fullest.sum(axis=1).mean(), tiles.sum(axis=1).mean()))
    touched, pairs, rows = np.array(found).T
    return Routed(touched, pairs, rows)


def _in_order(counts: Array, ranks: int) -> Array:
    """[draws, ranks, slots]: experts in their order; where they do not divide, the last ranks have fewer."""
    draws, experts = counts.shape
    share = -(-experts // ranks)
    padded = np.zeros((draws, share * ranks))
    padded[:, :experts] = counts
    found: Array = padded.reshape(draws, ranks, share)
    return found


def _sampled(popularity: Array, placed: Sequence[ExpertPlacement], tokens: float, top_k: int) -> Array:
    """[draws, ranks, slots]: routers draw experts by their popularity; every layer is drawn from in turn."""
    expected = np.minimum(top_k * popularity / popularity.sum(axis=1, keepdims=True), 1.0)
    shares = expected / expected.sum(axis=1, keepdims=True)
    rng, found = np.random.default_rng(_SEED), []
    for draw in range(max(_DRAWS, len(popularity))):
        layer = draw % len(popularity)
        counts = np.minimum(rng.multinomial(round(tokens * top_k), shares[layer]), tokens)
        each = np.ceil(counts / placed[layer].copies)  # copies share an expert's tokens
        found.append(each[placed[layer].experts])
    return np.array(found, dtype=np.float64)


def _counts(tokens: float, experts: int, top_k: int) -> Array:
    """Tokens of each expert under the power law, [draws, experts]."""
    uniform = np.random.default_rng(_SEED).random((_DRAWS, experts))
    low, high = (1.0, max(0.8 * tokens, 1.0 + 1e-6)) if tokens * top_k > experts else (0.01, 2.0)
    power = 1.0 - SKEW
    popularity = ((high**power - low**power) * uniform + low**power) ** (1.0 / power)
    return _dealt(popularity, tokens, top_k)


def _dealt(popularity: Array, tokens: float, top_k: int) -> Array:
    """Tokens of each expert, [draws, experts]: whole numbers, none above tokens, of sum tokens * top_k."""
    counts = popularity / popularity.sum(axis=1, keepdims=True) * (tokens * top_k)
    for _ in range(4):  # a token takes an expert once: what is too much goes to the others
        counts = np.minimum(counts, tokens)
        room = np.where(counts < tokens, counts, 0.0)
        short = tokens * top_k - counts.sum(axis=1, keepdims=True)
        counts = counts + short * room / np.maximum(room.sum(axis=1, keepdims=True), 1e-30)
    counts = np.minimum(counts, tokens)
    whole = np.floor(counts + 1e-9)
    left = np.rint(tokens * top_k - whole.sum(axis=1, keepdims=True))
    order = np.argsort(np.argsort(whole - counts, axis=1), axis=1)  # largest remainders first
    found: Array = whole + (order < left)
    return found
