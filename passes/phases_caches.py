"""Which ops look at other tokens, and the paged op that each becomes.

    planc.attention(q, k, v, ...)                    paged_attention, caches of k and v
    planc.mla_expand_kv(c_kv, k_rot, w) and the      paged_mla, cache of (c_kv, k_rot): expanded in
      planc.attention over its results               prefill, absorbed in decode and for chosen keys
    planc.dsa_indexer(q, k, weights, ...)            paged_indexer, cache of k
    planc.causal_conv1d(x, ...)                      paged_conv1d, state of the last inputs
    planc.gated_delta_rule(q, k, v, g, beta, ...)    paged_delta_rule, state of the recurrence

Attentions over the very same keys and values (layers that share them) share their cache.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch.fx import Graph as Nodes
from torch.fx import Node

from planc.errors import UnsupportedModel
from planc.ir.graph import CacheSpec, Graph
from planc.ir.layers import layer_of
from planc.ir.opdef import Call, fake

_planc = torch.ops.planc
_PAGES = ("query_starts", "context_lens", "block_table", "slots")
_STATES = ("query_starts", "context_lens", "state_slots")


@dataclass(slots=True)
class Caches:
    """The caches of a phase graph, in the order in which the model comes upon them."""

    nodes: Nodes
    inputs: dict[str, Node]
    decode: bool
    specs: list[CacheSpec] = field(default_factory=list)
    _of: dict[tuple[Node, ...], tuple[Node, ...]] = field(default_factory=dict)
    _last: Node | None = None

    def page(self, graph: Graph) -> None:
        """Replaces every op that has a paged form."""
        for node in list(self.nodes.nodes):
            rule = _RULES.get(node.target.name()) if isinstance(node.target, torch._ops.OpOverload) else None
            if rule is None:
                continue
            with self.nodes.inserting_before(node):
                paged = rule(self, Call(node, graph.symbols), graph)
            paged.meta = dict(node.meta)
            node.replace_all_uses_with(paged)
            self.nodes.erase_node(node)

    def paged(self, node: Node, held: tuple[Node, ...], **entries: tuple[int, ...]) -> tuple[Node, ...]:
        """Paged caches, name -> entry, for what `held` holds; the same ones if asked for again."""
        return self._caches(node, held, "paged", fake(held[0]).dtype, entries)

    def state(self, node: Node, dtype: torch.dtype, **entries: tuple[int, ...]) -> tuple[Node, ...]:
        """State caches, name -> entry, of one op."""
        return self._caches(node, (node,), "state", dtype, entries)

    def batch(self, names: tuple[str, ...]) -> tuple[Node, ...]:
        return tuple(self.inputs[name] for name in names)

    def _caches(
        self,
        node: Node,
        held: tuple[Node, ...],
        kind: Literal["paged", "state"],
        dtype: torch.dtype,
        entries: dict[str, tuple[int, ...]],
    ) -> tuple[Node, ...]:
        if held not in self._of:
            layer = layer_of(node) or 0
            made = []
            for name, entry in entries.items():
                taken = {spec.name for spec in self.specs}
                full = f"cache_{layer}_{name}"
                copies = sum(1 for other in taken if re.fullmatch(rf"{full}(_\d+)?", other))
                full = f"{full}_{copies}" if copies else full
                self.specs.append(CacheSpec(full, layer, kind, entry, dtype))
                with self.nodes.inserting_after(self._last or self.inputs["state_slots"]):
                    self._last = self.nodes.placeholder(full)
                made.append(self._last)
            self._of[held] = tuple(made)
        return self._of[held]


def _args(call: Call, names: str) -> tuple[Any, ...]:
    return tuple(call.arg(name) for name in names.split())


def _attention(caches: Caches, call: Call, graph: Graph) -> Node:
    if not call.arg("causal"):
        raise UnsupportedModel(
            model=graph.source.name,
            reason=f"attention at {call.node.name} is not causal",
            mend="A model that looks ahead has no decode phase; compile it as an encoder.",
        )
    q, k, v = call.arg("q"), call.arg("k"), call.arg("v")
    expand = _expanded_by(k, v)
    if expand is not None:
        return _latent_attention(caches, call, Call(expand, graph.symbols))
    k_cache, v_cache = caches.paged(
        call.node,
        (k, v),
        k=(call.size("k", 1), call.size("k", 3)),
        v=(call.size("v", 1), call.size("v", 3)),
    )
    options = _args(call, "sinks indices scale window chunk softcap")
    return caches.nodes.call_function(
        _planc.paged_attention.default, (q, k, v, k_cache, v_cache, *caches.batch(_PAGES), *options)
    )


def _expanded_by(k: Node, v: Node) -> Node | None:
    """The `mla_expand_kv` whose two results k and v are, if there is one."""
    for node, index in ((k, 0), (v, 1)):
        if node.target is not operator.getitem or node.args[1] != index:
            return None
    source = k.args[0]
    assert isinstance(source, Node)
    return source if source is v.args[0] and source.target is _planc.mla_expand_kv.default else None


def _latent_attention(caches: Caches, attention: Call, expand: Call) -> Node:
    q, indices = attention.arg("q"), attention.arg("indices")
    c_kv, k_rot = expand.arg("c_kv"), expand.arg("k_rot")
    assert attention.arg("sinks") is None, f"{attention.node}: latent attention with sinks"
    assert not any(attention.arg(name) for name in ("window", "chunk", "softcap")), attention.node
    (cache,) = caches.paged(
        attention.node, (c_kv, k_rot), latent=(expand.size("c_kv", 3) + expand.size("k_rot", 3),)
    )
    absorbed = caches.decode or indices is not None
    return caches.nodes.call_function(
        _planc.paged_mla.default,
        (
            *(q, c_kv, k_rot, expand.arg("kv_b"), cache, *caches.batch(_PAGES), indices),
            *(attention.arg("scale"), expand.arg("nope_dim"), expand.arg("v_dim"), absorbed),
        ),
    )


def _indexer(caches: Caches, call: Call, graph: Graph) -> Node:
    (cache,) = caches.paged(call.node, (call.arg("k"),), index=(call.size("k", 2),))
    return caches.nodes.call_function(
        _planc.paged_indexer.default,
        (*_args(call, "q k weights"), cache, *caches.batch(_PAGES), *_args(call, "top_k scale")),
    )


def _conv1d(caches: Caches, call: Call, graph: Graph) -> Node:
    channels, width = call.size("weight", 0), call.size("weight", 1)
    (state,) = caches.state(call.node, fake(call.arg("x")).dtype, conv=(channels, width - 1))
    return caches.nodes.call_function(
        _planc.paged_conv1d.default,
        (*_args(call, "x weight bias"), state, *caches.batch(_STATES), call.arg("activation")),
    )


def _delta_rule(caches: Caches, call: Call, graph: Graph) -> Node:
    entry = (call.size("v", 2), call.size("k", 3), call.size("v", 3))
    (state,) = caches.state(call.node, torch.float32, state=entry)
    return caches.nodes.call_function(
        _planc.paged_delta_rule.default,
        (*_args(call, "q k v g beta"), state, *caches.batch(_STATES), call.arg("l2norm")),
    )


_RULES: dict[str, Callable[[Caches, Call, Graph], Node]] = {
    "planc::attention": _attention,
    "planc::dsa_indexer": _indexer,
    "planc::causal_conv1d": _conv1d,
    "planc::gated_delta_rule": _delta_rule,
}
