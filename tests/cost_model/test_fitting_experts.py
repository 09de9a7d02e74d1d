"""Which rows of routed experts are fitted to."""

from __future__ import annotations

import numpy as np
import pytest

from planc.cost_model import catalogue
from planc.cost_model.fitting import experts_rows as experts
from planc.cost_model.kernels import GroupedGemm
from planc.cost_model.measured.loops import Loop

pandas = pytest.importorskip("pandas", reason="fitting needs the measured extra")


def shape(width: float) -> GroupedGemm:
    return GroupedGemm(8, 8, 2, 24 * 1024 * width, 6 * 1024 * width, 1024, width, "bf16", "bf16")


def rows(gpu: str, factors: list[float]) -> experts.Rows:
    """A table of shapes of growing width that take a second times their factor at every token count."""
    specs = tuple(shape(64.0 * (at + 1)) for at in range(len(factors)))
    seconds = np.tile(np.array(factors)[:, None], (1, 15))
    return experts.Rows(
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


def timed(version: str, ranks: int, tokens: int, latency: float) -> dict[str, object]:
    """A row as the tables have it."""
    sizes = {"hidden_size": 2048, "inter_size": 768, "topk": 8, "num_experts": 128}
    kernel = {"engine": "sglang", "version": version, "kernel_source": "triton", "moe_dtype": "bfloat16"}
    return {
        **kernel,
        **sizes,
        "moe_tp_size": 1,
        "moe_ep_size": ranks,
        "num_tokens": tokens,
        "latency": latency,
    }


def test_ranks_that_were_given_all_tokens_show_in_their_times() -> None:
    shared, whole = 0.3, 0.9  # of one rank's time, on each of eight
    found = pandas.DataFrame(
        [
            timed(version, ranks, tokens, tokens * (1.0 if ranks == 1 else part))
            for version, part in (("2", shared), ("1", whole))
            for ranks in (1, 8)
            for tokens in (16, 4096, 16384)
        ]
    )
    assert experts._unshared(found) == {("sglang", "1", "triton", "bfloat16")}


def test_a_loop_reads_from_the_cache_what_fits_it() -> None:
    gpu = catalogue.gpu("l40s")
    held = gpu.l2_mib * 1024**2
    inside, above, far = Loop.on(gpu).seconds(held * np.array([0.5, 1.2, 10.0])) * gpu.memory_bytes_s / held
    assert inside == pytest.approx(0.5 / 3.31, rel=0.01)  # 8 bytes per clock and SM over the memory's
    assert above == pytest.approx(1.2)
    assert far == pytest.approx(10.0)


@pytest.mark.parametrize("name", ["a100_sxm", "h100_sxm", "b200_sxm"])
def test_beside_hbm_the_cache_makes_no_difference(name: str) -> None:
    gpu, size = catalogue.gpu(name), np.geomspace(1e5, 1e9, 30)
    assert Loop.on(gpu).seconds(size) == pytest.approx(size / gpu.memory_bytes_s)
