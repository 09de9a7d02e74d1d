"""From a plan back to graphs: the decisions of a plan, applied to the traced model.

The order is the compiler's: front, phases, parallelism, fusion, quantization. What is searched and
what runs are the same passes, so a decision that cannot be applied never reaches a user.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from planc.errors import InvalidBundle
from planc.ir.graph import Graph
from planc.ir.trace import kind_of, trace
from planc.ir.trace.hf import trace_config
from planc.ir.trace.hf_config import read_config
from planc.passes.fusion import NAMES, Fusion
from planc.passes.parallel import TensorParallel
from planc.passes.phases import Phases
from planc.passes.pipeline import FRONT, Pass, Step, run
from planc.passes.quantize import Quantize
from planc.planner.plan import Plan, Replica

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16}


@dataclass(frozen=True, slots=True)
class Compiled:
    """A model before and after a plan's decisions. Encoders and modules have no phases."""

    traced: Graph
    prefill: Graph | None
    decode: Graph | None
    optimised: Graph | None  # what runs where there are no phases

    def graph(self, phase: str) -> Graph:
        """The graph of "prefill", "decode" or "traced"; for a model without phases the one it has."""
        found = {"prefill": self.prefill, "decode": self.decode, "traced": self.traced}[phase]
        return found or self.optimised or self.traced


def decisions(
    plan: Plan, replica: Replica, *, rank: int | None = None, formats: bool = True
) -> tuple[Pass, ...]:
    """The passes that apply a plan's decisions to a phase graph, in order.

    rank      a tensor-parallel rank of the replica; None: the whole model on one device
    formats   False leaves the number formats as they are: structure only
    """
    passes: list[Pass] = []
    if rank is not None and replica.tp > 1:
        passes.append(TensorParallel(replica.tp, rank % replica.tp, ep=replica.ep > 1))
    fusions = frozenset(name for layer in plan.layers for name in layer.decisions.fusions)
    passes.append(Fusion(fusions & NAMES))
    if formats:
        chosen = {layer.layer_class: layer.decisions.format for layer in plan.layers} | replica.formats
        passes.append(Quantize(formats=chosen, activations=replica.activations, kv=replica.kv))
    return tuple(passes)


def apply(
    plan: Plan,
    traced: Graph,
    *,
    rank: int | None = None,
    formats: bool = True,
    observe: Callable[[Step], None] | None = None,
) -> Compiled:
    """A plan's decisions applied to a traced graph; `observe` hears of every pass."""
    rewrites = decisions(plan, plan.replicas()[0], rank=rank, formats=formats)
    if traced.source.kind != "causal_lm":
        return Compiled(traced, None, None, run(traced, (*FRONT, *rewrites), observe=observe))
    front = run(traced, FRONT, observe=observe)
    return Compiled(
        traced,
        run(front, (Phases("prefill"), *rewrites), observe=observe),
        run(front, (Phases("decode"), *rewrites), observe=observe),
        None,
    )


def assemble(
    plan: Plan, bundle: Path, *, rank: int | None = None, trust_remote_code: bool = False
) -> Compiled:
    """Traces the bundle's model (from the cache where possible) and applies the plan's decisions.

    Raises InvalidBundle where the bundle has no model, and the passes' errors.
    """
    return apply(plan, traced_model(plan, bundle, trust_remote_code=trust_remote_code), rank=rank)


def traced_model(plan: Plan, bundle: Path, *, trust_remote_code: bool = False) -> Graph:
    """The traced graph of a bundle's model, in the floating-point type that the plan computes in.

    Traces are kept in bf16; a plan in fp32 or fp16 has its own, made anew.
    """
    source = model_source(plan, bundle)
    dtype = _DTYPES.get(plan.replicas()[0].weights)
    if dtype is None or kind_of(source) != "hf":
        return trace(source, trust_remote_code=trust_remote_code)
    return trace_config(
        read_config(source), plan.model.name, dtype=dtype, trust_remote_code=trust_remote_code
    )


def model_source(plan: Plan, bundle: Path) -> str | Path:
    """What to trace: the configuration inside the bundle, else the request's own model."""
    inside = bundle / "model" / "config.json"
    if inside.is_file():
        return inside
    if ":" in plan.model.source or Path(plan.model.source).exists():
        return plan.model.source
    raise InvalidBundle(
        path=bundle,
        reason=f"it holds no model, and '{plan.model.source}' is not there",
        mend="Run from the folder that the request's model path is relative to.",
    )
