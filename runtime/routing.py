"""A fleet under prefixes that recur, behind one router or another.

A workload of W recurring tokens has W / L prefixes of L tokens, all wanted equally often. A run has to ask
for each of them several times at every replica before caches are as full as they get. Where that would take
too long it asks for as many as it can, and caches keep the same share of their room, which is what running
sequences leave over: what a cache of C tokens finds of W wanted ones depends on C / W alone. Prefixes of
running sequences are found, too; with fewer of them in all that is a little more often than it would be.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from planc.planner.traffic import Traffic
from planc.runtime.simulator.cluster import simulate_cluster
from planc.runtime.simulator.load import Load, gamma, lengths, open_loop
from planc.runtime.simulator.records import Records
from planc.runtime.simulator.replica import Server

#: requests of a run at least and at most, of which the first half fills the caches; visits of each prefix at
#: each replica
_LEAST, _MOST, _VISITS = 2000, 5000, 2
#: tokens that a router knows a prefix by
_BLOCK = 64
#: lengths are spread by this much around the workload's
_SPREAD = 0.1


def behind(
    router: str,
    servers: Sequence[Server],
    weights: Sequence[float],
    running: Sequence[float],
    flow: Traffic,
    rate: float,
    seed: int,
) -> tuple[Records, NDArray[np.bool_], NDArray[np.intp]]:
    """Records of all requests, which of them met filled caches, and the traffic class of each.

    running   tokens that each server's decoding sequences hold on average
    rate      requests/s of all servers together
    """
    assert flow.prefix_tokens is not None
    tokens = max(flow.isl_mean * flow.hit_rate, 1.0)
    whole = max(flow.prefix_tokens / tokens, 1.0)
    count = round(min(max(_VISITS * len(servers) * whole, _LEAST), _MOST))
    visited = max(min(whole, count / (_VISITS * len(servers))), 1.0)
    kept = [_with_room(one, held, visited / whole) for one, held in zip(servers, running, strict=True)]
    load, label = _load(flow, rate, count, max(round(visited), 1), kept, seed)
    records = simulate_cluster(kept, load, router=router, weights=weights, seed=seed)
    filled = records.arrival_s >= np.quantile(records.arrival_s, 0.5)
    return records, filled, label


def _with_room(server: Server, running: float, share: float) -> Server:
    """A share of the blocks that running sequences leave to prefixes."""
    used = min(math.ceil(running / server.block_size), server.kv_blocks)
    return replace(server, kv_blocks=used + math.ceil((server.kv_blocks - used) * share))


def _load(
    flow: Traffic, rate: float, count: int, prefixes: int, servers: Sequence[Server], seed: int
) -> tuple[Load, NDArray[np.intp]]:
    which, prompt, output = lengths(flow, count, 1 - _SPREAD, 1 + _SPREAD, seed)
    size = math.lcm(_BLOCK, *(server.block_size for server in servers))
    chosen = np.random.default_rng([seed, 2]).integers(prefixes, size=count)
    blocks = (prompt * flow.hit_rate / size).astype(np.int64)
    longest = int(blocks.max()) + 1
    shared = [
        tuple(range(first, first + many))
        for first, many in zip((chosen * longest).tolist(), blocks.tolist(), strict=True)
    ]
    arrivals = gamma(rate, count, math.sqrt(flow.arrival_cv2), seed)
    label = np.zeros(count, dtype=np.intp) if flow.label is None else flow.label[which]
    return open_loop(arrivals, prompt, output, prefix=shared, prefix_block=size), label
