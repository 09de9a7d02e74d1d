"""Closed forms of attended pairs and cached tokens against counting them one by one."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planc.cost_model.features import StepLoad

SPANS = ("full", "both", "w16", "c16", "k16")


def seen(span: str, query: int, length: int) -> set[int]:
    """Keys that the query at position `query` of a sequence of `length` tokens sees."""
    if span == "both":
        return set(range(length))
    if span[0] == "w":
        return set(range(max(0, query + 1 - int(span[1:])), query + 1))
    if span[0] == "c":
        return set(range(query - query % int(span[1:]), query + 1))
    return set(range(query + 1))


@settings(deadline=None)
@given(
    span=st.sampled_from(SPANS), cached=st.integers(0, 70), new=st.integers(1, 70), chunks=st.integers(1, 3)
)
def test_prompt_chunks(span: str, cached: int, new: int, chunks: int) -> None:
    reach = int(span[1:]) if span[0] == "k" else cached + new
    queries = [seen(span, q, cached + new) for q in range(cached, cached + new)]
    load = StepLoad(0, 0, new * chunks, chunks, cached).arrays()
    found = load.prefill([f"P:{span}", f"K:{span}"])
    assert found[f"P:{span}"][0] == pytest.approx(chunks * sum(min(len(keys), reach) for keys in queries))
    read = set.union(*queries)
    assert found[f"K:{span}"][0] == pytest.approx(chunks * len(read))


@settings(deadline=None)
@given(
    span=st.sampled_from(("full", "both", "w16", "k16")), context=st.integers(1, 100), seqs=st.integers(1, 9)
)
def test_decoding_tokens(span: str, context: int, seqs: int) -> None:
    keys = min(len(seen(span, context - 1, context)), int(span[1:]) if span[0] in "wk" else context)
    found = StepLoad(seqs, context).arrays().decode([f"P:{span}", f"K:{span}"])
    assert found[f"P:{span}"][0] == found[f"K:{span}"][0] == seqs * keys


def test_chunked_decode_is_the_mean_over_spread_contexts() -> None:
    found = StepLoad(1, 5000.0).arrays().decode(["K:c1024"])["K:c1024"][0]
    contexts = np.arange(2500, 7500)
    assert found == pytest.approx(np.mean(contexts % 1024), rel=0.01)


def test_merged_is_the_sum_of_both_parts() -> None:
    load = StepLoad(8, 100, 64, 2, 32).arrays()
    names = ["P:full", "K:full"]
    one, two, both = load.decode(names), load.prefill(names), load.merged(names)
    assert both["T"][0] == 72
    assert both["S"][0] == 10
    assert both["P:full"][0] == one["P:full"][0] + two["P:full"][0]
    assert both["1"][0] == 1


def test_a_load_without_prompts_has_no_chunks() -> None:
    load = StepLoad([4, 0], [10, 10], [0, 16]).arrays()
    assert load.chunks.tolist() == [0, 1]
    assert load.context.tolist() == [10, 0]
