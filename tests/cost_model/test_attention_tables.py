"""Attention tables from rows: what writing to the cache takes besides, and benchmarks of one width."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("scipy")
pytest.importorskip("pandas")

from planc.cost_model import catalogue
from planc.cost_model.fitting import attention, attention_append, attention_rows
from planc.cost_model.fitting.attention_rows import Rows
from planc.cost_model.measured.attention_tables import Append

H100 = catalogue.gpu("h100_sxm")
GROUPS = np.array([1.0, 2.0, 4.0])


def prefill(slow: dict[float, float]) -> Rows:
    """A kernel at half the peak, and `slow` ns per token and KV head for writing, by KV heads."""
    batch, kv, reach, group = (
        axis.reshape(-1)
        for axis in np.meshgrid(
            2.0 ** np.arange(6),
            2.0 ** np.arange(5),
            [128.0, 512.0, 2048.0, 8192.0],
            [1.0, 4.0],
            indexing="ij",
        )
    )
    heads, width = batch * kv * group, 128.0
    flops = 4 * width * heads * reach * (reach + 1) / 2
    cached, new = 4 * width * batch * kv * reach, 4 * width * reach * batch * kv * (group + 1)
    append = np.array([slow[k] for k in kv]) * 1e-9 * batch * kv * reach
    return Rows(
        name="made up",
        key={
            "op": "softmax",
            "part": "prefill",
            "engine": "vllm",
            "head_dim": 128,
            "kv_bytes": 1.0,
            "window": 0,
        },
        source="",
        precision="bf16",
        coords={"heads": heads, "reach": reach, "group": group},
        flops=flops,
        cached=cached,
        new=new,
        seconds=8e-6 + flops / (0.5 * H100.peak_flops("bf16")) + new / H100.memory_bytes_s + append,
        kv_heads=kv,
    )


def test_what_writing_takes_is_told_from_attention() -> None:
    slow = {1.0: 0.5, 2.0: 2.0, 4.0: 1.0, 8.0: 0.0, 16.0: 0.0}
    rows = prefill(slow)
    table = attention._table(rows, H100, GROUPS, 0.0)
    append = Append.of(table)
    assert append.at(np.array([2.0, 4.0])) * 1e9 == pytest.approx([2.0, 1.0], rel=0.15)
    assert append.at(8.0) * 1e9 == pytest.approx(0.0, abs=0.1)
    assert np.median(np.abs(attention_append.seconds(table, rows) / rows.seconds - 1)) < 0.03


def test_writing_that_costs_all_the_same_is_not_told_apart() -> None:
    rows = prefill(dict.fromkeys((1.0, 2.0, 4.0, 8.0, 16.0), 0.3))
    assert attention._table(rows, H100, GROUPS, 0.0).extra == {}
    assert Append.nothing().at(4.0) == 0.0


@pytest.mark.parametrize(("slower", "nodes"), [(1.0, [1, 2, 4, 8]), (1.3, [1, 2, 3, 4, 5, 6, 8])])
def test_groups_that_a_kernel_packs_badly_get_nodes_of_their_own(slower: float, nodes: list[int]) -> None:
    heads, reach, group = (
        axis.reshape(-1)
        for axis in np.meshgrid(
            2.0 ** np.arange(10), 2.0 ** np.arange(6, 14), [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0], indexing="ij"
        )
    )
    flops, packed = heads * reach**2 * 256, np.where(np.isin(group, 2.0 ** np.arange(4)), 1.0, slower)
    rows = Rows(
        name="made up",
        key={"op": "softmax", "part": "prefill", "engine": "vllm"},
        source="",
        precision="bf16",
        coords={"heads": heads, "reach": reach, "group": group},
        flops=flops,
        cached=np.zeros_like(flops),
        new=np.zeros_like(flops),
        seconds=(5e-6 + flops / (0.5 * H100.peak_flops("bf16"))) * packed,
    )
    assert attention._groups(rows, H100).tolist() == nodes


def frame(grows: bool) -> Any:
    """A convolution of 16 key heads and 16 or 64 value heads."""
    import pandas

    batch, reach, values = (
        axis.reshape(-1)
        for axis in np.meshgrid([1.0, 8.0, 64.0], [16.0, 1024.0, 8192.0], [16.0, 64.0], indexing="ij")
    )
    width = 32 + values if grows else 16 + 0 * values
    return pandas.DataFrame(
        {
            "batch_size": batch, "seq_len": reach, "num_k_heads": 16.0 + 0 * values, "num_v_heads": values,
            "latency": 5e-3 + 1e-7 * batch * reach * width,
        }
    )  # fmt: skip


@pytest.mark.parametrize("grows", [True, False])
def test_convolutions_of_one_width_are_found_by_their_times(grows: bool) -> None:
    assert attention_rows._one_width(frame(grows)) is not grows
