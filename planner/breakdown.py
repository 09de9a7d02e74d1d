"""Where the time of a plan's steps goes, op by op, at the load that the plan expects, and where each op
stands under the roofline (Williams, Waterman, Patterson 2009)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from planc.cost_model import catalogue
from planc.cost_model.catalogue import Gpu
from planc.cost_model.collectives import Fabric
from planc.cost_model.step import StepLoad, StepModel, StepPart
from planc.cost_model.table import CostTable
from planc.planner.check import shape_of
from planc.planner.plan import Plan, Replica
from planc.planner.request import Request, make_request
from planc.planner.traffic import Traffic, traffic


def breakdown(plan: Plan, table: CostTable) -> list[dict[str, Any]]:
    """One entry per (phase, layer class, site, op) of the first replica, over all its layers of a stage.

    decode    a step of the sequences that run at the planned load, each with the mean context
    prefill   a step that holds a full chunk of prompt tokens and nothing else

    Keys: phase, class, site, op, ms, bound (compute, memory, launch or link), source; of kernels also
    `calls`, `flops` and `bytes` of all calls, `intensity` (FLOP per byte), and the shares of the GPU's peaks
    that they reach: `peak_compute` of the arithmetic in use, `peak_bandwidth`.
    """
    replica = plan.replicas()[0]
    request = make_request(plan.request)
    return replica_breakdown(replica, plan, table, request, traffic(request, table.model.kind))


def replica_breakdown(
    replica: Replica, plan: Plan, table: CostTable, request: Request, load: Traffic
) -> list[dict[str, Any]]:
    """`breakdown` of one replica, and of the traffic given."""
    model = step_model(replica, table, request)
    return [
        {"phase": phase, **_entry(part, model.gpu)}
        for phase, step in steps(plan, replica, load, table)
        for part in model.breakdown(step)
    ]


def _entry(part: StepPart, gpu: Gpu) -> dict[str, Any]:
    entry = {
        "class": part.layer_class,
        "site": part.site,
        "op": part.op,
        "ms": part.seconds * 1e3,
        "bound": part.bound,
        "source": part.source,
    }
    if part.done is not None:
        flops, nbytes = part.calls * part.done.flops, part.calls * part.done.nbytes
        entry |= {
            "calls": part.calls,
            "flops": flops,
            "bytes": nbytes,
            "intensity": part.done.intensity,
            "precision": part.done.precision,
            "peak_compute": flops / part.seconds / gpu.peak_flops(part.done.precision),
            "peak_bandwidth": nbytes / part.seconds / gpu.memory_bytes_s,
        }
    return entry


def bounds(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Per phase the share of the step that each kind of bound takes, and `ms` of the whole step."""
    found: dict[str, dict[str, float]] = {}
    for row in rows:
        shares = found.setdefault(row["phase"], {"ms": 0.0})
        shares[row["bound"]] = shares.get(row["bound"], 0.0) + row["ms"]
        shares["ms"] += row["ms"]
    return {
        phase: {
            name: value if name == "ms" else value / shares["ms"] for name, value in sorted(shares.items())
        }
        for phase, shares in found.items()
    }


def step_model(replica: Replica, table: CostTable, request: Request) -> StepModel:
    """The step model of a plan's replica, on the inventory's own fabric."""
    gpu, profile = catalogue.gpu(replica.gpu), catalogue.engine(replica.engine)
    home = next(n for n in request.inventory.nodes if catalogue.gpu(n.gpu).name == gpu.name)
    fabric = Fabric(home.gpus_per_node, request.inventory.inter_node_gbps)
    return StepModel(table, shape_of(replica), gpu, fabric, profile, max_num_seqs=replica.max_num_seqs)


def steps(plan: Plan, replica: Replica, load: Traffic, table: CostTable) -> Iterator[tuple[str, StepLoad]]:
    """(phase, load of one rank's step). With pipeline stages a step is that of one micro-batch."""
    if table.model.kind == "causal_lm":
        running = plan.predicted["concurrency"].value * replica.traffic_share / replica.dp
        seqs = max(1.0, min(running, float(replica.max_num_seqs)) / replica.pp)
        chunk = float(min(replica.max_num_batched_tokens, max(load.new_tokens, 1.0)))
        yield "decode", StepLoad(seqs, load.decode_context)
        yield "prefill", StepLoad(0.0, 0.0, chunk, 1.0, load.prefill_context)
    else:
        full = min(float(replica.max_num_batched_tokens), replica.max_num_seqs * load.new_tokens)
        yield "prefill", StepLoad(0.0, 0.0, full, max(full / load.new_tokens, 1.0), 0.0)
