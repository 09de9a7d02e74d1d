"""Power and energy of a GPU from how busy it is.

`P(u) = P_idle + (P_tdp - P_idle) * u^g` with u the share of time that kernels run, weighed by how
hard they press (mu-Serve, DynamoLLM use this form). The exponent is in `data/efficiencies.yaml`.
"""

from __future__ import annotations

import numpy as np

from planc.cost_model.catalogue import Gpu
from planc.cost_model.efficiency import efficiencies
from planc.cost_model.features import Array, ArrayLike


def watts(gpu: Gpu, utilisation: ArrayLike) -> Array:
    """Mean power of one GPU at `utilisation` in [0, 1] (clipped), W."""
    share = np.clip(np.asarray(utilisation, dtype=np.float64), 0.0, 1.0)
    power: Array = gpu.idle_w + (gpu.tdp_w - gpu.idle_w) * share ** efficiencies().value("power_exponent")
    return power


def joules_per_token(gpu: Gpu, gpus: int, utilisation: ArrayLike, tokens_s: ArrayLike) -> Array:
    """Energy of `gpus` GPUs per token at a rate; infinite at a rate of zero."""
    with np.errstate(divide="ignore"):
        energy: Array = gpus * watts(gpu, utilisation) / np.asarray(tokens_s, dtype=np.float64)
    return energy
