"""FlashInfer's tiles of fp8 products with a scale per block."""

import numpy as np
import pytest

from planc.cost_model import block_products, catalogue
from planc.cost_model.kernels import Gemm
from planc.cost_model.measured import Measured

B200 = catalogue.gpu("b200_sxm")
TOLD = catalogue.engine("sglang").model_copy(update={"fp8_gemm_backend": block_products.NAME})


def product(n: float, k: float, weights: str = "fp8_block") -> Gemm:
    return Gemm(n, k, weights, "fp8", 2.0)


@pytest.mark.parametrize(
    ("n", "k", "rows"), [(2112, 7168, 32), (7168, 2048, 16), (24576, 1536, 32), (32768, 512, 8)]
)
def test_tiles_by_the_shape_of_the_weights(n: float, k: float, rows: int) -> None:
    assert block_products.tile_rows(n, k) == rows


@pytest.mark.parametrize(
    ("n", "k", "m", "published_us"),
    [(576, 7168, 2048, 41.2), (2048, 1024, 512, 8.7), (24576, 7168, 256, 223.5), (24576, 7168, 2048, 1632.5)],
)
def test_published_times(n: float, k: float, m: int, published_us: float) -> None:
    assert block_products.seconds(m, product(n, k), B200) * 1e6 == pytest.approx(published_us, rel=0.1)


def test_prompts_take_several_times_as_long_where_an_engine_was_told_so() -> None:
    rows = np.array([[4.0, 8192.0]])
    usual, told = (
        Measured(B200, engine).gemm([product(7168, 2048)])(rows).seconds[0]
        for engine in (catalogue.engine("sglang"), TOLD)
    )
    assert told[0] == pytest.approx(usual[0], rel=0.3)
    assert told[1] > 5 * usual[1]


def test_other_formats_and_gpus_keep_their_kernels() -> None:
    assert block_products.runs(product(7168, 2048), B200, TOLD)
    assert not block_products.runs(product(7168, 2048, "fp8"), B200, TOLD)
    assert not block_products.runs(product(7168, 2048), catalogue.gpu("h200_sxm"), TOLD)
