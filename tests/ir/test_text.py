"""Graphs as text: readable, complete, and the same every time."""

from __future__ import annotations

import torch
from torch import nn

from planc.ir.text import show
from planc.ir.trace import trace
from planc.ir.trace.module import trace_module
from tests.ir.blocks import Block

ENCODER = """\
examples.modules.encoder:tiny: Encoder, traced
inputs
  %ids: i64[B, S]
(top)
  %sym_size_int_2: int = aten.sym_size.int(%ids, 1)
  %arange: i64[S] = aten.arange(%sym_size_int_2, device=cpu, pin_memory=False)
tokens
  %embedding: f32[B, S, 32] = aten.embedding(tokens.weight, %ids)
positions
  %embedding_1: f32[S, 32] = aten.embedding(positions.weight, %arange)
(top)
  %add: f32[B, S, 32] = aten.add.Tensor(%embedding, %embedding_1)
norm
  %layer_norm: f32[B, S, 32] = aten.layer_norm(%add, [32], norm.weight, norm.bias, 1e-12, False)
layers.0
  %linear: f32[B, S, 32] = aten.linear(%layer_norm, .attention.query.weight, .attention.query.bias)
"""


def test_a_graph_prints_as_it_should() -> None:
    text = show(trace("examples.modules.encoder:tiny"))
    assert text.startswith(ENCODER)
    assert "\nlayers.1 .. layers.2: the same\n" in text
    assert text.endswith("outputs\n  %mean\n")


def test_two_traces_print_alike_and_printing_changes_nothing() -> None:
    graph = trace("examples.modules.convnet:tiny")
    first = show(graph)
    assert first == show(graph) == show(trace("examples.modules.convnet:tiny"))


def test_unfolded_text_has_every_layer() -> None:
    graph = trace("examples.modules.encoder:tiny")
    text = show(graph, fold=False)
    assert "the same" not in text
    calls = sum(node.op == "call_function" for node in graph.module.graph.nodes)
    assert text.count(" = ") == calls


def test_layers_that_differ_in_one_number_are_not_folded() -> None:
    layers = [Block() for _ in range(3)]
    layers[2].second.eps = 1e-3
    text = show(trace_module(nn.Sequential(*layers), torch.randn(2, 6, 32)))
    assert "\n1: the same\n" in text
    assert "\n2\n" in text


def test_the_limit_counts_what_it_leaves_out() -> None:
    graph = trace("examples.modules.encoder:tiny")
    whole = show(graph).splitlines()
    short = show(graph, limit=5).splitlines()
    assert short[:6] == whole[:6]
    assert short[6] == f"... {len(whole) - 6} more lines"
