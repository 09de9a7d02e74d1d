"""Serving, simulated: iteration-level events under the scheduler that planc's executor runs.

Comes in: a step model, an engine's rules, a load. Goes out: the times of every request. Torch-free.
"""

from planc.runtime.simulator.clock import Clock
from planc.runtime.simulator.load import Load, closed_loop, open_loop
from planc.runtime.simulator.records import Records
from planc.runtime.simulator.replica import Replica, Server
from planc.runtime.simulator.rules import Rules, Speculation
from planc.runtime.simulator.simulate import simulate

__all__ = [
    "Clock",
    "Load",
    "Records",
    "Replica",
    "Rules",
    "Server",
    "Speculation",
    "closed_loop",
    "open_loop",
    "simulate",
]
