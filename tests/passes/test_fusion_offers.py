"""What fusions offer is what they save: against counts by hand, and against the fused graph's own work."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from planc.cost_model.table import FusionOffer
from planc.ir.graph import Graph
from planc.ir.opdef import Call, declaration
from planc.ir.work import NONE, Amount
from planc.passes.fold import fold
from planc.passes.fusion import NAMES, Fusion, offers
from planc.passes.fusion_offers import launches
from planc.passes.phases import Phases
from tests.families import tiny_graph


@cache
def decode(family: str) -> Graph:
    return Phases("decode").apply(tiny_graph(family))


@cache
def offered(family: str) -> tuple[FusionOffer, ...]:
    return offers(decode(family))


def test_offers_of_a_llama_layer_counted_by_hand() -> None:
    """Hidden 64, 4 query and 2 key heads of 16; in elements per token."""
    found = {offer.name: offer for offer in offered("llama") if offer.layer_class == "decoder"}
    amounts = {name: (o.launches, o.reads.terms, o.writes.terms) for name, o in found.items()}
    assert amounts == {
        "gate_up_merge": (1, {"T": 64.0}, {}),  # x read once instead of twice
        "qkv_merge": (2, {"T": 128.0}, {}),  # once instead of three times
        "residual_add_rms_norm": (2, {"T": 128.0}, {}),  # twice a layer, the norm does not read the sum again
        "rope_kv_write": (1, {"T": 32.0}, {"T": 32.0}),  # rotated keys go to the cache alone
    }
    assert found["qkv_merge"].sites == ("self_attn.k_proj", "self_attn.q_proj", "self_attn.v_proj")


@pytest.mark.parametrize("family", ["qwen3", "deepseek_v3", "gpt_oss", "gemma4"])
@pytest.mark.parametrize("name", sorted(NAMES))
def test_offers_add_up_to_the_fused_graphs_difference(family: str, name: str) -> None:
    """Summed over the layers of all classes, an offer is the whole graph's work before less that after."""
    graph = decode(family)
    fused = Fusion(frozenset({name})).apply(graph)
    saved = _add(_work(graph), _work(fused), -1)
    layers = {group.name: group.count for group in fold(graph)}
    claimed = (0, NONE, NONE)
    for offer in offered(family):
        if offer.name == name:
            times = layers[offer.layer_class]
            claimed = _add(claimed, (offer.launches, offer.reads, offer.writes), times)
    assert claimed == saved


_Sum = tuple[int, Amount, Amount]


def _work(graph: Graph) -> _Sum:
    sums: _Sum = (0, NONE, NONE)
    for node in graph.module.graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload) and node.users:
            declared = declaration(node)
            assert declared is not None, node.target
            work = declared.work(Call(node, graph.symbols))
            sums = _add(sums, (launches(work), work.reads, work.writes), 1)
    return sums


def _add(one: _Sum, other: _Sum, times: int) -> _Sum:
    return one[0] + other[0] * times, one[1] + other[1] * times, one[2] + other[2] * times
