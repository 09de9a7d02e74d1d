"""Graphs of ranks on real processes (gloo) against the undivided model."""

from __future__ import annotations

import os
import signal
import time
from functools import cache

import pytest
import torch
import torch.distributed as dist

from planc.errors import InvalidField, ToolFailed
from planc.ir.graph import Graph
from planc.ir.ops.collectives import bound_groups
from planc.passes.fusion import Fusion
from planc.passes.phases import Phases
from planc.runtime.distributed import Ranks, forward, generate, run_ranks
from planc.runtime.executor import Executor
from tests.families import FAMILIES
from tests.passes.running import run, tokens
from tests.runtime.serving import serving_graph, serving_weights

#: Whole experts per rank: one family per kind (plain, beside a shared one, interleaved, scaled input).
EXPERTS = ["qwen3_moe", "deepseek_v3", "gpt_oss", "llama4"]
PROMPTS = [
    [17, 3, 99, 4, 180],
    [5, 77, 8, 150, 21, 60, 12, 9, 33, 101, 44, 2],
    [64, 32, 16, 8, 4, 2, 90, 91, 92],
]
#: qwen3_5: a rounding of every weight moves its logits by 4e-4.
TOLERANCE = {"qwen3_5": 1e-3}


@cache
def phases(family: str) -> tuple[Graph, Graph]:
    graph = serving_graph(family)
    return Phases("prefill").apply(graph), Phases("decode").apply(graph)


@cache
def alone(family: str) -> list[list[int]]:
    """Greedy tokens of the undivided model."""
    executor = Executor(*phases(family), serving_weights(family), blocks=32, block_size=4)
    return executor.generate(PROMPTS, 6)


def together(family: str, layout: Ranks) -> list[list[int]]:
    return generate(
        *phases(family), serving_weights(family), PROMPTS, 6, layout=layout, blocks=32, block_size=4
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_two_ranks_add_up_to_the_model(family: str) -> None:
    graph, weights = serving_graph(family), serving_weights(family)
    whole = run(graph, weights, *tokens())
    layouts = [Ranks(tp=2), Ranks(pp=2)] + [Ranks(tp=2, ep=True)] * (family in EXPERTS)
    for layout in layouts:
        out = forward(graph, weights, tokens(), layout=layout)
        torch.testing.assert_close(out, whole, rtol=0, atol=TOLERANCE.get(family, 1e-4))


@pytest.mark.parametrize("family", FAMILIES)
def test_two_ranks_generate_the_models_tokens(family: str) -> None:
    assert together(family, Ranks(tp=2)) == alone(family)
    assert together(family, Ranks(pp=2)) == alone(family)


@pytest.mark.parametrize("family", EXPERTS)
def test_ranks_with_whole_experts_generate_the_models_tokens(family: str) -> None:
    assert together(family, Ranks(tp=2, ep=True)) == alone(family)


@pytest.mark.parametrize("family", ["llama", "qwen3_5"])
def test_stages_of_divided_ranks_generate_the_models_tokens(family: str) -> None:
    assert together(family, Ranks(tp=2, pp=2)) == alone(family)


def test_divided_ranks_run_fused() -> None:
    assert together("llama", Ranks(tp=2, pp=2, after=(Fusion(),))) == alone("llama")


# -- collectives ------------------------------------------------------------------------


def test_collectives_do_what_they_say() -> None:
    def task(rank: int) -> dict[str, torch.Tensor]:
        x = torch.arange(8.0).view(2, 4) + 10 * rank
        ops = torch.ops.planc
        with bound_groups({"tp": dist.new_group()}):
            got = ops.send(x, 1, "tp") if rank == 0 else ops.recv(x, 0, "tp")
            return {
                "all_reduce": ops.all_reduce(x, "tp", 2),
                "all_gather": ops.all_gather(x, 1, "tp", 2),
                "reduce_scatter": ops.reduce_scatter(x, 1, "tp", 2),
                "all_to_all": ops.all_to_all(x, 1, 0, "tp", 2),
                "p2p": got,
            }

    zero, one = run_ranks(2, task)
    x = torch.arange(8.0).view(2, 4)
    y = x + 10
    for found in (zero, one):
        torch.testing.assert_close(found["all_reduce"], x + y)
        torch.testing.assert_close(found["all_gather"], torch.cat([x, y], 1))
        torch.testing.assert_close(found["p2p"], x)
    torch.testing.assert_close(torch.cat([zero["reduce_scatter"], one["reduce_scatter"]], 1), x + y)
    torch.testing.assert_close(zero["all_to_all"], torch.cat([x[:, :2], y[:, :2]], 0))
    torch.testing.assert_close(one["all_to_all"], torch.cat([x[:, 2:], y[:, 2:]], 0))


def test_fakes_have_the_shapes_of_the_collectives() -> None:
    x, ops = torch.empty(2, 4, device="meta"), torch.ops.planc
    assert ops.all_reduce(x, "tp", 2).shape == (2, 4)
    assert ops.all_gather(x, -1, "tp", 2).shape == (2, 8)
    assert ops.reduce_scatter(x, 1, "tp", 2).shape == (2, 2)
    assert ops.all_to_all(x, 1, 0, "tp", 2).shape == (4, 2)


def test_a_group_must_be_bound_even_for_one_rank() -> None:
    with pytest.raises(InvalidField, match=r"group = 'tp'.*no process group is bound"):
        torch.ops.planc.all_reduce(torch.ones(2), "tp", 1)


def test_a_graph_for_other_ranks_is_refused() -> None:
    def task(rank: int) -> None:
        with bound_groups({"tp": dist.new_group()}):
            torch.ops.planc.all_reduce(torch.ones(2), "tp", 4)

    with pytest.raises(InvalidField, match="the graph is for 4 ranks, the bound group has 2"):
        run_ranks(2, task)


# -- processes ---------------------------------------------------------------------------


def test_results_come_by_rank() -> None:
    assert run_ranks(3, lambda rank: (rank, dist.get_world_size())) == [(0, 3), (1, 3), (2, 3)]


def test_a_rank_that_raises_ends_the_run() -> None:
    def task(rank: int) -> None:
        if rank == 1:
            raise ValueError("no such layer")
        dist.barrier()

    start = time.monotonic()
    with pytest.raises(ToolFailed, match=r"rank 1 failed: it raised[\s\S]*no such layer"):
        run_ranks(2, task, timeout_s=60)
    assert time.monotonic() - start < 30


def test_a_rank_that_dies_is_named() -> None:
    def task(rank: int) -> None:
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)

    with pytest.raises(ToolFailed, match="rank 1 failed: the process died"):
        run_ranks(2, task, timeout_s=60)


def test_ranks_that_wait_for_each_other_run_out_of_time() -> None:
    def task(rank: int) -> None:
        if rank == 0:
            time.sleep(60)

    with pytest.raises(ToolFailed, match=r"no result after 3 s \(ranks still running: \[0"):
        run_ranks(2, task, timeout_s=3)


def test_layouts_that_do_not_fit_are_refused_before_any_process_starts() -> None:
    with pytest.raises(InvalidField, match=r"tp = 3.*4 heads"):
        forward(serving_graph("llama"), {}, tokens(), layout=Ranks(tp=3))
