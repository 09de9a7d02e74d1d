"""Alpha-beta collectives: algebra, links, hierarchy, and the constants they were taken from."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planc.cost_model import catalogue
from planc.cost_model.collectives import KINDS, Fabric, group_seconds, seconds, transfer_seconds
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
    assert bus == pytest.approx(0.764 * 450e9, rel=0.05)


def test_library_all_reduce_lies_near_measured_constants() -> None:
    """NCCL 2.29 on H100, us by ranks: 8 KB, 2 MB, 32 MB."""
    measured = {2: (6.8, 27.9, 143.6), 4: (10.0, 27.7, 175.7), 8: (16.0, 38.2, 199.8)}
    for ranks, timed in measured.items():
        link = NODE.inner(H100, ranks)
        for size, us in zip((8192.0, 2.0**21, 2.0**25), timed, strict=True):
            assert float(seconds("all_reduce", size, ranks, link)) == pytest.approx(us * 1e-6, rel=0.3)


def test_the_engines_own_kernel_is_faster_for_small_messages_only() -> None:
    own = NODE.inner(H100, 8, custom_up_to=8 * 2**20)
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
