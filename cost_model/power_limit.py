"""What a GPU's power limit leaves of the speed that kernels have alone.

Tables of kernels are taken in short runs at the boost clock. In service large products follow each other for
as long as a prompt takes, and where their arithmetic asks for more than the limit the clock falls. Power goes
with f V^2 and the voltage about with f, so that a demand of x times what the limit grants runs at a clock of
x^-0.4 (`power_clock_exponent`). The demand is the products' rate by the energy of one operation (`product_pj`
for 16-bit operands). Operations on 8 bits take half of that, on 4 bits a fifth: in proportion to the width
they would slow fp4 products of B200 by 9 %, and published offline runs show nothing of it.

Memory-bound kernels, and so steps without prompts, stay below the limit.
"""

from __future__ import annotations

import numpy as np

from planc.cost_model.catalogue import Gpu, Precision
from planc.cost_model.efficiency import efficiencies
from planc.cost_model.features import Array

#: energy of an operation over that of one on 16-bit operands
_SHARE = {"fp32": 2.0, "tf32": 2.0, "fp8": 0.5, "int8": 0.5, "fp4": 0.2}


def joules(gpu: Gpu, precision: Precision) -> float:
    """Energy of one operation of a matrix product, J; 0 where no limit is known to matter."""
    if gpu.vendor == "cpu":
        return 0.0
    return efficiencies().on("product_pj", gpu, "any") * 1e-12 * _SHARE.get(precision, 1.0)


def slowdown(gpu: Gpu, energy: Array, seconds: Array) -> Array:
    """How many times longer kernels take that need `energy` joules for their products in `seconds` alone."""
    granted = (gpu.tdp_w - gpu.idle_w) * np.maximum(seconds, 1e-12)
    found: Array = np.maximum(energy / granted, 1.0) ** efficiencies().value("power_clock_exponent")
    return found
