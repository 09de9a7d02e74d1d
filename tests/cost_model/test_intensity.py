"""What a kernel does, by hand, for a step whose numbers can be multiplied out."""

from __future__ import annotations

import pytest

from planc.cost_model import catalogue
from planc.cost_model.collectives import Fabric
from planc.cost_model.shape import EngineShape
from planc.cost_model.step import StepLoad, StepModel, StepPart
from tests import sample_tables

H100 = catalogue.gpu("h100_sxm")


def parts(load: StepLoad, name: str = "llama8b", **shape: object) -> list[StepPart]:
    table = getattr(sample_tables, name)()
    asked = EngineShape("vllm", "h100_sxm", **shape)  # type: ignore[arg-type]
    return StepModel(table, asked, H100, Fabric(8), catalogue.engine("vllm")).breakdown(load)


def whole(found: list[StepPart]) -> float:
    return sum(part.calls * part.done.flops for part in found if part.done)


def test_a_decoding_step_reads_all_weights_once() -> None:
    """Llama-3.1-8B: two operations per parameter and token; a gigabyte or two of cache beside the weights."""
    found = parts(StepLoad(8, 1))
    products = [p for p in found if p.done and p.done.precision == "bf16" and "attention" not in p.op]
    table = sample_tables.llama8b()
    embedding = 128256 * 4096
    dense = table.model.parameters - embedding
    assert sum(p.calls * p.done.flops for p in products if p.done) == pytest.approx(2 * 8 * dense, rel=0.01)
    assert sum(p.calls * p.done.nbytes for p in products if p.done) == pytest.approx(2 * dense, rel=0.02)


def test_fp8_halves_the_bytes_and_names_its_units() -> None:
    wide, narrow = (parts(StepLoad(1, 1), weights=w, activations=w) for w in ("bf16", "fp8"))
    pick = lambda found: next(p.done for p in found if p.done and "down_proj" in p.site and p.done.flops)  # noqa: E731
    assert pick(narrow).precision == "fp8"
    assert pick(narrow).nbytes == pytest.approx(pick(wide).nbytes / 2, rel=0.01)
    assert pick(narrow).intensity == pytest.approx(2 * pick(wide).intensity, rel=0.01)


def test_tensor_parallel_ranks_share_the_operations() -> None:
    load = StepLoad(16, 500)
    assert whole(parts(load, tp=4)) == pytest.approx(whole(parts(load)) / 4, rel=0.02)


def test_no_product_beats_its_roof() -> None:
    """Operations over seconds stay under the lesser of peak and intensity * bandwidth."""
    for load in (StepLoad(64, 2000), StepLoad(0, 0, 4096, 1)):
        products = [p for p in parts(load) if p.done and p.op.endswith("linear")]
        assert products
        for part in products:
            assert part.done is not None
            peak = min(H100.peak_flops("bf16"), part.done.intensity * H100.memory_bytes_s)
            assert part.done.flops * part.calls / part.seconds <= 1.05 * peak, part.site
