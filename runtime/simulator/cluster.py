"""Several replicas behind a router, under one clock."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import count
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from planc.runtime.simulator.load import Load
from planc.runtime.simulator.records import Records, Timeline
from planc.runtime.simulator.replica import (
    Finished,
    Journal,
    Planned,
    Replica,
    Sent,
    Server,
    check,
)
from planc.runtime.simulator.router import Router, Target, router
from planc.runtime.simulator.simulate import Requests

_MOMENT = 1e-9


class Clients(Protocol):
    """Who sends requests."""

    @property
    def soon(self) -> float:
        """When the next one is sent, as far as is known; inf for none."""
        ...

    def take(self) -> Sent:
        """The next request, sent at `soon`."""
        ...

    def answered(self, at: float) -> None:
        """A client has its answer."""
        ...


class Open:
    """Requests at times of their own, read as they come due."""

    def __init__(self, requests: Iterator[Sent]) -> None:
        self._rest = requests
        self._next = next(requests, None)
        self.soon = self._next.at if self._next else math.inf

    def take(self) -> Sent:
        taken, self._next = self._next, next(self._rest, None)
        assert taken is not None
        self.soon = self._next.at if self._next else math.inf
        return taken

    def answered(self, at: float) -> None:
        pass


class Closed:
    """Clients that each send their next request when they have the answer to their last."""

    def __init__(self, load: Load, requests: Requests) -> None:
        assert load.concurrency is not None
        self._load, self._requests, self._sent = load, requests, 0
        self._due = [client * load.ramp_s / load.concurrency for client in range(load.concurrency)]

    @property
    def soon(self) -> float:
        return self._due[0] if self._due else math.inf

    def take(self) -> Sent:
        self._sent += 1
        return self._requests.send(self._sent - 1, heappop(self._due))

    def answered(self, at: float) -> None:
        if self._sent + len(self._due) < self._load.requests:
            heappush(self._due, at)


class Front:
    """A router before some replicas, and what it knows of them: an answer counts once its time has come."""

    def __init__(self, policy: Router, replicas: Sequence[Replica], weights: Sequence[float]) -> None:
        self.policy, self.replicas = policy, replicas
        self.targets = [Target(weight) for weight in weights]
        self._answers: list[tuple[float, int, int]] = []

    def choose(self, sent: Sent) -> int:
        """A replica that can hold the request at all; the router's own choice wherever that one can."""
        answers = self._answers
        while answers and answers[0][0] <= sent.at:
            _, where, prompt = heappop(answers)
            self.targets[where].finished(prompt)
        chosen = self.policy.choose(self.targets, sent.prompt, sent.prefix)
        if not fits(self.replicas[chosen].server, sent.prompt, sent.output):
            able = [i for i, r in enumerate(self.replicas) if fits(r.server, sent.prompt, sent.output)]
            chosen = min(
                able, key=lambda i: self.targets[i].requests / self.targets[i].weight, default=chosen
            )
        self.targets[chosen].sent(sent.prompt)
        return chosen

    def answered(self, where: int, prompt: int, at: float) -> None:
        heappush(self._answers, (at, where, prompt))


@dataclass(frozen=True, slots=True)
class Lockstep:
    """Attention ranks of one engine that computes prompts. They meet in every layer, so that all begin and
    end their steps together, those with nothing to do included.

    ranks     their replicas' numbers
    joint_s   seconds for each token of any of them (routed experts, and the exchanges around them), which
              a rank's own clock counts as if all ranks had as many tokens as it has
    """

    ranks: range
    joint_s: float

    def seconds(self, planned: Sequence[Planned]) -> float:
        """The common step, of the ranks that have something to run."""
        most = max(planned, key=lambda one: one.seconds)
        missing = len(self.ranks) * most.prompt_tokens - sum(one.prompt_tokens for one in planned)
        return most.seconds - self.joint_s * max(missing, 0)


class Cluster:
    """The event loop: whichever comes first of arrivals, other events, and the replicas' next steps.

    coupled   what one replica does may reach another before it is asked for (a closed loop, a handed-over
              cache): no replica then runs ahead of the others
    """

    coupled = False

    def __init__(self, replicas: Sequence[Replica], clients: Clients) -> None:
        self.replicas, self.clients = replicas, clients
        self._later: list[tuple[float, int, Callable[[float], None]]] = []
        self._ready: list[tuple[float, int]] = []
        self._at = [math.inf] * len(replicas)
        self._stuck: set[int] = set()
        self._number = count()
        self.lockstep: dict[int, Lockstep] = {}

    def arrive(self, sent: Sent) -> None:
        raise NotImplementedError

    def answer(self, where: int, found: Finished) -> None:
        raise NotImplementedError

    def alone(self, where: int) -> float:
        """Seconds in which nothing that another replica begins now can reach this one."""
        return 0.0

    def later(self, at: float, action: Callable[[float], None]) -> None:
        """`action` is called with the time when it has come."""
        heappush(self._later, (at, next(self._number), action))

    def touched(self, where: int) -> None:
        """A replica's next step may begin at another time than it would have."""
        at = self.replicas[where].ready_at
        if at != self._at[where]:
            self._at[where] = at
            if at < math.inf:
                heappush(self._ready, (at, where))

    def freed(self, where: int, at: float) -> None:
        """A replica's cache has more room from now on."""
        replica = self.replicas[where]
        if where in self._stuck and at > replica.now:
            replica.idle(at)
        self._stuck.discard(where)
        self.touched(where)

    def run(self) -> None:
        clients, later, ready = self.clients, self._later, self._ready
        while True:
            while ready and self._at[ready[0][1]] != ready[0][0]:
                heappop(ready)
            now = ready[0][0] if ready else math.inf
            soon = min(clients.soon, later[0][0] if later else math.inf)
            if soon <= now:
                if soon == math.inf:
                    return
                if clients.soon == soon:
                    self.arrive(clients.take())
                else:
                    at, _, action = heappop(later)
                    action(at)
                continue
            _, where = heappop(ready)
            until = soon
            if self.coupled and ready:
                until = min(soon, max(ready[0][0] + self.alone(where), now + _MOMENT))
            crew = self.lockstep.get(where)
            ran = self._in_step(crew, now, until) if crew else [(where, self._alone(where, now, until))]
            for one, answers in ran:
                for found in answers:
                    self.answer(one, found)

    def _alone(self, where: int, now: float, until: float) -> list[Finished]:
        """Runs one replica until its next event."""
        self._at[where] = math.inf
        replica = self.replicas[where]
        queued = replica.scheduler.queued
        answers = replica.step(until)
        if replica.now == now and replica.scheduler.queued == queued and not answers:
            self._stuck.add(where)  # there is no room for what waits
        else:
            self.touched(where)
        return answers

    def _in_step(self, crew: Lockstep, now: float, until: float) -> list[tuple[int, list[Finished]]]:
        """Runs the next step of the ranks of one engine."""
        planned: dict[int, Planned] = {}
        for rank in [rank for rank in crew.ranks if self._at[rank] <= now]:
            self._at[rank] = math.inf
            found = self.replicas[rank].plan(until)
            if found and found.batch.chunks:
                planned[rank] = found
            else:
                self._stuck.add(rank)
        if not planned:
            return []
        seconds, ran = crew.seconds(list(planned.values())), []
        for rank in crew.ranks:
            replica = self.replicas[rank]
            if rank in planned:
                ran.append((rank, replica.run(planned[rank]._replace(seconds=seconds, last=seconds))))
            else:
                replica.idle(now + seconds)
            self.touched(rank)
        return ran


class Aggregated(Cluster):
    """Replicas that each prefill and decode what they are given.

    served_by   replica of each request
    """

    def __init__(self, replicas: Sequence[Replica], clients: Clients, front: Front, requests: int) -> None:
        super().__init__(replicas, clients)
        self.front = front
        self.coupled = isinstance(clients, Closed) and len(replicas) > 1
        self.served_by = np.full(requests, -1, dtype=np.int32)
        self._prompt: dict[int, int] = {}

    def arrive(self, sent: Sent) -> None:
        where = self.front.choose(sent)
        self.served_by[sent.id] = where
        self._prompt[sent.id] = sent.prompt
        self.replicas[where].offer(sent)
        self.touched(where)

    def answer(self, where: int, found: Finished) -> None:
        self.front.answered(where, self._prompt.pop(found.id), found.at)
        self.clients.answered(found.at)


@dataclass(frozen=True, slots=True)
class Outcome:
    """A cluster's run. `served_by` is the replica of each request; with separate pools, that which decoded
    it is `decoded_by`."""

    records: Records
    replicas: tuple[Replica, ...]
    served_by: NDArray[np.int32]
    decoded_by: NDArray[np.int32] | None = None


def simulate_cluster(
    servers: Sequence[Server],
    load: Load,
    *,
    router: str = "round_robin",
    weights: Sequence[float] | None = None,
    seed: int = 0,
) -> Records:
    """Serves a load on several servers; `weights` are their shares (equal ones by default)."""
    prompt, output = load.lengths(seed)
    journal = Journal(load.requests)
    replicas = [Replica(server, journal, prefix_block=load.prefix_block) for server in servers]
    clients = sending(load, journal, prompt.tolist(), output.tolist())
    front = fronted(router, replicas, weights or [1.0] * len(servers), seed, load.prefix_block)
    run = Aggregated(replicas, clients, front, load.requests)
    run.run()
    return together(replicas, journal, prompt, output, load.concurrency or 0)


def fronted(
    name: str, replicas: Sequence[Replica], weights: Sequence[float], seed: int, prefix_block: int
) -> Front:
    """A named router before replicas. Raises UnknownName, and InvalidField for servers that cannot run."""
    for replica in replicas:
        check(replica.server)
    remembered = max(r.server.kv_blocks * r.server.block_size // max(prefix_block, 1) for r in replicas)
    return Front(router(name, seed, prefix_block, remembered), replicas, weights)


def sending(load: Load, journal: Journal, prompt: list[int], output: list[int]) -> Clients:
    requests = Requests(load, journal, prompt, output)
    if load.arrival_s is None:
        return Closed(load, requests)
    return Open(requests.send(i, at) for i, at in enumerate(load.arrival_s.tolist()))


def fits(server: Server, prompt: int, output: int) -> bool:
    """Whether the server's whole cache holds the request; its last token is never fed back."""
    return -(-(prompt + output - 1) // server.block_size) <= server.kv_blocks


def together(
    replicas: Sequence[Replica],
    journal: Journal,
    prompt: NDArray[np.int64],
    output: NDArray[np.int64],
    wave: int = 0,
    gpus: Sequence[int] | None = None,
) -> Records:
    """One record of all replicas: busy by `gpus`, cache shares by blocks, sequences summed."""
    size = np.array(gpus or [1] * len(replicas), dtype=np.float64)
    blocks = np.array([replica.server.kv_blocks for replica in replicas], dtype=np.float64)
    ones = np.ones(len(replicas))
    shares = (size / size.sum(), ones, ones, blocks / blocks.sum())
    timelines = [replica.timeline for replica in replicas]
    width = max(line.width for line in timelines)
    whole = Timeline(width=width)
    for number, line in enumerate(timelines):
        for column, mine, share in zip(whole.columns, widened(line, width), shares, strict=True):
            column[:] = [a + share[number] * b for a, b in zip(column, mine, strict=True)]
    return journal.records(
        prompt,
        output,
        whole,
        steps=sum(replica.steps for replica in replicas),
        events=sum(replica.events for replica in replicas),
        wave=wave,
    )


def widened(line: Timeline, width: float) -> list[list[float]]:
    """A timeline's columns in bins of `width`, a multiple of its own."""
    many = round(width / line.width)
    return [
        [sum(column[i : i + many]) for i in range(0, line.bins, many)]
        + [0.0] * (line.bins - line.bins // many)
        for column in line.columns
    ]
