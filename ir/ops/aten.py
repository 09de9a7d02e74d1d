"""ATen ops that are not matrix products: pointwise, views, reductions, norms, look-ups, copies."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from planc.ir.opdef import Call, OpDef, ShardRule, amount, declare
from planc.ir.work import NONE, Amount, Work, total

aten = torch.ops.aten


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split())


#: Overload -> operations per result element. Transcendentals count as 5; either way the bytes of these
#: ops outweigh their arithmetic on any accelerator.
POINTWISE: dict[str, float] = {
    **dict.fromkeys(
        _names(
            """
    add.Tensor add.Scalar sub.Tensor sub.Scalar mul.Tensor mul.Scalar div.Tensor div.Scalar rsub.Scalar
    neg.default abs.default maximum.default minimum.default relu.default clamp.default clamp_min.default
    clamp_max.default floor.default ceil.default round.default eq.Scalar eq.Tensor ne.Scalar ne.Tensor
    lt.Scalar lt.Tensor le.Scalar le.Tensor gt.Scalar gt.Tensor ge.Scalar ge.Tensor logical_not.default
    logical_and.default logical_or.default bitwise_not.default bitwise_and.Tensor bitwise_or.Tensor
    where.self masked_fill.Scalar masked_fill.Tensor square.default reciprocal.default sign.default
    """
        ),
        1.0,
    ),
    **dict.fromkeys(
        _names(
            """
    exp.default log.default log1p.default expm1.default sqrt.default rsqrt.default sin.default
    cos.default tanh.default sigmoid.default silu.default gelu.default elu.default erf.default
    softplus.default hardtanh.default hardswish.default hardsigmoid.default leaky_relu.default
    mish.default pow.Tensor_Scalar pow.Tensor_Tensor pow.Scalar floor_divide.default remainder.Scalar
    relu6.default
    """
        ),
        5.0,
    ),
    **dict.fromkeys(
        _names(
            """
    to.dtype to.device to.dtype_layout _to_copy.default clone.default contiguous.default alias.default
    detach.default lift_fresh_copy.default dropout.default
    """
        ),
        0.0,
    ),
}

#: These give the same bytes another shape. `reshape`, `contiguous` and `to` may still copy.
VIEWS = _names(
    """
    view.default view.dtype _unsafe_view.default reshape.default unsqueeze.default squeeze.dim
    squeeze.dims squeeze.default transpose.int permute.default t.default expand.default
    expand_as.default slice.Tensor select.int split.Tensor split_with_sizes.default chunk.default
    unbind.int flatten.using_ints unflatten.int movedim.int swapaxes.default view_as_real.default
    view_as_complex.default diagonal.default narrow.default sym_size.int
    """
)

#: One pass over the operands; result elements cost as many operations as given per operand element.
PASSES: dict[str, float] = {
    "softmax.int": 8.0,
    "_softmax.default": 8.0,
    "log_softmax.int": 8.0,
    "layer_norm.default": 8.0,
    "native_layer_norm.default": 8.0,
    "rms_norm.default": 4.0,
    "group_norm.default": 8.0,
    "batch_norm.default": 2.0,
    "_native_batch_norm_legit_no_training.default": 2.0,
    "topk.default": 2.0,
    "sort.default": 20.0,
    "argsort.default": 20.0,
    "argmax.default": 1.0,
    "sum.default": 1.0,
    "sum.dim_IntList": 1.0,
    "mean.default": 1.0,
    "mean.dim": 1.0,
    "amax.default": 1.0,
    "max.dim": 1.0,
    "cumsum.default": 1.0,
    "prod.dim_int": 1.0,
    "any.dim": 1.0,
    "all.dim": 1.0,
    "cat.default": 0.0,
    "stack.default": 0.0,
    "pad.default": 0.0,
    "constant_pad_nd.default": 0.0,
    "roll.default": 0.0,
    "flip.default": 0.0,
    "repeat.default": 0.0,
    "repeat_interleave.self_int": 0.0,
    "tril.default": 0.0,
    "triu.default": 0.0,
    "scatter.src": 0.0,
    "scatter.value": 0.0,
    "copy.default": 0.0,
    "slice_scatter.default": 0.0,
    "upsample_nearest2d.vec": 1.0,
    "upsample_bilinear2d.vec": 8.0,
    "one_hot.default": 0.0,
}

#: Result elements times the pooling window.
POOLS = _names(
    """
    max_pool2d.default max_pool2d_with_indices.default avg_pool2d.default avg_pool1d.default
    adaptive_avg_pool2d.default adaptive_avg_pool1d.default _adaptive_avg_pool2d.default
    max_pool1d.default
    """
)

#: Rows picked out of a table: only what is picked is read.
LOOKUPS = ("gather.default", "index_select.default", "index.Tensor", "take_along_dim.default")

#: Constants made in the graph: written, nothing read.
FACTORIES = _names(
    """
    arange.default arange.start arange.start_step zeros.default ones.default full.default
    zeros_like.default ones_like.default full_like.default new_zeros.default new_ones.default
    new_full.default empty.memory_format new_empty.default empty_like.default scalar_tensor.default
    eye.default
    """
)


def operands(node: Node) -> Iterator[Node]:
    """Tensor-valued arguments of a call, lists opened."""
    for found in node.all_input_nodes:
        if isinstance(found.meta.get("val"), Tensor):
            yield found


def is_parameter(node: Node) -> bool:
    return node.op == "get_attr"


def moved(call: Call) -> tuple[Amount, int, Amount]:
    """Activation elements read, parameter elements read, elements written."""
    reads, weights = NONE, 0
    for found in operands(call.node):
        tensor: Tensor = found.meta["val"]
        if is_parameter(found) and all(isinstance(s, int) for s in tensor.shape):
            weights += tensor.numel()
        else:
            reads = reads + amount(tensor.numel(), call.symbols)
    return reads, weights, results(call)


def results(call: Call) -> Amount:
    return total(amount(t.numel(), call.symbols) for t in _tensors(call.node.meta["val"]))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)


def _pointwise(flops: float) -> Callable[[Call], Work]:
    def work(call: Call) -> Work:
        if same_bytes(call.node):
            return Work("view")
        reads, weights, writes = moved(call)
        return Work("elementwise", flops=writes * flops, weights=weights, reads=reads, writes=writes)

    return work


_CONVERSIONS = frozenset(name for name, flops in POINTWISE.items() if not flops and name != "clone.default")


def same_bytes(node: Node) -> bool:
    """Whether a copy or conversion changes nothing, so that it is free: same type, already contiguous."""
    name = str(node.target).removeprefix("aten.")
    inputs = list(operands(node))
    if name not in _CONVERSIONS or len(inputs) != 1:
        return False
    before, after = inputs[0].meta["val"], node.meta["val"]
    if before.dtype != after.dtype:
        return False
    return bool(name != "contiguous.default" or before.is_contiguous())


def _view(call: Call) -> Work:
    if call.node.target is aten.reshape.default and not _viewable(call.node):
        reads, weights, writes = moved(call)
        return Work("elementwise", weights=weights, reads=reads, writes=writes)
    return Work("view")


def _viewable(node: Node) -> bool:
    """A reshape of contiguous bytes is a view; of others it is taken for a copy."""
    return all(found.meta["val"].is_contiguous() for found in operands(node))


def _pass(flops: float) -> Callable[[Call], Work]:
    def work(call: Call) -> Work:
        reads, weights, writes = moved(call)
        return Work("elementwise", flops=reads * flops, weights=weights, reads=reads, writes=writes)

    return work


def _pool(call: Call) -> Work:
    reads, _, writes = moved(call)
    return Work("elementwise", flops=reads, reads=reads, writes=writes)


def _lookup(call: Call) -> Work:
    picked = results(call)
    return Work("gather", reads=picked, writes=picked)


def _embedding(call: Call) -> Work:
    """A row of the table per token: reads and writes the width once each, and the ids."""
    return Work("gather", reads=call.out() + call.elements("indices"), writes=call.out())


def _factory(call: Call) -> Work:
    return Work("elementwise", writes=results(call))


def _declare(name: str, work: Callable[[Call], Work], **facts: Any) -> None:
    packet, overload = name.split(".")
    found = getattr(getattr(aten, packet, None), overload, None)
    if found is not None:  # an op that this torch does not have cannot be in its graphs
        declare(OpDef(found, work=work, **facts))


for _name, _flops in POINTWISE.items():
    _declare(_name, _pointwise(_flops), pointwise=True)
for _name in VIEWS:
    _declare(_name, _view)
for _name, _flops in PASSES.items():
    _declare(_name, _pass(_flops))
for _name in POOLS:
    _declare(_name, _pool)
for _name in LOOKUPS:
    _declare(_name, _lookup)
for _name in FACTORIES:
    _declare(_name, _factory)
_declare("embedding.default", _embedding, shards=(ShardRule("vocab", {"weight": 0}, ("partial",)),))
