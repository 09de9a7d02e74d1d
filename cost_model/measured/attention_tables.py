"""What the attention modules share: the ideal that tables are relative to, and the choice of a table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from planc.cost_model.features import Array
from planc.cost_model.kernels import COMPUTE, LAUNCH, MEMORY, Attention
from planc.cost_model.profile import Grid, Profile, Table

#: whose kernels stand in for an engine without a table, nearest first
_KIN = {
    "vllm": ("vllm", "sglang", "trtllm"),
    "sglang": ("sglang", "vllm", "trtllm"),
    "trtllm": ("trtllm", "sglang", "vllm"),
}


@dataclass(frozen=True, slots=True)
class Loads:
    """What one kernel does in N steps, [N] each; fields as in `AttentionLoad`."""

    flops: Array
    kv: Array
    acts: Array
    tokens: Array
    sequences: Array
    context: Array


#: seconds [N], and what bounds them
Price = Callable[[Loads], tuple[Array, npt.NDArray[np.int8]]]


@dataclass(frozen=True, slots=True)
class Ideal:
    """Seconds that a table's values are relative to:
    launch + max(flops / peak, cached / bandwidth) + new / bandwidth.

    cached   bytes of keys and values (or weights) that are read again and again
    new      bytes of queries, results, and keys and values appended; another kernel may move them
    """

    flops_s: float
    bytes_s: float
    launch_s: float

    @staticmethod
    def of(table: Table) -> Ideal:
        known = table.info.ideal
        return Ideal(known["flops_s"], known["bytes_s"], known["launch_s"])

    def seconds(self, flops: Array, cached: Array, new: Array) -> Array:
        work = np.maximum(flops / self.flops_s, cached / self.bytes_s)
        found: Array = self.launch_s + work + new / self.bytes_s
        return found

    def bound(self, flops: Array, cached: Array, new: Array) -> npt.NDArray[np.int8]:
        compute, memory = flops / self.flops_s, cached / self.bytes_s
        found = np.where(compute > memory, COMPUTE, MEMORY)
        short = np.maximum(compute, memory) + new / self.bytes_s < self.launch_s
        return np.where(short, LAUNCH, found).astype(np.int8)


def pairs_of(spec: Attention, load: Loads) -> Array:
    """(query, key) pairs of all sequences: what is left of the operations per pair."""
    keys = load.kv / spec.key_width - load.tokens
    rest = load.flops - spec.key_flops * keys - spec.token_flops * load.tokens
    found: Array = np.maximum(rest / spec.pair_flops, load.tokens)
    return found


def nearest(
    profile: Profile,
    engine: str,
    distance: Callable[[Table], Sequence[float]],
    **key: str | float | int,
) -> Table | None:
    """Of the tables with these key items the engine's own, else its nearest kin's; then the least distant."""
    kin = _KIN.get(engine, ())

    def order(table: Table) -> tuple[float, ...]:
        theirs = str(table.info.key["engine"])
        return (0 if theirs == engine else kin.index(theirs) if theirs in kin else len(kin), *distance(table))

    return min(profile.find(**key), key=order, default=None)


def sliced(table: Table, third: float) -> Grid:
    """The first two axes of a table at one value of the third."""
    one, two, last = table.axes
    position = float(Grid((last,), np.arange(last.size, dtype=np.float64)).at(third))
    low = int(position)
    values = table.values[:, :, low] * (1 - (position - low))
    if position > low:
        values = values + table.values[:, :, low + 1] * (position - low)
    return Grid((one, two), np.ascontiguousarray(values))
