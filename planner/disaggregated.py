"""Prefill and decode in pools of their own: what passes between them, and what each pool must keep to.

A request's prompt is computed by an engine of the prefill pool, its cache then crosses the link to an engine
of the decode pool, which computes the other tokens. Steps of the decode pool carry no prompts, so TPOT is
free of them; the fleet pays with a second copy of the weights and with the hand-over.

The engines modelled hand a cache over whole, after the last chunk of its prompt (vLLM's NIXL connector pulls
it then; TensorRT-LLM overlaps a transfer with other requests' steps, not with its own request's): nothing of
a transfer hides behind its own prefill.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from planc.cost_model import collectives
from planc.cost_model.collectives import Link
from planc.cost_model.local import stages
from planc.cost_model.memory import kept_by, state_bytes
from planc.cost_model.shape import EngineShape
from planc.cost_model.table import CostTable
from planc.planner.candidates import Candidate
from planc.planner.evaluate import Engine
from planc.planner.inventory import Group
from planc.planner.priors import priors
from planc.planner.slo import Slo
from planc.planner.traffic import Traffic

#: shares of an objective on TTFT that decode pools may take for the hand-over, the least where a TPOT says
#: how much they need; and shares of one on end-to-end latency that prefill pools may take
_HANDOVER = (0.1, 0.3)
_STEPS = 3.5  # of a decode pool until its first token: the running one, one to take notice, its own and a lag
_PREFILL = (0.1, 0.25, 0.5)


@dataclass(frozen=True, slots=True)
class Split:
    """Objectives of the two pools that together keep the request's.

    A percentile of a sum is taken to be no more than the sum of the parts' percentiles. That holds for what
    queues do (unimodal, not negatively dependent), not for every distribution.
    """

    prefill: tuple[Slo, ...]
    decode: tuple[Slo, ...]


def cache_bytes(table: CostTable, shape: EngineShape, tokens: float) -> float:
    """Cache and states of one request on the GPU of an engine that holds most of them."""

    def on(counts: tuple[int, ...]) -> float:
        kept = sum(part.bytes_per_token * min(tokens, part.limit) for part in kept_by(table, shape, counts))
        return kept / shape.cp + state_bytes(table, shape, counts)

    return max(on(stage.counts) for stage in stages(table, shape))


def transfer_seconds(
    table: CostTable,
    prefill: EngineShape,
    decode: EngineShape,
    tokens: float,
    source: Group,
    target: Group,
    *,
    near: bool | None = None,
) -> float:
    """Seconds that the cache of `tokens` takes from a prefill to a decode engine.

    Each GPU of the decode engine fetches what it will hold; the GPUs of the prefill engine share the sending.
    Heads that tensor parallelism copies are fetched once per copy, as NIXL's readers do.

    near   whether both lie in one island; None: unknown, so only where the group has no other island
    """
    arriving = cache_bytes(table, decode, tokens)
    leaving = arriving * decode.tp * decode.pp / (prefill.tp * prefill.pp)
    wire = link(source, target, near)
    return float(collectives.transfer_seconds(max(arriving, leaving), wire))


def link(source: Group, target: Group, near: bool | None = None) -> Link:
    """The wire between GPUs of two groups, the slower end's where they differ."""
    if near is None:
        near = source.index == target.index and len(source.islands) == 1
    if near:
        return source.fabric.inner(source.gpu, max(source.islands))
    ends = (source.fabric.outer(source.gpu), target.fabric.outer(target.gpu))
    return min(ends, key=lambda wire: wire.bytes_s)


def decoding(table: CostTable, engines: Sequence[Engine], traffic: Traffic) -> list[Engine]:
    """Decode engines with the time that a cache takes to reach them from the worst partner among the same
    engines: which prefill engine it comes from is not known while they are compared."""
    found: dict[tuple[object, ...], float] = {}
    partners: dict[tuple[object, ...], Candidate] = {}
    for engine in engines:
        one = engine.candidate
        width = one.shape.tp * one.shape.pp
        partners.setdefault((one.group.index, width, one.shape.kv), one)

    def worst(one: Candidate) -> float:
        key = (one.group.index, one.shape.tp, one.shape.pp, one.shape.cp, one.shape.kv)
        if key not in found:
            found[key] = max(
                transfer_seconds(table, p.shape, one.shape, traffic.isl_mean, p.group, one.group)
                for p in partners.values()
                if p.shape.kv == one.shape.kv
            )
        return found[key]

    return [replace(engine, transfer_s=worst(engine.candidate)) for engine in engines]


def splits(
    table: CostTable, groups: Sequence[Group], traffic: Traffic, slos: Sequence[Slo]
) -> tuple[Split, ...]:
    """Ways to divide a request's objectives between prefill and decode pools; () where nothing is decoded.

    TPOT and ITL are the decode pool's. TTFT is the sum of what both take; where TPOT is limited, decode needs
    a few of its steps and the way to the scheduler, besides the transfer. End-to-end latency couples both: a
    few shares are tried.
    """
    if not traffic.decode_steps or table.model.kind != "causal_lm":
        return ()
    ttft = [slo for slo in slos if slo.metric == "ttft"]
    e2e = [slo for slo in slos if slo.metric == "e2e"]
    steps = tuple(slo for slo in slos if slo.metric in ("tpot", "itl"))
    if not ttft:
        found = [Split((), steps)] if not e2e else [_split((), e2e, steps, 0.0, part) for part in _PREFILL]
        return tuple(found)
    return tuple(_split(ttft, e2e, steps, share, None) for share in _handovers(ttft, steps))


def _handovers(ttft: Sequence[Slo], steps: Sequence[Slo]) -> tuple[float, ...]:
    """Shares of the TTFT objectives that decode pools may take: what their steps need, and more."""
    tightest = min(slo.limit for slo in ttft)
    if not steps:
        return _HANDOVER
    step = min(slo.limit for slo in steps)
    need = (_STEPS * step + priors().request_s) / tightest
    return tuple(sorted({max(min(need, 0.5), _HANDOVER[0]), _HANDOVER[1]}))


def _split(
    ttft: Sequence[Slo], e2e: Sequence[Slo], steps: tuple[Slo, ...], handover: float, part: float | None
) -> Split:
    """`handover`: the decode pool's share of TTFT; `part`: the prefill pool's share of end-to-end latency,
    None for what TTFT leaves to it."""
    prefill = [replace(slo, limit=slo.limit * (1 - handover)) for slo in ttft]
    decode = [replace(slo, limit=slo.limit * handover) for slo in ttft]
    for slo in e2e:
        most = min((own.limit for own in prefill), default=slo.limit)
        mine = slo.limit * part if part is not None else min(most, slo.limit / 2)
        prefill.append(replace(slo, limit=mine))
        decode.append(replace(slo, limit=slo.limit - mine))
    return Split(tuple(prefill), (*decode, *steps))
