"""Speculative decoding: tokens per step, what it adds to steps and memory."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from planc.cost_model import catalogue
from planc.cost_model.collectives import Fabric
from planc.cost_model.memory import memory_map
from planc.cost_model.shape import EngineShape
from planc.cost_model.speculative import Speculation, drafting, expected_tokens, with_draft
from planc.cost_model.step import StepLoad, StepModel
from tests import sample_tables

LOAD = StepLoad(np.array([1.0, 8.0, 64.0, 256.0]), 2000.0)


def model(table: str = "llama8b", **shape: int) -> StepModel:
    engine = catalogue.engine("vllm")
    gpu = catalogue.gpu("h100_sxm")
    return StepModel(
        getattr(sample_tables, table)(), EngineShape("vllm", "h100_sxm", **shape), gpu, Fabric(8), engine
    )


@given(st.floats(0, 0.99), st.integers(0, 16))
def test_tokens_per_step_are_the_geometric_sum(acceptance: float, draft: int) -> None:
    assert expected_tokens(acceptance, draft) == pytest.approx(
        (1 - acceptance ** (draft + 1)) / (1 - acceptance)
    )


def test_every_draft_accepted() -> None:
    assert expected_tokens(1.0, 3) == 4


@pytest.mark.parametrize("method", ["ngram", "mtp"])
def test_drafting_nothing_adds_nothing(method: str) -> None:
    nothing = drafting(Speculation(method, 0, 0.7), model())  # type: ignore[arg-type]
    assert nothing.seconds(LOAD) == pytest.approx(np.zeros(4), abs=1e-12)


def test_steps_without_decoding_are_not_longer() -> None:
    added = drafting(Speculation("mtp", 2, 0.7), model()).seconds(StepLoad(0.0, 0.0, 512.0))
    assert added == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize(("table", "tp"), [("llama8b", 1), ("qwen235b", 8)])
def test_a_pass_through_the_draft_takes_about_its_share_of_the_layers(table: str, tp: int) -> None:
    """One layer of many, and the head, which is not shared out among them."""
    whole = model(table, tp=tp)
    one = drafting(Speculation("mtp", 1, 0.7), whole)
    step = float(whole.seconds(StepLoad(1.0, 2000.0)))
    layers = whole.table.model.layers
    assert step / layers / 3 < one.fixed_s + one.per_sequence_s < step / 3


def test_verifying_is_nearly_free_in_small_batches_and_dear_in_large_ones() -> None:
    """Weights are read once; past the ridge every row costs arithmetic."""
    whole = model()
    added = drafting(Speculation("ngram", 4, 0.5), whole).seconds(LOAD) / whole.seconds(LOAD)
    assert added[0] < 0.1
    assert added[-1] > 0.5
    assert added[0] < added[2] < added[3]


def test_draft_models_weigh_as_many_layers_as_their_parameters_make() -> None:
    table = sample_tables.llama8b()
    layer = max(cls.parameters for cls in table.classes if cls.layers)
    small = Speculation("draft_model", 3, 0.7, "small", 2.5 * layer)
    assert small.layers(table) == 3
    grown = with_draft(table, small)
    assert grown.model.layers == table.model.layers + 3
    assert grown.kv_elements_per_token() == pytest.approx(
        table.kv_elements_per_token() * (1 + 3 / table.model.layers)
    )
    assert with_draft(table, Speculation("ngram", 3, 0.7)) is table
    dear, cheap = (drafting(way, model()).fixed_s for way in (small, replace(small, method="mtp")))
    assert dear > 1.5 * cheap


def test_the_draft_takes_cache() -> None:
    table, gpu, engine = sample_tables.llama8b(), catalogue.gpu("h100_sxm"), catalogue.engine("vllm")

    def blocks(way: Speculation | None) -> int:
        return memory_map(
            with_draft(table, way),
            EngineShape("vllm", "h100_sxm"),
            gpu,
            engine,
            max_num_seqs=64,
            max_num_batched_tokens=2048,
            max_model_len=4096,
        ).kv_blocks

    assert blocks(Speculation("eagle", 3, 0.7, "x")) < blocks(None)
    assert blocks(Speculation("ngram", 3, 0.7)) == blocks(None)
