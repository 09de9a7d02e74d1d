"""Which experts tokens go to: loads of the fullest rank under skewed routing.

Routers of trained models prefer some experts. An expert's popularity is drawn from a power law of
density x^-1.2 between 1 and 0.8 T, which is how the measured tables of routed experts were driven and what
served models come closest to (balanced routing misses serving points by up to twice the error).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np

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


@cache
def routed(experts: int, top_k: int, ranks: int = 1) -> Routed:
    """Loads for a layer of `experts`, `top_k` per token, spread whole over `ranks`."""
    found = []
    for tokens in TOKENS:
        counts = _counts(float(tokens), experts, min(top_k, experts))
        share = -(-experts // ranks)
        padded = np.zeros((_DRAWS, share * ranks))
        padded[:, :experts] = counts
        grouped = padded.reshape(_DRAWS, ranks, share)
        fullest = grouped[np.arange(_DRAWS), grouped.sum(axis=2).argmax(axis=1)]
        tiles = np.ceil(fullest / TILE) * TILE
        found.append(((fullest > 0).sum(axis=1).mean(), fullest.sum(axis=1).mean(), tiles.sum(axis=1).mean()))
    touched, pairs, rows = np.array(found).T
    return Routed(touched, pairs, rows)


def _counts(tokens: float, experts: int, top_k: int) -> Array:
    """Tokens of each expert, [draws, experts]: whole numbers, none above tokens, of sum tokens * top_k."""
    uniform = np.random.default_rng(_SEED).random((_DRAWS, experts))
    low, high = (1.0, max(0.8 * tokens, 1.0 + 1e-6)) if tokens * top_k > experts else (0.01, 2.0)
    power = 1.0 - SKEW
    popularity = ((high**power - low**power) * uniform + low**power) ** (1.0 / power)
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
