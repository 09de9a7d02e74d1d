"""Replays of recorded traffic: a deployment's schedulers under a trace, and what came of it."""

from __future__ import annotations

import csv
import math
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from planc.cost_model import catalogue
from planc.cost_model.collectives import transfer_seconds
from planc.errors import InvalidField
from planc.files import whole
from planc.planner.disaggregated import link
from planc.planner.inventory import Group
from planc.planner.request import Slo
from planc.planner.trace import MOONCAKE_BLOCK, Scan, TraceRow, read
from planc.runtime.simulator.cluster import Aggregated, Front, Open, fits, fronted, together
from planc.runtime.simulator.deployment import Site, speculation
from planc.runtime.simulator.disaggregated import Disaggregated
from planc.runtime.simulator.records import Ints, Records
from planc.runtime.simulator.replica import Journal, Replica, Sent, Server
from planc.runtime.simulator.rules import Rules

Progress = Callable[[str], None]
_EVERY = 500


@dataclass(slots=True)
class Admission:
    """The trace's requests as they are sent; those that no replica could take are counted and left out.

    rows       trace row (from 0) of each request that was sent
    rejected   (row, arrival, prompt, output, reason)
    """

    trace: Iterator[TraceRow]
    sites: Sequence[Site]
    servers: Sequence[Server]
    journal: Journal
    rate_scale: float = 1.0
    progress: Progress | None = None
    total: int = 0
    rows: array[int] = field(default_factory=lambda: array("q"))
    prompt: array[int] = field(default_factory=lambda: array("q"))
    output: array[int] = field(default_factory=lambda: array("q"))
    rejected: list[tuple[int, float, int, int, str]] = field(default_factory=list)

    def sent(self) -> Iterator[Sent]:
        for number, (arrival, prompt, output, blocks) in enumerate(self.trace):
            at = arrival / self.rate_scale
            reason = self._refusal(prompt, output)
            if reason:
                self.rejected.append((number, at, prompt, output, reason))
                continue
            request = len(self.rows)
            self.rows.append(number)
            self.prompt.append(prompt)
            self.output.append(output)
            self.journal.arrival[request] = at
            if self.progress and number % _EVERY == 0:
                self.progress(f"{number:,} of {self.total:,} requests, {at:,.0f} s simulated")
            yield Sent(at, request, prompt, output, prefix=blocks)

    def _refusal(self, prompt: int, output: int) -> str | None:
        longest = max(site.plan.max_model_len for site in self.sites)
        if prompt + output > longest:
            return f"longer than max_model_len, {longest:,} tokens"
        roles = {site.role for site in self.sites}
        for role in roles:
            mine = [s for site, s in zip(self.sites, self.servers, strict=True) if site.role == role]
            if not any(fits(server, prompt, 1 if role == "prefill" else output) for server in mine):
                most = max(server.kv_blocks * server.block_size for server in mine)
                return f"longer than the whole cache of a {role} replica, {most:,} tokens"
        return None


@dataclass(frozen=True, slots=True)
class Replay:
    """What a deployment made of a trace.

    records     of the requests that were sent, by id       sites     the schedulers, as `replicas`
    served_by   site of each request; with separate pools the one that prefilled it, then `decoded_by`
    """

    trace: Scan
    router: str
    seed: int
    sites: tuple[Site, ...]
    replicas: tuple[Replica, ...]
    records: Records
    admission: Admission
    served_by: Ints
    decoded_by: Ints | None
    slos: tuple[Slo, ...]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The document of `planc replay --json`; what is not defined is null."""
        from planc.runtime.simulator.report import document

        return document(self)

    def save_requests(self, path: str | Path) -> None:
        """Writes one CSV line per request of the trace, whole or not at all."""
        target = Path(path)
        try:
            with whole(target) as file:
                writer = csv.writer(file)
                writer.writerow(_COLUMNS)
                writer.writerows(self._lines())
        except OSError as error:
            raise InvalidField(
                where="command line",
                field="--out",
                value=str(path),
                reason=str(error.strerror),
                mend="Name a file in a folder that exists.",
            ) from None

    def _lines(self) -> Iterator[tuple[object, ...]]:
        """In the trace's order."""
        found, gone = self.records, iter(self.admission.rejected)
        left = next(gone, None)
        names = [site.name for site in self.sites]
        for request, row in enumerate(self.admission.rows):
            while left and left[0] < row:
                yield _rejection(left)
                left = next(gone, None)
            where = names[self.served_by[request]]
            if self.decoded_by is not None and self.decoded_by[request] >= 0:
                where += f">{names[self.decoded_by[request]]}"
            at = found.arrival_s[request], found.first_token_s[request], found.finish_s[request]
            times = found.ttft_s[request], found.tpot_s[request], found.e2e_s[request]
            yield (
                row,
                *(f"{seconds:.6f}" for seconds in at),
                found.prompt[request],
                found.output[request],
                *("" if math.isnan(seconds) else f"{1e3 * seconds:.3f}" for seconds in times),
                found.preemptions[request],
                found.hit[request],
                where,
                "",
            )
        while left:
            yield _rejection(left)
            left = next(gone, None)


_COLUMNS = (
    "row", "arrival_s", "first_token_s", "finish_s", "prompt", "output", "ttft_ms", "tpot_ms", "e2e_ms",
    "preemptions", "prefix_hit_tokens", "replica", "rejected",
)  # fmt: skip


def _rejection(item: tuple[int, float, int, int, str]) -> tuple[object, ...]:
    row, at, prompt, output, reason = item
    return row, f"{at:.6f}", "", "", prompt, output, "", "", "", "", "", "", reason


def replay(
    sites: Sequence[Site],
    groups: Sequence[Group],
    trace: Scan,
    *,
    router: str = "round_robin",
    limit: int | None = None,
    rate_scale: float = 1.0,
    seed: int = 0,
    slos: tuple[Slo, ...] = (),
    notes: tuple[str, ...] = (),
    progress: Progress | None = None,
) -> Replay:
    """Sends a trace through a deployment: replicas that do both, or some that prefill and some that decode,
    or all of these.

    Raises UnknownName for a router, InvalidField for pools that do not go together or requests none of
    which can be served.
    """
    prefill = [site for site in sites if site.role == "prefill"]
    decode = [site for site in sites if site.role == "decode"]
    whole = [site for site in sites if site.role == "aggregated"]
    if len(prefill) + len(decode) + len(whole) != len(sites) or bool(prefill) != bool(decode):
        raise InvalidField(
            where="replay",
            field="pools",
            value=sorted({site.role for site in sites}),
            reason="prompts and decoding need replicas for both, and nothing else can be replayed",
            mend="Give a plan for a language model, with both pools if it has one of them.",
        )
    ordered = (*prefill, *decode, *whole)
    servers = [_server(site) for site in ordered]
    journal = Journal(trace.requests)
    prefix = (
        MOONCAKE_BLOCK if trace.shares and all(MOONCAKE_BLOCK % s.block_size == 0 for s in servers) else 0
    )
    replicas = [
        Replica(server, journal, prefix_block=0 if site.role == "decode" else prefix)
        for site, server in zip(ordered, servers, strict=True)
    ]
    admission = Admission(
        read(trace.path, trace.format, limit), ordered, servers, journal, rate_scale, progress, trace.requests
    )
    clients = Open(admission.sent())

    def front(mine: Sequence[Site], start: int) -> Front:
        chosen = replicas[start : start + len(mine)]
        return fronted(router, chosen, [site.weight for site in mine], seed, prefix)

    run: Aggregated | Disaggregated
    if not prefill:
        run = Aggregated(replicas, clients, front(whole, 0), trace.requests)
    else:
        move = _transfer(prefill, decode, groups)
        first_token = catalogue.engine(decode[0].plan.engine).serving.first_token
        keeps_seat = catalogue.engine(prefill[0].plan.engine).serving.keeps_seat
        fronts = front(prefill, 0), front(decode, len(prefill))
        both = front(whole, len(prefill) + len(decode)) if whole else None
        run = Disaggregated(clients, *fronts, journal, move, first_token, whole=both, keeps_seat=keeps_seat)
    run.run()
    count = len(admission.rows)
    if not count:
        reasons = Counter(item[-1] for item in admission.rejected)
        raise InvalidField(
            where="replay",
            field="trace",
            value=str(trace.path),
            reason=f"none of its {trace.requests:,} requests can be served: {next(iter(reasons))}",
            mend="Raise max_model_len, or take larger replicas.",
        )
    decoded = run.decoded_by[:count].astype(np.int64) if isinstance(run, Disaggregated) else None
    if decoded is not None:
        decoded[decoded >= 0] += len(prefill)
    lengths = np.ones((2, trace.requests), dtype=np.int64)  # of those that were sent; the rest is cut off
    lengths[:, :count] = admission.prompt, admission.output
    gpus = [site.gpus for site in ordered]
    everything = together(replicas, journal, lengths[0], lengths[1], gpus=gpus)
    records = everything.only(np.arange(trace.requests) < count)
    return Replay(
        trace=trace,
        router=router,
        seed=seed,
        sites=ordered,
        replicas=tuple(replicas),
        records=records,
        admission=admission,
        served_by=run.served_by[:count].astype(np.int64),
        decoded_by=decoded,
        slos=slos,
        notes=notes,
    )


def _server(site: Site) -> Server:
    plan = site.plan
    rules = Rules.of(
        catalogue.engine(plan.engine),
        plan.max_num_seqs,
        plan.max_num_batched_tokens,
        prefix_caching=plan.prefix_caching,
        chunked=plan.chunked_prefill,
        speculative=speculation(site),
        asynchronous=site.clock.model.asynchronous,
    )
    return Server(site.clock, rules, site.kv_blocks, plan.block_size)


def _transfer(
    prefill: Sequence[Site], decode: Sequence[Site], groups: Sequence[Group]
) -> Callable[[int, int, int], float]:
    """Seconds to hand over so many tokens' cache, as the planner counts them where no layer forgets: each GPU
    that decodes fetches what it will hold, those that prefilled share the sending."""
    home = {group.index: group for group in groups}
    wires = [[link(home[a.home[0]], home[b.home[0]], a.home == b.home) for b in decode] for a in prefill]
    sizes = [[b.kv_bytes_per_token * max(b.gpus / a.gpus, 1.0) for b in decode] for a in prefill]

    def seconds(source: int, target: int, tokens: int) -> float:
        return float(transfer_seconds(sizes[source][target] * tokens, wires[source][target]))

    return seconds
