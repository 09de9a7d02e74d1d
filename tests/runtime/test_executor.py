"""The executor's greedy tokens are transformers' own, for every family."""

from __future__ import annotations

import copy
from functools import cache

import pytest
import torch

from planc.errors import CheckFailed, InvalidField, WeightsMismatch
from planc.ir.graph import Graph
from planc.passes.phases import Phases
from planc.passes.pipeline import FRONT, run
from planc.runtime.executor import Executor, Request
from planc.runtime.scheduler import Step
from planc.runtime.verify import Agreement, verify_model
from tests.families import FAMILIES
from tests.runtime.serving import serving_graph, serving_model, serving_weights

NEW = 14

#: One token; shorter and longer than every window, chunk and top-k of the families; blocks of 4 crossed.
PROMPTS = (
    [7],
    [8, 3, 150],
    [5, 9, 33, 2, 8, 77, 12, 4, 4, 19, 20],
    [100, 101, 102, 5, 6, 30],
    [50, 3] * 12,
)


@cache
def phases(family: str) -> tuple[Graph, Graph]:
    front = run(serving_graph(family), FRONT)
    return run(front, (Phases("prefill"),)), run(front, (Phases("decode"),))


def executor(family: str, **limits: int) -> Executor:
    settings = {"blocks": 64, "block_size": 4, "max_num_seqs": 4, "max_num_batched_tokens": 7, **limits}
    return Executor(*phases(family), serving_weights(family), **settings)  # type: ignore[arg-type]


def transformers_tokens(family: str, prompt: list[int]) -> list[int]:
    model = serving_model(family)
    found = model.generate(  # type: ignore[operator]
        torch.tensor([prompt]), max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    return [int(t) for t in found[0, len(prompt) :]]


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_equal_transformers_generate(family: str) -> None:
    """Five prompts at once, four at a time, in chunks of at most seven tokens, in blocks of four."""
    found = executor(family).generate(PROMPTS, NEW)
    assert found == [transformers_tokens(family, prompt) for prompt in PROMPTS]
    assert len({tuple(tokens) for tokens in found}) == len(PROMPTS)
    assert len({token for tokens in found for token in tokens}) > NEW


@pytest.mark.parametrize("family", ["deepseek_v3", "qwen3_5"])
def test_settings_change_speed_not_tokens(family: str) -> None:
    """Any budget, any block size, and a cache so small that sequences are preempted: the same tokens."""
    reference = executor(family).generate(PROMPTS, NEW)
    assert executor(family, max_num_batched_tokens=500, block_size=16).generate(PROMPTS, NEW) == reference
    assert executor(family, max_num_seqs=1).generate(PROMPTS, NEW) == reference
    small = executor(family, blocks=13, max_num_batched_tokens=11)
    preempted: list[int] = []

    def observe(step: Step, logits: torch.Tensor) -> None:
        preempted.extend(step.preempted)

    assert small.run([Request(tuple(p), NEW) for p in PROMPTS], observe=observe) == reference
    assert preempted


def test_generation_ends_after_an_end_token() -> None:
    whole = executor("llama").generate(PROMPTS, NEW)
    end = whole[2][5]
    ended = executor("llama").generate(PROMPTS, NEW, eos=end)
    for tokens, found in zip(whole, ended, strict=True):
        stop = tokens.index(end) + 1 if end in tokens else NEW
        assert found == tokens[:stop]


def test_an_executor_can_be_used_again() -> None:
    """State rows and blocks of earlier requests leave no trace in later ones."""
    machine = executor("qwen3_5")
    first = machine.generate(PROMPTS, 6)
    assert machine.generate(PROMPTS[::-1], 6)[::-1] == first


def test_tokens_outside_the_vocabulary_are_refused() -> None:
    with pytest.raises(InvalidField, match="0 to 191"):
        executor("llama").generate([[5, 192]], 4)


def test_weights_of_another_model_are_refused() -> None:
    prefill, decode = phases("llama")
    weights = dict(serving_weights("llama"))
    name = "model.layers.1.mlp.up_proj.weight"
    with pytest.raises(WeightsMismatch, match=r"'model.layers.1.mlp.up_proj.weight' is float32 \[2, 2\]"):
        Executor(prefill, decode, {**weights, name: torch.zeros(2, 2)}, blocks=1, block_size=1)
    del weights[name]
    with pytest.raises(WeightsMismatch, match=f"missing.*{name}"):
        Executor(prefill, decode, weights, blocks=1, block_size=1)


@pytest.mark.parametrize("family", ["gpt_oss", "glm5"])
def test_verify_model_finds_no_difference(family: str) -> None:
    found = verify_model(
        serving_graph(family),
        *phases(family),
        serving_weights(family),
        prompts=PROMPTS,
        max_new_tokens=6,
        block_size=4,
        max_num_batched_tokens=9,
    )
    assert found.compared == found.same_tokens == 6 * len(PROMPTS)
    assert found.typical_error <= found.relative_error < 1e-5
    found.require("llama", 1e-5)


def test_verify_model_finds_a_wrong_graph() -> None:
    """A decode graph that scales its scores wrongly is found out, by its tokens and by its logits."""
    prefill, decode = copy.deepcopy(phases("llama"))
    node = decode.module.graph.find_nodes(op="call_function", target=torch.ops.planc.paged_attention.default)[
        0
    ]
    node.update_arg(11, 0.4)
    decode.module.recompile()
    found = verify_model(
        serving_graph("llama"), prefill, decode, serving_weights("llama"), prompts=PROMPTS, max_new_tokens=6
    )
    assert found.relative_error > 1e-3
    with pytest.raises(CheckFailed, match="differs from the traced model"):
        found.require("llama", 1e-3)


def test_not_a_number_agrees_with_nothing() -> None:
    with pytest.raises(CheckFailed):
        Agreement(1, None, float("nan"), 0.0, 1.0).require("module", 1e9)
