"""Energy over time: power follows how busy a GPU is, window by window."""

from __future__ import annotations

import numpy as np

from planc.cost_model.catalogue import Gpu
from planc.cost_model.energy import watts
from planc.cost_model.features import Array


def joules(gpu: Gpu, gpus: int, busy: Array, edges: Array) -> Array:
    """Energy of `gpus` GPUs in each window, J.

    busy     [W] seconds that steps ran in each window
    edges    [W + 1] where the windows begin and end, s
    """
    length = np.diff(edges)
    share = np.divide(busy, length, out=np.zeros_like(length), where=length > 0)
    energy: Array = gpus * watts(gpu, share) * length
    return energy
