"""Which experts tokens go to: what the fullest rank gets.

Two laws. In service a router prefers some experts whatever the batch: popularity is spread log-normally over
them (`usual`), or as counts of a router's own choices say (`ExpertLoad`). Two spreads stand for all models.
Routers that training balances by a loss: the fullest of four ranks carries 1.35 times the mean, as measured
step by step in Qwen3.6-35B-A3B with 256 experts, 8 a token (ai-dynamo/aiconfigurator,
EXPERT_ROUTING_CAPTURE.md, Apache-2.0). Routers with a bias that is moved until experts are chosen alike
(DeepSeek-V3, arXiv 2412.19437) spread less between unrelated sequences, by a number chosen on serving points
of two such models, but among a prompt's tokens as others do. Every token chooses by itself, so that a step
touches

    sum over experts of 1 - (1 - probability)^tokens

of them. The tables of routed experts were timed under another law, whose skew depends on the batch: an
expert's tokens are drawn from a power law of density x^-1.2 between 1 and 0.8 T, or between 0.01 and 2 where
there are fewer pairs than experts. On one side of that border it touches half as many experts again as on the
other, which no router does. Rows are compared with the formula under the law that they were timed under, and
prices are made under the other.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from statistics import NormalDist

import numpy as np

from planc.cost_model.expert_placement import ExpertPlacement, contiguous, place_experts
from planc.cost_model.features import Array

#: standard deviation of the logarithm of experts' popularity in service; the same where a bias balances them
SPREAD, BALANCED = 1.5, 1.0

#: exponent of the power law that tables were timed under
_TIMED = 1.2

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
    """The most that one of `ranks` ranks has at each of `TOKENS`, expected over draws of the router.

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

    placed    experts are placed by these counts; False: they lie in their order
    prompts   the same among a prompt's tokens, which are alike: what the fullest rank gets follows it, while
              the experts that a step touches follow `counts`; None: as `counts`
    """

    counts: Array
    placed: bool = True
    prompts: Array | None = None
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


def usual(experts: int, *, balanced: bool = False) -> ExpertLoad:
    """Quantiles of the log-normal law, over experts that lie in another order in each layer; the same object
    for the same arguments."""
    return _usual(experts, balanced)


@cache
def _usual(experts: int, balanced: bool) -> ExpertLoad:
    counts = _spread(experts, BALANCED if balanced else SPREAD)
    return ExpertLoad(counts, placed=False, prompts=_spread(experts, SPREAD) if balanced else None)


def _spread(experts: int, spread: float) -> Array:
    """Popularity of experts, [layers, experts]."""
    ranks = (np.arange(experts) + 0.5) / experts
    popularity = np.exp(spread * np.array([NormalDist().inv_cdf(rank) for rank in ranks]))
    rng = np.random.default_rng(_SEED)
    return np.stack([rng.permutation(popularity) for _ in range(_DRAWS)])


@cache
def routed(
    experts: int, top_k: int, ranks: int = 1, load: ExpertLoad | None = None, copies: int = 0
) -> Routed:
    """Loads for a layer of `experts`, `top_k` per token, spread whole over `ranks`.

    load   of served routers; None: the law that tables were timed under, on the rank with most pairs
    """
    top_k, found = min(top_k, experts), []
    laws = () if load is None else (load.counts,) if load.prompts is None else (load.counts, load.prompts)
    chosen = [_probabilities(counts, top_k) for counts in laws]
    for tokens in TOKENS:
        if load is None:
            counts = _in_order(_counts(float(tokens), experts, top_k), ranks)
            fullest = counts.sum(axis=2).argmax(axis=1)
            spread = alike = counts[np.arange(len(counts)), fullest][:, None]
        else:
            drawn = [_on_ranks(load, _sampled(law, float(tokens)), ranks, copies) for law in chosen]
            spread, alike = drawn[0], drawn[-1]
        tiles = np.ceil(alike / TILE) * TILE
        parts = ((spread > 0).sum(axis=2), alike.sum(axis=2), tiles.sum(axis=2))
        found.append([part.max(axis=1).mean() for part in parts])
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


def _on_ranks(load: ExpertLoad, counts: Array, ranks: int, copies: int) -> Array:
    """[draws, ranks, slots] of tokens by expert, [draws, experts]; copies of an expert share its tokens."""
    if not load.placed and not copies:
        return _in_order(counts, ranks)
    placements = load.placements(ranks, copies)
    placed = [placements[draw % len(placements)] for draw in range(len(counts))]
    return np.array([np.ceil(one / at.copies)[at.experts] for one, at in zip(counts, placed, strict=True)])


def _sampled(chosen: Array, tokens: float) -> Array:
    """Tokens of each expert, [draws, experts], by the probabilities of layers in turn."""
    rng = np.random.default_rng(_SEED)
    layers = np.arange(max(2 * _DRAWS, len(chosen))) % len(chosen)
    return rng.binomial(round(tokens), chosen[layers]).astype(np.float64)


def _probabilities(popularity: Array, top_k: int) -> Array:
    """How likely a token takes each expert, [layers, experts]: in proportion to popularity, at most 1, top_k
    over all."""
    chosen = np.zeros_like(popularity)
    for _ in range(top_k):  # an expert that every token takes leaves the rest to the others
        sure = chosen >= 1.0
        rest = np.where(sure, 0.0, popularity)
        left = top_k - sure.sum(axis=1, keepdims=True)
        share = rest / np.maximum(rest.sum(axis=1, keepdims=True), 1e-30)
        chosen = np.where(sure, 1.0, np.minimum(share * left, 1.0))
    return chosen


def _counts(tokens: float, experts: int, top_k: int) -> Array:
    """Tokens of each expert under the law of tables, [draws, experts]."""
    uniform = np.random.default_rng(_SEED).random((_DRAWS, experts))
    low, high = (1.0, max(0.8 * tokens, 1.0 + 1e-6)) if tokens * top_k > experts else (0.01, 2.0)
    power = 1.0 - _TIMED
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
