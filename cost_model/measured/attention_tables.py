"""What the attention modules share: the ideal that tables are relative to, the choice of a table, and the
surface of times that one kernel's share of it becomes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from planc.cost_model.catalogue import Provenance
from planc.cost_model.features import Array
from planc.cost_model.kernels import Attention
from planc.cost_model.measured.loops import Loop
from planc.cost_model.profile import Grid, Profile, Table

#: whose kernels stand in for an engine without a table, nearest first
_KIN = {
    "vllm": ("vllm", "sglang", "trtllm"),
    "sglang": ("sglang", "vllm", "trtllm"),
    "trtllm": ("trtllm", "sglang", "vllm"),
}

_PER_OCTAVE = 2  # nodes of a surface; between them a + b x is off by less than 0.4 %
_OCTAVES = (26, 18)
_AHEAD = 2 * _PER_OCTAVE

#: query rows of a prefill kernel's smallest tile
TILE = 64.0
#: contexts of decode below it cost the same
SHORTEST = 16.0


@dataclass(frozen=True, slots=True)
class Loads:
    """What one kernel does in N steps, [N] each; fields as in `AttentionLoad`."""

    flops: Array
    kv: Array
    tokens: Array
    sequences: Array
    context: Array


#: seconds [N] of one kernel
Seconds = Callable[[Loads], Array]


@dataclass(frozen=True, slots=True)
class One:
    """One kernel's price, and how well founded it is."""

    seconds: Seconds
    source: Provenance


@dataclass(frozen=True, slots=True)
class Ideal:
    """Seconds that a table's values are relative to:
    launch + max(flops / peak, cached / bandwidth) + new / bandwidth.

    cached   bytes of keys and values (or weights) that are read again and again
    loop     where those lay while the table was timed, if not always in memory
    new      bytes of queries, results, and keys and values appended; another kernel may move them
    """

    flops_s: float
    bytes_s: float
    launch_s: float
    loop: Loop | None = None

    @staticmethod
    def of(table: Table) -> Ideal:
        known = table.info.ideal
        loop = (
            Loop(known["bytes_s"], known["near_bytes_s"], known["l2_bytes"]) if "l2_bytes" in known else None
        )
        return Ideal(known["flops_s"], known["bytes_s"], known["launch_s"], loop)

    def stated(self) -> dict[str, float]:
        """As `TableInfo.ideal` holds it."""
        found = {"flops_s": self.flops_s, "bytes_s": self.bytes_s, "launch_s": self.launch_s}
        if self.loop is None:
            return found
        return found | {"near_bytes_s": self.loop.near_bytes_s, "l2_bytes": self.loop.l2_bytes}

    def seconds(self, flops: Array, cached: Array, new: Array) -> Array:
        work = np.maximum(flops / self.flops_s, cached / self.bytes_s)
        found: Array = self.launch_s + work + new / self.bytes_s
        return found

    def looped(self, flops: Array, cached: Array, new: Array) -> Array:
        """Seconds in the loop that a table was timed in."""
        if self.loop is None:
            return self.seconds(flops, cached, new)
        return self.seconds(flops, self.loop.seconds(cached) * self.bytes_s, new)


@dataclass(frozen=True, slots=True, eq=False)
class Append:
    """What writing keys and values to the cache takes besides, more than where it takes least: seconds per
    token and KV head, by KV heads of a rank; empty where nothing was seen of it."""

    kv_heads: Array
    each_s: Array

    @staticmethod
    def nothing() -> Append:
        return Append(np.zeros(0), np.zeros(0))

    @staticmethod
    def of(table: Table) -> Append:
        known = table.extra
        return (
            Append(known["append_kv_heads"], known["append_s"]) if "append_s" in known else Append.nothing()
        )

    def extra(self) -> dict[str, Array]:
        """As `Table.extra` holds it."""
        return {"append_kv_heads": self.kv_heads, "append_s": self.each_s} if self.each_s.size else {}

    def at(self, kv_heads: Array | float) -> Array:
        if not self.each_s.size:
            return np.zeros(np.shape(kv_heads))
        found: Array = np.interp(np.log(kv_heads), np.log(self.kv_heads), self.each_s)
        return found


@dataclass(frozen=True, slots=True, eq=False)
class Surface:
    """Seconds over two amounts of work, from 1 and `shortest` up, that never fall while either grows."""

    log_seconds: Array
    shortest: float

    @staticmethod
    def of(seconds: Callable[[Array, Array], Array], shortest: float) -> Surface:
        """Tabulates a function of two broadcast arrays at half octaves. A node goes half-way to the least
        within two octaves more of both, and is then lifted to the greatest before it."""
        one, two = (2.0 ** (np.arange(n * _PER_OCTAVE + 1) / _PER_OCTAVE) for n in _OCTAVES)
        found = np.log(seconds(one[:, None], shortest * two[None, :]))
        ahead = np.pad(found, (0, _AHEAD), constant_values=np.inf)
        least = np.lib.stride_tricks.sliding_window_view(ahead, (_AHEAD + 1, _AHEAD + 1)).min(axis=(-2, -1))
        lifted = np.maximum.accumulate((found + least) / 2, axis=0)
        return Surface(np.maximum.accumulate(lifted, axis=1), shortest)

    def at(self, one: Array, two: Array) -> Array:
        rows, columns = self.log_seconds.shape
        x = np.clip(np.log2(np.maximum(one, 1.0)) * _PER_OCTAVE, 0, rows - 1.001)
        y = np.clip(np.log2(np.maximum(two / self.shortest, 1.0)) * _PER_OCTAVE, 0, columns - 1.001)
        i, j = x.astype(np.intp), y.astype(np.intp)
        u, v = x - i, y - j
        flat, low = self.log_seconds.reshape(-1), i * columns + j
        before = flat[low] * (1 - v) + flat[low + 1] * v
        after = flat[low + columns] * (1 - v) + flat[low + columns + 1] * v
        found: Array = np.exp(before * (1 - u) + after * u)
        return found


@dataclass(frozen=True, slots=True)
class Causal:
    """The causal prompt that a chunk of each sequence runs like: as many query tiles, as long loops.

    A chunk fills tiles of `TILE` queries. Of q queries that see m keys in the mean, m - (q + 1) / 2 lie
    before the chunk; with those twice over, the mean loop of a causal prompt is as long.
    """

    queries: Array  # of all sequences
    reach: Array  # tokens of the causal prompt
    loop: Array  # keys of the longest loop

    @staticmethod
    def of(tokens: Array, sequences: Array, seen: Array) -> Causal:
        each = tokens / sequences
        before, padded = np.maximum(seen - (each + 1) / 2, 0.0), np.maximum(each, TILE)
        return Causal(padded * sequences, padded + 2 * before, padded + before)


def pairs_of(spec: Attention, load: Loads) -> Array:
    """(query, key) pairs of all sequences: what is left of the operations per pair."""
    rest = load.flops - spec.key_flops * keys_of(spec, load) - spec.token_flops * load.tokens
    found: Array = np.maximum(rest / spec.pair_flops, load.tokens)
    return found


def keys_of(spec: Attention, load: Loads) -> Array:
    """Cached keys that all sequences read."""
    return load.kv / spec.key_width - load.tokens


def nearest(
    profile: Profile,
    engine: str,
    distance: Callable[[Table], Sequence[float]],
    **key: str | float | int,
) -> Table | None:
    """Of the tables with these key items the engine's own, else its nearest kin's; then the least distant
    one. Tables at an infinite distance do not fit at all."""
    kin = _KIN.get(engine, ())

    def order(table: Table) -> tuple[float, ...]:
        theirs = str(table.info.key["engine"])
        return (0 if theirs == engine else kin.index(theirs) if theirs in kin else len(kin), *distance(table))

    fitting = [table for table in profile.find(**key) if np.inf not in distance(table)]
    return min(fitting, key=order, default=None)


def founded(table: Table, engine: str, apart: float = 0.0) -> Provenance:
    """Measured where the engine's own kernel was, at this distance at most; else it stands in for another."""
    return "measured" if table.info.key["engine"] == engine and apart < 1e-6 else "fitted"


def sliced(table: Table, third: float) -> Grid:
    """The first two axes of a table at one value of the third."""
    one, two, last = table.axes
    position = float(Grid((last,), np.arange(last.size, dtype=np.float64)).at(third))
    low = int(position)
    values = table.values[:, :, low] * (1 - (position - low))
    if position > low:
        values = values + table.values[:, :, low + 1] * (position - low)
    return Grid((one, two), np.ascontiguousarray(values))
