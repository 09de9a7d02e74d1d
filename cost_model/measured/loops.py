"""What a benchmark's loop finds in the L2 cache, and a model's step does not.

A kernel timed over and over reads the same weights, or keys and values, each time. While they fit the L2
cache they come from there, which on GPUs with GDDR memory is far faster (L40S: 64 MiB of experts at twice
the bandwidth of memory); a little above its size each run evicts what the next one needs. Layers of a model
evict each other always. So rows are compared with the time that the loop's bytes take, and prices are made
with that of memory. Beside HBM no difference shows in products and attention, whose SMs take no more from
the cache; it does in recurrences, which stream their state.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from planc.cost_model.catalogue import Gpu
from planc.cost_model.efficiency import efficiencies
from planc.cost_model.features import Array

#: bytes per clock that one SM's loads take from L2 in decode attention and products of few rows
_BYTES_PER_CLOCK = 8.0
#: bytes, as shares of the L2 cache, up to which a loop finds all of them there, and from which none
_ALL, _NONE = 0.8, 1.1


@dataclass(frozen=True, slots=True)
class Loop:
    """Bytes/s of memory and of the L2 cache, and the bytes that it holds."""

    bytes_s: float
    near_bytes_s: float
    l2_bytes: float

    @staticmethod
    def on(gpu: Gpu, per_clock: float = _BYTES_PER_CLOCK, passes: float = 1.0) -> Loop:
        """Of a kernel whose bytes count so many passes over what the cache holds."""
        near = per_clock * gpu.sm_count * gpu.clock_mhz * 1e6
        return Loop(gpu.memory_bytes_s, max(near, gpu.memory_bytes_s), passes * gpu.l2_mib * 1024**2)

    @staticmethod
    def updating(gpu: Gpu) -> Loop:
        """Of a kernel that streams a state, reading and writing it as pointwise kernels do."""
        return Loop.on(gpu, efficiencies().on("cache_bytes_per_clock", gpu), 2.0)

    def seconds(self, nbytes: Array) -> Array:
        """That one run takes to read `nbytes` again, at the peak rates."""
        far, near = 1.0 / self.bytes_s, 1.0 / self.near_bytes_s
        missed = np.clip((nbytes / self.l2_bytes - _ALL) / (_NONE - _ALL), 0.0, 1.0)
        return np.asarray(nbytes * (near + missed * (far - near)))
