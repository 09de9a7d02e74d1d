"""A load on one server, from its first request to its last answer."""

from __future__ import annotations

import math

from planc.runtime.simulator.load import Load
from planc.runtime.simulator.records import Records
from planc.runtime.simulator.replica import Journal, Replica, Sent, Server, check


def simulate(server: Server, load: Load, *, seed: int = 0, jumps: bool = True) -> Records:
    """Serves a load; `seed` draws its lengths. The same arguments give the same records.

    jumps   False runs every step by itself: slower, and the same result
    """
    check(server)
    prompt, output = load.lengths(seed)
    journal = Journal(load.requests)
    replica = Replica(server, journal, prefix_block=load.prefix_block, jumps=jumps)
    requests = Requests(load, journal, prompt.tolist(), output.tolist())
    serve(replica, requests)
    return journal.records(
        prompt,
        output,
        replica.timeline,
        steps=replica.steps,
        events=replica.events,
        wave=load.concurrency or 0,
    )


class Requests:
    """A load's requests as they are sent: `send` makes one and notes when."""

    def __init__(self, load: Load, journal: Journal, prompt: list[int], output: list[int]) -> None:
        self.load, self.journal = load, journal
        self.prompt, self.output = prompt, output
        self.priority = None if load.priority is None else load.priority.tolist()
        self.adapter = None if load.adapter is None else load.adapter.tolist()

    def send(self, request: int, at: float) -> Sent:
        self.journal.arrival[request] = at
        adapter = -1 if self.adapter is None else self.adapter[request]
        return Sent(
            at,
            request,
            self.prompt[request],
            self.output[request],
            0 if self.priority is None else self.priority[request],
            None if adapter < 0 else adapter,
            () if self.load.prefix is None else tuple(self.load.prefix[request]),
        )


def serve(replica: Replica, requests: Requests) -> None:
    """Runs a replica until the last request is answered."""
    if requests.load.arrival_s is None:
        _closed(replica, requests)
    else:
        _open(replica, requests)


def _closed(replica: Replica, requests: Requests) -> None:
    load = requests.load
    at = _round(replica, requests, 0, load.warm_up, 0.0) if load.warm_up else 0.0
    _round(replica, requests, load.warm_up, load.requests, at)


def _round(replica: Replica, requests: Requests, following: int, stop: int, at: float) -> float:
    """Clients that start at `at` with request `following` and send all up to `stop`; when the last answer is
    there."""
    load = requests.load
    clients = min(load.concurrency or 1, stop - following)
    for client in range(clients):
        replica.offer(requests.send(following, at + client * load.ramp_s / clients))
        following += 1
    while replica.busy:
        for answer in replica.step():
            at = max(at, answer.at)
            if following < stop:
                replica.offer(requests.send(following, answer.at))
                following += 1
    return at


def _open(replica: Replica, requests: Requests) -> None:
    assert requests.load.arrival_s is not None
    arrivals, way = requests.load.arrival_s.tolist(), replica.rules.request_ms / 1e3
    following, count = 0, len(arrivals)
    while following < count or replica.busy:
        soon = arrivals[following] + way if following < count else math.inf
        if soon <= replica.ready_at:
            replica.offer(requests.send(following, arrivals[following]))
            following += 1
        else:
            replica.step(soon)
