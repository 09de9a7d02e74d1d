"""Where the time of a plan's steps goes, op by op, at the load that the plan expects."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from planc.cost_model import catalogue
from planc.cost_model.collectives import Fabric
from planc.cost_model.step import StepLoad, StepModel
from planc.cost_model.table import CostTable
from planc.planner.check import shape_of
from planc.planner.plan import Plan, Replica
from planc.planner.request import Request, make_request
from planc.planner.traffic import Traffic, traffic


def breakdown(plan: Plan, table: CostTable) -> list[dict[str, Any]]:
    """One entry per (phase, layer class, site, op) of the first replica: `ms` over all its layers.

    decode    a step of the sequences that run at the planned load, each with the mean context
    prefill   a step that holds a full chunk of prompt tokens and nothing else
    """
    replica = plan.replicas()[0]
    request = make_request(plan.request)
    load = traffic(request, table.model.kind)
    model = step_model(replica, table, request)
    rows: list[dict[str, Any]] = []
    for phase, step in _steps(plan, replica, load, table):
        for part in model.breakdown(step):
            entry = {
                "phase": phase,
                "class": part.layer_class,
                "site": part.site,
                "op": part.op,
                "ms": part.seconds * 1e3,
                "bound": part.bound,
                "source": part.source,
                "calls": part.calls,
            }
            if part.done is not None:  # of one call on one GPU
                entry |= {
                    "flops": part.done.flops,
                    "bytes": part.done.nbytes,
                    "precision": part.done.precision,
                }
            rows.append(entry)
    return rows


def step_model(replica: Replica, table: CostTable, request: Request) -> StepModel:
    """The step model of a plan's replica, on the inventory's own fabric."""
    gpu, profile = catalogue.gpu(replica.gpu), catalogue.engine(replica.engine)
    home = next(n for n in request.inventory.nodes if catalogue.gpu(n.gpu).name == gpu.name)
    fabric = Fabric(home.gpus_per_node, request.inventory.inter_node_gbps)
    return StepModel(table, shape_of(replica), gpu, fabric, profile, max_num_seqs=replica.max_num_seqs)


def _steps(plan: Plan, replica: Replica, load: Traffic, table: CostTable) -> Iterator[tuple[str, StepLoad]]:
    chunk = float(min(replica.max_num_batched_tokens, max(load.new_tokens, 1.0)))
    if table.model.kind == "causal_lm":
        running = plan.predicted["concurrency"].value * replica.traffic_share / replica.dp
        seqs = max(1.0, min(running, float(replica.max_num_seqs)))
        yield "decode", StepLoad(seqs, load.decode_context)
        yield "prefill", StepLoad(0.0, 0.0, chunk, 1.0, load.prefill_context)
    else:
        yield "prefill", StepLoad(0.0, 0.0, chunk * replica.max_num_seqs, float(replica.max_num_seqs), 0.0)
