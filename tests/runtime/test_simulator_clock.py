"""The clock tells the step model's time."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from planc.cost_model import catalogue
from planc.cost_model.collectives import Fabric
from planc.cost_model.shape import EngineShape
from planc.cost_model.step import StepLoad, StepModel
from planc.cost_model.table import CostTable
from planc.runtime.simulator import Clock
from tests.sample_tables import deepseek_v3, llama8b, llama70b, qwen235b

FP8 = {"weights": "fp8", "activations": "fp8", "kv": "fp8"}
SHAPES = [
    (llama8b(), "h100_sxm", {}),
    (llama8b(), "a10", {}),
    (llama8b(), "h100_sxm", {"eager": True}),
    (llama70b(), "h200_sxm", {"tp": 4, **FP8}),
    (llama70b(), "h100_sxm", {"tp": 2, "pp": 4}),
    (qwen235b(), "h200_sxm", {"tp": 8, "ep": 8}),
    (deepseek_v3(), "b200_sxm", {"tp": 8, "weights": "fp8", "activations": "fp8"}),
]


def model(table: CostTable, gpu: str, shape: dict[str, Any], engine: str = "vllm") -> StepModel:
    made = EngineShape(engine, gpu, **shape)
    return StepModel(table, made, catalogue.gpu(gpu), Fabric(8), catalogue.engine(engine))


@pytest.mark.parametrize(("table", "gpu", "shape"), SHAPES, ids=lambda x: getattr(x, "name", None))
def test_look_ups_are_within_a_percent(table: CostTable, gpu: str, shape: dict[str, Any]) -> None:
    """Mean error below 0.2 %; 95 of 100 random loads within 1 %, and all within 2 %."""
    step = model(table, gpu, shape)
    clock, stages = Clock(step), step.shape.pp
    draw, count = np.random.default_rng(0), 150
    spread = lambda low, high: np.exp(draw.uniform(np.log(low), np.log(high), count))  # noqa: E731
    seqs, context = spread(1, 500).astype(int), spread(20, 60_000)
    chunks, cached = draw.integers(1, 6, count), draw.integers(0, 2, count) * draw.integers(0, 30_000, count)
    new = np.maximum((spread(8, 8192) / chunks).astype(int), 1)

    plain = step.seconds(StepLoad(seqs, context))
    told = np.array([clock.line(b * stages, c).seconds for b, c in zip(seqs.tolist(), context, strict=True)])
    errors = [np.abs(told / (stages * plain) - 1)]

    mixed = step.seconds(StepLoad(seqs, context, new * chunks, chunks, cached)) + (stages - 1) * plain
    rows = zip(seqs.tolist(), context, new.tolist(), cached.tolist(), chunks.tolist(), strict=True)
    told = np.array([clock.mixed(b * stages, c, [(q, p)] * n)[0] for b, c, q, p, n in rows])
    errors.append(np.abs(told / mixed - 1))
    for error in errors:
        assert error.mean() < 0.002
        assert np.quantile(error, 0.95) < 0.01
        assert error.max() < 0.02


def test_hosts_that_take_longer_than_kernels() -> None:
    step = model(llama8b(), "gb200", FP8, engine="trtllm")
    seqs, context, chunks = 3000, 200.0, 10
    wanted = step.seconds(StepLoad(seqs, context, 128 * chunks, chunks))
    assert wanted > 1.3 * step.pieces(StepLoad(seqs, context, 128 * chunks, chunks)).device[0, 0]
    assert Clock(step).mixed(seqs, context, [(128, 0)] * chunks)[0] == pytest.approx(wanted, rel=1e-6)


def test_a_line_is_the_time_of_every_step_on_it() -> None:
    clock = Clock(model(llama8b(), "h100_sxm", {}))
    line = clock.line(40, 1500.5)
    for steps in (1, line.steps // 2, line.steps - 1):
        ahead = clock.line(40, 1500.5 + steps).seconds
        assert line.seconds + steps * line.slope == pytest.approx(ahead, rel=1e-9)


def test_a_pipeline_is_filled_before_a_prompts_answer_comes() -> None:
    clock = Clock(model(llama70b(), "h100_sxm", {"tp": 2, "pp": 4}))
    seconds, drain = clock.mixed(0, 0.0, [(2000, 0)])
    assert drain == pytest.approx(3 * seconds)  # the next chunk starts after one stage
    assert clock.line(1, 500.0).seconds == pytest.approx(clock.line(4, 500.0).seconds)
    assert clock.line(8, 500.0).seconds > clock.line(4, 500.0).seconds


def test_a_prompt_fills_one_micro_batch_after_the_other() -> None:
    step = model(llama70b(), "h100_sxm", {"tp": 2, "pp": 4})
    whole, cut = Clock(step), Clock(step, budget=1000)
    piece, long = whole.mixed(0, 0.0, [(1000, 0)])[0], whole.mixed(0, 0.0, [(3000, 0)])
    seconds, drain = cut.mixed(0, 0.0, [(3000, 0)])
    assert seconds == pytest.approx(3 * piece, rel=0.15)  # later pieces read what came before
    assert seconds + drain == pytest.approx((3 + 4 - 1) * seconds / 3, rel=0.05)
    assert seconds + drain < 0.6 * sum(long)
    plain = cut.line(400, 1000.0).seconds / 4
    parts = [[(900, 0)], [(600, 900), (300, 0)], [(700, 300)]]  # beside 100 sequences each
    each = [whole.mixed(400, 1000.0, part)[0] - 3 * plain for part in parts]
    seconds, drain = cut.mixed(400, 1000.0, [(1500, 0), (1000, 0)])
    assert seconds == pytest.approx(sum(each) + plain)
    assert seconds + drain == pytest.approx(sum(each) + 3 * each[-1])


def test_drafts_cost_rows_not_cache_reads() -> None:
    clock = Clock(model(llama70b(), "h200_sxm", {"tp": 4, **FP8}))
    one, drafted, fourfold = clock.line(32, 8000.0), clock.line(32, 8000.0, 3), clock.line(128, 8000.0)
    assert one.seconds <= drafted.seconds < fourfold.seconds
    assert drafted.slope == one.slope
