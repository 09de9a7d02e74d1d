"""Routed experts: loads under skewed routing, and tables of shapes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from planc.cost_model import catalogue, routing
from planc.cost_model.experts import ExpertKernel, curve, stack
from planc.cost_model.kernels import GroupedGemm, Priced
from planc.cost_model.measured import experts
from planc.cost_model.profile import Profile, Table, TableInfo
from planc.cost_model.roofline import Roofline
from planc.cost_model.routing import TOKENS, ExpertLoad, routed, usual

KERNEL = ExpertKernel(20.0, 0.0, 0.1, 5.0, 3.0, 3.0, 0.0, 0.8, 0.5)
PEAKS = {"weight_bytes": 2.0, "bytes_s": 4.8e12, "flops_s": 9.9e14}
H200 = catalogue.gpu("h200_sxm")
VLLM = catalogue.engine("vllm")
MEASURED_AT = 2.0 ** np.arange(15)


def layer(
    hidden: int = 2048, inner: float = 768, total: int = 128, top_k: int = 8, ranks: int = 1
) -> GroupedGemm:
    here = total / ranks
    return GroupedGemm(
        experts=here,
        total_experts=total,
        top_k=top_k,
        elements=here * 3.0 * hidden * inner,
        flops_per_pair=6.0 * hidden * inner,
        hidden=hidden,
        inner=inner,
        weights="bf16",
        activations="bf16",
        ranks=ranks,
    )


def table(*shapes: tuple[GroupedGemm, float], engine: str = "vllm", format: str = "bfloat16") -> Table:
    """Shapes that take so many times the formula."""
    columns = {
        "hidden": [s.hidden for s, _ in shapes],
        "inner": [s.inner for s, _ in shapes],
        "experts": [s.experts for s, _ in shapes],
        "total": [float(s.total_experts) for s, _ in shapes],
        "top_k": [float(s.top_k) for s, _ in shapes],
    }
    constants = {name: getattr(KERNEL, name) for name in ExpertKernel.names()}
    return Table(
        TableInfo(
            name=f"{engine}/{format}",
            key={"engine": engine, "format": format},
            axes=("shape", "tokens"),
            ideal=constants | PEAKS,
            rows=1,
            error=0.0,
            source="test",
            date="2026-11-21",
        ),
        (np.arange(1.0, len(shapes) + 1), MEASURED_AT),
        np.log(np.array([[ratio] * MEASURED_AT.size for _, ratio in shapes])),
        {name: np.array(values) for name, values in columns.items()},
    )


@pytest.mark.parametrize(("experts_", "top_k", "ranks"), [(8, 2, 1), (128, 8, 1), (256, 8, 8), (384, 8, 64)])
def test_loads_grow_with_tokens_and_stay_possible(experts_: int, top_k: int, ranks: int) -> None:
    found = routed(experts_, top_k, ranks)
    assert np.all(np.diff(found.pairs) > 0)
    assert np.all(found.touched <= np.minimum(found.pairs, experts_ / ranks) + 1e-9)
    assert np.all(found.padded >= found.pairs)
    assert np.all(found.pairs >= TOKENS * top_k / ranks - 1e-6)  # the fullest rank has its share at least
    assert np.all(found.pairs <= TOKENS * min(top_k, experts_ / ranks) + 1e-6)


def test_one_token_touches_top_k_experts() -> None:
    assert routed(256, 8).touched[0] == pytest.approx(8)
    assert routed(256, 8).pairs[-1] == pytest.approx(8 * TOKENS[-1])


def test_skew_leaves_experts_idle_that_even_routing_would_touch() -> None:
    found = routed(256, 8)
    even = 256 * (1 - (1 - 8 / 256) ** 64)
    assert found.touched[np.flatnonzero(TOKENS == 64)[0]] < 0.9 * even


def test_served_routers_spread_as_measured() -> None:
    four = routed(256, 8, 4, usual(256))
    at = np.searchsorted(TOKENS, 1024)
    assert four.pairs[at] / (TOKENS[at] * 8 / 4) == pytest.approx(1.35, abs=0.02)


def test_routers_with_a_bias_spread_less_but_for_the_tokens_of_a_prompt() -> None:
    even, skewed = (routed(256, 8, 8, usual(256, balanced=balanced)) for balanced in (True, False))
    crowd = (TOKENS > 8) & (TOKENS < 512)
    assert np.all(even.touched[crowd] > skewed.touched[crowd])
    assert np.array_equal(even.pairs, skewed.pairs)


def test_served_routers_touch_more_experts_with_every_token_and_none_at_once() -> None:
    served, timed = routed(128, 4, load=usual(128)), routed(128, 4)
    steps = lambda found: np.diff(np.log(found.touched)) / np.diff(np.log(TOKENS))  # noqa: E731
    crowded = TOKENS[1:] <= 256
    assert np.max(np.diff(steps(served)[crowded])) < 0.2  # each token finds fewer new ones
    assert np.max(np.diff(steps(timed)[crowded])) > 0.5  # where tables' law changes


def test_the_most_touched_rank_need_not_have_most_pairs() -> None:
    hot = np.ones((1, 16))
    hot[0, 0] = 1e6  # every token takes it
    found = routed(16, 2, 2, ExpertLoad(hot, placed=False))
    two = np.searchsorted(TOKENS, 64)
    assert found.pairs[two] == pytest.approx(64 * (1 + 7 / 15), rel=0.05)
    assert found.touched[two] == pytest.approx(8)


def test_served_experts_need_not_divide_by_the_ranks() -> None:
    assert np.all(routed(60, 4, 8, usual(60)).touched <= 8)


def test_draws_are_the_same_every_time() -> None:
    assert np.array_equal(routing._counts(64.0, 128, 8), routing._counts(64.0, 128, 8))


def test_times_between_and_beyond_the_points_never_fall() -> None:
    price = stack([curve(layer(), KERNEL, *PEAKS.values()), curve(layer(ranks=8), KERNEL, *PEAKS.values())])
    tokens = np.tile(np.geomspace(1, 400_000, 300), (2, 1))
    seconds = price(tokens).seconds
    assert np.all(np.diff(seconds, axis=1) >= -1e-12)
    assert np.all(seconds[1] < seconds[0])
    assert np.all(price(np.zeros((2, 1))).seconds == 0)
    far = price(np.full((2, 1), 4 * TOKENS[-1])).seconds
    assert far == pytest.approx(4 * price(np.full((2, 1), TOKENS[-1])).seconds)


def test_a_timed_shape_keeps_its_own_residual_and_others_take_their_neighbours() -> None:
    slow, quick = layer(), layer(inner=384)
    made = table((slow, 2.0), (quick, 1.0), (layer(hidden=7168, total=256), 8.0))
    formula = curve(slow, KERNEL, *PEAKS.values()).seconds
    assert experts.measured(made, slow).seconds == pytest.approx(2.0 * formula)
    between = layer(inner=543)  # halfway in logarithms
    ratio = experts.measured(made, between).seconds / curve(between, KERNEL, *PEAKS.values()).seconds
    assert ratio == pytest.approx(np.full(TOKENS.size, np.sqrt(2.0)), rel=0.1)


def test_weights_of_neighbours_sum_to_one_and_trust_the_nearest() -> None:
    made = table(
        *((layer(inner=inner), 1.0) for inner in (96, 192, 384, 1536)), (layer(7168, total=256), 1.0)
    )
    rows, weights, distance = experts.nearest(made, layer(inner=400))
    assert weights.sum() == pytest.approx(1.0)
    assert made.extra["inner"][rows[weights.argmax()]] == 384
    assert abs(weights[rows == 4][0]) < 0.1  # another model's shape
    assert distance == pytest.approx(np.log(400 / 384))


def test_a_named_library_runs_only_where_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    usual, slow = table((layer(), 1.0), engine="trtllm"), table((layer(), 3.0), engine="trtllm")
    key = {**slow.info.key, "library": "cutlass"}
    slow = replace(slow, info=slow.info.model_copy(update={"name": "trtllm/bfloat16/cutlass", "key": key}))
    monkeypatch.setattr(experts, "shipped", lambda family, gpu: Profile(gpu, "experts", (slow, usual)))
    trtllm = catalogue.engine("trtllm")
    told = trtllm.model_copy(update={"expert_table": "trtllm/bfloat16/cutlass"})
    own, named = (
        experts.prepare([layer()], H200, engine, Roofline(H200))(np.full((1, 1), 64.0)).seconds
        for engine in (trtllm, told)
    )
    assert named == pytest.approx(3.0 * own)


def test_pairs_of_other_ranks_take_time_only_where_kernels_hold_them() -> None:
    spread, holds = layer(ranks=8), replace(KERNEL, other_moves=3.0)
    assert np.all(
        curve(spread, holds, *PEAKS.values()).seconds > curve(spread, KERNEL, *PEAKS.values()).seconds
    )
    alone = curve(layer(), holds, *PEAKS.values()).seconds
    assert alone == pytest.approx(curve(layer(), KERNEL, *PEAKS.values()).seconds)


def test_the_engines_own_table_goes_first_then_the_nearest_format(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = replace(layer(), weights="fp8", activations="fp8")
    other = table((spec, 1.0), engine="trtllm", format="fp8")
    far = table((replace(layer(hidden=7168), weights="fp8"), 1.0), format="fp8")
    near = table((spec, 1.0), format="fp8_block")
    found = experts.find(Profile("h200_sxm", "experts", (other, far, near)), spec, "vllm")
    assert found is near
    assert experts.find(Profile("h200_sxm", "experts", (other,)), spec, "vllm") is other
    assert experts.find(Profile("h200_sxm", "experts", (table((spec, 1.0)),)), spec, "vllm") is None

    monkeypatch.setattr(experts, "shipped", lambda family, gpu: Profile(gpu, "experts", (other, near)))
    made = experts.prepare([spec, layer(), replace(spec, inner=500.0)], H200, VLLM, Roofline(H200))
    assert isinstance(made, Priced)
    assert made.sources == ("measured", "roofline", "fitted")


def test_gpt_oss_on_blackwell_runs_in_mxfp8() -> None:
    """Widening to bf16 instead is up to three times as slow, so the pair must reach its own rows."""
    gpu = catalogue.gpu("b200_sxm")
    spec = replace(layer(2880, 2880, 128, 4), weights="mxfp4", activations="mxfp8")
    wide = replace(spec, activations="bf16")
    for name in ("trtllm", "sglang"):
        price = experts.prepare([spec, wide], gpu, catalogue.engine(name), Roofline(gpu))
        narrow, widened = price(np.full((2, 1), 4096.0)).seconds[:, 0]
        assert narrow < 0.7 * widened


@pytest.mark.parametrize("gpu", ["h100_sxm", "h200_sxm", "b200_sxm"])
def test_shipped_tables_are_sane(gpu: str) -> None:
    price = experts.prepare(
        [layer(4096, 1536 / tp, 128, 8) for tp in (1, 2, 4)],
        catalogue.gpu(gpu),
        VLLM,
        Roofline(catalogue.gpu(gpu)),
    )
    seconds = price(np.tile([1.0, 64.0, 1024.0, 16384.0], (3, 1))).seconds
    assert np.all(np.diff(seconds, axis=1) > 0)  # more tokens
    assert np.all(np.diff(seconds[:, 1:], axis=0) < 0)  # less width


def test_starts_take_cycles_and_streams_take_bytes() -> None:
    slow = KERNEL.at_clock(2.0)
    assert slow.launch_us == 2 * KERNEL.launch_us
    assert slow.touched_us == 2 * KERNEL.touched_us
    assert (slow.memory, slow.compute, slow.hidden_moves) == (
        KERNEL.memory,
        KERNEL.compute,
        KERNEL.hidden_moves,
    )
