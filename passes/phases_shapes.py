"""Sizes of a phase graph: fresh symbols for tokens and sequences, and every node's fake tensor anew.

Symbols: T tokens, S sequences, B cache blocks, Z their size, M width of the block table, N state rows.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx import Graph as Nodes
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.fx.node import Argument, map_arg
from torch.nn import Module

from planc.ir.graph import CacheSpec

#: Role in `Graph.symbols` -> an example size; they differ so that no two sizes are taken for one.
_EXAMPLES = {"T": 1021, "S": 61, "blocks": 4099, "block_size": 16, "table": 257, "states": 67}


@dataclass(frozen=True, slots=True)
class Sizes:
    """The symbolic sizes of one phase graph, in a fake-tensor mode of their own."""

    mode: FakeTensorMode
    device: torch.device
    values: dict[str, torch.SymInt]

    @staticmethod
    def of(input_ids: Node) -> Sizes:
        """Fresh sizes, on the device that the traced graph stands on."""
        mode = FakeTensorMode(shape_env=ShapeEnv(duck_shape=False), allow_non_fake_inputs=False)
        values: dict[str, torch.SymInt] = {}
        for role, example in _EXAMPLES.items():
            one = mode.from_tensor(
                torch.empty(example, device="meta"),
                symbolic_context=StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC]),
            )
            size = one.shape[0]
            assert isinstance(size, torch.SymInt)
            values[role] = size
        return Sizes(mode, input_ids.meta["val"].device, values)

    def roles(self) -> dict[str, str]:
        """Symbol -> role, as in `Graph.symbols`."""
        return {str(size.node.expr): role for role, size in self.values.items()}

    def inputs(self, caches: Sequence[CacheSpec]) -> dict[str, Tensor]:
        """The fake tensor of every input, by name; see `planc.ir.graph`."""
        v = self.values
        shapes: dict[str, tuple[tuple[int | torch.SymInt, ...], torch.dtype]] = {
            "input_ids": ((1, v["T"]), torch.int64),
            "position_ids": ((1, v["T"]), torch.int64),
            "query_starts": ((v["S"] + 1,), torch.int32),
            "context_lens": ((v["S"],), torch.int32),
            "block_table": ((v["S"], v["table"]), torch.int32),
            "slots": ((v["T"],), torch.int64),
            "state_slots": ((v["S"],), torch.int64),
        }
        for spec in caches:
            lead = (v["blocks"], v["block_size"]) if spec.kind == "paged" else (v["states"],)
            shapes[spec.name] = ((*lead, *spec.entry), spec.dtype)
        with self.mode:
            return {
                name: torch.empty(shape, dtype=dtype, device=self.device)
                for name, (shape, dtype) in shapes.items()
            }

    def grows_with_square(self, value: object) -> bool:
        """Whether a tensor's number of elements has the tokens squared in it."""
        count: object = value.numel() if isinstance(value, Tensor) else None
        if not isinstance(count, torch.SymInt):
            return False
        tokens, elements = self.values["T"].node.expr, count.node.expr
        return bool(elements.has(tokens)) and elements.diff(tokens, 2).is_zero is False


def propagate(nodes: Nodes, root: Module, sizes: Sizes, caches: Sequence[CacheSpec]) -> None:
    """Computes every node's fake tensor; sizes that turn out constant (the batch of 1) become literals.

    `root` holds the parameters. A model repeats its layers, so calls of one op on arguments alike are
    computed once and share their fake tensor: eighty layers cost little more than one.
    """
    inputs = sizes.inputs(caches)
    memory = _Memory()
    values: dict[Node, Any] = {}
    with sizes.mode:
        for node in list(nodes.nodes):
            match node.op:
                case "placeholder":
                    value: Any = memory.same(inputs[str(node.target)])
                case "get_attr":
                    value = memory.same(_attribute(root, str(node.target), sizes.device))
                case "call_function":
                    value = memory.call(node, values)
                    if isinstance(value, int):
                        _inline(node, value)
                        continue
                case _:
                    continue
            values[node] = node.meta["val"] = value


class _Memory:
    """Fake tensors by what they look like, and results by op and arguments."""

    def __init__(self) -> None:
        self._tensors: dict[Hashable, Tensor] = {}
        self._results: dict[Hashable, Any] = {}

    def same(self, value: Any) -> Any:
        """The first value that looked like this one."""
        if isinstance(value, Tensor):
            looks = (value.dtype, value.device, str(value.shape), str(value.stride()))
            return self._tensors.setdefault(looks, value)
        if isinstance(value, tuple | list):
            return tuple(self.same(part) for part in value)
        return value

    def call(self, node: Node, values: dict[Node, Any]) -> Any:
        args, kwargs = map_arg((node.args, node.kwargs), lambda used: values[used])
        key = (node.target, _key(args), _key(tuple(sorted(kwargs.items()))))
        if key not in self._results:
            assert callable(node.target)
            self._results[key] = self.same(node.target(*args, **kwargs))
        return self._results[key]


def _key(argument: object) -> Hashable:
    """Equal for arguments that give equal results; tensors have gone through `_Memory.same`."""
    match argument:
        case Tensor():
            return ("tensor", id(argument))
        case tuple() | list():
            return tuple(_key(part) for part in argument)
        case torch.SymInt():
            return ("size", str(argument.node.expr))
        case _:
            return (type(argument), argument)


def _attribute(module: Module, name: str, device: torch.device) -> Tensor:
    found: object = module
    for part in name.split("."):
        found = getattr(found, part)
    assert isinstance(found, Tensor), f"{name} is not a tensor"
    return torch.empty_strided(found.shape, found.stride(), dtype=found.dtype, device=device)


def _inline(node: Node, value: int) -> None:
    """Puts a constant in place of the node that computed it."""

    def literal(argument: Node) -> Argument:
        return value if argument is node else argument

    for user in list(node.users):
        user.args = map_arg(user.args, literal)
        user.kwargs = map_arg(user.kwargs, literal)
    node.graph.erase_node(node)
