"""MIG slices: a GPU of which a part is to be had, with memory and SMs of its own.

"h100_sxm:3g.40gb" is three of the seven compute slices and four of the eight memory slices of an H100. Peaks
and power go by compute slices, capacity, bandwidth, cache and price by memory slices; nothing is measured
(`assumed`). Slices don't reach each other, so an engine lies on one of them.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from planc.cost_model.catalogue import Gpu

_COMPUTE, _MEMORY = 7, 8


def profiles(gpu: str) -> dict[str, int]:
    """Instance profiles of a GPU -> memory slices; {} where it has none."""
    found: dict[str, int] = _read()["profiles"].get(gpu, {})
    return found


def part_of(gpu: Gpu, profile: str) -> Gpu:
    """The slice of a GPU, `profile` being one of its `profiles`."""
    compute = int(profile.partition("g")[0]) / _COMPUTE
    memory = profiles(gpu.name)[profile] / _MEMORY
    return gpu.model_copy(
        update={
            "name": f"{gpu.name}:{profile}",
            "label": f"{gpu.label}, MIG {profile}",
            "peak_tflops": {name: peak * compute for name, peak in gpu.peak_tflops.items()},
            "memory_gib": gpu.memory_gib * memory,
            "memory_gbytes_s": gpu.memory_gbytes_s * memory,
            "l2_mib": gpu.l2_mib * memory,
            "sm_count": int(gpu.sm_count * compute),
            "nvlink_domain": 1,
            "nvlink_gbytes_s": 0.0,
            "pcie_gbytes_s": gpu.pcie_gbytes_s * memory,
            "fabric_gbit_s": gpu.fabric_gbit_s * memory,
            "tdp_w": gpu.tdp_w * compute,
            "idle_w": gpu.idle_w * compute,
            "usd_per_hour": gpu.usd_per_hour * memory,
            "price_source": f"share of memory slices of: {gpu.price_source}",
            "source": f"{gpu.source}; {_read()['source']}",
            "slice_of": gpu.name,
            "aliases": (),
        }
    )


@cache
def _read() -> Any:
    from planc.cost_model.catalogue import read

    return read("slices.yaml")
