"""Fake values of a rank's graph, each distinct call computed once.

The layers of a model are alike, so of ten thousand calls a few dozen differ in op, sizes and
constants; their results are shared. Fake tensors are metadata, so sharing one is safe.
"""

from __future__ import annotations

import operator
from collections.abc import Hashable, Mapping
from typing import Any

import torch
from torch import SymBool, SymFloat, SymInt, Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from planc.ir.fakes import compute, fake_mode


class Fakes:
    """Computes values in the fake mode of `module`, and so with its size symbols."""

    def __init__(self, module: GraphModule) -> None:
        self.mode: FakeTensorMode = fake_mode(module)
        self._calls: dict[Hashable, Any] = {}
        self._empty: dict[Hashable, Tensor] = {}
        self._keys: dict[int, tuple[Any, Hashable]] = {}  # the value is kept, so that its id stays its own

    def value(self, node: Node) -> Any:
        """What a call yields on its operands' values."""
        if node.target is operator.getitem:
            source, index = node.args
            assert isinstance(source, Node)
            return source.meta["val"][index]
        args, kwargs = map_arg((node.args, node.kwargs), lambda used: used.meta["val"])
        key = (node.target, self._key(args), self._key(kwargs))
        if key not in self._calls:
            self._calls[key] = compute(node, self.mode)
        return self._calls[key]

    def empty(self, like: Tensor, shape: tuple[int | SymInt, ...]) -> Tensor:
        """A value of this shape, type and device as `like`."""
        key = (like.dtype, like.device, self._key(shape))
        if key not in self._empty:
            with self.mode, torch.no_grad():
                self._empty[key] = like.new_empty(shape)
        return self._empty[key]

    def _key(self, value: Any) -> Hashable:
        if isinstance(value, Tensor):
            if id(value) not in self._keys:
                facts = (value.dtype, value.device, self._key(value.shape), self._key(value.stride()))
                self._keys[id(value)] = (value, facts)
            return self._keys[id(value)][1]
        if isinstance(value, SymInt | SymFloat | SymBool):
            return str(value.node.expr)
        if isinstance(value, list | tuple):
            return tuple(self._key(item) for item in value)
        if isinstance(value, Mapping):
            return tuple((name, self._key(item)) for name, item in value.items())
        return (type(value), value)
