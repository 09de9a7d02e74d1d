"""Quantization, simulated faithfully: weights are really stored in the format, activations really rounded.

    graph = Quantize("fp8", activations="fp8", kv="fp8").apply(graph)
    graph = Quantize({"moe": "mxfp4", "dense": "fp8"}).apply(graph)      per layer class
    graph = Quantize({"decoder": "fp8", "decoder:self_attn": "bf16"}).apply(graph)      and per part
    stored = prepare(graph, weights)                                     the source model's weights, stored

    before   y = linear(x, q_proj.weight)
    after    y = planc.linear_fp8(x, q_proj.weight, q_proj.weight_scale, None, None, 'fp8', 0)

Format names are the catalogue's, and so is which op families a format applies to (mxfp4: routed
experts only). What `quantize_scope` names keeps its precision. Run it last: fusion and sharding know
unquantized products only, and both commute with scales that belong to rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import Node

from planc.cost_model.formats import fmt
from planc.cost_model.parts import KV, Exceptions, banded, module_of_weight, parse, scheme, taken
from planc.errors import InvalidField, UnknownName
from planc.ir.graph import CacheSpec, Graph
from planc.ir.layers import relative
from planc.ir.opdef import Call, declaration, fake
from planc.ir.ops import quantized_formats as qf
from planc.ir.ops.quantized import LINEAR, ROUNDINGS
from planc.ir.ops.quantized_experts import EXPERTS
from planc.passes.fold import fold
from planc.passes.fusion_rewriter import Rewriter, weights_for
from planc.passes.quantize_scope import keeps_precision

aten, planc = torch.ops.aten, torch.ops.planc

#: cache format -> how it is stored
CACHE_TYPES = {"fp8": torch.float8_e4m3fn}


@dataclass(frozen=True, slots=True)
class QuantizeWeight:
    """A weight step: one matrix (or stack of them) into the tensors that a format stores.

    transposed   the source holds `[..., k, n]`
    """

    reads: tuple[str, ...]
    makes: tuple[str, ...]
    format: str
    group_size: int
    transposed: bool = False

    def apply(self, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        (weight,) = tensors
        if weight.is_meta:
            like = tuple(weight.shape), weight.dtype
            shapes = _stored_shapes(self.format, self.group_size, self.transposed, *like)
            return tuple(torch.empty(shape, dtype=dtype, device="meta") for shape, dtype in shapes)
        if self.transposed:
            weight = weight.transpose(-1, -2)
        return qf.WEIGHT_FORMATS[self.format].quantize(weight, self.group_size)


@cache
def _stored_shapes(
    format: str, group_size: int, transposed: bool, shape: tuple[int, ...], dtype: torch.dtype
) -> tuple[tuple[torch.Size, torch.dtype], ...]:
    """Shapes and types of what a format stores of such a weight; a model has few distinct ones."""
    weight = torch.empty(shape, dtype=dtype, device="meta")
    weight = weight.transpose(-1, -2) if transposed else weight
    stored = qf.WEIGHT_FORMATS[format].quantize(weight, group_size)
    return tuple((part.shape, part.dtype) for part in stored)


@dataclass(frozen=True, slots=True)
class Quantize:
    """Number formats for weights, activations and the KV cache.

    formats       weight format of every layer class, or of those named; "bf16" (or fp16, fp32): as it is.
                  Parts (`planc.cost_model.parts`) may be named too, with the scheme they take: what names
                  a module wins over what names a class, what names layers over what does not
    activations   what activations are rounded to where they meet a quantized weight, but in parts that
                  say so themselves
    kv            format of the paged caches (phase graphs) that `formats` does not name: "fp8", or as it is
    group_size    elements of k that share a scale in w4a16

    Raises UnknownName (a format or a layer class) and InvalidField (a format in the wrong role).
    """

    formats: str | Mapping[str, str] = "bf16"
    activations: str = "bf16"
    kv: str = "bf16"
    group_size: int = qf.INT4_GROUP
    name: ClassVar[str] = "quantize"

    def apply(self, graph: Graph) -> Graph:
        """The graph with quantized products and caches; its weights come from `prepare`."""
        self._check()
        places = self._places(graph)
        rewriter = Rewriter(graph)
        stored: _Stored = {}
        for node in rewriter.calls(frozenset({aten.linear.default, planc.experts.default})):
            weights, activations = self._scheme(node, places)
            if weights not in qf.WEIGHT_FORMATS:
                continue
            quantize = _linear if node.target is aten.linear.default else _experts
            quantize(rewriter, node, self._storing(weights, activations), stored)
        caches = _cache_types(rewriter, graph, lambda node: self._cache(places.get(node.name)))
        return rewriter.finish(self.name, caches=caches)

    @property
    def _parts(self) -> Exceptions:
        """Parts with the scheme they take."""
        named = {} if isinstance(self.formats, str) else self.formats
        return tuple((name, taken_) for name, taken_ in named.items() if ":" in name)

    @property
    def _classes(self) -> Exceptions:
        """Layer classes (or bands of their layers) with their weight format, written as parts without a
        module."""
        named = {} if isinstance(self.formats, str) else self.formats
        return tuple((f"{name}:", taken_) for name, taken_ in named.items() if ":" not in name)

    def _check(self) -> None:
        cached = [taken_ for part, taken_ in self._parts if part.endswith(f":{KV}")]
        schemes = [scheme(taken_) for part, taken_ in self._parts if not part.endswith(f":{KV}")]
        classes = [self.formats] if isinstance(self.formats, str) else [name for _, name in self._classes]
        given: dict[str, list[str]] = {
            "weight": [*classes, *(weights for weights, _ in schemes)],
            "activation": [self.activations, *(activations for _, activations in schemes)],
            "kv": [self.kv, *cached],
        }
        for role, names in given.items():
            for name in names:
                _check_role(name, role)

    def _places(self, graph: Graph) -> dict[str, tuple[str, str]]:
        """Call -> its layer class and the path of its layer.

        Fusion sets the first layer of a class apart (its norm has no addition to take along) and prefill
        the last one, so "decoder" speaks for "decoder.1" too unless that is named itself.
        """
        groups = fold(graph)
        known = {name for group in groups for name in (group.name, _kind(group.name))} | _ENDS
        named = {}
        for text, _ in (*self._parts, *self._classes):
            part = parse(text)
            named[text] = part.layer_class if part else text.rstrip(":")
            if part is None or (part.layer_class not in known and _kind(part.layer_class) not in known):
                raise UnknownName(
                    field="formats",
                    value=named[text],
                    kind="layer class",
                    mend=f"This model has {', '.join(sorted(known))}.",
                )
        own = set(named.values())
        return {
            node.name: (group.name if group.name in own else _kind(group.name), path)
            for group in groups
            for path, member in zip(group.paths, group.members, strict=True)
            for node in member
        }

    def _scheme(self, node: Node, places: Mapping[str, tuple[str, str]]) -> tuple[str, str]:
        """(weights, activations) of a product."""
        if isinstance(self.formats, str):
            return self.formats, self.activations
        if node.name not in places:
            return "", ""
        layer_class, path = places[node.name]
        weight = node.args[1] if node.target is aten.linear.default else Call(node, {}).arg("gate_up")
        module = module_of_weight(relative(str(getattr(weight, "target", "")), path or None))
        band = _band(layer_class, path)
        given = taken(self._parts, band, module)
        if given is not None:
            return scheme(given)
        return taken(self._classes, band, "") or "", self.activations

    def _cache(self, place: tuple[str, str] | None) -> str:
        return (taken(self._parts, _band(*place), KV) if place else None) or self.kv

    def _storing(self, weights: str, activations: str) -> _Storing:
        rounding = activations if activations in ROUNDINGS else ""
        return _Storing(weights, rounding, self.group_size if weights == "w4a16" else 0)


def _band(layer_class: str, path: str) -> str:
    """A layer as parts name it: "decoder[3]" for "model.layers.3"."""
    number = path.rpartition(".")[2]
    return banded(layer_class, (int(number),)) if number.isdigit() else layer_class


#: Classes of count one that any model may be said to have.
_ENDS = {"embedding", "head"}


def _kind(layer_class: str) -> str:
    """ "decoder" of "decoder.1": `fold` numbers classes that differ in nothing that has a name."""
    name, _, number = layer_class.rpartition(".")
    return name if number.isdigit() else layer_class


def prepare(graph: Graph, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors a quantized (and fused) graph reads, made from the source model's weights by name.

    Raises WeightsMismatch where one is missing.
    """
    return weights_for(graph, weights)


@dataclass(frozen=True, slots=True)
class _Storing:
    """How one product is quantized. `families`: which products the format applies to at all."""

    format: str
    activations: str
    group_size: int

    def applies_to(self, family: str) -> bool:
        return family in fmt(self.format).families

    def step(self, weight: str, transposed: bool = False) -> QuantizeWeight:
        parts = tuple(weight + suffix for suffix in qf.WEIGHT_FORMATS[self.format].parts)
        return QuantizeWeight((weight,), parts, self.format, self.group_size, transposed)


#: weight -> the format it is stored in now, and the stored tensors
_Stored = dict[str, tuple[str, tuple[Node, ...]]]


def _linear(rewriter: Rewriter, node: Node, how: _Storing, stored: _Stored) -> None:
    weight = node.args[1]
    if not isinstance(weight, Node) or not how.applies_to("gemm") or not _only_read_by(weight, node.target):
        return
    module = str(weight.target).rpartition(".")[0]
    if keeps_precision(module) or fake(weight).dim() != 2:
        return
    if stored.get(str(weight.target), (how.format,))[0] != how.format:
        return  # shared with a layer class of another format
    parts = _parts(rewriter, how, stored, weight)
    scale_2 = parts[2] if len(parts) > 2 else None
    bias = node.args[2] if len(node.args) > 2 else None
    args = (node.args[0], parts[0], parts[1], scale_2, bias, how.activations, how.group_size)
    _swap(rewriter, node, LINEAR[how.format], args)


def _experts(rewriter: Rewriter, node: Node, how: _Storing, stored: _Stored) -> None:
    call = Call(node, {})
    matrices = [call.arg("gate_up"), call.arg("down")]
    if not how.applies_to("grouped_gemm") or not all(_only_read_by(m, node.target) for m in matrices):
        return
    args = [call.arg(name) for name in ("x", "ids", "weights")]
    for matrix, bias in zip(matrices, ("gate_up_bias", "down_bias"), strict=True):
        parts = _parts(rewriter, how, stored, matrix, call.arg("transposed"))
        args += [parts[0], parts[1], parts[2] if len(parts) > 2 else None, call.arg(bias)]
    args += [call.arg(name) for name in ("act", "interleaved", "alpha", "limit", "scale_input")]
    _swap(rewriter, node, EXPERTS[how.format], [*args, how.activations, how.group_size, call.arg("first")])


def _parts(
    rewriter: Rewriter, how: _Storing, stored: _Stored, weight: Node, transposed: bool = False
) -> tuple[Node, ...]:
    """The stored tensors of a weight, made once however many calls read it."""
    name = str(weight.target)
    if name not in stored:
        stored[name] = how.format, rewriter.parameters(how.step(name, transposed))
    return stored[name][1]


def _swap(rewriter: Rewriter, node: Node, target: Any, args: Any) -> None:
    new = rewriter.call(target, args, before=node, like=node)
    node.replace_all_uses_with(new)
    rewriter.replaced([node], [new])


def _only_read_by(weight: object, target: object) -> bool:
    """A parameter that only such calls read (a tied embedding table is not)."""
    return (
        isinstance(weight, Node)
        and weight.op == "get_attr"
        and all(user.target is target for user in weight.users)
    )


def _cache_types(rewriter: Rewriter, graph: Graph, kv_of: Callable[[Node], str]) -> tuple[CacheSpec, ...]:
    """Caches that their ops can hold in 8 bits change type; the ops round on writing, widen on reading."""
    narrowed: dict[str, torch.dtype] = {}
    for node in rewriter.graph.nodes:
        declared = declaration(node)
        for name, role in declared.quantizable.items() if declared else ():
            cache = Call(node, graph.symbols).arg(name) if role == "kv" else None
            dtype = CACHE_TYPES.get(kv_of(node)) if role == "kv" else None
            if dtype is not None and isinstance(cache, Node) and cache.op == "placeholder":
                cache.meta["val"] = fake(cache).to(dtype)
                narrowed[str(cache.target)] = dtype
    return tuple(
        replace(spec, dtype=narrowed[spec.name]) if spec.name in narrowed else spec for spec in graph.caches
    )


def _check_role(name: str, role: str) -> None:
    """Raises UnknownName and InvalidField."""
    found = fmt(name)
    if role not in found.roles:
        raise InvalidField(
            where="formats",
            field=role,
            value=name,
            reason=f"{name} is a format of {' and '.join(found.roles)}",
            mend="`planc hardware` lists the formats and their roles.",
        )


__all__ = ["CACHE_TYPES", "Quantize", "QuantizeWeight", "prepare"]
