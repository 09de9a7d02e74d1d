"""How a request is loosened: which of its constraints are numbers and which are lists, and requests with
less load, more nodes, more formats."""

from __future__ import annotations

import math
from collections.abc import Sequence

from planc.cost_model.formats import formats
from planc.planner.request import Nodes, Request
from planc.planner.workload import Workload

#: an objective that nothing misses, ms
NEVER = 1e9

#: fields of `Constraints` that are numbers: one unit in the looser direction, and its name. An integer step
#: says that only whole values count
NUMBERS: dict[str, tuple[float, str]] = {
    "max_gpus": (1, "GPUs"),
    "max_replicas": (1, "replicas"),
    "max_power_kw": (1.0, "kW"),
    "max_accuracy_drop": (0.001, "of the score"),
    "gpu_memory_utilization": (0.01, "of the memory"),
    "spare_replicas": (-1, "replicas"),
    "max_spot_share": (0.01, "of the traffic"),
}
#: fields that list what may be used
LISTS = (
    *("weights", "activations", "kv", "engines", "gpus", "serving"),
    *("tp", "pp", "dp", "ep", "cp", "max_num_seqs", "max_num_batched_tokens"),
)
#: lists of formats, and what they are formats of
ROLES = {"weights": "weight", "activations": "activation", "kv": "kv"}


def with_load(workload: Workload, load: float, closed: bool) -> Workload:
    """The workload with another total load; per-class rates keep their proportions."""
    rates = [c.request_rate for c in workload.classes]
    if not closed and rates and all(rate is not None for rate in rates):
        factor = load / sum(rate for rate in rates if rate is not None)
        classes = [
            c.model_copy(update={"request_rate": (c.request_rate or 0.0) * factor}) for c in workload.classes
        ]
        return workload.model_copy(update={"classes": classes})
    return workload.model_copy(update={"concurrency": int(load)} if closed else {"request_rate": load})


def without_rate(workload: Workload) -> Workload:
    """The workload with as much load as can be carried; classes keep their proportions."""
    classes = [
        c.model_copy(update={"request_rate": None, "weight": c.request_rate or c.weight})
        for c in workload.classes
    ]
    return workload.model_copy(update={"classes": classes, "request_rate": None, "rate": "max"})


def with_nodes(request: Request, nodes: Sequence[Nodes]) -> Request:
    return request.changed(inventory=request.inventory.model_copy(update={"nodes": list(nodes)}))


def times_nodes(request: Request, factor: int) -> Request:
    """So many times the inventory."""
    nodes = [n.model_copy(update={"count": n.count * factor}) for n in request.inventory.nodes]
    return with_nodes(request, nodes)


def with_node_count(request: Request, position: int, count: int) -> Request:
    """Another number of nodes of one group; 0 takes the group away."""
    nodes = list(request.inventory.nodes)
    nodes[position : position + 1] = (
        [nodes[position].model_copy(update={"count": count})] if count >= 1 else []
    )
    return with_nodes(request, nodes)


def constrained(request: Request, **limits: object) -> Request:
    """The request with other constraints."""
    return request.changed(constraints=request.constraints.model_copy(update=limits))


def lifted(name: str) -> float | None:
    """What a number of `Constraints` is when it limits nothing. (Without any accuracy budget formats stay the
    checkpoint's own.)"""
    return 1.0 if name == "max_accuracy_drop" else None


def left_open(name: str) -> list[str] | None:
    """What a list of `Constraints` is when anything may be used. (A list of formats that is left out allows
    the checkpoint's own.)"""
    if name not in ROLES:
        return None
    return [known for known, entry in formats().items() if ROLES[name] in entry.roles]


def with_objective(request: Request, key: str, limit: float, traffic_class: str = "") -> Request:
    """The request with another limit, ms, on one of its objectives, or on that of one traffic class."""
    if not traffic_class:
        return request.changed(slo={**request.slo, key: limit})
    classes = [
        c.model_copy(update={"slo": {**c.slo, key: limit}}) if c.name == traffic_class else c
        for c in request.workload.classes
    ]
    return request.changed(workload=request.workload.model_copy(update={"classes": classes}))


def rounded_up(value: float) -> float:
    """To three significant digits."""
    if value <= 0:
        return 0.0
    unit = 10.0 ** (math.floor(math.log10(value)) - 2)
    return float(f"{math.ceil(value / unit - 1e-9) * unit:.12g}")


def rounded_down(value: float) -> float:
    """To three significant digits."""
    if value <= 0:
        return 0.0
    unit = 10.0 ** (math.floor(math.log10(value)) - 2)
    return float(f"{math.floor(value / unit + 1e-9) * unit:.12g}")
