"""Pipeline cuts: equal to all cuts tried, and told to engines where layers differ."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planc.cost_model import catalogue
from planc.cost_model.collectives import Fabric
from planc.cost_model.shape import EngineShape
from planc.cost_model.step import StepLoad, StepModel
from planc.cost_model.table import CostTable
from planc.planner.candidates import Candidate
from planc.planner.inventory import groups
from planc.planner.stages import cut, spans, with_cuts
from planc.planner.traffic import Traffic
from tests.planner.cases import request
from tests.sample_tables import dense_table, llama70b

ends = st.tuples(st.integers(0, 30), st.integers(0, 30))


def all_cuts(layers: int, stages: int) -> Iterator[tuple[int, ...]]:
    for bounds in itertools.combinations(range(1, layers), stages - 1):
        yield tuple(b - a for a, b in itertools.pairwise((0, *bounds, layers)))


def most(sizes: Sequence[int], values: Sequence[int], beside: tuple[int, int]) -> int:
    bounds = [0, *itertools.accumulate(sizes)]
    found = [sum(values[first:last]) for first, last in itertools.pairwise(bounds)]
    found[0] += beside[0]
    found[-1] += beside[1]
    return max(found)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), min_size=1, max_size=8),
    st.integers(1, 5),
    ends,
    ends,
    st.sampled_from([10.0, 40.0, float("inf")]),
)
def test_equals_all_cuts_tried(
    layers: list[tuple[int, int]],
    stages: int,
    time_ends: tuple[int, int],
    heavy_ends: tuple[int, int],
    limit: float,
) -> None:
    times, weights = [time for time, _ in layers], [weight for _, weight in layers]
    fit = [
        (most(sizes, times, time_ends), most(sizes, weights, heavy_ends))
        for sizes in (all_cuts(len(times), stages) if stages <= len(times) else ())
        if most(sizes, weights, heavy_ends) <= limit
    ]
    heavy = spans(weights, stages, heavy_ends)
    found = cut(len(times), stages, spans(times, stages, time_ends), heavy, limit)
    if found is None:
        assert not fit
    else:
        assert sum(found) == len(times)
        assert min(found) >= 1
        assert (most(found, times, time_ends), most(found, weights, heavy_ends)) == min(fit)


def chat() -> Traffic:
    return Traffic(np.array([500.0]), np.array([500.0]), np.array([1.0]), rate=1.0)


def model_of(table: CostTable, shape: EngineShape) -> StepModel:
    return StepModel(table, shape, catalogue.gpu(shape.gpu), Fabric(), catalogue.engine(shape.engine))


def offered(table: CostTable, **shape: object) -> list[Candidate]:
    group = groups(request())[0]
    made = EngineShape(**{"engine": "vllm", "gpu": group.gpu.name, **shape})  # type: ignore[arg-type]
    candidate = Candidate(group, catalogue.engine(made.engine), made, 0.0)
    return with_cuts([candidate], chat(), lambda one: model_of(table, one.shape))


def test_layer_seconds_add_up_to_a_stages_kernels() -> None:
    table = llama70b()
    model = model_of(table, EngineShape("vllm", "h100", tp=4, pp=2))
    load = StepLoad(64, 750, 500, 1)
    parts = model.breakdown(load, stage=1)
    kernels = sum(part.seconds for part in parts if part.layer_class != "step")
    device, launches = model.layer_seconds(load)
    each = dict(zip((cls.name for cls in table.classes), device[:, 0], strict=True))
    expected = model.profile.kernel_factor * kernels + 40 * model.profile.layer_us * 1e-6
    assert 40 * each["block"] + each["head"] == pytest.approx(expected)
    assert (launches > 0).all()
    assert not model.layer_seconds(StepLoad(64, 750))[1].any(), "a graph launches no kernels"


def test_a_wide_head_takes_layers_off_the_last_stage() -> None:
    """A small model with a large vocabulary: its head takes as long as several layers."""
    table = dense_table(16, 2048, 32, 8, 8192, 256000)
    even, uneven = offered(table, pp=4)
    assert even.shape.pipeline_layers == ()
    sizes = uneven.shape.pipeline_layers
    assert sum(sizes) == 16
    assert sizes[-1] < 4
    decode = StepLoad(64, 750)
    faster, usual = (float(model_of(table, one.shape).seconds(decode)) for one in (uneven, even))
    assert faster < 0.95 * usual


def test_alike_layers_stay_evenly_split() -> None:
    assert len(offered(llama70b(), tp=4, pp=2)) == 1


def test_engines_that_cannot_be_told_keep_their_split() -> None:
    assert len(offered(dense_table(16, 2048, 32, 8, 8192, 256000), engine="sglang", pp=4)) == 1
