"""The phase graphs of every family give what the traced forward gives, at every position."""

from __future__ import annotations

import copy
from functools import cache

import pytest
import torch
from torch import Tensor, nn

from planc.errors import UnsupportedModel
from planc.ir.graph import PHASE_INPUTS, Graph, Source
from planc.ir.opdef import Call, declaration
from planc.ir.trace.module import trace_module
from planc.ir.verify import verify
from planc.passes.phases import Phases
from planc.passes.pipeline import FRONT, run
from planc.runtime.binding import bind
from planc.runtime.executor import cache_shape
from planc.runtime.kv_cache import KVCache
from planc.runtime.weights import of_module
from tests.families import FAMILIES
from tests.runtime.serving import serving_graph, serving_weights

BLOCK = 4


@cache
def front(family: str) -> Graph:
    return run(serving_graph(family), FRONT)


@cache
def phase(family: str, stage: str) -> Graph:
    return run(front(family), (Phases(stage),))  # type: ignore[arg-type]


@pytest.mark.parametrize("family", FAMILIES)
def test_decode_gives_the_traced_models_last_position(family: str) -> None:
    """Two sequences: a prefill of both in one step, then decode steps; logits at each against the whole."""
    traced, weights = serving_graph(family), serving_weights(family)
    whole, prefill, decode = bind((traced, phase(family, "prefill"), phase(family, "decode")), weights)
    lengths, steps = (13, 5), 12
    ids = torch.randint(2, 190, (2, max(lengths) + steps), generator=torch.Generator().manual_seed(3))
    positions = torch.arange(ids.shape[1]).expand(2, -1).contiguous()
    with torch.inference_mode():
        wanted = whole(ids, positions)
    pool = KVCache(32, BLOCK, 4)
    caches = [
        torch.zeros(cache_shape(spec, pool), dtype=spec.dtype) for spec in phase(family, "prefill").caches
    ]
    done = [0, 0]

    def step(module: nn.Module, counts: tuple[int, int]) -> Tensor:
        starts = [0, counts[0], sum(counts)]
        for row in (0, 1):
            pool.grow(row, done[row] + counts[row])
        spans = [range(done[row], done[row] + counts[row]) for row in (0, 1)]
        tables = [pool.table(row) for row in (0, 1)]
        width = max(map(len, tables))
        for row in (0, 1):
            done[row] += counts[row]
        with torch.inference_mode():
            found = module(
                torch.cat([ids[row, s.start : s.stop] for row, s in enumerate(spans)])[None],
                torch.tensor([[*spans[0], *spans[1]]]),
                torch.tensor(starts, dtype=torch.int32),
                torch.tensor(done, dtype=torch.int32),
                torch.tensor([t + [0] * (width - len(t)) for t in tables], dtype=torch.int32),
                torch.tensor([at for row, s in enumerate(spans) for at in pool.slots(row, s.start, s.stop)]),
                torch.tensor([pool.state_slot(row) for row in (0, 1)]),
                *caches,
            )
        assert isinstance(found, Tensor)
        return found

    def due() -> Tensor:
        return torch.stack([wanted[row, done[row] - 1] for row in (0, 1)])

    torch.testing.assert_close(step(prefill, lengths), due(), atol=2e-4, rtol=2e-4)
    for _ in range(steps):
        torch.testing.assert_close(step(decode, (1, 1)), due(), atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_phase_graphs_are_valid_and_fully_declared(family: str) -> None:
    for stage in ("prefill", "decode"):
        graph = phase(family, stage)
        verify(graph, "phases", rerun=stage == "prefill")
        assert set(graph.symbols.values()) == {"T", "S", "blocks", "block_size", "table", "states"}
        assert [n.target for n in graph.module.graph.find_nodes(op="placeholder")] == [
            *PHASE_INPUTS,
            *(spec.name for spec in graph.caches),
        ]
        features: set[str] = set()
        for node in graph.module.graph.nodes:
            op = declaration(node)
            if op is not None:
                work = op.work(Call(node, graph.symbols))
                for amount in (work.flops, work.reads, work.writes, work.kv_reads, work.kv_writes):
                    features |= amount.features()
        assert "T" in features
        assert all(name in ("T", "S") or name[:2] in ("P:", "K:") for name in features), features


def test_the_traced_graph_is_left_alone() -> None:
    traced = serving_graph("llama")
    before = [(n.name, n.target, n.args) for n in traced.module.graph.nodes]
    Phases("prefill").apply(traced)
    assert [(n.name, n.target, n.args) for n in traced.module.graph.nodes] == before


def test_prefill_narrows_before_the_final_norm() -> None:
    """Only the last token of each sequence goes through the final norm and the head."""
    for family in ("llama", "gemma4"):
        nodes = phase(family, "prefill").module.graph
        (chosen,) = [n for n in nodes.nodes if n.target is torch.ops.planc.last_token.default]
        assert [user.target for user in chosen.users] == [torch.ops.planc.rms_norm.default]
        decode = phase(family, "decode").module.graph
        assert not decode.find_nodes(op="call_function", target=torch.ops.planc.last_token.default)


def test_latent_attention_is_expanded_in_prefill_and_absorbed_in_decode() -> None:
    def absorbed(family: str, stage: str) -> set[bool]:
        graph = phase(family, stage)
        calls = graph.module.graph.find_nodes(op="call_function", target=torch.ops.planc.paged_mla.default)
        return {Call(node, graph.symbols).arg("absorbed") for node in calls}

    assert absorbed("deepseek_v3", "prefill") == {False}
    assert absorbed("deepseek_v3", "decode") == {True}
    assert absorbed("glm5", "prefill") == {True}  # chosen keys: nothing to expand for
    assert [s.entry for s in phase("deepseek_v3", "decode").caches] == [(40,)] * 3


class TwoAttentions(nn.Module):
    """Two attentions over one set of keys and values, as in models whose layers share them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 16)
        self.q1, self.q2, self.k, self.v = (nn.Linear(16, 16) for _ in range(4))
        self.head = nn.Linear(16, 32)

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        x = self.embed(input_ids) + position_ids[..., None] * 0.01
        k, v = (layer(x).unflatten(-1, (2, 8)).transpose(1, 2) for layer in (self.k, self.v))
        for project in (self.q1, self.q2):
            q = project(x).unflatten(-1, (2, 8)).transpose(1, 2)
            found = torch.ops.planc.attention(q, k, v, None, None, 0.3, True, 0, 0, 0.0)
            x = x + found.flatten(2)
        return self.head(x)


class Counting(TwoAttentions):
    """Counts its positions itself instead of reading `position_ids`."""

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        counted = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        return super().forward(input_ids, counted + 0 * position_ids)


class Cumulative(nn.Module):
    """Mixes tokens in a way that no cache is known for."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 8)

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        return self.embed(input_ids).cumsum(1) + position_ids[..., None]


class Scores(Cumulative):
    """The same, by a product whose size is the square of the tokens."""

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        x = self.embed(input_ids) + position_ids[..., None]
        return torch.softmax(x @ x.transpose(1, 2), -1) @ x


def traced(module: nn.Module) -> Graph:
    ids = torch.zeros(2, 6, dtype=torch.long)
    graph = trace_module(module.requires_grad_(False), (ids, ids.clone()))
    source = Source(graph.source.name, "causal_lm", graph.source.architecture)
    return Graph(graph.module, "traced", source, graph.symbols)


def test_attentions_over_the_same_keys_share_a_cache() -> None:
    graph = Phases("prefill").apply(traced(TwoAttentions()))
    assert [spec.name for spec in graph.caches] == ["cache_0_k", "cache_0_v"]


def test_positions_that_a_model_counts_itself_are_those_of_the_sequence() -> None:
    """The second half of a sequence, prefilled after the first, does not start from zero again."""
    graph = traced(Counting())
    prefill = Phases("prefill").apply(graph)
    ids = torch.tensor([[3, 9, 4, 30, 7, 7]])
    weights = of_module(graph.module)
    whole, module = bind((graph, prefill), weights)
    caches = [torch.zeros(1, 8, *spec.entry) for spec in prefill.caches]
    for start, stop in ((0, 3), (3, 6)):
        at = torch.arange(start, stop)
        batch = [torch.tensor(x, dtype=torch.int32) for x in ([0, 3], [stop], [[0]])]
        found = module(ids[:, start:stop], at[None], *batch, at, torch.tensor([0]), *caches)
    wanted = whole(ids, torch.arange(6)[None])[0, -1:]
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("module", [Cumulative(), Scores()])
def test_an_op_that_mixes_tokens_without_a_cache_is_refused(module: nn.Module) -> None:
    with pytest.raises(UnsupportedModel, match=r"mixes tokens.*test_phases\.py"):
        Phases("decode").apply(traced(copy.deepcopy(module)))


def test_an_encoder_has_no_phases() -> None:
    ids = torch.zeros(2, 6, dtype=torch.long)
    graph = trace_module(Cumulative(), (ids, ids.clone()))
    with pytest.raises(UnsupportedModel, match="no phases"):
        Phases("decode").apply(graph)
