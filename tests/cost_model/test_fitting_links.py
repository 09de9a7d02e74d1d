"""Which rows of expert exchanges are fitted to."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from planc.cost_model.fitting import links, sources

pandas = pytest.importorskip("pandas", reason="fitting needs the measured extra")

SOURCE = sources.Source("gb200", "comm", "vllm", "1", "moe_a2a_perf", Path())


def timed(latency: list[float], ranks: int = 4) -> links._Rows:
    """One model's combine at 1, 4, 16 ... tokens, us."""
    rows = pandas.DataFrame({"num_tokens": 4.0 ** np.arange(len(latency)), "latency": latency})
    model = {"hidden_size": 4096, "topk": 8, "width": 2.0, "ep_size": ranks, "phase": "combine"}
    (found,) = links._by_bytes(SOURCE, rows.assign(**model))
    return found


def test_first_calls_that_take_longer_than_more_tokens_are_dropped() -> None:
    found = timed([140.0, 90.0, 60.0, 70.0, 200.0])
    assert found.dropped == 2
    assert found.seconds[0] * 1e6 == pytest.approx([60.0, 70.0, 200.0])


def test_rows_within_the_noise_of_more_tokens_stay() -> None:
    assert timed([62.0, 60.0, 65.0]).dropped == 0


def test_exchanges_keep_the_ranks_that_they_were_timed_on() -> None:
    assert timed([60.0, 70.0], ranks=4).ranks == (4,)
