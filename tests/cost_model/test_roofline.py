"""The roofline: physics that must hold on any GPU, and the measurements its constants came from."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planc.cost_model import catalogue, softmax
from planc.cost_model.kernels import BOUNDS, Attention, AttentionLoad, Gemm, GroupedGemm
from planc.cost_model.roofline import Roofline

gpus = st.sampled_from(list(catalogue.gpus()))


def gemm(gpu: str, m: object, n: int, k: int, fmt: str = "bf16") -> np.ndarray:
    price = Roofline(catalogue.gpu(gpu)).gemm([Gemm(n, k, fmt, fmt)])
    return price(np.atleast_2d(np.asarray(m, dtype=float))).seconds[0]


@settings(deadline=None)
@given(gpu=gpus, m=st.integers(1, 20000), n=st.integers(64, 60000), k=st.integers(64, 30000))
def test_no_gemm_beats_the_peaks(gpu: str, m: int, n: int, k: int) -> None:
    entry = catalogue.gpu(gpu)
    time = gemm(gpu, m, n, k)[0]
    assert time > 2.0 * m * n * k / entry.peak_flops("bf16")
    assert time > 2.0 * (n * k + m * k + m * n) / entry.memory_bytes_s


@settings(deadline=None)
@given(gpu=gpus, m=st.integers(1, 4000), n=st.integers(64, 30000), k=st.integers(64, 16000))
def test_more_of_anything_is_never_faster(gpu: str, m: int, n: int, k: int) -> None:
    time = gemm(gpu, m, n, k)[0]
    assert gemm(gpu, m + 1, n, k)[0] >= time * (1 - 1e-12)
    assert gemm(gpu, m, n + 8, k)[0] >= time * (1 - 1e-12)


def linears(gpu: str, tokens: int, tp: int) -> tuple[float, float]:
    """(MBU, MFU) of the four linears of a Llama-2-70B layer."""
    entry = catalogue.gpu(gpu)
    shapes = [(10240 // tp, 8192), (8192, 8192 // tp), (57344 // tp, 8192), (8192, 28672 // tp)]
    time = sum(gemm(gpu, tokens, n, k)[0] for n, k in shapes)
    elements = sum(n * k for n, k in shapes)
    mbu = 2.0 * elements / entry.memory_bytes_s / time
    return mbu, 2.0 * tokens * elements / entry.peak_flops("bf16") / time


@pytest.mark.parametrize(
    ("gpu", "tp", "tokens", "mbu"),
    [("h100_sxm", 1, 8, 0.87), ("h100_sxm", 8, 8, 0.73), ("a100_sxm", 1, 8, 0.78), ("a100_sxm", 8, 8, 0.69)],
)
def test_small_batches_reach_the_measured_bandwidth(gpu: str, tp: int, tokens: int, mbu: float) -> None:
    assert linears(gpu, tokens, tp)[0] == pytest.approx(mbu, rel=0.15)


@pytest.mark.parametrize(
    ("gpu", "tp", "tokens", "mfu"),
    [
        ("h100_sxm", 1, 128, 0.36),
        ("h100_sxm", 1, 256, 0.62),
        ("h100_sxm", 1, 512, 0.76),
        ("h100_sxm", 1, 1024, 0.64),
        ("h100_sxm", 1, 2048, 0.72),
        ("h100_sxm", 1, 4096, 0.70),
        ("h100_sxm", 8, 256, 0.46),
        ("h100_sxm", 8, 512, 0.61),
        ("h100_sxm", 8, 4096, 0.75),
        ("a100_sxm", 1, 4096, 0.77),
    ],
)
def test_large_batches_reach_the_measured_flops(gpu: str, tp: int, tokens: int, mfu: float) -> None:
    """MFU of vidur's tables, bf16; the roofline's band is a third."""
    assert linears(gpu, tokens, tp)[1] == pytest.approx(mfu, rel=0.30)


def test_waves_and_tiles_quantize() -> None:
    """One row more than a full wave of tiles costs a step up, then nothing until the next."""
    m = np.arange(1, 8193)
    time = gemm("h100_sxm", m, 8192, 8192)
    steps = np.diff(time) / time[:-1]
    assert steps.max() > 0.02
    assert np.median(steps) < 1e-4


def test_narrow_weights_help_small_batches_and_narrow_arithmetic_large_ones() -> None:
    price = Roofline(catalogue.gpu("h100_sxm")).gemm(
        [
            Gemm(28672, 8192, "bf16", "bf16"),
            Gemm(28672, 8192, "w4a16", "bf16"),
            Gemm(28672, 8192, "fp8", "fp8"),
        ]
    )
    small, large = price(np.array([[8.0, 8192.0]])).seconds.T
    assert small[1] < small[2] < small[0]
    assert large[2] < 0.7 * large[0]
    assert large[1] == pytest.approx(large[0], rel=0.05)


def test_what_bounds_a_product_is_named() -> None:
    price = Roofline(catalogue.gpu("h100_sxm")).gemm(
        [Gemm(28672, 8192, "bf16", "bf16"), Gemm(64, 64, "bf16", "bf16")]
    )
    found = price(np.array([[1.0, 8192.0]])).bound
    assert [BOUNDS[i] for i in found[0]] == ["memory", "compute"]
    assert [BOUNDS[i] for i in found[1]] == ["launch", "launch"]


EXPERTS = GroupedGemm(
    experts=128,
    total_experts=128,
    top_k=8,
    elements=128 * 3 * 4096 * 1536.0,
    flops_per_pair=6.0 * 4096 * 1536,
    hidden=4096,
    inner=1536,
    weights="bf16",
    activations="bf16",
)


def spread(ranks: int) -> GroupedGemm:
    """Whole experts over so many ranks."""
    return replace(EXPERTS, experts=128 / ranks, elements=EXPERTS.elements / ranks, ranks=ranks)


def test_experts_stream_their_weights_once_all_are_touched() -> None:
    gpu = catalogue.gpu("h100_sxm")
    price = Roofline(gpu).grouped_gemm([EXPERTS])
    one, many = price(np.array([[1.0, 1024.0]])).seconds[0]
    whole = 2 * EXPERTS.elements / gpu.memory_bytes_s
    assert one < 0.15 * whole + 60e-6
    assert whole < many < 2 * whole


def test_experts_spread_over_ranks_wait_for_the_fullest() -> None:
    """Routers prefer some experts: the fullest of eight ranks has more than an eighth of the work."""
    price = Roofline(catalogue.gpu("h100_sxm")).grouped_gemm([EXPERTS, spread(2), spread(8)])
    whole, half, eighth = price(np.full((3, 1), 20000.0)).seconds[:, 0]
    assert 0.5 * whole < half < 0.7 * whole
    assert 0.125 * whole < eighth < 0.35 * whole


def test_decode_attention_streams_the_cache() -> None:
    gpu = catalogue.gpu("h100_sxm")
    price = Roofline(gpu).attention(
        [Attention("attention", "decode", 2.0), Attention("attention", "decode", 1.0)]
    )
    tokens = np.array([64.0])
    load = AttentionLoad(
        np.full((2, 1), 64 * 8000 * 4 * 8192.0),
        np.full((2, 1), 64 * 8000 * 2048.0),
        np.full((2, 1), 64 * 16384.0),
        tokens,
        tokens,
        np.array([8000.0]),
    )
    wide, narrow = price(load).seconds[:, 0]
    floor = 64 * 8000 * 2048 * 2 / gpu.memory_bytes_s
    assert floor < wide < 1.5 * floor
    assert narrow == pytest.approx(wide / 2, rel=0.1)


def test_fused_pointwise_work_pays_bytes_but_no_launch() -> None:
    price = Roofline(catalogue.gpu("h100_sxm")).elementwise(np.array([[1.0], [0.0]]))
    alone, fused = price(np.array([[1e4], [1e4]])).seconds[:, 0]
    assert fused < 0.01 * alone
    assert price(np.array([[0.0], [0.0]])).seconds.max() == 0


def tiled(queries: float, before: float, seen: float) -> softmax.Work:
    one, none = np.array([1.0]), np.zeros(1)
    plain = softmax.Work(one, one, none, none, one, np.array([seen]), none, 0.0, 0.0)
    return plain.tiled(np.array([queries]), before, one)


def test_tiles_multiply_what_their_masks_hide() -> None:
    causal, chunk, window = tiled(4096, 0, 4097 / 2), tiled(4096, 1000, 1000 + 4097 / 2), tiled(4096, 0, 128)
    assert causal.blocks[0] == chunk.blocks[0] == 32
    assert causal.flops[0] == pytest.approx(1 + 64 / 2048, rel=1e-3)
    assert causal.loop[0] == pytest.approx(4096 / (2048 + 64), rel=1e-3)
    assert chunk.loop[0] == pytest.approx(5096 / (3048 + 64), rel=1e-3)
    assert window.flops[0] == pytest.approx(2.0)  # a tile of 128 queries visits 256 keys
    assert window.loop[0] == pytest.approx(1.0)


def test_short_prompts_pad_a_tile() -> None:
    short = tiled(5, 0, 3)
    assert short.flops[0] == pytest.approx(16 * 11 / (5 * 3))
    assert short.blocks[0] == 1.0
