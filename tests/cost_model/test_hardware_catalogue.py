"""The catalogue: complete, plausible, honest about sources, helpful about typos."""

from __future__ import annotations

import pytest

from planc.cost_model import catalogue
from planc.cost_model.efficiency import efficiencies
from planc.cost_model.formats import fmt, formats, product_precision
from planc.errors import UnknownName


def test_every_gpu_has_a_source_a_date_and_plausible_rates() -> None:
    assert len(catalogue.gpus()) >= 15
    for gpu in catalogue.gpus().values():
        assert len(gpu.source) > 10
        assert gpu.date.startswith("20")
        assert gpu.price_source
        assert gpu.idle_w < gpu.tdp_w
        assert {"bf16", "fp32"} <= gpu.peak_tflops.keys()
        ridge = gpu.peak_flops("bf16") / gpu.memory_bytes_s
        assert gpu.vendor == "cpu" or 30 < ridge < 600, gpu.name
        assert (gpu.nvlink_domain > 1) == (gpu.nvlink_gbytes_s > 0), gpu.name


def test_aliases_resolve_and_do_not_collide() -> None:
    names = [*catalogue.gpus(), *(a for gpu in catalogue.gpus().values() for a in gpu.aliases)]
    assert len(names) == len(set(names))
    assert catalogue.gpu("h200").name == "h200_sxm"


@pytest.mark.parametrize(
    ("look_up", "wrong", "near"),
    [
        (catalogue.gpu, "h200_smx", "h200_sxm"),
        (catalogue.engine, "vlm", "vllm"),
        (fmt, "fp8_e4m3", "fp8"),
    ],
)
def test_unknown_names_come_with_near_ones(look_up: object, wrong: str, near: str) -> None:
    with pytest.raises(UnknownName, match=f"{wrong}.*{near}"):
        look_up(wrong)  # type: ignore[operator]


def test_unknown_name_without_near_ones_lists_all() -> None:
    with pytest.raises(UnknownName, match=r"Known: .*vllm"):
        catalogue.engine("zzzzzz")


def test_engines_name_only_formats_that_exist() -> None:
    archs = {gpu.arch for gpu in catalogue.gpus().values()}
    for profile in catalogue.engines().values():
        assert set(profile.archs) <= archs
        for support in profile.archs.values():
            for weights, activations in support.linear:
                assert "weight" in fmt(weights).roles
                assert "activation" in fmt(activations).roles
            assert all("kv" in fmt(kv).roles for kv in support.kv)


def test_graph_sizes_are_those_of_vllm() -> None:
    rule = catalogue.engine("vllm").cuda_graphs
    assert rule.sizes(32) == (1, 2, 4, 8, 16, 24, 32)
    assert rule.sizes(2048)[-3:] == (480, 496, 512)
    assert rule.sizes(20)[-1] == 20  # the batch cap itself is captured
    assert rule.sizes(1) == (1,)


def test_bits_count_the_scales() -> None:
    assert fmt("w4a16").bits == 4 + 16 / 128
    assert fmt("nvfp4").bits == 4 + 8 / 16
    assert fmt("mxfp4").bits == 4 + 8 / 32
    assert fmt("fp8").bytes == 1


@pytest.mark.parametrize(
    ("weights", "activations", "arithmetic"),
    [
        ("bf16", "bf16", "bf16"),
        ("fp8", "fp8", "fp8"),
        ("w4a16", "bf16", "bf16"),
        ("mxfp4", "mxfp8", "fp8"),
        ("nvfp4", "nvfp4", "fp4"),
        ("int8", "bf16", "bf16"),
    ],
)
def test_products_run_in_the_finer_arithmetic(weights: str, activations: str, arithmetic: str) -> None:
    assert product_precision(weights, activations) == arithmetic


def test_accuracy_figures_and_efficiencies_say_where_they_come_from() -> None:
    for entry in formats().values():
        assert entry.accuracy_drop.note
        assert 0 <= entry.accuracy_drop.value < 0.05
    named = efficiencies()
    for efficiency in named.values.values():
        assert efficiency.note
    lows = [named.bands[source].low for source in ("measured", "fitted", "roofline", "assumed")]
    highs = [named.bands[source].high for source in ("measured", "fitted", "roofline", "assumed")]
    assert lows == sorted(lows, reverse=True)
    assert highs == sorted(highs)
