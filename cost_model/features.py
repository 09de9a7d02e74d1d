"""Features of an engine step: what `planc.ir.work.Amount`s are written in.

A step carries decoding sequences (one new token each) and chunks of prompts. Everything is an
array or a number; shapes broadcast against each other.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
ArrayLike = npt.ArrayLike

#: contexts of a batch spread evenly over mean * (1 +- this); used where a cost is not linear in them
_SPREAD = 0.5


@dataclass(frozen=True, slots=True)
class StepLoad:
    """What one scheduler's batch holds in one step (with attention data parallel: one rank's batch).

    decode_seqs      sequences that decode, one new token each
    decode_context   mean tokens in their caches, the new one included
    prefill_tokens   new prompt tokens in the step, over all its chunks
    prefill_seqs     chunks; at least 1 where there are prompt tokens (a 0 is read as 1 there)
    prefill_context  mean tokens of those sequences already in the cache before the step
    """

    decode_seqs: ArrayLike
    decode_context: ArrayLike
    prefill_tokens: ArrayLike = 0.0
    prefill_seqs: ArrayLike = 0.0
    prefill_context: ArrayLike = 0.0

    def arrays(self) -> Load:
        """The load as float arrays of one common shape, flattened."""
        parts = [
            np.asarray(getattr(self, name), dtype=np.float64)
            for name in ("decode_seqs", "decode_context", "prefill_tokens", "prefill_seqs", "prefill_context")
        ]
        parts = list(np.broadcast_arrays(*parts))
        shape = parts[0].shape
        seqs, context, tokens, chunks, cached = (part.reshape(-1) for part in parts)
        chunks = np.where(tokens > 0, np.maximum(chunks, 1.0), 0.0)
        return Load(seqs, np.where(seqs > 0, np.maximum(context, 1.0), 0.0), tokens, chunks, cached, shape)


@dataclass(frozen=True, slots=True)
class Load:
    """`StepLoad` as flat arrays of equal length; `shape` is what results are folded back to."""

    seqs: Array
    context: Array
    tokens: Array
    chunks: Array
    cached: Array
    shape: tuple[int, ...] = field(default=())

    @property
    def size(self) -> int:
        return int(self.seqs.size)

    def decode(self, names: Iterable[str]) -> dict[str, Array]:
        """Features of the decoding part alone."""
        found: dict[str, Array] = {
            "1": (self.seqs > 0).astype(np.float64),
            "T": self.seqs,
            "S": self.seqs,
            "C": self.context,
        }
        for name in names:
            if name not in found:
                found[name] = self.seqs * _last_keys(name, self.context)
        return found

    def prefill(self, names: Iterable[str]) -> dict[str, Array]:
        """Features of the prompt chunks alone."""
        found: dict[str, Array] = {
            "1": (self.tokens > 0).astype(np.float64),
            "T": self.tokens,
            "S": self.chunks,
            "C": self.cached,
        }
        each = np.divide(self.tokens, self.chunks, out=np.zeros_like(self.tokens), where=self.chunks > 0)
        for name in names:
            if name not in found:
                kind, span = name.split(":", 1)
                per_chunk = (
                    _pairs(span, self.cached, each) if kind == "P" else _keys_read(span, self.cached, each)
                )
                found[name] = self.chunks * per_chunk
        return found

    def merged(self, names: Iterable[str]) -> dict[str, Array]:
        """Features of the whole step: the sum of both parts ("1" is 1)."""
        names = list(names)
        one, two = self.decode(names), self.prefill(names)
        found = {name: one[name] + two[name] for name in one}
        found["1"] = np.ones_like(self.seqs)
        return found


def _reach(span: str) -> float:
    return float(span[1:])


def _last_keys(feature: str, context: Array) -> Array:
    """Keys that a decoding token sees, and cache entries it reads, at a mean context."""
    span = feature.split(":", 1)[1]
    if span in ("full", "both"):
        return context
    if span[0] in "wk":
        return np.minimum(context, _reach(span))
    if span[0] == "c":
        low, high = context * (1 - _SPREAD), context * (1 + _SPREAD)
        area = _chunk_area(high, _reach(span)) - _chunk_area(low, _reach(span))
        return np.maximum(np.divide(area, high - low, out=np.ones_like(context), where=high > low), 1.0)
    raise ValueError(f"attention span {span!r}")


def _chunk_area(x: Array, chunk: float) -> Array:
    """Integral of (t mod chunk) over 0..x."""
    whole, rest = np.divmod(x, chunk)
    return whole * chunk * chunk / 2 + rest * rest / 2


def _pairs(span: str, cached: Array, new: Array) -> Array:
    """(query, key) pairs of one chunk of `new` tokens after `cached` ones."""
    if span == "full":
        return new * cached + new * (new + 1) / 2
    if span == "both":
        return new * (cached + new)
    if span[0] in "wk":
        reach = _reach(span)
        return window_sum(cached + new, reach) - window_sum(cached, reach)
    if span[0] == "c":
        chunk = _reach(span)
        return _chunk_sum(cached + new, chunk) - _chunk_sum(cached, chunk)
    raise ValueError(f"attention span {span!r}")


def window_sum(x: Array, reach: float) -> Array:
    """Sum of min(t, reach) over t = 1..x."""
    inside = np.minimum(x, reach)
    found: Array = inside * (inside + 1) / 2 + (x - inside) * reach
    return found


def _chunk_sum(x: Array, chunk: float) -> Array:
    """Sum of ((t - 1) mod chunk) + 1 over t = 1..x."""
    whole, rest = np.divmod(x, chunk)
    found: Array = whole * chunk * (chunk + 1) / 2 + rest * (rest + 1) / 2
    return found


def _keys_read(span: str, cached: Array, new: Array) -> Array:
    """Cache entries of one sequence that at least one of its new tokens sees."""
    if span in ("full", "both") or span[0] == "k":
        return cached + new
    if span[0] == "w":
        return new + np.minimum(cached, np.maximum(_reach(span) - 1, 0.0))
    if span[0] == "c":
        return new + np.mod(cached, _reach(span))
    raise ValueError(f"attention span {span!r}")
