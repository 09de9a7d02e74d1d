"""Which attention kernel an unmeasured GPU is taken to run, and that scores are of what is shipped."""

from __future__ import annotations

import numpy as np
import pytest

from planc.cost_model import attention_kernels, catalogue
from planc.cost_model.attention_kernels import kernels
from planc.cost_model.efficiency import efficiencies
from planc.cost_model.kernels import Attention, AttentionLoad
from planc.cost_model.roofline import Roofline
from planc.cost_model.softmax import Constants


@pytest.mark.parametrize(
    ("gpu", "engine", "head_dim", "narrow", "kernel"),
    [
        ("l4", "vllm", 128, False, "fa2"),
        ("l4", "vllm", 128, True, "flashinfer"),
        ("a10", "trtllm", 128, False, "fmha"),
        ("h100_nvl", "sglang", 128, True, "fa3"),
        ("h100_nvl", "trtllm", 128, False, "fmha_hopper"),
        ("b200_sxm", "vllm", 192, True, "triton_wide"),
        ("b200_sxm", "", 128, True, "trtllm_gen"),
    ],
)
def test_choice_of_a_kernel(gpu: str, engine: str, head_dim: int, narrow: bool, kernel: str) -> None:
    found = kernels().choice(catalogue.gpu(gpu).arch, engine, head_dim, narrow)
    assert found is not None
    assert found.kernel == kernel


def test_kernels_are_named_and_own_what_the_physics_knows() -> None:
    known = kernels()
    assert {choice.kernel for choice in known.choices} == set(known.kernels)
    assert all(set(kernel.constants) <= set(Constants.names()) for kernel in known.kernels.values())


def test_other_vendors_and_measured_numbers() -> None:
    known, named = kernels(), efficiencies()
    amd, ada = catalogue.gpu("mi300x"), catalogue.gpu("rtx_4090")
    assert known.choice(amd.arch, "vllm", 128, False) is None
    general = attention_kernels.constants(known, None, amd, named)
    assert general.prefill_peak == 0.40  # stated for this GPU
    assert general.decode_kcycles == named.value("attention_decode_kcycles")
    own = attention_kernels.constants(known, known.choice(ada.arch, "vllm", 128, False), ada, named)
    assert own.decode_memory == 0.945
    assert own.decode_kcycles == known.kernels["fa2"].constants["decode_kcycles"]


@pytest.mark.parametrize("cache", [1.0, 2.0])
@pytest.mark.parametrize("part", ["prefill", "decode"])
@pytest.mark.parametrize("window", [0, 512])
def test_what_is_scored_is_what_ships(part: str, window: int, cache: float) -> None:
    """A sample of measured rows is predicted as `Roofline` predicts the same kernel."""
    pytest.importorskip("scipy")
    from planc.cost_model.fitting.attention_physics import Sample
    from planc.cost_model.fitting.attention_rows import Rows

    q, kv, dim, batch, reach = 32.0, 8.0, 128.0, np.array([1.0, 4.0]), np.array([300.0, 2000.0])
    seen = np.minimum(reach, window or np.inf)
    tokens = batch if part == "decode" else batch * reach
    pairs = batch * (seen if part == "decode" else seen * (seen + 1) / 2 + (reach - seen) * seen)
    keys = batch * (seen if part == "decode" else reach)
    written = 2 * kv * dim * cache * tokens
    rows = Rows(
        name="made up",
        key={"op": "softmax", "part": part, "engine": "trtllm", "head_dim": 128, "kv_bytes": cache},
        source="",
        precision="bf16",
        coords={
            "heads": batch * (kv if part == "decode" else q),
            "reach": reach,
            "group": q / kv + 0 * batch,
        },
        flops=4 * dim * q * pairs,
        cached=2 * dim * kv * keys * cache,
        new=4.0 * dim * (q + kv) * tokens + written,
        seconds=np.ones(2),
    )
    gpu = catalogue.gpu("h100_sxm")
    roofline = Roofline(gpu, engine="trtllm")
    choice = kernels().choice(gpu.arch, "trtllm", 128, cache < 2)
    constants = attention_kernels.constants(kernels(), choice, gpu, roofline.named)
    spec = Attention(
        "attention", part, cache, q_heads=q, kv_heads=kv, qk_dim=128, v_dim=128, key_width=2 * kv * dim,
        pair_flops=4 * q * dim,
    )  # type: ignore[arg-type]  # fmt: skip
    load = AttentionLoad(
        flops=rows.flops[None],
        kv=((rows.cached + written) / cache)[None],
        acts=((rows.new - written) / 2.0)[None],
        tokens=tokens,
        sequences=batch,
        context=reach if part == "decode" else np.zeros(2),
    )
    shipped = roofline.attention([spec])(load).seconds[0]
    assert Sample.of(rows, gpu.name, None).ratio(constants) == pytest.approx(shipped, rel=1e-9)
