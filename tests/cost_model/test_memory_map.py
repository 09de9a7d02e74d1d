"""Memory: exact bytes where bytes are exact, and blocks as the engines count them."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planc.cost_model import catalogue
from planc.cost_model.catalogue import GIB
from planc.cost_model.local import even_split, stages
from planc.cost_model.memory import MemoryMap, kept_by, memory_map, rotary_bytes, weight_bytes
from planc.cost_model.shape import EngineShape
from planc.cost_model.table import CostTable
from tests.sample_tables import deepseek_v3, dense_table, llama8b, llama70b, qwen235b

VLLM = catalogue.engine("vllm")
LIMITS = {"max_num_seqs": 256, "max_num_batched_tokens": 8192, "max_model_len": 8192}


def shape(**fields: object) -> EngineShape:
    return EngineShape("vllm", "h200_sxm", **fields)  # type: ignore[arg-type]


def mapped(table: CostTable, gpu: str = "h200_sxm", *, limits: object = None, **fields: object) -> MemoryMap:
    given_limits = {**LIMITS, **(limits or {})}  # type: ignore[dict-item]
    return memory_map(table, shape(**fields), catalogue.gpu(gpu), VLLM, **given_limits)  # type: ignore[arg-type]


def whole(table: CostTable, **fields: object) -> float:
    made = shape(**fields)
    return sum(weight_bytes(table, made, stage.counts) for stage in stages(table, made))


@pytest.mark.parametrize(
    "table", [llama8b(), llama70b(), qwen235b(), deepseek_v3()], ids=lambda t: t.model.name
)
def test_unquantized_weights_are_two_bytes_per_parameter(table: CostTable) -> None:
    assert whole(table) == pytest.approx(2 * table.model.parameters, rel=1e-9)
    assert whole(table, pp=4) == pytest.approx(2 * table.model.parameters, rel=1e-9)


def test_tensor_parallel_divides_all_but_norms_and_the_cache_of_kv_heads() -> None:
    table = llama70b()
    one, eight = whole(table), whole(table, tp=8)
    assert eight == pytest.approx(one / 8, rel=1e-3)
    assert eight > one / 8
    # beyond 8 KV heads their projections are held twice
    sixteen = whole(table, tp=16)
    copies = 80 * 2 * 8192 * 1024 * 2 / 16
    assert sixteen == pytest.approx(one / 16 + copies, rel=1e-3)


def test_a_tied_head_is_held_once_or_copied_to_the_last_stage() -> None:
    table = llama8b()
    ends = 128256 * 4096
    tied = replace(
        table,
        model=replace(table.model, tied_embeddings=True),
        classes=tuple(replace(c, parameters=4096) if c.name == "head" else c for c in table.classes),
    )
    assert whole(tied) == pytest.approx(whole(table) - 2 * ends, rel=1e-4)
    assert whole(tied, pp=2) == pytest.approx(whole(table, pp=2), rel=1e-4)


def test_formats_narrow_the_matrices_only() -> None:
    table = llama70b()
    ends = 2 * 128256 * 8192
    inside = table.model.parameters - ends - 161 * 8192
    rest = 2 * (ends + 161 * 8192)
    assert whole(table, weights="fp8", activations="fp8") == pytest.approx(inside + rest, rel=1e-9)
    assert whole(table, weights="w4a16") == pytest.approx(inside * 4.125 / 8 + rest, rel=1e-9)


def test_mxfp4_is_for_experts_only() -> None:
    table = qwen235b()
    experts = 94 * 128 * 3 * 4096 * 1536
    want = experts * 4.25 / 8 + 2 * (table.model.parameters - experts)
    assert whole(table, weights="mxfp4") == pytest.approx(want, rel=1e-9)


def test_attention_data_parallel_copies_attention_and_spreads_experts() -> None:
    table = deepseek_v3()
    experts = 58 * 256 * 3 * 7168 * 2048
    others = table.model.parameters - experts
    for ep in (1, 8):
        assert whole(table, dp=8, ep=ep) == pytest.approx(2 * (experts / 8 + others), rel=1e-9)


@pytest.mark.parametrize(
    ("table", "tp", "elements"),
    [
        (llama70b(), 1, 2 * 8 * 128 * 80),
        (llama70b(), 8, 2 * 1 * 128 * 80),
        (llama70b(), 16, 2 * 1 * 128 * 80),
        (qwen235b(), 8, 2 * 1 * 128 * 94),
        (deepseek_v3(), 1, 576 * 61),
        (deepseek_v3(), 8, 576 * 61),
    ],
)
def test_cache_bytes_per_token_are_exact(table: CostTable, tp: int, elements: int) -> None:
    for kv, width in (("bf16", 2), ("fp8", 1)):
        made = shape(tp=tp, kv=kv)
        (kept,) = kept_by(table, made, stages(table, made)[0].counts)
        assert kept.bytes_per_token == elements * width


def test_the_map_adds_up_and_stays_within_the_engines_share() -> None:
    found = mapped(llama70b(), tp=4)
    parts = found.weights + found.activations + found.graphs + found.overhead + found.states + found.kv_cache
    assert parts == pytest.approx(found.total)
    assert found.total + found.reserve == pytest.approx(found.capacity)
    assert 0.9 * found.capacity - found.kv_bytes_per_token * 16 < found.total <= 0.9 * found.capacity
    assert found.kv_cache == found.kv_blocks * 16 * found.kv_bytes_per_token
    assert 1 * GIB < found.activations + found.graphs + found.overhead < 6 * GIB


@settings(max_examples=60, deadline=None)
@given(
    tp=st.sampled_from([1, 2, 4, 8]),
    seqs=st.integers(1, 1024),
    tokens=st.integers(64, 65536),
    length=st.integers(16, 131072),
    utilization=st.floats(0.3, 0.99),
)
def test_blocks_never_overfill_and_shrink_with_every_demand(
    tp: int, seqs: int, tokens: int, length: int, utilization: float
) -> None:
    def blocks(**limits: object) -> int:
        asked = {"max_num_seqs": seqs, "max_num_batched_tokens": tokens, "max_model_len": length}
        found = mapped(llama8b(), "l40s", tp=tp, limits={**asked, "utilization": utilization, **limits})
        assert found.kv_blocks == 0 or found.total <= found.capacity * utilization
        assert found.kv_blocks == 0 or found.kv_tokens >= length
        return found.kv_blocks

    base = blocks()
    assert blocks(max_num_batched_tokens=2 * tokens) <= base
    assert blocks(max_num_seqs=2 * seqs) <= base
    assert blocks(utilization=utilization * 0.9) <= base


def test_a_model_too_large_has_no_blocks() -> None:
    found = mapped(llama70b(), "l40s")
    assert not found.fits
    assert found.kv_blocks == 0
    assert mapped(llama70b(), "h200_sxm", tp=2).fits


def test_a_length_that_does_not_fit_is_refused_as_the_engine_would() -> None:
    assert mapped(llama70b(), "h100_sxm", tp=2, weights="fp8", activations="fp8").fits
    long = {"max_model_len": 131072, "max_num_batched_tokens": 8192}
    tight = mapped(llama70b(), "h100_sxm", tp=2, limits=long)
    assert not tight.fits


def test_measured_capacity_of_a_70b_on_one_h200() -> None:
    """TensorRT-LLM holds about 265 k tokens of fp8 cache beside fp8 weights (public serving points)."""
    profile = catalogue.engine("trtllm")
    made = EngineShape("trtllm", "h200_sxm", weights="fp8", activations="fp8", kv="fp8")
    found = memory_map(llama70b(), made, catalogue.gpu("h200_sxm"), profile, **LIMITS)  # type: ignore[arg-type]
    assert found.kv_tokens >= 265_000


def test_layers_that_forget_hold_less() -> None:
    full = dense_table(8, 1024, 8, 8, 4096, 1000)
    window = replace(
        full, classes=tuple(replace(c, kv_span="w128" if c.kv_elements else "") for c in full.classes)
    )
    one, two = mapped(full, "l4"), mapped(window, "l4")
    assert one.sequence_bytes(4096) == 4096 * one.kv_bytes_per_token
    assert two.sequence_bytes(4096) == (128 + 16) * two.kv_bytes_per_token
    assert two.sequences(4096) > 20 * one.sequences(4096)
    assert one.sequences(4096) == pytest.approx(one.kv_tokens / 4096)


def test_stages_split_as_vllm_does() -> None:
    assert even_split(80, 4) == (20, 20, 20, 20)
    assert even_split(61, 2) == (31, 30)
    assert even_split(61, 4) == (15, 15, 16, 15)
    assert even_split(7, 1) == (7,)
    held = stages(llama70b(), shape(pp=4))
    assert [stage.counts for stage in held] == [(1, 20, 0), (0, 20, 0), (0, 20, 0), (0, 20, 1)]
    assert [stage.counts[1] for stage in stages(llama70b(), shape(pp=2, pipeline_layers=(41, 39)))] == [
        41,
        39,
    ]


def test_eager_engines_and_processors_capture_no_graphs() -> None:
    assert mapped(llama8b(), eager=True).graphs == 0
    assert mapped(llama8b(), "cpu").graph_sizes == ()
    assert mapped(llama8b()).graph_sizes[-1] == 256


def test_rotary_tables_hold_every_position_that_a_model_names() -> None:
    table = llama8b()
    short, long = (
        replace(table, model=replace(table.model, max_position=positions)) for positions in (8192, 10_485_760)
    )
    assert rotary_bytes(long) - rotary_bytes(short) == 4.0 * 128 * (10_485_760 - 8192)
    assert mapped(long).overhead - mapped(short).overhead == rotary_bytes(long) - rotary_bytes(short)


def test_stated_graph_sizes_take_the_place_of_steps() -> None:
    rule = catalogue.engine("trtllm").cuda_graphs.model_copy(update={"listed": (1, 64, 512), "largest": 512})
    assert rule.sizes(300) == (1, 64, 300)
    assert rule.sizes(1000) == (1, 64, 512)
