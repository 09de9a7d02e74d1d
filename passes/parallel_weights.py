"""What one rank loads of a parameter: a step on weights, recorded in the graph it belongs to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class TakePieces:
    """Keeps pieces `(start, length)` of dimension `dim`, end to end (one for each of q, k, v, say)."""

    name: str
    dim: int
    pieces: tuple[tuple[int, int], ...]

    @property
    def reads(self) -> tuple[str, ...]:
        return (self.name,)

    @property
    def makes(self) -> tuple[str, ...]:
        return (self.name,)

    def apply(self, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        (whole,) = tensors
        kept = [whole.narrow(self.dim, start, length) for start, length in self.pieces]
        return (torch.cat(kept, self.dim).contiguous(),)

    def shape(self, whole: torch.Size) -> tuple[int, ...]:
        local = list(whole)
        local[self.dim] = sum(length for _, length in self.pieces)
        return tuple(local)


@dataclass(frozen=True, slots=True)
class Zero:
    """A term that another rank adds (the bias of a row-divided product): zeros here."""

    name: str

    @property
    def reads(self) -> tuple[str, ...]:
        return (self.name,)

    @property
    def makes(self) -> tuple[str, ...]:
        return (self.name,)

    def apply(self, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (torch.zeros_like(tensors[0]),)
