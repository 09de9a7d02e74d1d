"""Work: what an op costs, as linear expressions over the features of one engine step.

Torch-free, so that the search reads it from a cached table. An `Amount` is a sparse linear
expression `sum coefficient * feature`. The features of a step (one model forward over a
batch of sequences, query lengths q_i, context lengths c_i including the new tokens):

    "1"        constant
    "T"        tokens in the step, sum q_i
    "S"        sequences in the step (rows of logits)
    "P:<span>" attended (query, key) pairs, sum over queries of the keys each one sees
    "K:<span>" cached tokens read at least once, sum over sequences

and a span says how far attention reaches:

    full       causal, everything before     w4096   sliding window of 4096 tokens
    both       not causal (encoders)         c8192   chunks of 8192 tokens (Llama 4)
    k2048      at most 2048 chosen tokens (sparse attention with an indexer)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

Family = Literal[
    "gemm",  # dense matrix product, weight stationary
    "grouped_gemm",  # routed experts
    "attention",  # softmax attention over a cache or a sequence
    "recurrence",  # linear attention / state space scan with a state per sequence
    "elementwise",  # pointwise, norms, rotary, copies that move memory
    "gather",  # embedding look-ups
    "link",  # a collective: `reads` elements leave the rank, `writes` arrive; dims: ranks
    "view",  # free: changes no byte
    "generic",  # ATen that no op declares: bytes of its operands, FLOPs counted as zero
]


@dataclass(frozen=True, slots=True)
class Amount:
    """A linear expression over step features, e.g. `Amount({"T": 8192.0})`. Immutable."""

    terms: Mapping[str, float] = field(default_factory=dict)

    @staticmethod
    def of(**terms: float) -> Amount:
        return Amount({k: float(v) for k, v in terms.items() if v})

    def __add__(self, other: Amount) -> Amount:
        out = dict(self.terms)
        for name, value in other.terms.items():
            out[name] = out.get(name, 0.0) + value
        return Amount({k: v for k, v in out.items() if v})

    def __mul__(self, factor: float) -> Amount:
        return Amount({k: v * factor for k, v in self.terms.items() if v * factor})

    __rmul__ = __mul__

    def __bool__(self) -> bool:
        return bool(self.terms)

    def at(self, features: Mapping[str, float]) -> float:
        """Value for one step; a missing feature is an error, never zero."""
        return sum(c * (1.0 if name == "1" else features[name]) for name, c in self.terms.items())

    def features(self) -> set[str]:
        return set(self.terms) - {"1"}


NONE = Amount()


def total(amounts: Iterable[Amount]) -> Amount:
    out = NONE
    for amount in amounts:
        out = out + amount
    return out


@dataclass(frozen=True, slots=True)
class Work:
    """What one call of an op does in one step, before any sharding, in elements, not bytes.

    Formats turn elements into bytes later, so one row serves every format.

    flops      floating-point operations, a multiply-add counted as 2
    weights    parameter elements read (for routed experts: of ALL experts; the cost model
               scales by the share that T tokens touch, from dims experts/top_k)
    reads      activation elements read         writes      activation elements written
    kv_reads   cache elements read              kv_writes   cache elements appended
    dims       the family's own shape facts:
                 gemm          k, n
                 grouped_gemm  experts, top_k, k, n (n of the first product), matrices
                 attention     q_heads, kv_heads, qk_dim, v_dim, latent (1 for MLA caches)
                 recurrence    heads, state_elements (per sequence, fp32)
    """

    family: Family
    flops: Amount = NONE
    weights: int = 0
    reads: Amount = NONE
    writes: Amount = NONE
    kv_reads: Amount = NONE
    kv_writes: Amount = NONE
    dims: Mapping[str, int] = field(default_factory=dict)
