"""The tensor operands of a call, and how a declared rule holds them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.fx import Node

from planc.ir.opdef import Held
from planc.passes.parallel_state import Axis, State


@dataclass(frozen=True, slots=True)
class Operand:
    """One tensor operand of a call: where it stands in the arguments, its name in the schema."""

    path: tuple[str | int, ...]
    name: str
    node: Node
    state: State

    @property
    def shape(self) -> torch.Size:
        found = self.node.meta["val"]
        assert isinstance(found, torch.Tensor)
        return found.shape


def operands(node: Node, state: Callable[[Node], State]) -> list[Operand]:
    """The tensor operands of a call or of the output, lists opened."""
    names: list[str] = []
    if isinstance(node.target, torch._ops.OpOverload):
        names = [argument.name for argument in node.target._schema.arguments]
    out: list[Operand] = []

    def walk(value: object, path: tuple[str | int, ...], name: str) -> None:
        if isinstance(value, Node):
            if isinstance(value.meta.get("val"), torch.Tensor):
                out.append(Operand(path, name, value, state(value)))
        elif isinstance(value, list | tuple):
            for i, item in enumerate(value):
                walk(item, (*path, i), name)
        elif isinstance(value, dict):
            for key, item in value.items():
                walk(item, (*path, key), name)

    for i, value in enumerate(node.args):
        walk(value, (i,), names[i] if i < len(names) else str(i))
    for key, value in node.kwargs.items():
        walk(value, (key,), key)
    return out


def results(node: Node) -> list[torch.Tensor]:
    """The tensors a call gives; sizes and other scalars are not among them."""
    val = node.meta.get("val")
    found = val if isinstance(val, list | tuple) else [val]
    return [v for v in found if isinstance(v, torch.Tensor)]


def alike(one: Axis, other: Axis) -> bool:
    """Whether two axes are laid out alike, whatever groups divide them."""
    sizes = [section.size for section in one.sections] == [section.size for section in other.sections]
    return one.dim == other.dim and one.outer == other.outer and sizes


def held_dim(held: Held | None, operand: Operand) -> int | None:
    """The dimension a rule divides an operand along, counted from the front."""
    if isinstance(held, str) and held.startswith("halves:"):
        held = int(held.removeprefix("halves:"))
    return held % len(operand.shape) if isinstance(held, int) and operand.shape else None
