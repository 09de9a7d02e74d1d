"""Equivalence: any way to split sequences into steps gives what the op over whole sequences gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import planc.ir.ops  # noqa: F401

ops = torch.ops.planc


@dataclass(frozen=True)
class Case:
    """Lengths of the sequences and, per step, how many new tokens each of them gets."""

    block_size: int
    lengths: tuple[int, ...]
    steps: tuple[tuple[int, ...], ...]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    lengths = draw(st.lists(st.integers(1, 14), min_size=1, max_size=3))
    left, steps = list(lengths), []
    while any(left):
        kind = draw(st.sampled_from(["rest", "some", "decode"]))
        counts = [draw(st.integers(0, n)) if kind == "some" and n else n for n in left]
        if kind == "decode":
            counts = [min(n, 1) for n in left]
        if not any(counts):
            counts = left
        steps.append(tuple(counts))
        left = [n - c for n, c in zip(left, counts, strict=True)]
    return Case(draw(st.integers(1, 5)), tuple(lengths), tuple(steps))


def run_paged(case: Case, step: Callable[..., Tensor]) -> list[Tensor]:
    """Runs `step(rows, query_starts, context_lens, block_table, slots, state_slots)` over the case.

    rows: (sequence, start, stop) of each segment. Returns the outputs [1, n, ...] per sequence.
    """
    size = case.block_size
    width = max(-(-n // size) for n in case.lengths)
    count = len(case.lengths)
    order = torch.randperm(count * width, generator=torch.Generator().manual_seed(1)).view(count, width)
    done = [0] * count
    pieces: list[list[Tensor]] = [[] for _ in case.lengths]
    for counts in case.steps:
        live = [i for i, n in enumerate(counts) if n]
        rows = [(i, done[i], done[i] + counts[i]) for i in live]
        starts = torch.tensor([0, *torch.tensor([b - a for _, a, b in rows]).cumsum(0).tolist()])
        slots = [int(order[i, t // size]) * size + t % size for i, a, b in rows for t in range(a, b)]
        out = step(
            rows,
            starts.int(),
            torch.tensor([b for _, _, b in rows]).int(),
            order[live].int(),
            torch.tensor(slots),
            torch.tensor(live),
        )
        for (i, a, b), at in zip(rows, starts.tolist(), strict=False):
            pieces[i].append(out[:, at : at + b - a])
            done[i] = b
    return [torch.cat(found, 1) for found in pieces]


def cut(tensors: list[Tensor], rows: list[tuple[int, int, int]], dim: int) -> Tensor:
    """The rows of whole sequences, laid end to end along `dim`."""
    return torch.cat([tensors[i].narrow(dim, a, b - a) for i, a, b in rows], dim)


def randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def blocks(case: Case) -> int:
    return len(case.lengths) * max(-(-n // case.block_size) for n in case.lengths)


def assert_same(found: list[Tensor], wanted: list[Tensor]) -> None:
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize(
    ("window", "chunk", "softcap", "sinks", "top_k"),
    [
        (0, 0, 0.0, False, 0),
        (3, 0, 0.0, True, 0),
        (0, 4, 0.0, False, 0),
        (0, 0, 2.0, False, 3),
        (5, 0, 1.0, True, 4),
    ],
)
@settings(max_examples=25, deadline=None)
@given(case=cases())
def test_paged_attention(
    window: int, chunk: int, softcap: float, sinks: bool, top_k: int, case: Case
) -> None:
    q = [randn(i, 1, 4, n, 8) for i, n in enumerate(case.lengths)]
    k = [randn(i + 10, 1, 2, n, 8) for i, n in enumerate(case.lengths)]
    v = [randn(i + 20, 1, 2, n, 6) for i, n in enumerate(case.lengths)]
    sink = randn(30, 4) if sinks else None
    picks = [_picks(i, n, top_k) for i, n in enumerate(case.lengths)]
    options = (0.3, window, chunk, softcap)
    whole = [
        ops.attention(a, b, c, sink, p if top_k else None, 0.3, True, window, chunk, softcap)
        for a, b, c, p in zip(q, k, v, picks, strict=True)
    ]
    caches = (
        torch.zeros(blocks(case), case.block_size, 2, 8),
        torch.zeros(blocks(case), case.block_size, 2, 6),
    )

    def step(rows: list[tuple[int, int, int]], *batch: Tensor) -> Tensor:
        chosen = cut(picks, rows, 1) if top_k else None
        return ops.paged_attention(
            cut(q, rows, 2), cut(k, rows, 2), cut(v, rows, 2), *caches, *batch[:4], sink, chosen, *options
        )

    assert_same(run_paged(case, step), whole)


def _picks(seed: int, tokens: int, top_k: int) -> Tensor:
    """Random earlier positions [1, tokens, top_k], the token's own among them, padded with -1."""
    scores = randn(seed + 40, tokens, tokens).masked_fill(torch.ones(tokens, tokens).triu(1).bool(), -9e9)
    scores.fill_diagonal_(9e9)
    found = scores.topk(min(top_k, tokens), -1).indices
    found = found.masked_fill(found > torch.arange(tokens)[:, None], -1)
    return torch.nn.functional.pad(found, (0, max(top_k - tokens, 0)), value=-1)[None].int()


@pytest.mark.parametrize("absorbed", [False, True])
@pytest.mark.parametrize("top_k", [0, 3])
@settings(max_examples=25, deadline=None)
@given(case=cases())
def test_paged_mla(absorbed: bool, top_k: int, case: Case) -> None:
    q = [randn(i, 1, 3, n, 10) for i, n in enumerate(case.lengths)]
    c_kv = [randn(i + 10, 1, 1, n, 12) for i, n in enumerate(case.lengths)]
    k_rot = [randn(i + 20, 1, 1, n, 4) for i, n in enumerate(case.lengths)]
    kv_b = randn(30, 3 * (6 + 5), 12)
    picks = [_picks(i, n, top_k) for i, n in enumerate(case.lengths)]
    whole = []
    for a, b, c, p in zip(q, c_kv, k_rot, picks, strict=True):
        k, v = ops.mla_expand_kv(b, c, kv_b, 6, 5)
        whole.append(ops.attention(a, k, v, None, p if top_k else None, 0.3, True, 0, 0, 0.0))
    cache = torch.zeros(blocks(case), case.block_size, 16)

    def step(rows: list[tuple[int, int, int]], *batch: Tensor) -> Tensor:
        new = (cut(q, rows, 2), cut(c_kv, rows, 2), cut(k_rot, rows, 2))
        chosen = cut(picks, rows, 1) if top_k else None
        return ops.paged_mla(*new, kv_b, cache, *batch[:4], chosen, 0.3, 6, 5, absorbed)

    assert_same(run_paged(case, step), whole)


@settings(max_examples=25, deadline=None)
@given(case=cases())
def test_paged_indexer(case: Case) -> None:
    # positive products: a score that every head cuts to zero would tie with others
    q = [randn(i, 1, n, 3, 8).abs() for i, n in enumerate(case.lengths)]
    k = [randn(i + 10, 1, n, 8).abs() for i, n in enumerate(case.lengths)]
    weights = [randn(i + 20, 1, n, 3) for i, n in enumerate(case.lengths)]
    whole = [ops.dsa_indexer(a, b, c, 4, 0.5) for a, b, c in zip(q, k, weights, strict=True)]
    cache = torch.zeros(blocks(case), case.block_size, 8)

    def step(rows: list[tuple[int, int, int]], *batch: Tensor) -> Tensor:
        new = (cut(q, rows, 1), cut(k, rows, 1), cut(weights, rows, 1))
        return ops.paged_indexer(*new, cache, *batch[:4], 4, 0.5)

    for a, b in zip(run_paged(case, step), whole, strict=True):
        assert torch.equal(a.sort(-1).values, b.sort(-1).values)


@pytest.mark.parametrize("activation", ["silu", ""])
@settings(max_examples=25, deadline=None)
@given(case=cases())
def test_paged_conv1d(activation: str, case: Case) -> None:
    x = [randn(i, 1, 6, n) for i, n in enumerate(case.lengths)]
    weight, bias = randn(10, 6, 4), randn(11, 6)
    whole = [ops.causal_conv1d(a, weight, bias, activation).transpose(1, 2) for a in x]
    state = torch.full((len(x), 6, 3), 7.0)  # rows are not cleared before use

    def step(rows: list[tuple[int, int, int]], *batch: Tensor) -> Tensor:
        starts, contexts, _, _, states = batch
        out = ops.paged_conv1d(cut(x, rows, 2), weight, bias, state, starts, contexts, states, activation)
        return out.transpose(1, 2)

    assert_same(run_paged(case, step), whole)


@settings(max_examples=25, deadline=None)
@given(case=cases())
def test_paged_delta_rule(case: Case) -> None:
    shapes = {"q": (2, 6), "k": (2, 6), "v": (4, 5), "g": (4,), "beta": (4,)}
    inputs = {
        name: [randn(i + 10 * j, 1, n, *shape) for i, n in enumerate(case.lengths)]
        for j, (name, shape) in enumerate(shapes.items())
    }
    inputs["g"] = [-t.abs() for t in inputs["g"]]
    inputs["beta"] = [t.sigmoid() for t in inputs["beta"]]
    whole = [ops.gated_delta_rule(*row, True) for row in zip(*inputs.values(), strict=True)]
    state = torch.full((len(case.lengths), 4, 6, 5), 7.0)

    def step(rows: list[tuple[int, int, int]], *batch: Tensor) -> Tensor:
        starts, contexts, _, _, states = batch
        new = (cut(t, rows, 1) for t in inputs.values())
        return ops.paged_delta_rule(*new, state, starts, contexts, states, True)

    assert_same(run_paged(case, step), whole)


def test_eight_bit_cache_is_scaled_and_saturated() -> None:
    """An fp8 cache holds k / k_scale: the result is that of keys rounded so, and outliers saturate."""
    q, k, v = randn(0, 1, 2, 5, 8), randn(1, 1, 2, 5, 8), randn(2, 1, 2, 5, 8)
    k[0, 0, 0, 0] = 4000.0
    scale = 2.0
    rounded = (k / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale
    values = v.to(torch.float8_e4m3fn).float()
    whole = ops.attention(q, rounded, values, None, None, 0.1, True, 0, 0, 0.0)
    caches = [torch.zeros(3, 2, 2, 8, dtype=torch.float8_e4m3fn) for _ in range(2)]
    batch = (torch.tensor([0, 5]), torch.tensor([5]), torch.tensor([[0, 1, 2]]), torch.arange(5))
    paged = ops.paged_attention(q, k, v, *caches, *batch, None, None, 0.1, 0, 0, 0.0, scale, 1.0)
    torch.testing.assert_close(paged, whole, atol=1e-5, rtol=1e-5)
