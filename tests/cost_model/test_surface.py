"""Tables from scattered rows: what nodes without rows take, and what lone spikes do not do."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("scipy")

from planc.cost_model.fitting import surface

AXES = (np.array([1.0, 2.0, 4.0, 8.0]), np.array([1.0, 2.0, 4.0, 8.0]), np.array([1.0, 2.0, 4.0]))


def _rows(most: float) -> tuple[np.ndarray, ...]:
    """Coordinates of all nodes whose first two stay within a product, as benchmarks end with memory."""
    one, two, group = (c.reshape(-1) for c in np.meshgrid(*AXES, indexing="ij"))
    kept = one * two * group <= most
    return one[kept], two[kept], group[kept]


def test_more_work_goes_on_like_the_same_kernel_not_like_another_group() -> None:
    coords = _rows(32.0)
    slow = np.log(1.7) * (coords[2] == 1.0)  # groups of one run another kernel
    found, dropped = surface.nodes(AXES, coords, slow)
    assert dropped == 0
    assert found[:, :, 0] == pytest.approx(np.log(1.7), abs=0.01)
    assert found[:, :, 1:] == pytest.approx(0.0, abs=0.01)


def test_a_spike_at_the_edge_of_what_was_measured_does_not_spread() -> None:
    coords = _rows(32.0)
    values = np.where((coords[0] == 8.0) & (coords[1] == 4.0), 3.0, 0.0)
    found, dropped = surface.nodes(AXES, coords, values)
    assert dropped == 1
    assert found == pytest.approx(0.0, abs=0.1)


def test_less_work_is_taken_from_another_group_before_more_work() -> None:
    """A machine that is full says nothing of one that is not."""
    one, two, group = _rows(1e9)
    kept = (group < 4.0) | (one > 1.0)
    coords = one[kept], two[kept], group[kept]
    found, _ = surface.nodes(AXES, coords, np.where(coords[0] == 1.0, 0.4, 0.0))
    assert found[0, :, 2] == pytest.approx(0.4, abs=0.03)
