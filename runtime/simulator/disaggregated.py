"""Prefill and decode in pools of their own, with the cache handed over between them.

A prompt's blocks stay taken where it was prefilled until its cache has arrived, and a transfer begins when
the decoding replica has a seat and blocks for it: what decodes too slowly holds up what prefills. Each
replica sends one cache and receives one at a time, at the link's full speed. Engines differ in where the
client has its first token from (`Serving.first_token`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from planc.runtime.simulator.cluster import Clients, Cluster, Front, Lockstep, fronted, sending, together
from planc.runtime.simulator.load import Load
from planc.runtime.simulator.records import Records
from planc.runtime.simulator.replica import Finished, FirstToken, Journal, Replica, Sent, Server
from planc.runtime.simulator.router import Router

#: seconds that so many tokens' cache takes from one replica to another: (source, target, tokens)
Transfer = Callable[[int, int, int], float]


class Handover(NamedTuple):
    """A prefilled request: where, how many blocks it holds there, when its first token was made."""

    sent: Sent
    source: int
    held: int
    made: float


class Disaggregated(Cluster):
    """`replicas` are the prefilling ones, then the decoding ones, then those that do both; each pool has its
    router. Requests go to the one or the other way in turn, by the shares of their replicas.

    keeps_seat              a prompt keeps its seat until its cache has been fetched
    served_by, decoded_by   the replica that had each request first, and the decoding one (-1 for none)
    shortest_s              no prompt is computed in less time: so long a decoding replica runs by itself
    """

    coupled = True

    def __init__(
        self,
        clients: Clients,
        prefill: Front,
        decode: Front,
        journal: Journal,
        transfer_s: Transfer,
        first_token: FirstToken = "prefill",
        shortest_s: float = 0.0,
        whole: Front | None = None,
        keeps_seat: bool = False,
    ) -> None:
        both = list(whole.replicas) if whole else []
        super().__init__([*prefill.replicas, *decode.replicas, *both], clients)
        self.whole, self.last = whole, len(prefill.replicas) + len(decode.replicas)
        self._turns = [0, 0]
        self.prefill, self.decode, self.journal, self.transfer_s = prefill, decode, journal, transfer_s
        self.first, self.first_token = len(prefill.replicas), first_token
        self.shortest_s, self.keeps_seat = shortest_s, keeps_seat
        self.served_by = np.full(journal.requests, -1, dtype=np.int32)
        self.decoded_by = np.full(journal.requests, -1, dtype=np.int32)
        self._open: dict[int, Sent] = {}
        self._noted: dict[int, tuple[int, int]] = {}
        self._queues: list[deque[Handover]] = [deque() for _ in decode.replicas]
        self._coming = [0] * len(decode.replicas)
        self._sending = [0.0] * len(prefill.replicas)
        self._receiving = [0.0] * len(decode.replicas)

    def alone(self, where: int) -> float:
        return self.shortest_s if self.first <= where < self.last else 0.0

    def arrive(self, sent: Sent) -> None:
        front = self._way_of_next()
        if front is self.prefill:
            where = front.choose(sent)
            self.replicas[where].offer(sent._replace(output=1))
        else:
            where = self.last + front.choose(sent)
            self.replicas[where].offer(sent)
        self.served_by[sent.id] = where
        self._open[sent.id] = sent
        self.touched(where)

    def _way_of_next(self) -> Front:
        """Whose turn it is: the way that is furthest behind its share."""
        if self.whole is None:
            return self.prefill
        ways = self.prefill, self.whole
        shares = [sum(target.weight for target in way.targets) for way in ways]
        chosen = min((0, 1), key=lambda i: (self._turns[i] + 1) / shares[i])
        self._turns[chosen] += 1
        return ways[chosen]

    def answer(self, where: int, found: Finished) -> None:
        sent = self._open[found.id]
        if self.whole is not None and where >= self.last:
            self.whole.answered(where - self.last, sent.prompt, found.at)
            self._done(found)
            return
        if where >= self.first:
            self.decode.answered(where - self.first, sent.prompt, found.at)
            self._recall(found.id)
            self._done(found)
            self._admit(where - self.first)
            return
        self.prefill.answered(where, sent.prompt, found.at)
        if sent.output == 1:
            self._done(found)
            return
        replica = self.replicas[where]
        held = min(replica.cache.blocks_for(sent.prompt), replica.cache.free_blocks)
        replica.cache.take(held)
        replica.scheduler.withheld += self.keeps_seat
        self._noted[found.id] = (self.journal.preemptions[found.id], self.journal.hit[found.id])
        target = self.decode.choose(sent._replace(at=found.at))
        self.decoded_by[found.id] = target
        self._queues[target].append(Handover(sent, where, held, found.at))
        self._admit(target)

    def _recall(self, request: int) -> None:
        """Adds what the prefill side had noted."""
        preemptions, hit = self._noted.pop(request)
        self.journal.preemptions[request] += preemptions
        self.journal.hit[request] += hit

    def _done(self, found: Finished) -> None:
        del self._open[found.id]
        self.clients.answered(found.at)

    def _admit(self, target: int) -> None:
        """Begins the transfers that a decoding replica has room for, in order."""
        replica, queue = self.replicas[self.first + target], self._queues[target]
        while queue:
            hand = queue[0]
            blocks = replica.cache.blocks_for(hand.sent.prompt + 1)
            if replica.load + self._coming[target] >= replica.rules.max_num_seqs:
                return
            if blocks > replica.cache.free_blocks:
                return
            queue.popleft()
            replica.cache.take(blocks)
            self._coming[target] += 1
            told = hand.made + self._way(replica)
            begin = max(told, replica.now, self._sending[hand.source], self._receiving[target])
            end = begin + self.transfer_s(hand.source, target, hand.sent.prompt)
            self._sending[hand.source] = self._receiving[target] = end
            self.later(end, partial(self._arrived, hand, target, blocks))

    def _way(self, replica: Replica) -> float:
        """Seconds until a decoding engine hears of a prefilled request: none where both were told of it at
        once; an engine that computes the first token again is sent the request when the other is done."""
        return replica.rules.request_ms / 1e3 if self.first_token == "again" else 0.0

    def _arrived(self, hand: Handover, target: int, blocks: int, at: float) -> None:
        source, replica = self.replicas[hand.source], self.replicas[self.first + target]
        source.cache.give(hand.held)
        source.scheduler.withheld -= self.keeps_seat
        replica.cache.give(blocks)
        self._coming[target] -= 1
        replica.resume(hand.sent._replace(at=at), hand.made, self.first_token)
        self.freed(hand.source, at)
        self.touched(self.first + target)


def simulate_disaggregated(
    prefill_servers: Sequence[Server],
    decode_servers: Sequence[Server],
    load: Load,
    *,
    transfer_s: Callable[[int], float],
    weights: tuple[Sequence[float], Sequence[float]] | None = None,
    router: str = "least_loaded",
    prompt_router: Router | None = None,
    first_token: FirstToken = "prefill",
    keeps_seat: bool = False,
    lockstep: Sequence[Lockstep] = (),
    seed: int = 0,
) -> Records:
    """Serves a load on two pools; `transfer_s` prices the hand-over of so many tokens' cache; `weights` are
    the servers' shares of the traffic, equal ones where there are none; `prompt_router` is for prompts,
    where it is another one; `first_token` and `keeps_seat` are as in an engine's profile; `lockstep` tells
    which of the prefilling servers are attention ranks of one engine."""
    prompt, output = load.lengths(seed)
    journal = Journal(load.requests)
    prefill = [Replica(server, journal, prefix_block=load.prefix_block) for server in prefill_servers]
    decode = [Replica(server, journal) for server in decode_servers]
    shares = weights or ([1.0] * len(prefill), [1.0] * len(decode))
    front = fronted(router, prefill, shares[0], seed, load.prefix_block)
    if prompt_router is not None:
        front.policy = prompt_router
    run = Disaggregated(
        sending(load, journal, prompt.tolist(), output.tolist()),
        front,
        fronted(router, decode, shares[1], seed, 0),
        journal,
        lambda source, target, tokens: transfer_s(tokens),
        first_token,
        _shortest(prefill_servers, prompt, lockstep) if load.prefix is None else 0.0,
        keeps_seat=keeps_seat,
    )
    for crew in lockstep:
        run.lockstep |= dict.fromkeys(crew.ranks, crew)
    run.run()
    return together(run.replicas, journal, prompt, output, load.concurrency or 0)


def _shortest(servers: Sequence[Server], prompt: NDArray[np.int64], lockstep: Sequence[Lockstep]) -> float:
    """Seconds of the shortest prompt by itself on the fastest engine; no budget makes it shorter."""
    least = int(prompt.min())
    spared = max((crew.joint_s * (len(crew.ranks) - 1) * least for crew in lockstep), default=0.0)
    return min(server.clock.mixed(0, 0.0, [(least, 0)])[0] for server in servers) - spared
