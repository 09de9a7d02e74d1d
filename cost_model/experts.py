"""What routed experts cost: one formula, whose constants are one implementation's.

seconds = launch + expert * local experts + touched * (start + weight bytes / (memory * bandwidth))
          + padded rows * flops / (compute * peak)
          + 2 bytes * (T hidden m_T + pairs (hidden m_h + inner m_i)
                       + pairs of other ranks (hidden + inner) m_o) / bandwidth

Streaming of weights and arithmetic add up rather than overlap, which is how all engines' tables behave:
an expert's tile waits for its weights. Loads are those of the fullest rank (`planc.cost_model.routing`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np

from planc.cost_model.features import Array
from planc.cost_model.kernels import COMPUTE, LAUNCH, MEMORY, GroupedGemm, Times
from planc.cost_model.routing import TOKENS, routed

_LOG_TOKENS = np.log(TOKENS)


@dataclass(frozen=True, slots=True)
class ExpertKernel:
    """Constants of one implementation.

    launch_us       sort, products and combine of a step without work
    expert_us       for each of the rank's experts, touched or not
    touched_us      for each expert with tokens, besides its weights
    token_moves     how often a token's hidden vector passes memory, as 2 bytes per element
    hidden_moves    the same of a (token, expert) pair's hidden vector, and
    inner_moves     of what lies between the products
    other_moves     the same of both vectors of a pair whose expert lies on another rank: Triton's buffers
                    hold all pairs, and what is not this rank's is zeroed, activated and summed with the rest
    memory          share of the peak bandwidth at which weights stream
    compute         share of the peak of arithmetic that padded rows reach
    """

    launch_us: float
    expert_us: float
    touched_us: float
    token_moves: float
    hidden_moves: float
    inner_moves: float
    other_moves: float
    memory: float
    compute: float

    @staticmethod
    def names() -> tuple[str, ...]:
        return tuple(item.name for item in fields(ExpertKernel))

    @property
    def factors(self) -> Array:
        """What `terms` are multiplied by: the constants, and of the two shares their inverses."""
        values = np.array([getattr(self, name) for name in self.names()])
        values[-2:] = 1.0 / values[-2:]
        return values

    def at_clock(self, slower: float) -> ExpertKernel:
        """On a GPU whose clock is so many times slower: starts take as many cycles."""
        starts = {name: getattr(self, name) * slower for name in STARTS}
        return replace(self, **starts)


#: constants that stand for instructions rather than bytes or arithmetic; the first of `terms`
STARTS = ("launch_us", "expert_us", "touched_us")


@dataclass(frozen=True, slots=True)
class Curve:
    """Seconds and what bounds them at each of `routing.TOKENS`."""

    seconds: Array
    bound: Array


def terms(spec: GroupedGemm, weight_bytes: float, bytes_s: float, flops_s: float) -> Array:
    """Seconds per unit of each constant, [constants, tokens]; weight_bytes is per element with its scales."""
    load = routed(spec.total_experts, spec.top_k, spec.ranks, spec.load, spec.copies)
    micro, one = 1e-6, np.ones(TOKENS.size)
    return np.stack(
        [
            micro * one,
            micro * spec.experts * one,
            micro * load.touched,
            TOKENS * (2.0 * spec.hidden / bytes_s),
            load.pairs * (2.0 * spec.hidden / bytes_s),
            load.pairs * (2.0 * spec.inner / bytes_s),
            np.maximum(TOKENS * min(spec.top_k, spec.total_experts) - load.pairs, 0.0)
            * (2.0 * (spec.hidden + spec.inner) / bytes_s),
            load.touched * (spec.elements / spec.experts * weight_bytes / bytes_s),
            load.padded * (spec.flops_per_pair / flops_s),
        ]
    )


def curve(
    spec: GroupedGemm, kernel: ExpertKernel, weight_bytes: float, bytes_s: float, flops_s: float
) -> Curve:
    """The formula for one rank's experts; arguments as in `terms`."""
    parts = terms(spec, weight_bytes, bytes_s, flops_s) * kernel.factors[:, None]
    fixed, memory, compute = parts[:2].sum(axis=0), parts[2:-1].sum(axis=0), parts[-1]
    bound = np.where(compute > memory, COMPUTE, MEMORY)
    return Curve(fixed + memory + compute, np.where(memory + compute < fixed, LAUNCH, bound))


def stack(curves: Sequence[Curve]) -> Callable[[Array], Times]:
    """Prices tokens [R, N] between the curves' points, linear in logarithms, in proportion beyond."""
    logs = [np.log(each.seconds) for each in curves]

    def price(tokens: Array) -> Times:
        at = np.log(np.clip(tokens, 1.0, TOKENS[-1]))
        beyond = np.maximum(tokens / TOKENS[-1], 1.0)
        seconds = np.stack([np.interp(row, _LOG_TOKENS, log) for row, log in zip(at, logs, strict=True)])
        nearest = np.clip(np.searchsorted(_LOG_TOKENS, at), 0, TOKENS.size - 1)
        bound = np.stack([each.bound[row] for row, each in zip(nearest, curves, strict=True)])
        return Times(np.where(tokens > 0, np.exp(seconds) * beyond, 0.0), bound.astype(np.int8))

    return price
