"""Alpha-beta collectives: algebra, links, hierarchy, and the constants they were taken from."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planc.cost_model import catalogue
from planc.cost_model.collectives import KINDS, Fabric, Own, group_seconds, seconds, transfer_seconds
from planc.errors import UnknownName

H100 = catalogue.gpu("h100_sxm")
NODE = Fabric(8)


@settings(deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    size=st.floats(1, 1e10),
    more=st.floats(0, 1e10),
    ranks=st.sampled_from([2, 4, 8, 16, 32]),
    gpu=st.sampled_from(["h100_sxm", "l40s", "mi300x", "gb200", "cpu"]),
)
def test_more_bytes_never_take_less_time(kind: str, size: float, more: float, ranks: int, gpu: str) -> None:
    low, high = group_seconds(kind, np.array([size, size + more]), ranks, catalogue.gpu(gpu), NODE)  # type: ignore[arg-type]
    assert 0 < low <= high


@pytest.mark.parametrize("kind", KINDS)
def test_one_rank_or_nothing_to_move_is_free(kind: str) -> None:
    assert group_seconds(kind, 1e6, 1, H100, NODE) == 0  # type: ignore[arg-type]
    assert group_seconds(kind, 0.0, 8, H100, NODE) == 0  # type: ignore[arg-type]


def test_large_all_reduce_approaches_the_bus_bandwidth() -> None:
    size, n = 4e9, 8
    time = float(seconds("all_reduce", size, n, NODE.inner(H100, n)))
    bus = 2 * (n - 1) / n * size / time
    assert bus == pytest.approx(0.795 * 450e9, rel=0.05)


def test_library_all_reduce_lies_near_measured_constants() -> None:
    """NCCL 2.29 on H100, us by ranks: 8 KB, 2 MB, 32 MB."""
    measured = {2: (6.8, 27.9, 143.6), 4: (10.0, 27.7, 175.7), 8: (16.0, 38.2, 199.8)}
    for ranks, timed in measured.items():
        link = NODE.inner(H100, ranks)
        for size, us in zip((8192.0, 2.0**21, 2.0**25), timed, strict=True):
            assert float(seconds("all_reduce", size, ranks, link)) == pytest.approx(us * 1e-6, rel=0.3)


def test_the_engines_own_kernel_is_faster_for_small_messages_only() -> None:
    own = NODE.inner(H100, 8, Own(8 * 2**20))
    library = NODE.inner(H100, 8)
    assert seconds("all_reduce", 64e3, 8, own) < 0.5 * seconds("all_reduce", 64e3, 8, library)
    assert seconds("all_reduce", 64e6, 8, own) == seconds("all_reduce", 64e6, 8, library)


def test_links_are_chosen_by_reach() -> None:
    assert NODE.inner(H100, 8).name == "nvlink"
    assert NODE.inner(catalogue.gpu("l40s"), 4).name == "pcie"
    assert NODE.inner(catalogue.gpu("h100_nvl"), 2).name == "nvlink"
    assert NODE.inner(catalogue.gpu("h100_nvl"), 4).name == "pcie"
    assert NODE.inner(catalogue.gpu("mi300x"), 8).name == "xgmi"
    assert Fabric(4).scale_up(catalogue.gpu("gb200")) == 72
    assert Fabric(4).scale_up(H100) == 4


def test_kernels_start_with_the_clock_and_lamports_before_barriers() -> None:
    """8 KiB over two ranks of A100, H100, B200, us: 4.7, 3.5, 4.9 in TensorRT-LLM, 5.3, 4.4, 7.0 in vLLM."""
    measured = {"a100_sxm": (4.7, 5.3), "h100_sxm": (3.5, 4.4), "b200_sxm": (4.9, 7.0)}
    for name, (lamport, barrier) in measured.items():
        for kernel, us in (("lamport", lamport), ("barrier", barrier)):
            link = NODE.inner(catalogue.gpu(name), 2, Own(8 * 2**20, kernel))  # type: ignore[arg-type]
            assert float(seconds("all_reduce", 8192.0, 2, link)) == pytest.approx(us * 1e-6, rel=0.25)


def test_ranks_behind_shared_bridges_slow_each_other_down() -> None:
    """NCCL over 2, 4 and 8 L40S, all-gather of 512 MiB: 13.7, 85 and 399 ms; one rank alone has its x16."""
    gpu = catalogue.gpu("l40s")
    for ranks, measured in {2: 13.7e-3, 4: 85.1e-3, 8: 398.9e-3}.items():
        link = NODE.inner(gpu, ranks)
        assert float(seconds("all_gather", 2.0**29, ranks, link)) == pytest.approx(measured, rel=0.25)
        assert link.bytes_s == gpu.pcie_gbytes_s * 1e9
    assert catalogue.gpu("a100_pcie").pcie_group_gbytes_s(8) == catalogue.gpu("a100_pcie").pcie_gbytes_s


def test_leaving_the_node_costs_more_and_a_faster_fabric_helps() -> None:
    for kind in ("all_reduce", "all_gather", "all_to_all"):
        inside = group_seconds(kind, 64e6, 8, H100, NODE)  # type: ignore[arg-type]
        across = group_seconds(kind, 64e6, 16, H100, NODE)  # type: ignore[arg-type]
        faster = group_seconds(kind, 64e6, 16, H100, Fabric(8, 3200.0))  # type: ignore[arg-type]
        assert inside < across
        assert faster < across


def test_pipeline_neighbours_talk_over_the_wire_between_them() -> None:
    near = group_seconds("p2p", 1e7, 2, H100, NODE, stride=4)
    far = group_seconds("p2p", 1e7, 2, H100, NODE, stride=8)
    assert near < far
    assert far == transfer_seconds(1e7, NODE.outer(H100))


def test_an_unknown_kind_is_named() -> None:
    with pytest.raises(UnknownName, match="all_reduce"):
        seconds("all_reduc", 1.0, 2, NODE.inner(H100, 2))  # type: ignore[arg-type]
