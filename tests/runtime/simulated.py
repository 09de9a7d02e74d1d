"""Servers with step times one can reckon with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from planc.runtime.simulator import Load, Records, Rules, Server, simulate
from planc.runtime.simulator.clock import Line
from planc.runtime.simulator.replica import Journal, Replica
from planc.runtime.simulator.simulate import Requests, serve


@dataclass(frozen=True)
class Linear:
    """base + per_seq * sequences + per_context * tokens attended to + per_token * prompt tokens, s."""

    base: float = 0.01
    per_seq: float = 0.0
    per_context: float = 0.0
    per_token: float = 0.0

    def line(self, seqs: int, context: float, draft: int = 0) -> Line:
        seconds = self.base + seqs * (self.per_seq + self.per_context * context)
        return Line(seconds, self.per_context * seqs, 1 << 30)

    def mixed(
        self, seqs: int, context: float, chunks: Sequence[tuple[int, int]], draft: int = 0
    ) -> tuple[float, float]:
        decode = self.line(seqs, context).seconds if seqs else self.base
        return decode + self.per_token * sum(new for new, _ in chunks), 0.0


def server(clock: Any, blocks: int = 10_000, block_size: int = 16, **rules: Any) -> Server:
    given = {"max_num_seqs": 64, "max_num_batched_tokens": 8192} | rules
    return Server(clock, Rules(**given), blocks, block_size)


def run(of: Server, load: Load, seed: int = 0, jumps: bool = True) -> tuple[Records, Replica]:
    """`simulate`, and the replica as it was left."""
    prompt, output = load.lengths(seed)
    journal = Journal(load.requests)
    replica = Replica(of, journal, prefix_block=load.prefix_block, jumps=jumps)
    serve(replica, Requests(load, journal, prompt.tolist(), output.tolist()))
    return journal.records(prompt, output, replica.timeline, steps=replica.steps), replica


__all__ = ["Linear", "run", "server", "simulate"]
