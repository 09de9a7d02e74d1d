"""Attention from measured tables: what made-up tables give back, and what measured kernels say."""

from __future__ import annotations

import csv
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planc.cost_model import catalogue
from planc.cost_model.kernels import Attention, AttentionLoad
from planc.cost_model.measured import attention
from planc.cost_model.measured.attention_tables import Ideal, Surface, nearest
from planc.cost_model.profile import Profile, Table, TableInfo, shipped
from planc.cost_model.roofline import Roofline

H100 = catalogue.gpu("h100_sxm")
PEAKS = {"flops_s": 1e15, "bytes_s": 3e12, "launch_s": 5e-6}
HEADS, REACH, GROUP = 2.0 ** np.arange(12), 2.0 ** np.arange(4, 15), 2.0 ** np.arange(5)


def table(part: str, engine: str = "vllm", slower: float = 1.0, **key: float) -> Table:
    """Kernels that take `slower` times the ideal, whatever the work."""
    about = {"op": "softmax", "part": part, "engine": engine, "head_dim": 128, "kv_bytes": 2.0, "window": 0}
    info = TableInfo(
        name=f"{part} {engine} {key}",
        key={**about, **key},
        axes=("heads", "reach", "group"),
        ideal=PEAKS,
        rows=1,
        error=0.0,
        source="made up",
        date="2026-11-21",
    )
    return Table(info, (HEADS, REACH, GROUP), np.full((12, 11, 5), np.log(slower)))


def spec(
    part: str, q: int = 32, kv: int = 8, span: str = "full", width: int = 128, kv_bytes: float = 2.0
) -> Attention:
    return Attention(
        "attention",
        part,  # type: ignore[arg-type]
        kv_bytes,
        q_heads=q,
        kv_heads=kv,
        qk_dim=width,
        v_dim=width,
        span=span,
        pair_flops=4.0 * q * width,
        key_width=2.0 * kv * width,
    )


def load(one: Attention, tokens: float, sequences: float, context: float) -> AttentionLoad:
    """Of one spec in one step; full causal attention, `context` as in `AttentionLoad`."""
    each = tokens / sequences
    seen = context if one.part == "decode" else context + (each + 1) / 2
    keys = context if one.part == "decode" else context + each
    if one.span[0] == "w":
        seen = min(seen, float(one.span[1:]))
    cell = lambda value: np.array([[float(value)]])  # noqa: E731
    return AttentionLoad(
        cell(tokens * seen * one.pair_flops),
        cell((sequences * keys + tokens) * one.key_width),
        cell(tokens * 2 * (one.q_heads + one.kv_heads) * one.qk_dim),
        np.array([tokens]),
        np.array([sequences]),
        np.array([context]),
    )


def seconds(one: Attention, tokens: float, sequences: float, context: float, *tables: Table) -> float:
    priced = attention._softmax(one, Profile("h100_sxm", "attention", tables), "vllm", 132.0, 0.0)
    assert priced is not None
    return float(priced.seconds(attention._row(load(one, tokens, sequences, context), 0))[0])


def ideally(flops: float, cached: float, new: float) -> float:
    return float(Ideal(**PEAKS).seconds(np.array(flops), np.array(cached), np.array(new)))


@pytest.mark.parametrize(("batch", "context"), [(1, 100), (7, 1000), (64, 4000), (256, 9000)])
def test_a_table_gives_back_its_ideal_for_decode(batch: int, context: int) -> None:
    one = spec("decode")
    cached, new = batch * context * 2048 * 2.0, batch * (2 * 40 * 128 * 2 + 2048 * 2.0)
    expected = 1.5 * ideally(batch * context * 4 * 32 * 128, cached, new)
    assert seconds(one, batch, batch, context, table("decode", slower=1.5)) == pytest.approx(
        expected, rel=0.01
    )


@pytest.mark.parametrize(("prompts", "length"), [(1, 128), (1, 3000), (4, 1024), (2, 12000)])
def test_a_table_gives_back_its_ideal_for_prompts(prompts: int, length: int) -> None:
    one, tokens = spec("prefill"), prompts * length
    new = tokens * (2 * 40 * 128 * 2 + 2048 * 2.0)
    expected = ideally(tokens * (length + 1) / 2 * 4 * 32 * 128, tokens * 2048 * 2.0, new)
    assert seconds(one, tokens, prompts, 0, table("prefill")) == pytest.approx(expected, rel=0.02)


def test_chunks_after_a_prefix_add_up_to_the_whole_prompt() -> None:
    one, tables = spec("prefill"), table("prefill")
    whole = seconds(one, 16384, 1, 0, tables)
    chunks = sum(seconds(one, 4096, 1, before, tables) for before in (0, 4096, 8192, 12288))
    assert chunks == pytest.approx(whole, rel=0.1)


def test_a_short_chunk_waits_for_a_loop_over_all_its_keys() -> None:
    """16 queries on 32 heads leave most SMs idle: ten times the queries hardly take longer."""
    one, tables = spec("prefill"), table("prefill")
    few, more = (seconds(one, count, 1, 12000, tables) for count in (8, 64))
    assert few == pytest.approx(more, rel=1e-6)
    assert few > seconds(one, 8, 1, 1000, tables)


def test_the_engine_s_own_table_is_taken_then_its_kin_s() -> None:
    one = spec("decode")
    own, kin = table("decode", "vllm", 2.0), table("decode", "sglang", 1.0)
    both = seconds(one, 8, 8, 1000, kin, own)
    assert both == pytest.approx(seconds(one, 8, 8, 1000, own))
    profile = Profile("h100_sxm", "attention", (kin,))
    stand_in = attention._softmax(one, profile, "trtllm", 132.0, 0.0)
    assert stand_in is not None
    assert stand_in.source == "fitted"
    mine = attention._softmax(one, profile, "sglang", 132.0, 0.0)
    assert mine is not None
    assert mine.source == "measured"


def test_a_window_has_its_own_table_or_is_full_attention_to_what_it_sees() -> None:
    full, narrow = table("decode", slower=1.0), table("decode", slower=3.0, window=1024)
    near, far = spec("decode", span="w1024"), spec("decode", span="w64")
    assert seconds(near, 64, 64, 8000, full, narrow) == pytest.approx(
        3 * seconds(near, 64, 64, 8000, full), rel=0.01
    )
    assert seconds(far, 64, 64, 8000, full, narrow) == pytest.approx(
        seconds(spec("decode"), 64, 64, 64, full), rel=0.05
    )
    assert nearest(Profile("x", "attention", (narrow,)), "vllm", lambda _: (np.inf,), op="softmax") is None


def test_kernels_without_a_table_cost_what_the_roofline_says() -> None:
    engine, roofline = catalogue.engine("vllm"), Roofline(H100)
    bare = Attention("products", "prefill", 2.0)
    priced = attention.prepare([bare, spec("decode")], H100, engine, roofline)
    assert priced.sources == ("roofline", "measured")
    both = load(spec("decode"), 8, 8, 1000)
    two = AttentionLoad(
        *(np.repeat(a, 2, axis=0) for a in (both.flops, both.kv, both.acts)),
        both.tokens,
        both.sequences,
        both.context,
    )
    assert priced(two).seconds[0] == pytest.approx(roofline.attention([bare])(both).seconds[0])
    nothing = AttentionLoad(
        *(0.0 * a for a in (two.flops, two.kv, two.acts, two.tokens, two.sequences, two.context))
    )
    assert not priced(nothing).seconds.any()


@settings(max_examples=60, deadline=None)
@given(
    part=st.sampled_from(["decode", "prefill"]),
    gpu=st.sampled_from(["h100_sxm", "b200_sxm", "l40s"]),
    engine=st.sampled_from(["vllm", "sglang", "trtllm"]),
    span=st.sampled_from(["full", "w128"]),
    size=st.integers(1, 512),
    context=st.integers(1, 60000),
    more=st.integers(1, 5000),
)
def test_more_work_never_takes_less_time(
    part: str, gpu: str, engine: str, span: str, size: int, context: int, more: int
) -> None:
    one = spec(part, q=64, kv=8, span=span, width=64)
    known = catalogue.gpu(gpu)
    priced = attention.prepare([one], known, catalogue.engine(engine), Roofline(known))
    at = lambda count, held: float(  # noqa: E731
        priced(load(one, count, count if part == "decode" else 1, held)).seconds[0, 0]
    )
    now = at(size, context)
    assert at(size + more, context) >= now * (1 - 1e-9)
    assert at(size, context + more) >= now * (1 - 1e-9)


def test_a_surface_that_falls_goes_half_way() -> None:
    dip = Surface.of(lambda one, two: 1.0 + 0.0 * two - 0.5 * ((one > 3) & (one < 20)), 1.0)
    at = dip.at(np.array([1.0, 2.0, 10.0, 100.0]), np.full(4, 7.0))
    assert at == pytest.approx([0.5**0.5, 0.5**0.5, 0.5**0.5, 1.0])


def test_keys_and_values_come_from_memory_whatever_a_benchmark_finds_in_its_cache() -> None:
    """Kernels that run twice as fast while 50 MB hold their keys: in a step nothing of them is left there."""
    one, held = spec("decode"), table("decode")
    in_cache = HEADS[:, None, None] * REACH[None, :, None] * 512 < 50e6
    fast = Table(held.info, held.axes, np.where(in_cache, -np.log(2.0), 0.0) + 0.0 * held.values)
    profile = Profile("h100_sxm", "attention", (fast,))
    work = attention._row(load(one, 4, 4, 2000), 0)
    cached, swept = (attention._softmax(one, profile, "vllm", 132.0, l2) for l2 in (0.0, 50e6))
    assert cached is not None
    assert swept is not None
    assert cached.seconds(work)[0] < 0.7 * swept.seconds(work)[0]


def latent(part: str, heads: int = 16) -> Attention:
    """DeepSeek-V3's on one rank: rank 512, rotary 64, heads of 128 + 64 and 128."""
    weights, expanded = heads * 512 * 256, part == "prefill"
    return Attention(
        "attention",
        part,  # type: ignore[arg-type]
        2.0,
        weight_bytes=2.0 * weights,
        q_heads=heads,
        kv_heads=1,
        qk_dim=192,
        v_dim=128,
        latent=True,
        span="full",
        pair_flops=2.0 * heads * (320 if expanded else 1088),
        key_flops=2.0 * weights if expanded else 0.0,
        token_flops=0.0 if expanded else 2.0 * weights,
        key_width=576.0,
    )


def latent_seconds(
    one: Attention, tokens: float, sequences: float, context: float, engine: str = "trtllm"
) -> float:
    known = catalogue.gpu("h200_sxm")
    each = tokens / sequences
    pairs = tokens * (context if one.part == "decode" else context + (each + 1) / 2)
    keys = sequences * (context if one.part == "decode" else context + each)
    cell = lambda value: np.array([[float(value)]])  # noqa: E731
    work = AttentionLoad(
        cell(pairs * one.pair_flops + keys * one.key_flops + tokens * one.token_flops),
        cell((keys + tokens) * one.key_width),
        cell(tokens * one.q_heads * 320),
        np.array([tokens]),
        np.array([sequences]),
        np.array([context]),
    )
    priced = attention.prepare([one], known, catalogue.engine(engine), Roofline(known))
    assert priced.sources == ("measured",)
    return float(priced(work).seconds[0, 0])


def test_latent_decode_is_the_kernel_and_the_products_around_it() -> None:
    """TensorRT-LLM on H200, 16 heads, 64 sequences of 4,096: 91 us in the kernel, 9 in the two products."""
    assert 1e6 * latent_seconds(latent("decode"), 64, 64, 4096) == pytest.approx(100, rel=0.05)
    assert latent_seconds(latent("decode", 128), 64, 64, 4096) > latent_seconds(
        latent("decode"), 64, 64, 4096
    )


def test_a_latent_prompt_expands_the_keys_that_it_finds_cached() -> None:
    one = latent("prefill")
    fresh, after = (latent_seconds(one, 2048, 1, cached) for cached in (0, 8192))
    pairs = (8192 + 1024) / 1024
    assert fresh < after < pairs * fresh
    expansion = 8192 * one.key_flops / catalogue.gpu("h200_sxm").peak_flops("bf16")
    assert after > fresh + expansion


def test_a_state_update_streams_its_states() -> None:
    """Qwen3.5's gated delta rule: 64 heads of 128 x 128, in fp32, read and written by each sequence."""
    known, width = catalogue.gpu("b200_sxm"), 64 * 128 * 128.0
    rule = Attention("recurrence", "decode", 4.0, q_heads=64, key_width=width, token_flops=7.0 * width)
    priced = attention.prepare([rule], known, catalogue.engine("vllm"), Roofline(known))
    count = np.array([16.0, 128.0])
    few, many = priced(
        AttentionLoad(
            7.0 * width * count[None], 2 * width * count[None], 20000 * count[None], count, count, 0 * count
        )
    ).seconds[0]
    floor = 128 * 2 * width * 4 / known.memory_bytes_s
    assert floor < many < 2 * floor
    assert 4 * few < many < 9 * few


def test_shipped_tables_are_small_named_and_finite() -> None:
    names = (
        "a100_sxm",
        "h100_sxm",
        "h200_sxm",
        "b200_sxm",
        "b300_sxm",
        "gb200",
        "gb300",
        "l40s",
        "rtx_pro_6000",
    )
    profiles = [shipped("attention", name) for name in names]
    for profile in profiles:
        assert profile is not None
        assert len({t.info.name for t in profile.tables}) == len(profile.tables)
        for one in profile.tables:
            assert np.isfinite(one.values).all()
            assert one.info.rows > 0
            assert one.info.source
            assert one.info.error < 0.3
    latent = {t.info.key["engine"] for t in profiles[1].find(op="latent", part="prefill")}  # type: ignore[union-attr]
    assert "sglang" not in latent  # its rows ran absorbed products: three times TensorRT-LLM's


# -- measured kernels -------------------------------------------------------------------------------------

DATA = os.environ.get("PLANC_DATA")
LAYERS = "operators/llmservingsim/perf/RTXPRO6000"


@pytest.mark.skipif(DATA is None, reason="PLANC_DATA does not name a folder of measured data")
@pytest.mark.parametrize(
    ("model", "q", "kv"), [("meta-llama/Llama-3.1-8B", 32, 8), ("Qwen/Qwen3-32B", 64, 8)]
)
def test_attention_of_another_engine_version(model: str, q: int, kv: int) -> None:
    """vLLM 0.19 on RTX PRO 6000, none of it fitted: whole prompts, and decodes of more than 2,048 tokens."""
    known = catalogue.gpu("rtx_pro_6000")
    errors: dict[str, list[float]] = {"prefill": [], "decode": []}
    with (Path(str(DATA)) / LAYERS / model / "bf16/tp1/attention.csv").open() as file:
        rows = list(csv.DictReader(file))
    for part, found in errors.items():
        one = spec(part, q, kv)
        price = attention.prepare([one], known, catalogue.engine("vllm"), Roofline(known))
        for row in rows:
            chunk, cached, seqs, context = (
                float(row[name]) for name in ("prefill_chunk", "kv_prefill", "n_decode", "kv_decode")
            )
            whole = part == "prefill" and chunk and not seqs and not cached
            decode = part == "decode" and not chunk and context > 2048
            if whole or decode:
                work = load(one, seqs or chunk, seqs or 1, context if seqs else 0)
                found.append(abs(1e6 * price(work).seconds[0, 0] / float(row["time_us"]) - 1))
    assert len(errors["prefill"]) >= 15
    assert len(errors["decode"]) >= 60
    assert np.median(errors["decode"]) < 0.05
    assert np.median(errors["prefill"]) < 0.12
