"""What `planc verify` proves of a bundle's graphs: that the decisions kept the model's numbers.

Structure (phases, parallelism, fusion) must agree with the traced model to the last bits of fp32;
number formats change numbers by design, so their effect is measured and reported.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from planc.ir.graph import Graph
from planc.ir.trace.hf import trace_config
from planc.ir.trace.hf_config import read_config
from planc.ir.trace.narrow import narrow
from planc.planner.plan import Plan
from planc.runtime import weights as loading
from planc.runtime.assemble import Compiled, apply, model_source, traced_model
from planc.runtime.verify import Agreement, verify_model, verify_module

#: share of the largest logit by which fp32 graphs may differ: the order of sums
EXACT = 1e-4
#: the same for the median row of 16-bit graphs
ROUNDED = 0.05
#: beyond this a number format has broken the model, not rounded it
BROKEN = 0.5

_PROMPTS = (
    (3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8, 4, 6, 2, 6, 4, 3, 3),
    (2, 7, 1, 8, 2),
    (1, 6),
)


@dataclass(frozen=True, slots=True)
class Proof:
    """One comparison with the traced model."""

    name: str
    holds: bool
    detail: str


def prove(
    plan: Plan, bundle: Path, *, weights: str | Path | None = None, trust_remote_code: bool = False
) -> Iterator[Proof]:
    """Runs the compiled graphs against the traced model; structure first, then with the plan's formats.

    weights   the model's own folder: it is run as it is. None: a configured model is run narrow with
              random weights, a module as it is.
    """
    source = model_source(plan, bundle)
    if weights is not None:
        traced = traced_model(plan, bundle, trust_remote_code=trust_remote_code)
        tensors = loading.from_folder(weights, dtype=loading.float_dtype(traced))
        what = "the given weights"
    elif plan.model.kind == "causal_lm" and str(source).endswith(".json"):
        config = narrow(read_config(source))
        traced = trace_config(config, f"{plan.model.name}, narrow", dtype=torch.float32)
        tensors = loading.at_random(traced)
        what = "narrow, random weights, fp32"
    else:
        traced = traced_model(plan, bundle, trust_remote_code=trust_remote_code)
        tensors = loading.at_random(traced)
        what = "random weights"
    structure = _agreement(apply(plan, traced, formats=False), tensors)
    if loading.float_dtype(traced) == torch.float32:
        holds = structure.relative_error <= EXACT
    else:  # in 16 bits a router may choose differently between near-equals: the median row tells
        holds = structure.typical_error <= ROUNDED
    yield Proof(f"structure ({what})", holds, _said(structure))
    replica = plan.replicas()[0]
    rounded = _agreement(apply(plan, traced, formats=True), tensors)
    name = f"formats {replica.weights}/{replica.activations}/{replica.kv} ({what})"
    yield Proof(name, rounded.typical_error <= BROKEN, _said(rounded))


def _agreement(compiled: Compiled, tensors: dict[str, torch.Tensor]) -> Agreement:
    if compiled.prefill is None or compiled.decode is None:
        assert isinstance(compiled.optimised, Graph)
        return verify_module(compiled.traced, compiled.optimised, tensors)
    return verify_model(
        compiled.traced,
        compiled.prefill,
        compiled.decode,
        tensors,
        prompts=_PROMPTS,
        max_new_tokens=12,
        block_size=4,
        max_num_batched_tokens=16,
    )


def _said(found: Agreement) -> str:
    tokens = (
        "" if found.same_tokens is None else f", {found.same_tokens} of {found.compared} greedy tokens equal"
    )
    typical = f", median {found.typical_error:.1e}" if found.compared > 1 else ""
    return f"largest error {found.relative_error:.1e} of the largest value{typical}{tokens}"
