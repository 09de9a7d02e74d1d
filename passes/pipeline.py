"""Running passes: one ordered list, verified after each, observable at each step."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

from planc.ir.graph import Graph
from planc.ir.verify import verify
from planc.passes.canonicalise import Canonicalise
from planc.passes.recognise import Recognise


class Pass(Protocol):
    """A pass: a frozen dataclass whose fields are its options. It leaves the given graph as it is."""

    name: ClassVar[str]

    def apply(self, graph: Graph) -> Graph: ...


@dataclass(frozen=True, slots=True)
class Step:
    """One pass as it ran: the graph before and after it, and the seconds it took without the checks."""

    pass_: Pass
    before: Graph
    after: Graph
    seconds: float


#: What every traced graph goes through first.
FRONT: tuple[Pass, ...] = (Canonicalise(), Recognise())


def run(
    graph: Graph,
    passes: Sequence[Pass],
    *,
    observe: Callable[[Step], None] | None = None,
    check_shapes: bool = False,
) -> Graph:
    """Applies the passes in order and verifies the graph before the first and after each.

    observe        called after each pass has been verified; this is how the IR before and after a
                   pass is printed, and how passes are timed
    check_shapes   also compute every shape anew after each pass (slower)

    Raises InvalidGraph, naming the pass that broke a rule, and whatever a pass raises.
    """
    verify(graph, graph.history[-1] if graph.history else "trace", rerun=check_shapes)
    for each in passes:
        start = time.perf_counter()
        after = each.apply(graph)
        seconds = time.perf_counter() - start
        verify(after, each.name, rerun=check_shapes)
        if observe is not None:
            observe(Step(each, graph, after, seconds))
        graph = after
    return graph
