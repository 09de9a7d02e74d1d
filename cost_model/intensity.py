"""What one call of a kernel does: operations and the bytes it must move, whatever its seconds.

Their ratio is the arithmetic intensity of the roofline (Williams et al. 2009); operations over seconds
is what the kernel achieves.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from planc.cost_model.catalogue import Precision
from planc.cost_model.formats import fmt, product_precision
from planc.cost_model.kernels import Attention, Gemm, GroupedGemm
from planc.cost_model.rank_ops import Kernel
from planc.cost_model.routing import TOKENS, routed


@dataclass(frozen=True, slots=True)
class Done:
    """Of one call on one rank: floating-point operations, bytes to and from memory, and the units that
    the operations run on."""

    flops: float
    nbytes: float
    precision: Precision

    @property
    def intensity(self) -> float:
        """FLOP per byte; 0 for a kernel that only moves."""
        return self.flops / self.nbytes if self.nbytes else 0.0


def done(kernel: Kernel, features: Mapping[str, float]) -> Done:
    """`features` of the tokens that the kernel sees, by name.

    Every operand passes memory once: weights, what comes in, what goes out, the cache's entries. Of routed
    experts those weights that the tokens touch, on the fullest rank.
    """
    spec = kernel.spec
    if isinstance(spec, Gemm):
        rows = kernel.rows.at(features)
        weights, acts = fmt(spec.weights).bytes, fmt(spec.activations).bytes
        moved = spec.n * spec.k * weights + rows * (spec.k * acts + spec.n * spec.out_bytes)
        return Done(2.0 * rows * spec.n * spec.k, moved, product_precision(spec.weights, spec.activations))
    if isinstance(spec, GroupedGemm):
        touched, pairs = _routed(spec, kernel.rows.at(features))
        weights, acts = fmt(spec.weights).bytes, fmt(spec.activations).bytes
        through = pairs * (spec.hidden * (acts + 2.0) + spec.inner * (acts + 2.0))
        moved = touched * spec.elements / spec.experts * weights + through
        return Done(pairs * spec.flops_per_pair, moved, product_precision(spec.weights, spec.activations))
    flops = kernel.flops.at(features)
    if isinstance(spec, Attention):
        acts = kernel.reads.at(features) + kernel.writes.at(features)
        moved = kernel.kv.at(features) * spec.kv_bytes + acts * spec.act_bytes + spec.weight_bytes
        return Done(flops, moved, "bf16")
    return Done(flops, kernel.nbytes.at(features), "fp32")


def _routed(spec: GroupedGemm, tokens: float) -> tuple[float, float]:
    """(experts touched, pairs) of the fullest rank, between the points of `routing.TOKENS`."""
    load = routed(spec.total_experts, spec.top_k, spec.ranks, spec.load, spec.copies)
    at = np.log(np.clip(tokens, 1.0, TOKENS[-1]))
    beyond = max(tokens / TOKENS[-1], 1.0)
    touched = float(np.interp(at, np.log(TOKENS), load.touched))
    pairs = float(np.exp(np.interp(at, np.log(TOKENS), np.log(load.pairs)))) * beyond
    return (touched, pairs) if tokens > 0 else (0.0, 0.0)
