"""Physics of softmax attention: seconds of one kernel from its work and a machine's peaks.

A product per (query, key) pair on tensor cores and one exponential on the special-function units follow
each other (FlashAttention-4 and -3, arXiv 2407.08608, section 3.2: their overlap is partial), so both count.
Query tiles fill the SMs; the last ones to run leave SMs idle, and a step is never shorter than one tile's
loop over its keys. Latencies are in clock cycles, which carry over between GPUs better than microseconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

import numpy as np

from planc.cost_model.features import Array

#: query rows of a tile
TILE = 128.0
#: contexts of decode below it cost the same
_SHORT = 16.0


@dataclass(frozen=True, slots=True)
class Constants:
    """Named efficiencies `attention_<field>` of `data/efficiencies.yaml`.

    decode_kcycles, prefill_kcycles   start to end of a kernel with next to no work
    split_kcycles                     per doubling of the context in decode: more splits to combine
    decode_block_kcycles              of a (sequence, KV head) on one SM besides its bytes
    prefill_block_kcycles             of a query tile on one SM besides its loop
    decode_memory, prefill_memory     shares of memory peak
    decode_peak, prefill_peak         shares of tensor peak of the products alone
    """

    decode_kcycles: float
    prefill_kcycles: float
    split_kcycles: float
    decode_block_kcycles: float
    prefill_block_kcycles: float
    decode_memory: float
    prefill_memory: float
    decode_peak: float
    prefill_peak: float

    @staticmethod
    def names() -> tuple[str, ...]:
        return tuple(field.name for field in fields(Constants))

    @staticmethod
    def of(values: Mapping[str, float]) -> Constants:
        return Constants(**{name: values[name] for name in Constants.names()})


@dataclass(frozen=True, slots=True)
class Machine:
    """Peaks; each a number, or an array that broadcasts against the work.

    exp_per_cycle   exponentials per SM and clock cycle
    """

    flops_s: float | Array
    bytes_s: float | Array
    sms: float | Array
    cycles_s: float | Array
    exp_per_cycle: float | Array


@dataclass(frozen=True, slots=True)
class Work:
    """flops, exps        operations of the products, and exponentials
    cached, new        bytes of keys and values that queries read; of queries, results, what is appended
    blocks             (sequence, KV head) pairs in decode, query tiles in prefill
    rows               query rows of a tile
    reach, loop        keys that a query sees: in the mean, and in the longest loop
    """

    flops: Array
    exps: Array
    cached: Array
    new: Array
    blocks: Array
    rows: Array
    reach: Array
    loop: Array


def decode_seconds(known: Constants, on: Machine, work: Work) -> tuple[Array, Array, Array]:
    """Seconds in all, and those that its operations and its bytes take."""
    compute = work.flops / (known.decode_peak * on.flops_s) + _exponentials(on, work.exps)
    memory = work.cached / (known.decode_memory * on.bytes_s)
    fixed = known.decode_kcycles + known.split_kcycles * np.log2(np.maximum(work.reach / _SHORT, 1.0))
    around = (fixed + known.decode_block_kcycles * work.blocks / on.sms) * 1e3 / on.cycles_s
    moved = work.new / (known.decode_memory * on.bytes_s)
    return around + np.maximum(compute, memory) + moved, compute, memory + moved


def prefill_seconds(known: Constants, on: Machine, work: Work) -> tuple[Array, Array, Array]:
    """Seconds in all, and those that its operations and its bytes take."""
    compute = work.flops / (known.prefill_peak * on.flops_s) + _exponentials(on, work.exps)
    pairs = np.maximum(work.blocks * work.rows * work.reach, 1.0)
    loop = compute / pairs * work.rows * work.loop * on.sms
    tiles = compute + work.blocks / on.sms * known.prefill_block_kcycles * 1e3 / on.cycles_s
    memory = work.cached / (known.prefill_memory * on.bytes_s)
    moved = work.new / (known.prefill_memory * on.bytes_s)
    busy = np.maximum(np.maximum(tiles + loop / 2, loop), memory)
    return known.prefill_kcycles * 1e3 / on.cycles_s + busy + moved, np.maximum(compute, loop), memory + moved


def longest_loop(mean: Array, queries: Array, before: Array | float) -> Array:
    """Keys that the last tile of a prompt's queries visits, all [loads]: every one under a causal mask, and
    a window and its own tile's queries where the mean of what queries see falls short of that.

    mean      keys that a query sees
    queries   of a sequence; `before` are the tokens in its cache
    """
    every = before + queries
    causal = mean >= 0.99 * (before + (queries + 1) / 2)
    found: Array = np.where(causal, every, np.minimum(mean + TILE, every))
    return found


def _exponentials(on: Machine, exps: Array) -> Array:
    found: Array = exps / (on.exp_per_cycle * on.sms * on.cycles_s)
    return found
