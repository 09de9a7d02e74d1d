"""Where a divided dimension goes in ATen ops of one tensor: views, splits, reductions, copies.

A table from op to a pure function `follow(node, axis)`: given that the first operand is divided
along `axis`, how is each result divided, and which size arguments of the call must shrink with
it? None: the op mixes the divided dimension, so it needs its operand whole.

Before                                        After, on one of two ranks
    view(q, [B, S, 8, 64])   q: [B, S, 512]       view(q, [B, S, 4, 64])   q: [B, S, 256]
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch.fx import Node

from planc.ir.opdef import fake
from planc.passes.parallel_state import Axis, Count, Section, count

#: Path of an int inside node.args, and the sections whose local sizes add up to its new value.
Resize: TypeAlias = tuple[tuple[int, ...], tuple[Section, ...]]


@dataclass(frozen=True, slots=True)
class Followed:
    """results: one axis per result. refine: the op cuts the axis at these sizes, so that whoever
    divides it first must lay it out in sections of these sizes. in_step: it cuts equal pieces, so
    that all sections must be divided alike."""

    results: tuple[Axis, ...]
    resizes: tuple[Resize, ...] = ()
    refine: tuple[int, ...] = ()
    in_step: bool = False


Follow: TypeAlias = Callable[[Node, Axis], Followed | None]

_aten = torch.ops.aten


def argument(node: Node, index: int, name: str, default: Any) -> Any:
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)


def _rank(node: Node) -> int:
    return fake(node.args[0]).dim()


def same(node: Node, axis: Axis) -> Followed:
    """Copies and casts."""
    return Followed((axis,))


def reshaped(node: Node, axis: Axis) -> Axis | None:
    """The axis after any re-viewing of the same elements in the same order.

    With P elements in front of the divided part (leading dimensions, and `outer` in its own), the
    result is divided in the dimension that position P falls into, what is left of P being its outer.
    The part itself may grow by the dimensions behind it, or be split: its leading factor is divided.
    """
    before, after = fake(node.args[0]).shape, fake(node).shape
    front = count(before[: axis.dim]).times(axis.outer)
    grown = [
        front.times(Count(axis.size)).times(count(before[axis.dim + 1 : end])) for end in _ends(axis, before)
    ]
    best: Axis | None = None
    for dim in range(len(after)):
        outer = front.over(count(after[:dim]))
        own = count(after[dim : dim + 1]).over(outer) if outer else None
        if outer is None or own is None or own.symbols or own.number == 1:
            continue
        size = own.number
        if size == axis.size:
            return Axis(dim, axis.sections, outer)
        if size > axis.size and front.times(own) in grown:
            scaled = axis.scaled(size, axis.size)
            best = Axis(dim, scaled.sections, outer) if scaled else best
        elif size < axis.size and axis.size % size == 0 and len(axis.sections) == 1:
            best = Axis(dim, (Section(size, axis.sections[0].group),), outer)
    return best


def _ends(axis: Axis, shape: torch.Size) -> range:
    return range(axis.dim + 1, len(shape) + 1)


def _sized_view(node: Node, axis: Axis) -> Followed | None:
    found = reshaped(node, axis)
    if found is None:
        return None
    return Followed((found,), (((1, found.dim), found.sections),) if found.outer == Count() else ())


def _plain_view(node: Node, axis: Axis) -> Followed | None:
    found = reshaped(node, axis)
    return Followed((found,)) if found else None


def _unflatten(node: Node, axis: Axis) -> Followed | None:
    found = reshaped(node, axis)
    if found is None:
        return None
    start, sizes = int(node.args[1]) % _rank(node), node.args[2]  # type: ignore[arg-type]
    assert isinstance(sizes, list | tuple)
    inside = start <= found.dim < start + len(sizes)
    return Followed((found,), (((2, found.dim - start), found.sections),) if inside else ())


def _transpose(node: Node, axis: Axis) -> Followed:
    rank = _rank(node)
    a, b = (int(d) % rank for d in node.args[1:3])  # type: ignore[arg-type]
    return Followed((axis.moved({a: b, b: a}.get(axis.dim, axis.dim)),))


def _matrix_transpose(node: Node, axis: Axis) -> Followed:
    last = _rank(node) - 1
    return Followed((axis.moved({last: last - 1, last - 1: last}.get(axis.dim, axis.dim)),))


def _permute(node: Node, axis: Axis) -> Followed:
    rank = _rank(node)
    order = [int(d) % rank for d in node.args[1]]  # type: ignore[union-attr, arg-type]
    return Followed((axis.moved(order.index(axis.dim)),))


def _expand(node: Node, axis: Axis) -> Followed:
    dim = axis.dim + fake(node).dim() - _rank(node)
    return Followed((axis.moved(dim),), (((1, dim), axis.sections),))


def _repeat(node: Node, axis: Axis) -> Followed:
    dim = axis.dim + fake(node).dim() - _rank(node)
    times = int(node.args[1][dim])  # type: ignore[index, arg-type]
    return Followed((Axis(dim, axis.sections * times),))


def _repeat_interleave(node: Node, axis: Axis) -> Followed | None:
    dim = argument(node, 2, "dim", None)
    if dim is None or not isinstance(node.args[1], int):
        return None
    grown = axis.scaled(node.args[1]) if int(dim) % _rank(node) == axis.dim else axis
    return Followed((grown,)) if grown else None


def _select(node: Node, axis: Axis) -> Followed | None:
    dim = int(node.args[1]) % _rank(node)  # type: ignore[arg-type]
    return None if dim == axis.dim else Followed((axis.moved(axis.dim - (dim < axis.dim)),))


def _cuts(axis: Axis, sizes: list[int]) -> list[tuple[Section, ...]] | None:
    """The axis's sections dealt out to consecutive pieces of these sizes."""
    rest, out = list(axis.sections), []
    for size in sizes:
        taken: list[Section] = []
        while rest and sum(s.size for s in taken) < size:
            taken.append(rest.pop(0))
        if sum(s.size for s in taken) != size:
            return None
        out.append(tuple(taken))
    return out


def _slice(node: Node, axis: Axis) -> Followed | None:
    dim = int(argument(node, 1, "dim", 0)) % _rank(node)
    if dim != axis.dim:
        return Followed((axis,))
    start, end = argument(node, 2, "start", None) or 0, argument(node, 3, "end", None)
    if argument(node, 4, "step", 1) != 1 or not isinstance(start, int) or not isinstance(end, int | None):
        return None
    size = axis.size
    start = max(start + size, 0) if start < 0 else min(start, size)
    end = size if end is None else (end + size if end < 0 else min(end, size))
    sizes = [start, end - start, size - end]
    cut = _cuts(axis, sizes)
    if cut is None:
        return Followed((), refine=tuple(s for s in sizes if s))
    before, kept, _ = cut
    return Followed((Axis(dim, kept),), (((2,), before), ((3,), before + kept)))


def _split(node: Node, axis: Axis) -> Followed | None:
    """split, split_with_sizes, chunk: the results' own sizes say where the cuts are."""
    dim = int(argument(node, 2, "dim", 0)) % _rank(node)
    results = node.meta["val"]
    if dim != axis.dim:
        return Followed((axis,) * len(results))
    sizes = [int(result.shape[dim]) for result in results]
    cut = _cuts(axis, sizes)
    if cut is None:
        return Followed((), refine=tuple(sizes))
    axes = tuple(Axis(dim, kept) for kept in cut)
    given = node.args[1]
    if isinstance(given, list | tuple):
        return Followed(axes, tuple(((1, i), kept) for i, kept in enumerate(cut)))
    if len(set(sizes)) > 1:
        return None
    by_size = node.target is _aten.split.Tensor
    return Followed(axes, (((1,), cut[0]),) if by_size else (), in_step=True)


def _along(index: int, default: int = -1) -> Follow:
    """Ops that work along the dims given by argument `index` and leave the others alone."""

    def follow(node: Node, axis: Axis) -> Followed | None:
        rank = _rank(node)
        given = argument(node, index, "dim", default)
        along = {int(d) % rank for d in (given if isinstance(given, list | tuple) else [given])}
        if given is None or axis.dim in along:
            return None
        results = node.meta["val"]
        out = results[0] if isinstance(results, list | tuple) else results
        if out.dim() < rank:
            axis = axis.moved(axis.dim - sum(d < axis.dim for d in along))
        return Followed((axis,) * (len(results) if isinstance(results, list | tuple) else 1))

    return follow


def _pad(node: Node, axis: Axis) -> Followed | None:
    padded = len(node.args[1]) // 2  # type: ignore[arg-type]
    return Followed((axis,)) if axis.dim < _rank(node) - padded else None


#: Ops that keep sums: they may run on partial sums before these are added up.
LINEAR_VIEWS: Mapping[Any, Follow] = {
    **dict.fromkeys((_aten.view.default, _aten.reshape.default, _aten._unsafe_view.default), _sized_view),
    _aten.flatten.using_ints: _plain_view,
    _aten.unsqueeze.default: _plain_view,
    _aten.squeeze.default: _plain_view,
    _aten.squeeze.dim: _plain_view,
    _aten.squeeze.dims: _plain_view,
    _aten.unflatten.int: _unflatten,
    _aten.transpose.int: _transpose,
    _aten.t.default: _matrix_transpose,
    _aten.mT.default: _matrix_transpose,
    _aten.permute.default: _permute,
    _aten.expand.default: _expand,
    _aten.repeat.default: _repeat,
    _aten.repeat_interleave.self_int: _repeat_interleave,
    _aten.select.int: _select,
    _aten.slice.Tensor: _slice,
    _aten.split.Tensor: _split,
    _aten.split_with_sizes.default: _split,
    _aten.chunk.default: _split,
    _aten.unbind.int: _along(1, 0),
    _aten.sum.dim_IntList: _along(1),
    _aten.mean.dim: _along(1),
    **dict.fromkeys(
        (
            _aten.clone.default,
            _aten.contiguous.default,
            _aten.alias.default,
            _aten.detach.default,
            _aten._to_copy.default,
            _aten.to.dtype,
            _aten.to.dtype_layout,
            _aten.to.device,
        ),
        same,
    ),
}

#: Ops along some dims that are not linear: partial sums are added up before them.
ALONG: Mapping[Any, Follow] = {
    _aten.softmax.int: _along(1),
    _aten._softmax.default: _along(1),
    _aten.log_softmax.int: _along(1),
    _aten.amax.default: _along(1),
    _aten.cumsum.default: _along(1),
    _aten.topk.default: _along(2),
    _aten.sort.default: _along(1),
    _aten.argmax.default: _along(1, 0),
    _aten.dropout.default: same,
    _aten.constant_pad_nd.default: _pad,
}
