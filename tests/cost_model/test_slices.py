"""MIG slices as GPUs of their own."""

from __future__ import annotations

import pytest

from planc.cost_model import catalogue, slices
from planc.errors import InvalidField, UnknownName
from tests.planner.cases import planned


@pytest.mark.parametrize("name", [n for n in catalogue.gpus() if slices.profiles(n)])
def test_slices_are_parts_and_the_largest_is_the_whole(name: str) -> None:
    whole = catalogue.gpu(name)
    made = [catalogue.gpu(f"{name}:{profile}") for profile in slices.profiles(name)]
    for part in made:
        assert part.slice_of == name
        assert 0 < part.memory_gib <= whole.memory_gib
        assert part.peak_flops("bf16") <= whole.peak_flops("bf16")
        assert part.nvlink_domain == 1
    assert made[-1].memory_gib == whole.memory_gib
    assert made[-1].sm_count == whole.sm_count


def test_aliases_name_the_same_slice() -> None:
    assert catalogue.gpu("h100:3g.40gb").name == "h100_sxm:3g.40gb"


def test_unknown_slices_are_refused() -> None:
    with pytest.raises(UnknownName, match=r"h100_sxm:3g\.40gb"):
        catalogue.gpu("h100_sxm:3g.50gb")
    with pytest.raises(InvalidField, match="no MIG slices"):
        catalogue.gpu("l40s:1g.5gb")


def test_engines_lie_on_one_slice() -> None:
    found = planned(
        inventory={"nodes": [{"gpu": "h100_sxm:3g.40gb", "gpus_per_node": 4, "usd_per_gpu_hour": 1.0}]}
    )
    for replica in found.replicas():
        assert len(replica.gpus) == 1
        assert replica.gpu == "h100_sxm:3g.40gb"
