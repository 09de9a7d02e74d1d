"""Physics of softmax attention: seconds of one kernel from its work and a machine's peaks.

A product per (query, key) pair on tensor cores and one exponential on the special-function units follow
each other; kernels overlap them in part (FlashAttention-3, arXiv 2407.08608, section 3.2, and -4), so both
count. A prompt's queries run in tiles over the SMs: a tile multiplies whole tiles of keys, those that its
mask hides on the diagonal too, and the last tiles to run leave SMs idle for one loop over the keys. Latencies
are half instructions, which take as many cycles on any GPU, and half waits for memory, which do not follow
the clock; they are stated in cycles of an H100. Work on the SMs counts in their own cycles.

Which constants are a kernel's own and which every kernel's: `planc.cost_model.attention_kernels`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

import numpy as np

from planc.cost_model.features import Array

#: query rows of a tile, and of the smallest: an instruction of the tensor cores takes no fewer
TILE, SMALLEST = 128.0, 16.0
#: contexts of decode below it cost the same
_SHORT = 16.0
#: clock at which latencies are stated, Hz
_CLOCK = 1.83e9


@dataclass(frozen=True, slots=True)
class Constants:
    """Named efficiencies `attention_<field>` of `data/efficiencies.yaml`.

    decode_kcycles, prefill_kcycles   start to end of a kernel with next to no work
    split_kcycles                     per doubling of the context in decode: more splits to combine
    ..._narrow_kcycles                with an 8-bit cache: queries are scaled, keys widened
    decode_block_kcycles              of a (sequence, KV head) on one SM besides its bytes
    prefill_block_kcycles             of a query tile on one SM besides its loop
    decode_memory, prefill_memory     shares of memory peak
    decode_peak, prefill_peak         shares of the bf16 tensor peak of the products alone
    narrow_gain                       how much faster prefill's products are in 8 bits
    overlap                           exponent with which products and exponentials add up; 1: one by one
    """

    decode_kcycles: float
    prefill_kcycles: float
    split_kcycles: float
    decode_narrow_kcycles: float
    prefill_narrow_kcycles: float
    decode_block_kcycles: float
    prefill_block_kcycles: float
    decode_memory: float
    prefill_memory: float
    decode_peak: float
    prefill_peak: float
    narrow_gain: float
    overlap: float

    @staticmethod
    def names() -> tuple[str, ...]:
        return tuple(field.name for field in fields(Constants))

    @staticmethod
    def of(values: Mapping[str, float]) -> Constants:
        return Constants(**{name: values[name] for name in Constants.names()})


@dataclass(frozen=True, slots=True)
class Machine:
    """Rates per second; each a number, or an array that broadcasts against the work.

    exp_per_cycle   exponentials per SM and clock cycle
    cache           bytes of the last-level cache that a kernel finds its neighbours' output in
    cache_bytes_s   at which it moves them
    """

    flops_s: float | Array
    bytes_s: float | Array
    sms: float | Array
    cycles_s: float | Array
    exp_per_cycle: float | Array
    cache: float | Array
    cache_bytes_s: float | Array


@dataclass(frozen=True, slots=True)
class Work:
    """flops, exps        operations of the products, and exponentials
    cached, new        bytes of keys and values that queries read; of queries, results, what is appended
    blocks             (sequence, KV head) pairs in decode, query tiles in prefill
    reach              keys that a query sees, in the mean
    loop               how much longer than the mean tile's the longest loop over keys is
    narrow             1 where the cache has 8 bits, else 0
    narrow_products    1 where prefill multiplies in 8 bits, else 0
    """

    flops: Array
    exps: Array
    cached: Array
    new: Array
    blocks: Array
    reach: Array
    loop: Array
    narrow: float | Array
    narrow_products: float | Array

    def tiled(self, queries: Array, before: Array | float, heads: Array) -> Work:
        """The same prompt's work in tiles: with the pairs that a tile's mask hides and the rows that pad it.

        queries   of a sequence, after `before` tokens in its cache; a window is where they see fewer keys
                  than a causal mask shows
        heads     of all sequences
        """
        rows = np.clip(np.exp2(np.ceil(np.log2(np.maximum(queries, 1.0)))), SMALLEST, TILE)
        count = np.ceil(queries / rows)
        every = before + count * rows
        windowed = self.reach < 0.99 * (before + (queries + 1) / 2)
        visited = np.minimum(self.reach + np.where(windowed, rows, rows / 2), every)
        loop = np.where(windowed, np.minimum(self.reach + rows, every), every) / visited
        more = count * rows * visited / np.maximum(queries * self.reach, 1.0)
        return replace(self, flops=self.flops * more, exps=self.exps * more, blocks=heads * count, loop=loop)


def decode_seconds(known: Constants, on: Machine, work: Work) -> tuple[Array, Array, Array]:
    """Seconds in all, and those that its operations and its bytes take."""
    compute = _compute(known, on, work, known.decode_peak)
    memory = work.cached / (known.decode_memory * on.bytes_s)
    moved = work.new / (known.decode_memory * on.bytes_s)
    splits = known.split_kcycles * np.log2(np.maximum(work.reach / _SHORT, 1.0))
    start = _latency(on, known.decode_kcycles + splits + known.decode_narrow_kcycles * work.narrow)
    blocks = known.decode_block_kcycles * work.blocks / on.sms * 1e3 / on.cycles_s
    return start + blocks + np.maximum(compute, memory) + moved, compute, memory + moved


def prefill_seconds(known: Constants, on: Machine, work: Work) -> tuple[Array, Array, Array]:
    """Seconds in all, and those that its operations and its bytes take."""
    peak = known.prefill_peak * np.where(work.narrow_products, known.narrow_gain, 1.0)
    compute = _compute(known, on, work, peak)
    last = compute * work.loop * on.sms / np.maximum(work.blocks, 1.0)
    tiles = work.blocks / on.sms * known.prefill_block_kcycles * 1e3 / on.cycles_s
    far = known.prefill_memory * on.bytes_s
    near = np.maximum(on.cache_bytes_s, far)
    missed = np.clip((work.cached + work.new) / on.cache - 1.0, 0.0, 1.0)
    per_byte = (1 - missed) / near + missed / far
    memory, moved = work.cached * per_byte, work.new * per_byte
    busy = np.maximum(compute + last + tiles, memory)
    start = _latency(on, known.prefill_kcycles + known.prefill_narrow_kcycles * work.narrow)
    return start + busy + moved, compute + last, memory + moved


def _compute(known: Constants, on: Machine, work: Work, peak: float | Array) -> Array:
    products = work.flops / (peak * on.flops_s)
    exponentials = work.exps / (on.exp_per_cycle * on.sms * on.cycles_s)
    found: Array = (products**known.overlap + exponentials**known.overlap) ** (1.0 / known.overlap)
    return found


def _latency(on: Machine, kcycles: float | Array) -> Array:
    found: Array = np.asarray(kcycles * 1e3 * (0.5 / on.cycles_s + 0.5 / _CLOCK))
    return found
