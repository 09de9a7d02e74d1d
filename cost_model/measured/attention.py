"""Attention, recurrences, and products of activations."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from planc.cost_model.catalogue import EngineProfile, Gpu
from planc.cost_model.kernels import Attention, AttentionLoad, Times
from planc.cost_model.roofline import Roofline


def prepare(
    specs: Sequence[Attention], gpu: Gpu, engine: EngineProfile, roofline: Roofline
) -> Callable[[AttentionLoad], Times]:
    return roofline.attention(specs)
