"""What all paged ops share: the ragged batch, blocks of a cache, and which keys a query sees.

A step lays S sequences end to end in one row of T tokens. Sequence s owns the tokens
`query_starts[s] : query_starts[s + 1]`; they are the last of its `context_lens[s]` tokens, so the
first of them stands at absolute position `context_lens[s] - its query length`. A paged cache is
[blocks, block_size, *entry]; token j of sequence s lies in block `block_table[s, j // block_size]`
at offset `j % block_size`. A state cache is [slots, *entry], one row per sequence.

These are the reference semantics: plain torch, any device, written to be read. Kernels that
replace them must give the same numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Segment:
    """One sequence's part of a step: tokens `start:stop` of the row, the last of `context` tokens."""

    row: int
    start: int
    stop: int
    context: int

    @property
    def queries(self) -> int:
        return self.stop - self.start

    @property
    def first(self) -> int:
        """Absolute position of the first new token, = tokens already in the cache."""
        return self.context - self.queries


def segments(query_starts: Tensor, context_lens: Tensor) -> Iterator[Segment]:
    """The sequences of a step that have tokens in it."""
    starts = query_starts.tolist()
    for row, context in enumerate(context_lens.tolist()):
        if starts[row + 1] > starts[row]:
            yield Segment(row, starts[row], starts[row + 1], context)


def one_token_each(query_starts: Tensor, tokens: int) -> bool:
    """Whether this is a decode step: every sequence has exactly one new token."""
    return tokens == query_starts.numel() - 1


def store(cache: Tensor, slots: Tensor, entries: Tensor, scale: float = 1.0) -> None:
    """Writes one entry per token into a paged cache, in place.

    cache [blocks, block_size, *entry], slots [T], entries [T, *entry]. A cache narrower than the
    entries (8-bit) holds `entries / scale`, saturated at the largest finite value of its type.
    """
    flat = cache.view(-1, *cache.shape[2:])
    if cache.dtype != entries.dtype:
        entries = entries.float() / scale
        limit = torch.finfo(cache.dtype).max
        entries = entries.clamp(-limit, limit).to(cache.dtype)
    flat[slots] = entries


def load(cache: Tensor, blocks: Tensor, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    """Entries of whole blocks, in order: blocks [..., M] -> [..., M * block_size, *entry]."""
    found = cache[blocks].flatten(blocks.dim() - 1, blocks.dim())
    return found if cache.dtype == dtype else (found.float() * scale).to(dtype)


def reach(first: int, window: int, chunk: int) -> int:
    """The earliest position that a query at position `first` (or any later one) can see."""
    low = 0
    if window:
        low = max(low, first - window + 1)
    if chunk:
        low = max(low, first // chunk * chunk)
    return low


def reachable(
    part: Segment, block_table: Tensor, block_size: int, window: int = 0, chunk: int = 0
) -> tuple[Tensor, Tensor]:
    """The cache blocks that a sequence's new tokens can see, and the positions [C] that these hold."""
    low = reach(part.first, window, chunk) // block_size
    high = -(-part.context // block_size)
    positions = torch.arange(low * block_size, part.context, device=block_table.device)
    return block_table[part.row, low:high].long(), positions


def visible(queries: Tensor, keys: Tensor, window: int, chunk: int) -> Tensor:
    """Which keys each query sees, by absolute position: [..., Q, 1] x [..., 1, K] -> bool [..., Q, K]."""
    seen = keys <= queries
    if window:
        seen = seen & (keys > queries - window)
    if chunk:
        seen = seen & (keys // chunk == queries // chunk)
    return seen


def chosen(indices: Tensor, first_key: int, keys: int) -> Tensor:
    """Positions [..., k] as a mask [..., keys] over `first_key .. first_key + keys`; others are ignored."""
    at = indices.long() - first_key
    inside = (at >= 0) & (at < keys)
    mask = torch.zeros(*indices.shape[:-1], keys + 1, dtype=torch.bool, device=indices.device)
    return mask.scatter_(-1, torch.where(inside, at, keys), True)[..., :keys]


def span(window: int, chunk: int, topk: int = 0) -> str:
    """The name of an attention's reach, as in `planc.ir.work`."""
    if topk:
        return f"k{topk}"
    if window:
        return f"w{window}"
    return f"c{chunk}" if chunk else "full"
