"""Steps: what any engine's step must obey, and the sum of its parts."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planc.cost_model import catalogue, exchanges
from planc.cost_model.catalogue import EngineProfile
from planc.cost_model.collectives import Fabric
from planc.cost_model.kernels import BOUNDS
from planc.cost_model.roofline import Roofline
from planc.cost_model.shape import EngineShape, refusals
from planc.cost_model.step import StepLoad, StepModel
from planc.cost_model.table import CostTable, FusionOffer
from planc.ir.work import Amount
from tests.sample_tables import deepseek_v3, dense_table, llama8b, llama70b, moe_table, qwen235b

Make = Callable[..., StepModel]
TINY = dense_table(4, 512, 8, 4, 1536, 4096, name="tiny")
TINY_MOE = moe_table(4, 512, 8, 4, 64, 256, 16, 2, 4096, name="tiny-moe")
H100 = catalogue.gpu("h100_sxm")


def of(table: CostTable, **shape: object) -> StepModel:
    made = EngineShape("vllm", "h100_sxm", **shape)  # type: ignore[arg-type]
    return StepModel(table, made, H100, Fabric(8), catalogue.engine("vllm"))


MODELS = [
    of(TINY),
    of(TINY, tp=4),
    of(TINY, pp=2, weights="fp8", activations="fp8", kv="fp8"),
    of(TINY, eager=True),
    of(TINY_MOE, tp=2, ep=2),
    of(TINY_MOE, dp=4, ep=4),
]
loads = st.tuples(
    st.integers(0, 600), st.integers(1, 20000), st.integers(0, 8192), st.integers(1, 8), st.integers(0, 20000)
)


@settings(max_examples=150, deadline=None)
@given(load=loads, which=st.sampled_from(MODELS), axis=st.integers(0, 4), more=st.integers(1, 3000))
def test_more_load_never_takes_less_time(
    load: tuple[int, ...], which: StepModel, axis: int, more: int
) -> None:
    """More sequences, context or prompt tokens. More chunks of the same tokens mean less attention."""
    if axis == 3:
        return
    bigger = list(load)
    bigger[axis] += more
    # a batch that outgrows the captured graphs, or that gains its first prompt, changes how it is launched
    before, after = which.seconds(StepLoad(*load)), which.seconds(StepLoad(*bigger))
    assert after >= before * (1 - 1e-9)


@settings(deadline=None)
@given(load=loads, which=st.sampled_from(MODELS))
def test_parts_sum_to_the_step(load: tuple[int, ...], which: StepModel) -> None:
    stages = [which.breakdown(StepLoad(*load), stage) for stage in range(which.shape.pp)]
    totals = [sum(part.seconds for part in parts) for parts in stages]
    assert max(totals) == pytest.approx(float(which.seconds(StepLoad(*load))), rel=1e-9, abs=1e-15)
    assert sum(totals) == pytest.approx(float(which.latency(StepLoad(*load))), rel=1e-9, abs=1e-15)
    assert all(part.bound in BOUNDS and part.seconds >= -1e-15 for parts in stages for part in parts)


def test_a_grid_equals_its_points(model: Make) -> None:
    step = model(llama8b(), tp=2)
    seqs, context, tokens = np.array([[1.0], [40.0], [700.0]]), np.array([[10.0, 5000.0]]), 2048.0
    grid = step.seconds(StepLoad(seqs, context, tokens, 2))
    assert grid.shape == (3, 2)
    for i, j in np.ndindex(3, 2):
        one = step.seconds(StepLoad(seqs[i, 0], context[0, j], tokens, 2))
        assert one.shape == ()
        assert grid[i, j] == pytest.approx(float(one), rel=1e-12)


def test_an_empty_step_takes_no_time(model: Make) -> None:
    assert model(TINY).seconds(StepLoad(0, 0)) == 0


@pytest.mark.parametrize("gpu", ["h100_sxm", "h200_sxm", "b200_sxm", "a100_sxm", "mi300x"])
def test_tensor_parallel_divides_but_never_ideally(model: Make, gpu: str) -> None:
    load = StepLoad(32, 4000, 4096, 1)
    times = [float(model(llama70b(), gpu, tp=tp, weights="bf16").seconds(load)) for tp in (1, 2, 4, 8)]
    for one, two in pairwise(times):
        assert one / 2 < two < one


def test_a_decode_step_streams_weights_and_cache(model: Make) -> None:
    """Above the floor of physics; below it with achieved bandwidth and 65 us a layer of launches, links."""
    table = llama70b()
    for tp in (2, 4, 8):
        time = float(model(table, "h200_sxm", tp=tp).seconds(StepLoad(1, 4000)))
        floor = (2 * (table.model.parameters - 128256 * 8192) + 2 * 163840 * 4000) / tp / 4.8e12
        assert floor < time < 1.25 * floor + 80 * 65e-6


def test_a_long_prompt_runs_near_the_tensor_peak(model: Make) -> None:
    table = llama70b()
    time = float(model(table, "h100_sxm", tp=8).seconds(StepLoad(0, 0, 8192, 1)))
    mfu = 2 * table.model.parameters * 8192 / (8 * H100.peak_flops("bf16")) / time
    assert 0.35 < mfu < 0.75


def test_formats_move_what_they_should(model: Make) -> None:
    table, few, many = llama70b(), StepLoad(4, 500), StepLoad(64, 16000)
    base = model(table, tp=4)
    fp8 = model(table, tp=4, weights="fp8", activations="fp8")
    int4 = model(table, tp=4, weights="w4a16")
    narrow_cache = model(table, tp=4, kv="fp8")
    assert int4.seconds(few) < fp8.seconds(few) < base.seconds(few)
    assert narrow_cache.seconds(many) < 0.75 * base.seconds(many)
    assert narrow_cache.seconds(few) == pytest.approx(base.seconds(few), rel=0.03)


def test_pipeline_stages_split_the_latency(model: Make) -> None:
    load = StepLoad(16, 2000)
    whole, halves = model(llama70b(), tp=4), model(llama70b(), tp=4, pp=2)
    step, through = halves.seconds(load), halves.latency(load)
    assert 0.5 * whole.seconds(load) < step < 0.65 * whole.seconds(load)
    assert through > 1.8 * step
    uneven = model(llama70b(), tp=4, pp=2, pipeline_layers=(60, 20))
    assert uneven.seconds(load) > 1.3 * step


def test_each_micro_batch_waits_for_a_host_that_sees_all_sequences(model: Make) -> None:
    few, many = StepLoad(10, 1000), StepLoad(110, 1000)
    each = [
        float((m.pieces(many).host - m.pieces(few).host).min()) / 100
        for m in (model(llama70b(), tp=4), model(llama70b(), tp=4, pp=2, nodes_of=16))
    ]
    assert each[1] == pytest.approx(2 * each[0], rel=1e-6)


def test_experts_touched_grow_with_the_batch(model: Make) -> None:
    times = model(qwen235b(), tp=8).seconds(StepLoad([1, 8, 64, 512], 100))
    assert times[2] > 2.0 * times[0]
    assert times[3] < 3 * times[2]  # all experts are touched by then


def test_attention_data_parallel_keeps_the_latent_cache_apart(model: Make) -> None:
    """Latent caches don't divide by tp: at long contexts eight schedulers of 8 beat one of 64."""
    tp = model(deepseek_v3(), "h200_sxm", "sglang", tp=8, weights="fp8", activations="fp8")
    dp = model(deepseek_v3(), "h200_sxm", "sglang", dp=8, ep=8, weights="fp8", activations="fp8")
    long = 60_000
    part = lambda m, n: sum(p.seconds for p in m.breakdown(StepLoad(n, long)) if p.op == "planc::paged_mla")  # noqa: E731
    assert part(dp, 16) < part(tp, 128)


def test_exchange_with_experts_crosses_the_network_when_it_must(model: Make) -> None:
    load = StepLoad(128, 2000)
    ops = ("dispatch", "combine")
    link = lambda m: sum(p.seconds for p in m.breakdown(load) if p.op in ops)  # noqa: E731
    fp8 = {"weights": "fp8", "activations": "fp8"}
    near = model(deepseek_v3(), "h200_sxm", "sglang", dp=8, ep=8, **fp8)
    far = model(deepseek_v3(), "h200_sxm", "sglang", dp=16, ep=16, **fp8)
    farther = model(deepseek_v3(), "h200_sxm", "sglang", dp=32, ep=32, **fp8)
    rack = model(deepseek_v3(), "gb200", "sglang", nodes_of=4, dp=16, ep=16, **fp8)
    assert link(near) == link(rack) == 0  # gathered and scattered where one switch reaches all
    assert {"all_gather", "reduce_scatter"} <= {p.op for p in rack.breakdown(load)}
    assert 0 < link(far) < link(farther)


def test_attention_ranks_wait_for_the_fullest_one(model: Make) -> None:
    """A step of ranks with seven sequences on average is one of eight, as far as graphs go."""
    ranks = model(deepseek_v3(), "h200_sxm", "sglang", dp=8, ep=8, weights="fp8", activations="fp8")
    one = model(deepseek_v3(), "h200_sxm", "sglang", tp=8, weights="fp8", activations="fp8")
    largest = ranks.graph_sizes[-1]
    for step, same in ((ranks, False), (one, True)):
        at = step.pieces(StepLoad([8, 9, largest], 2000)).device[0]
        assert (at[0] == step.pieces(StepLoad([7], 2000)).device[0, 0]) is not same
        assert at[1] > at[0]
    capped = ranks.pieces(StepLoad([largest - 1, largest], 2000)).shared[0]
    assert capped[0] == capped[1]


def test_inputs_of_experts_are_gathered_in_the_engine_s_format() -> None:
    fp4 = {"dp": 8, "ep": 8, "weights": "nvfp4", "activations": "nvfp4"}
    shape = EngineShape("trtllm", "b200_sxm", **fp4)  # type: ignore[arg-type]
    wide = exchanges.collectives(deepseek_v3(), shape)
    quantized = exchanges.collectives(deepseek_v3(), shape, quantized=("nvfp4",))
    moved = lambda found, kind: [c.size.terms["T"] for c in found if c.kind == kind]  # noqa: E731
    assert moved(quantized, "all_gather") == [4.5 / 16 * size for size in moved(wide, "all_gather")]
    assert moved(quantized, "reduce_scatter") == moved(wide, "reduce_scatter") != []


def test_graphs_pad_the_batch_and_spare_launches(model: Make) -> None:
    step = model(llama8b(), costs=Roofline(H100))
    nine, ten, sixteen = step.seconds(StepLoad([9, 10, 16], 1.0))
    attention = lambda n: sum(  # noqa: E731
        p.seconds for p in step.breakdown(StepLoad(n, 1.0)) if p.op == "planc::paged_attention"
    )
    more = step.profile.per_sequence_us * 1e-6 + attention(10) - attention(9)
    assert ten - nine == pytest.approx(more, rel=0.05)  # no product grows, attention and the host do
    assert sixteen > ten
    few = StepLoad(1, 100)
    graphed, eager = (model(llama8b(), tp=4, eager=flag).seconds(few) for flag in (False, True))
    assert eager > 1.5 * graphed


def test_a_hosts_time_per_sequence_runs_beside_kernels_but_not_with_stages() -> None:
    slow = catalogue.engine("trtllm").model_copy(update={"hidden_sequence_us": 20.0, "per_sequence_us": 3.0})
    fast = slow.model_copy(update={"hidden_sequence_us": 0.0})
    made = EngineShape("trtllm", "h100_sxm")
    step = lambda profile, load, **shape: float(  # noqa: E731
        StepModel(TINY, replace(made, **shape), H100, Fabric(8), profile).seconds(load)
    )
    many, few = StepLoad(2000, 64), StepLoad(2, 64)
    assert step(fast, many) < 2000 * 20e-6 < step(slow, many)
    assert step(slow, few) == step(fast, few)
    assert step(slow, many, pp=2) == step(fast, many, pp=2)
    assert step(slow, many) - step(slow.offline(1), many) == pytest.approx(2000 * 3e-6)


def test_hosts_launch_several_kernels_for_what_is_priced_as_one() -> None:
    engine = catalogue.engine("trtllm").model_copy(update={"launches": {}, "hidden_sequence_us": 0.0})
    several = engine.model_copy(update={"launches": {"experts": 8, "collective": 1, "experts mxfp4": 3}})
    prompt = StepLoad(0, 0, 100, 1)

    def launched(profile: EngineProfile, **shape: object) -> tuple[float, float]:
        """In a step with a prompt, and kernels of a step."""
        made = EngineShape("trtllm", "h100_sxm", **shape)  # type: ignore[arg-type]
        step = StepModel(TINY_MOE, made, H100, Fabric(8), profile)
        seconds = step.layer_seconds(prompt)[1].T @ step._counts()
        assert seconds == pytest.approx(step.pieces(prompt).launches.sum())
        return float(seconds[0] / (profile.launch_us * 1e-6)), step.launches

    (alone, kernels), (more, same) = launched(engine), launched(several)
    assert (more - alone, same - kernels) == (pytest.approx(7 * TINY_MOE.model.layers), 0)
    apart = {"tp": 2, "ep": 2}
    moves = launched(several, **apart)[0] - launched(engine, **apart)[0] - (more - alone)
    assert moves >= 2 * TINY_MOE.model.layers  # after attention and after the experts
    mxfp4 = {"weights": "mxfp4", "activations": "bf16"}
    assert launched(several, **mxfp4)[0] - launched(engine, **mxfp4)[0] == pytest.approx(
        2 * TINY_MOE.model.layers
    )


def test_short_prompts_replay_graphs_between_attentions(model: Make) -> None:
    step = model(llama8b(), tp=4)
    most = step.profile.cuda_graphs.piecewise
    short, long = step.pieces(StepLoad(0, 0, [most, most + 1], 1)).launches[0]
    assert 0 < short < long / 2
    eager = model(llama8b(), tp=4, eager=True)
    assert np.ptp(eager.pieces(StepLoad(0, 0, [most, most + 1], 1)).launches) == 0


def test_fusions_save_what_they_offer() -> None:
    load = StepLoad(8, 500)
    table = TINY
    profile = catalogue.engine("vllm").model_copy(update={"kernel_factor": 1.0})
    shape = EngineShape("vllm", "h100_sxm")

    def seconds(*names: str) -> float:
        step = StepModel(table, shape, H100, Fabric(8), profile, frozenset(names), costs=Roofline(H100))
        return float(step.seconds(load))

    none, merged, normed = seconds(), seconds("qkv_merge"), seconds("residual_add_rms_norm")
    assert none - normed == pytest.approx(4 * 3.0e-6, rel=0.01)  # one pointwise launch in each of 4 layers
    assert none - merged == pytest.approx(4 * 2 * 3.9e-6, rel=0.25)
    all_named = seconds("qkv_merge", "gate_up_merge", "residual_add_rms_norm")
    step = StepModel(table, shape, H100, Fabric(8), profile, costs=Roofline(H100))
    by_engine = float(step.seconds(load))
    assert all_named - by_engine == pytest.approx(4 * 3.0e-6, rel=0.01)  # the sum behind the MLP rides too


def test_a_fusion_that_saves_traffic_helps_long_prompts() -> None:
    offer = FusionOffer(
        "residual_add_rms_norm", "block", ("attn_residual", "post_attention_layernorm"), 1,
        reads=Amount({"T": 512.0}), writes=Amount({"T": 0.0}),
    )  # fmt: skip
    table = replace(TINY, fusions=(offer,))
    shape, profile = EngineShape("vllm", "h100_sxm"), catalogue.engine("vllm")
    load = StepLoad(0, 0, 100_000, 1)
    costs = Roofline(H100)
    apart = StepModel(table, shape, H100, Fabric(8), profile, frozenset(), costs=costs).breakdown(load)
    fused = StepModel(table, shape, H100, Fabric(8), profile, costs=costs).breakdown(load)
    pick = lambda parts: sum(p.seconds for p in parts if p.site in offer.sites)  # noqa: E731
    assert pick(fused) == pytest.approx(pick(apart) * (1 - 512 / (5 * 512)), rel=0.01)


def test_a_merge_saves_its_input_and_nothing_of_what_follows() -> None:
    """Also where ranks divide the work: offers count whole tensors, kernels a rank's share."""
    sites = ("mlp.act", "mlp.gate_proj", "mlp.up_proj")
    merge = FusionOffer("gate_up_merge", "block", sites, 1, reads=Amount({"T": 512.0}))
    table = replace(TINY, fusions=(merge,))
    shape, profile = EngineShape("vllm", "h100_sxm", tp=4), catalogue.engine("vllm")
    load = StepLoad(0, 0, 200_000, 1)

    def act(names: frozenset[str]) -> float:
        parts = StepModel(table, shape, H100, Fabric(8), profile, names).breakdown(load)
        return sum(part.seconds for part in parts if part.site == "mlp.act")

    assert act(frozenset({"gate_up_merge"})) == pytest.approx(act(frozenset()), rel=1e-9)


def test_bands_and_sources_come_with_the_seconds(model: Make) -> None:
    step = model(TINY)
    low, high = step.band
    assert step.source in ("measured", "fitted")
    assert low < 1 < high
    assert model(TINY, "mi300x").source == "roofline"  # no tables
    assert model(TINY, "rtx_4090", tp=2).source == "assumed"  # over PCIe, no tables
    assert model(TINY, tp=2, pp=8).source == "assumed"  # over the network
    assert model(TINY, tp=4, costs=Roofline(H100)).source == "roofline"
    found = step.quantity(2.0)
    assert (found.low, found.high, found.source) == (2 * low, 2 * high, step.source)


@pytest.mark.parametrize(
    ("shape", "field", "word"),
    [
        ({"tp": 3}, "tp", "units do not divide by 3"),
        ({"tp": 16}, "", ""),
        ({"pp": 81}, "pp", "80 layers"),
        ({"tp": 8, "cp": 2}, "cp", "copies on 8 ranks"),
        ({"ep": 8, "tp": 8}, "ep", "no routed experts"),
        ({"weights": "nvfp4", "activations": "nvfp4"}, "weights", "nvfp4"),
        ({"kv": "int8"}, "kv", "int8"),
        ({"weights": "mxfp4"}, "weights", "routed experts"),
        ({"weights": "w4a16", "tp": 8}, "", ""),
        ({"tp": 0}, "tp", "at least 1"),
        ({"pp": 2, "pipeline_layers": (70, 20)}, "pipeline_layers", "sum to 80"),
    ],
)
def test_what_cannot_run_says_why(shape: dict[str, object], field: str, word: str) -> None:
    made = EngineShape("vllm", "h100_sxm", **shape)  # type: ignore[arg-type]
    found = refusals(made, llama70b(), H100, catalogue.engine("vllm"))
    assert [(r.field, word in r.reason) for r in found][:1] == ([(field, True)] if field else [])


def test_experts_refuse_degrees_that_do_not_divide_them() -> None:
    profile = catalogue.engine("vllm")
    shape = EngineShape("vllm", "h100_sxm", tp=4, ep=2)
    assert "tp*dp = 4" in refusals(shape, qwen235b(), H100, profile)[0].reason
    assert refusals(replace(shape, ep=4), qwen235b(), H100, profile) == []


def test_groups_of_scales_are_not_split() -> None:
    """Qwen3-235B's experts are 1,536 wide: over 8 ranks 192, which cuts groups of 128."""
    profile, table = catalogue.engine("vllm"), qwen235b()
    shape = EngineShape("vllm", "h100_sxm", tp=8, weights="w4a16")
    assert [r.field for r in refusals(shape, table, H100, profile)] == ["weights"]
    assert refusals(replace(shape, ep=8), table, H100, profile) == []
    assert refusals(replace(shape, tp=4), table, H100, profile) == []


def test_a_breakdown_is_of_one_load(model: Make) -> None:
    with pytest.raises(ValueError, match="one load"):
        model(TINY).breakdown(StepLoad([1, 2], 10))


def test_seconds_are_finite_on_every_gpu(model: Make) -> None:
    for gpu in catalogue.gpus():
        time = model(llama8b(), gpu).seconds(StepLoad([0, 1, 4000], 1e5, [1, 0, 1e6]))
        assert np.isfinite(time).all()
        assert math.isfinite(float(model(TINY_MOE, gpu, tp=2).seconds(StepLoad(7, 77, 777, 7, 7))))
