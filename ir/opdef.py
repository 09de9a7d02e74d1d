"""How an op is declared: once, in one place, for passes, cost model and codegen alike.

A declaration ties an op of torch (`torch.ops.planc.*` or an ATen one) to what planc must know
of it: its work over the features of a step, the ways it may be sharded, and which operands may
take another number format. Nothing else in planc switches on op names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch.fx import Node

from planc.ir.work import NONE, Amount, Work

#: How one tensor is held by the ranks of a group: a dimension that is divided (negative: counted
#: from the last), or "whole" (every rank has all of it), or "partial" (the sum over the ranks is the
#: value), or "halves:d": dimension d holds two parts end to end (gate, then up), each divided.
Held = int | str


@dataclass(frozen=True, slots=True)
class ShardRule:
    """One way to run an op on a group of ranks without talking inside it.

    name      as in `planc.cost_model.table.Shard.kind`
    operands  argument name -> how it is held; an argument not named is "whole"
    results   how each result is held
    when      whether the rule holds for a call at all (a layout flag, a head count); None: always
    first     an int argument that tells the op the index of the first piece it holds (the rank's
              first expert or vocabulary row; 0 before sharding); "" where it need not know
    """

    name: str
    operands: Mapping[str, Held]
    results: tuple[Held, ...]
    when: Callable[[Call], bool] | None = None
    first: str = ""


@dataclass(frozen=True, slots=True)
class Call:
    """One call of an op in a graph, as a declaration sees it: arguments and shapes by name.

    `symbols` says which size symbol of the graph is which feature; see `planc.ir.graph.Graph`.
    """

    node: Node
    symbols: Mapping[str, str]

    def arg(self, name: str) -> Any:
        """The argument by its schema name, whether given by position, keyword or default."""
        target = self.node.target
        assert isinstance(target, torch._ops.OpOverload)
        for position, spec in enumerate(target._schema.arguments):
            if spec.name == name:
                if position < len(self.node.args):
                    return self.node.args[position]
                return self.node.kwargs.get(name, spec.default_value)
        raise KeyError(f"{target} has no argument {name!r}")

    def tensor(self, name: str) -> torch.Tensor | None:
        """The fake tensor of an argument; None where the argument is None."""
        given = self.arg(name)
        return None if given is None else fake(given)

    def size(self, name: str, dim: int) -> int:
        """A static (feature) dimension of an argument."""
        tensor = self.tensor(name)
        assert tensor is not None, f"{self.node}: {name} is None"
        return int(tensor.shape[dim])

    def elements(self, name: str) -> Amount:
        """Elements of an argument (NONE where it is None)."""
        tensor = self.tensor(name)
        return NONE if tensor is None else amount(tensor.numel(), self.symbols)

    def out(self, index: int = 0) -> Amount:
        """Elements of a result."""
        found = self.node.meta["val"]
        tensor = found if isinstance(found, torch.Tensor) else found[index]
        return amount(tensor.numel(), self.symbols)


@dataclass(frozen=True, slots=True)
class OpDef:
    """One declared op.

    target       the overload, e.g. torch.ops.planc.rms_norm.default
    work         Work of one call
    shards       the ways it may be divided; the first that fits its inputs is taken
    quantizable  argument name -> role: "weight", "activation" or "kv"
    pointwise    each element of a result depends only on the operands' elements at the same
                 (broadcast) place, so any dimension may be divided, and chains may be fused
    """

    target: torch._ops.OpOverload
    work: Callable[[Call], Work]
    shards: tuple[ShardRule, ...] = ()
    quantizable: Mapping[str, str] = field(default_factory=dict)
    pointwise: bool = False

    @property
    def name(self) -> str:
        return str(self.target.name())


_DECLARED: dict[Any, OpDef] = {}


def declare(op: OpDef) -> OpDef:
    """Registers a declaration; a second one for the same op is a bug."""
    assert op.target not in _DECLARED, f"{op.name} is declared twice"
    _DECLARED[op.target] = op
    return op


def declarations() -> tuple[OpDef, ...]:
    """Every declared op, planc's and ATen's."""
    import planc.ir.ops  # noqa: F401  (registers the dialect)

    return tuple(_DECLARED.values())


def declaration(node: Node) -> OpDef | None:
    """The declaration of a call node's op, or None: then it is costed generically."""
    import planc.ir.ops  # noqa: F401  (registers the dialect)

    return _DECLARED.get(node.target) if node.op == "call_function" else None


def fake(node: object) -> torch.Tensor:
    """The fake (or meta) tensor a node stands for."""
    assert isinstance(node, Node)
    found = node.meta["val"]
    assert isinstance(found, torch.Tensor), f"{node} is not a tensor"
    return found


def amount(size: int | torch.SymInt, symbols: Mapping[str, str]) -> Amount:
    """A size as a linear expression over step features.

    In a traced graph the symbols "batch" and "seq" multiply to "T" (and batch * seq * seq is what an
    attention matrix written out in ATen holds, "P:both"); in a phase graph "T" and "S"
    stand for themselves. Terms in any other symbol (cache blocks) are dropped: what an op reads
    of a cache it states itself.
    """
    if isinstance(size, int):
        return Amount({"1": float(size)}) if size else NONE
    expression = sympy.expand(size.node.expr)
    terms: dict[str, float] = {}
    for term in sympy.Add.make_args(expression):
        coefficient, rest = term.as_coeff_Mul()
        roles = sorted(
            symbols.get(str(symbol), "?")
            for base, power in rest.as_powers_dict().items()
            for symbol in base.free_symbols
            for _ in range(int(power))
        )
        match roles:
            case []:
                name = "1"
            case ["T"] | ["batch", "seq"] | ["batch"] | ["seq"]:
                name = "T"
            case ["S"]:
                name = "S"
            case ["batch", "seq", "seq"] | ["seq", "seq"]:
                name = "P:both"
            case _:
                continue
        terms[name] = terms.get(name, 0.0) + float(coefficient)
    return Amount(terms)
