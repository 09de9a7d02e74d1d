"""Where a plan's GPU time goes: GPU-milliseconds per output token, term by term, so that two plans can be
compared whatever their shapes.

With n engines of `world` GPUs that each decode B sequences in steps of D seconds and read a prompt of I
tokens in chunks of c tokens that take F(c) seconds, one output token of a request with O of them takes

    world D / B        in decode steps, split as the step's breakdown splits D
    world F I / (c O)  in prompts, split likewise
    the rest           GPUs / (tokens/s) less both: time without a step, less what steps that hold prompts
                       and decoding sequences share (weights are read and the host is paid once); so it may
                       be negative
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from planc.cost_model.features import ArrayLike
from planc.cost_model.table import CostTable
from planc.planner.breakdown import step_model, steps
from planc.planner.plan import Plan, Pool, Replica
from planc.planner.request import Request
from planc.planner.traffic import Traffic

#: what an op is, for people: the first that is part of its name or site
_KINDS = (
    ("all_reduce", "all-reduce"),
    ("all_gather", "all-gather"),
    ("reduce_scatter", "reduce-scatter"),
    ("dispatch", "expert dispatch"),
    ("combine", "expert combine"),
    ("quantize", "quantizing activations"),
    ("attention", "attention"),
    ("mla", "attention"),
    ("delta", "attention"),
    ("experts", "experts"),
    ("router", "router"),
    ("lm_head", "LM head"),
    ("_proj", "linear layers"),
    ("linear", "linear layers"),
    ("host", "host and hand-over"),
)
IDLE = "idle, less what mixed steps share"


@dataclass(frozen=True, slots=True)
class Term:
    """One line of a comparison: what it is, its unit, and its value for the plan and for the other."""

    name: str
    unit: str
    plan: float
    other: float

    @property
    def change(self) -> float:
        return self.other - self.plan

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "unit": self.unit,
            "plan": self.plan,
            "other": self.other,
            "change": self.change,
        }


def gpu_time(plan: Plan, table: CostTable, request: Request, load: Traffic) -> dict[str, float]:
    """GPU-milliseconds per output token (input token where nothing is decoded) by term; they add up to
    GPUs / throughput."""
    found: dict[str, float] = {}
    for pool in plan.pools:
        for replica, share in _kinds(pool):
            model = step_model(replica, table, request)
            world = len(replica.gpus)
            for phase, step in steps(plan, replica, load, table):
                if phase not in _phases(pool):
                    continue
                if phase == "decode":
                    per_token = world / (scalar(step.decode_seqs) * replica.dp)
                else:
                    tokens = load.new_tokens / (load.osl_mean or load.isl_mean)
                    per_token = world * tokens / (scalar(step.prefill_tokens) * replica.dp)
                for part in model.breakdown(step):
                    name = f"{phase}: {kind(part.op, part.site)}"
                    found[name] = found.get(name, 0.0) + 1e3 * part.seconds * per_token * share
    gpus = sum(len(replica.gpus) for replica in plan.replicas())
    whole = 1e3 * gpus / plan.predicted["output_tok_s"].value
    found[IDLE] = whole - sum(found.values())
    return found


def scalar(value: ArrayLike) -> float:
    return float(np.asarray(value))


def _phases(pool: Pool) -> tuple[str, ...]:
    return (pool.role,) if pool.role in ("prefill", "decode") else ("decode", "prefill")


def _kinds(pool: Pool) -> list[tuple[Replica, float]]:
    """Replicas that differ in nothing but place, with the share of the traffic that all of them carry."""
    kinds: dict[str, tuple[Replica, float]] = {}
    for replica in pool.replicas:
        key = replica.model_dump_json(exclude={"gpus", "traffic_share"})
        first, share = kinds.get(key, (replica, 0.0))
        kinds[key] = first, share + replica.traffic_share
    return list(kinds.values())


def kind(op: str, site: str) -> str:
    """What an op is, in few words."""
    for part, name in _KINDS:
        if part in op.lower():
            return name
    for part, name in _KINDS:
        if part in site.lower() and op.startswith("aten::linear"):
            return name
    return "norms and other pointwise"


def compared(plan: dict[str, float], other: dict[str, float], unit: str) -> list[Term]:
    """Terms of both accounts, the one that differs most first."""
    names = dict.fromkeys([*plan, *other])
    terms = [Term(name, unit, plan.get(name, 0.0), other.get(name, 0.0)) for name in names]
    return sorted(terms, key=lambda term: (-abs(term.change), term.name))


def memory_terms(plan: Plan, other: Plan) -> list[Term]:
    """The memory maps of the first replicas, GiB on one GPU."""
    mine, theirs = (p.replicas()[0].memory.model_dump() for p in (plan, other))
    named = {"weights_gib": "weights", "kv_cache_gib": "KV cache", "activations_gib": "activations"}
    return compared(
        {name: mine[key] for key, name in named.items()},
        {name: theirs[key] for key, name in named.items()},
        "GiB per GPU",
    )
