"""Which rows of routed experts are fitted to."""

from __future__ import annotations

import numpy as np
import pytest

from planc.cost_model import catalogue
from planc.cost_model.fitting import experts
from planc.cost_model.kernels import GroupedGemm


def shape(width: float) -> GroupedGemm:
    return GroupedGemm(8, 8, 2, 24 * 1024 * width, 6 * 1024 * width, 1024, width, "bf16", "bf16")


def rows(gpu: str, factors: list[float]) -> experts._Rows:
    """A table of shapes of growing width that take a second times their factor at every token count."""
    specs = tuple(shape(64.0 * (at + 1)) for at in range(len(factors)))
    seconds = np.tile(np.array(factors)[:, None], (1, 15))
    return experts._Rows(
        catalogue.gpu(gpu), "trtllm", "bfloat16", ("1",), specs, seconds, np.ones((len(factors), 15, 9)), 0
    )


@pytest.mark.parametrize(("twin", "left"), [("h100_sxm", 11), ("b200_sxm", 12)])
def test_shapes_that_a_gpu_of_the_architecture_runs_far_faster_are_set_aside(twin: str, left: int) -> None:
    mine, other = rows("h200_sxm", [1.0] * 11 + [2.0]), rows(twin, [1.2] * 12)
    found = experts._like_twins(mine, [mine, other])
    assert len(found.specs) == left
    assert found.dropped == (12 - left) * 15
    assert len(experts._like_twins(other, [mine, other]).specs) == 12  # the quick one keeps all of its own


def test_few_shapes_in_common_tell_nothing() -> None:
    mine, other = rows("h200_sxm", [1.0] * 3 + [2.0]), rows("h100_sxm", [1.2] * 4)
    assert len(experts._like_twins(mine, [mine, other]).specs) == 4
