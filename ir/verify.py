"""The invariants of the IR, as a list of rules; the pipeline checks them all after every pass.

A rule is a name, a sentence and a function that yields the nodes that break it. `verify` raises
InvalidGraph for the first fault, with the line of the user's model that the node came from.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch.fx import Node
from torch.utils import _pytree as pytree

from planc.errors import InvalidGraph
from planc.ir.graph import HIDDEN, PHASE_INPUTS, Graph
from planc.ir.layers import module_stack
from planc.ir.text import show_node


@dataclass(frozen=True, slots=True)
class Fault:
    """One breach of a rule. `node` is None where the graph as a whole is at fault."""

    node: Node | None
    reason: str


@dataclass(frozen=True, slots=True)
class Rule:
    """One invariant: `says` states it, `check` yields what breaks it."""

    name: str
    says: str
    check: Callable[[Graph], Iterator[Fault]]


def verify(graph: Graph, after: str, *, rerun: bool = False) -> None:
    """Checks every rule; `after` names the pass that made the graph.

    rerun   also compute every shape again from the ops' fake implementations (slower)

    Raises InvalidGraph, which names the rule, the node and the user's source line.
    """
    for rule in (*RULES, RERUN) if rerun else RULES:
        for fault in rule.check(graph):
            raise InvalidGraph(
                after=after,
                rule=rule.name,
                node=_said(graph, fault.node),
                reason=fault.reason,
                where=source_line(fault.node),
            )


def source_line(node: Node | None) -> str:
    """The line of the user's model that a node came from: the innermost frame outside torch itself."""
    if node is None:
        return "the graph as a whole"
    frames = re.findall(
        r'File "([^"]+)", line (\d+), in (\S+)\n\s*(.*)', str(node.meta.get("stack_trace") or "")
    )
    own = [frame for frame in frames if "/torch/" not in frame[0]] or frames
    stack = module_stack(node)
    module = f" (module {stack[-1][0] or 'top'}, {stack[-1][1].rsplit('.', 1)[-1]})" if stack else ""
    if not own:
        return f"no recorded line{module}"
    file, line, function, code = own[-1]
    return f"{file}:{line} in {function}: {code.strip()}{module}"


# -- the rules ---------------------------------------------------------------------------


def _lint(graph: Graph) -> Iterator[Fault]:
    seen: set[Node] = set()
    for node in graph.module.graph.nodes:
        late = [used for used in node.all_input_nodes if used not in seen]
        if late:
            yield Fault(node, f"it uses {late[0]}, which comes later or belongs to another graph")
        seen.add(node)
    try:
        graph.module.graph.lint()
    except (RuntimeError, ValueError) as error:
        yield Fault(None, str(error))


def _one_output(graph: Graph) -> Iterator[Fault]:
    nodes = list(graph.module.graph.nodes)
    outputs = [node for node in nodes if node.op == "output"]
    if len(outputs) != 1 or nodes[-1] is not outputs[0]:
        yield Fault(outputs[0] if outputs else None, "there is not exactly one output, at the end")


def _known_ops(graph: Graph) -> Iterator[Fault]:
    for node in graph.module.graph.nodes:
        if node.op in ("placeholder", "get_attr", "output"):
            continue
        if node.op != "call_function":
            yield Fault(node, f"a {node.op} of {node.target}; only functions are called")
        elif isinstance(node.target, torch._ops.OpOverload):
            if node.target.namespace not in ("aten", "planc"):
                yield Fault(node, f"{node.target.name()} is neither ATen nor planc's")
        elif node.target is not operator.getitem and not _is_scalar_op(node):
            yield Fault(node, f"{show_name(node.target)} is no op of ATen or planc")


def _values(graph: Graph) -> Iterator[Fault]:
    for node in graph.module.graph.nodes:
        if node.op != "output" and node.meta.get("val") is None and _yields_value(node):
            yield Fault(node, 'it has no meta["val"]')


def _attributes(graph: Graph) -> Iterator[Fault]:
    for node in graph.module.graph.nodes:
        if node.op != "get_attr":
            continue
        try:
            held = attrgetter(str(node.target))(graph.module)
        except AttributeError:
            yield Fault(node, f"the module has no attribute '{node.target}'")
            continue
        value = node.meta.get("val")
        if not isinstance(held, torch.Tensor) or not isinstance(value, torch.Tensor):
            yield Fault(node, f"'{node.target}' is a {type(held).__name__}, not a tensor")
        elif held.shape != value.shape or held.dtype != value.dtype:
            found, stated = (f"{t.dtype}{list(t.shape)}" for t in (held, value))
            yield Fault(node, f"'{node.target}' is {found}, but its value says {stated}")


def _functional(graph: Graph) -> Iterator[Fault]:
    caches = {cache.name for cache in graph.caches}
    for node in graph.module.graph.nodes:
        if not isinstance(node.target, torch._ops.OpOverload) or not node.target._schema.is_mutable:
            continue
        for place, spec in enumerate(node.target._schema.arguments):
            if spec.alias_info is None or not spec.alias_info.is_write:
                continue
            given = node.args[place] if place < len(node.args) else node.kwargs.get(spec.name)
            for written in pytree.tree_leaves(given):
                if isinstance(written, Node) and not (written.op == "placeholder" and written.name in caches):
                    yield Fault(node, f"it writes into {written}, which is no cache")


def _phase_inputs(graph: Graph) -> Iterator[Fault]:
    if graph.stage == "traced":
        return
    names = [str(node.target) for node in graph.module.graph.nodes if node.op == "placeholder"]
    arrived = [name for name in names if name.startswith(HIDDEN) and "pipeline_cut" in graph.history]
    wanted = [*PHASE_INPUTS, *arrived, *(cache.name for cache in graph.caches)]
    if names != wanted:
        found, due = next(
            ((a, b) for a, b in zip([*names, None], [*wanted, None], strict=False) if a != b), (None, None)
        )
        yield Fault(
            None, f"its inputs hold {found or 'nothing'} where a {graph.stage} graph has {due or 'none'}"
        )


def _caches(graph: Graph) -> Iterator[Fault]:
    if graph.stage == "traced":
        if graph.caches:
            yield Fault(None, "a traced graph has no caches")
        return
    nodes = {node.name: node for node in graph.module.graph.nodes if node.op == "placeholder"}
    for cache in graph.caches:
        node = nodes.get(cache.name)
        if node is None:
            continue  # the rule on inputs says so
        value = node.meta.get("val")
        lead = 2 if cache.kind == "paged" else 1
        if not node.users:
            yield Fault(node, "no op uses this cache")
        elif not isinstance(value, torch.Tensor) or tuple(value.shape[lead:]) != tuple(cache.entry):
            yield Fault(node, f"its entry is not {list(cache.entry)}, as listed")
        elif value.dtype != cache.dtype:
            yield Fault(node, f"it is {value.dtype}, not {cache.dtype} as listed")


def _collectives(graph: Graph) -> Iterator[Fault]:
    if any(name in SHARDING for name in graph.history):
        return
    for node in graph.module.graph.nodes:
        if is_collective(node):
            yield Fault(node, "ranks talk in a graph that no pass divided")


def _symbols(graph: Graph) -> Iterator[Fault]:
    for node in graph.module.graph.nodes:
        for value in pytree.tree_leaves(node.meta.get("val")):
            if not isinstance(value, torch.Tensor):
                continue
            for size in value.shape:
                if isinstance(size, torch.SymInt):
                    free = [str(s) for s in size.node.expr.free_symbols if str(s) not in graph.symbols]
                    if free:
                        yield Fault(node, f"its size {size} holds {free[0]}, a symbol without a role")


def _rerun(graph: Graph) -> Iterator[Fault]:
    from planc.ir.fakes import recompute

    for node, value in recompute(graph.module):
        stated = node.meta.get("val")
        for old, new in zip(pytree.tree_leaves(stated), pytree.tree_leaves(value), strict=False):
            if not isinstance(old, torch.Tensor) or not isinstance(new, torch.Tensor):
                continue
            if old.dtype != new.dtype or len(old.shape) != len(new.shape) or str(old.shape) != str(new.shape):
                said = f"{old.dtype}{list(old.shape)}"
                yield Fault(node, f"its value says {said}, but its op yields {new.dtype}{list(new.shape)}")


RULES: tuple[Rule, ...] = (
    Rule("order", "every value is defined before it is used, names are unique", _lint),
    Rule("one-output", "there is one output, and it is the last node", _one_output),
    Rule("known-ops", "only ATen and planc ops, `getitem` and arithmetic on sizes are called", _known_ops),
    Rule("values", 'every node that yields a tensor has `meta["val"]`', _values),
    Rule("attributes", "every weight named exists, with the dtype and shape its value states", _attributes),
    Rule("functional", "no op writes into anything but a cache", _functional),
    Rule("phase-inputs", "a phase graph has exactly the inputs of `planc.ir.graph`, in order", _phase_inputs),
    Rule(
        "caches", "caches listed are used, with the entry and dtype listed; traced graphs have none", _caches
    ),
    Rule("collectives", "ranks talk only in graphs that a parallelism pass divided", _collectives),
    Rule("symbols", "every size symbol has a role in `Graph.symbols`", _symbols),
)
RERUN = Rule("fakes", "every value's dtype and shape are those its op computes (on demand)", _rerun)

#: Passes that divide a graph over ranks.
SHARDING = frozenset({"tensor_parallel", "pipeline_cut"})


def is_collective(node: Node) -> bool:
    """Whether ranks talk here: the planc ops that name a process group."""
    target = node.target
    return (
        isinstance(target, torch._ops.OpOverload)
        and target.namespace == "planc"
        and any(argument.name == "group" for argument in target._schema.arguments)
    )


def show_name(target: Any) -> str:
    """A function's name, for messages."""
    return str(getattr(target, "__qualname__", target))


def _is_scalar_op(node: Node) -> bool:
    """Arithmetic on sizes: `operator.mul`, `math.floor`, `torch.sym_max` ... on numbers, not tensors."""
    module = getattr(node.target, "__module__", "") or ""
    known = module.startswith(("_operator", "operator", "math", "torch"))
    return known and not isinstance(node.meta.get("val"), torch.Tensor)


def _yields_value(node: Node) -> bool:
    if isinstance(node.target, torch._ops.OpOverload):
        return bool(node.target._schema.returns)
    return node.op != "placeholder" or bool(node.users)


def _said(graph: Graph, node: Node | None) -> str:
    if node is None:
        return "(none)"
    if node.op in ("placeholder", "get_attr", "output"):
        return f"{node.name} ({node.op} {node.target})"
    return show_node(node, graph.symbols)
