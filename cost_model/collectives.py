"""What collectives cost: alpha-beta over links, hierarchical across nodes.

Formulas are those of ring and one-shot algorithms (Thakur et al. 2005; NCCL's bus bandwidth
convention): a ring all-reduce of b bytes over n ranks moves 2 (n-1)/n b through each rank's
link, an all-gather or reduce-scatter (n-1)/n b, an all-to-all (n-1)/n b of a rank's own send
buffer. Constants live in `data/links.yaml`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, get_args

import numpy as np

from planc.cost_model.catalogue import Entry, Gpu, Provenance, read, unknown
from planc.cost_model.features import Array, ArrayLike
from planc.cost_model.quantity import worst

Kind = Literal[
    "all_reduce", "all_gather", "reduce_scatter", "all_to_all", "dispatch", "combine", "p2p", "broadcast"
]
KINDS: tuple[Kind, ...] = get_args(Kind)

#: bytes through a rank's link per byte of the full tensor, as (ranks) -> factor
_MOVED = {
    "all_reduce": lambda n: 2 * (n - 1) / n,
    "all_gather": lambda n: (n - 1) / n,
    "reduce_scatter": lambda n: (n - 1) / n,
    "all_to_all": lambda n: (n - 1) / n,
    "dispatch": lambda n: (n - 1) / n,
    "combine": lambda n: (n - 1) / n,
    "broadcast": lambda n: 1.0,
    "p2p": lambda n: 1.0,
}

#: seconds of a collective of (kind, bytes, ranks) inside a node
Inside = Callable[[Kind, Array, int], Array]

#: kinds that engines have small-message kernels for, and those that are tokens on their way to experts
_CUSTOM = ("all_reduce", "all_gather", "reduce_scatter")
_EXCHANGE = ("dispatch", "combine")


class Constants(Entry):
    """Of one way to run collectives on one kind of wire.

    alpha_us, per_step_us   start, and one step of the ring
    share                   of the link's one-direction peak that large messages reach
    chunk_us                start of one chunk of a pipelined message
    """

    alpha_us: float
    per_step_us: float
    share: float
    chunk_us: float = 0.0


@dataclass(frozen=True, slots=True)
class Link:
    """A kind of wire: one direction, per GPU.

    library       a collective of NCCL's kind
    custom        an engine's own kernel; messages up to `custom_up_to` bytes take it
    exchange      tokens to experts and back
    """

    name: str
    bytes_s: float
    library: Constants
    custom: Constants
    exchange: Constants
    custom_up_to: float = 0.0
    source: Provenance = "assumed"


@dataclass(frozen=True, slots=True)
class Fabric:
    """The wires around a GPU: how many share a node, and the network between nodes.

    inter_node_gbit_s   per GPU, one direction; None takes the GPU's typical one
    """

    gpus_per_node: int = 8
    inter_node_gbit_s: float | None = None

    def scale_up(self, gpu: Gpu) -> int:
        """GPUs that reach each other without the network: a node's, or a rack's for rack-scale NVLink."""
        return max(self.gpus_per_node, gpu.nvlink_domain if gpu.nvlink_domain > 8 else 1)

    def inner(self, gpu: Gpu, ranks: int, custom_up_to: float = 0.0) -> Link:
        """The link inside a node for a group of `ranks` neighbours: NVLink while they fit its domain."""
        if gpu.vendor == "cpu":
            return _link("shared_memory", gpu.memory_bytes_s, gpu.arch, 0.0)
        if ranks <= gpu.nvlink_domain and gpu.nvlink_gbytes_s > 0:
            name = "xgmi" if gpu.vendor == "amd" else "nvlink"
            return _link(name, gpu.nvlink_gbytes_s * 1e9, gpu.arch, custom_up_to)
        return _link("pcie", gpu.pcie_gbytes_s * 1e9, gpu.arch, custom_up_to if ranks <= 2 else 0.0)

    def outer(self, gpu: Gpu) -> Link:
        """The network between nodes."""
        gbit_s = gpu.fabric_gbit_s if self.inter_node_gbit_s is None else self.inter_node_gbit_s
        return _link("fabric", gbit_s * 1e9 / 8, gpu.arch, 0.0)


@cache
def _constants() -> Any:
    return read("links.yaml")


@cache
def _link(name: str, bytes_s: float, arch: str, custom_up_to: float) -> Link:
    raw = _constants()["links"][name]
    lanes = raw | raw.get("by_arch", {}).get(arch, {})
    made = {lane: Constants(**lanes[lane]) for lane in ("library", "custom", "exchange")}
    return Link(name, bytes_s, **made, custom_up_to=custom_up_to, source=raw["source_kind"])


def alpha_beta(kind: Kind, size: Array, ranks: int, of: Constants, bytes_s: float) -> Array:
    """Start, ring steps, bytes through one rank's link, and what pipelining them in chunks leaves over.

    A message of b/B seconds in chunks of start c takes b/B + 2 sqrt(c b/B) at the best number of chunks.
    """
    wire: Array = size * (_MOVED[kind](ranks) / (of.share * bytes_s))
    start = (of.alpha_us + of.per_step_us * steps(kind, ranks)) * 1e-6
    found: Array = start + wire + 2.0 * np.sqrt(of.chunk_us * 1e-6 * wire)
    return found


def steps(kind: Kind, ranks: int) -> float:
    """Of a ring, and of trees above a node's eight ranks; all-to-alls and transfers take one."""
    ring = ranks - 1.0 if ranks <= 8 else 7.0 * math.log2(ranks) / 3.0
    return {"all_reduce": 2.0 * ring, "all_gather": ring, "reduce_scatter": ring}.get(kind, 1.0)


def seconds(kind: Kind, size: ArrayLike, ranks: int, link: Link) -> Array:
    """Time of one collective inside one kind of link.

    size   bytes of the full tensor: what every rank ends with (all_reduce, all_gather), what it
           starts with (reduce_scatter; a rank's own send buffer in all_to_all, dispatch and combine), or
           what is sent (p2p)
    Raises UnknownName for another kind. One rank, or nothing to move, costs nothing.
    """
    if kind not in _MOVED:
        unknown("kind", kind, "collective", KINDS)
    size = np.asarray(size, dtype=np.float64)
    if ranks <= 1:
        return np.zeros_like(size)
    time = alpha_beta(kind, size, ranks, link.exchange if kind in _EXCHANGE else link.library, link.bytes_s)
    if kind in _CUSTOM and link.custom_up_to > 0:
        custom = alpha_beta(kind, size, ranks, link.custom, link.bytes_s)
        time = np.where(size <= link.custom_up_to, np.minimum(custom, time), time)
    return np.where(size > 0, time, 0.0)


def group_seconds(
    kind: Kind,
    size: ArrayLike,
    ranks: int,
    gpu: Gpu,
    fabric: Fabric,
    *,
    stride: int = 1,
    custom_up_to: float = 0.0,
    inside: Inside | None = None,
) -> Array:
    """Time of one collective over `ranks` GPUs that lie `stride` apart, hierarchical where they span nodes.

    `inside` prices what stays inside a node; by default the alpha-beta of its link does.

    Across nodes an all-reduce is a reduce-scatter inside, an all-reduce of each rank's share over
    the network, and an all-gather inside; an all-to-all sends the share that leaves the node over
    the network at the same time as the rest inside.
    """
    size = np.asarray(size, dtype=np.float64)
    near, far = spread(ranks, gpu, fabric, stride)
    if far <= 1:
        if inside is not None:
            return inside(kind, size, ranks)
        return seconds(kind, size, ranks, fabric.inner(gpu, ranks * stride, custom_up_to))
    outer = fabric.outer(gpu)
    if near == 1 or kind == "p2p":
        return seconds(kind, size, ranks, outer)
    inner = fabric.inner(gpu, near * stride)
    near_seconds: Inside = inside or (lambda kind, size, ranks: seconds(kind, size, ranks, inner))
    if kind == "all_reduce":
        local = near_seconds("reduce_scatter", size, near) + near_seconds("all_gather", size, near)
        return local + seconds("all_reduce", size / near, far, outer)
    if kind in ("all_to_all", *_EXCHANGE):
        leaving = size * (ranks - near) / (ranks - 1)
        return np.maximum(near_seconds(kind, size - leaving, near), seconds("p2p", leaving, 2, outer))
    local = near_seconds(kind, size, near)
    return local + seconds(kind, size / near if kind != "broadcast" else size, far, outer)


def group_source(ranks: int, gpu: Gpu, fabric: Fabric, *, stride: int = 1) -> Provenance:
    """The least well founded of the links that such a group uses; "measured" for one rank."""
    near, far = spread(ranks, gpu, fabric, stride)
    links = [fabric.inner(gpu, near * stride)] if near > 1 else []
    links += [fabric.outer(gpu)] if far > 1 else []
    return worst(link.source for link in links)


def spread(ranks: int, gpu: Gpu, fabric: Fabric, stride: int) -> tuple[int, int]:
    """(ranks of the group inside one node, nodes)."""
    near = max(1, min(ranks, fabric.scale_up(gpu) // max(stride, 1)))
    return near, math.ceil(ranks / near)


def transfer_seconds(size: ArrayLike, link: Link) -> Array:
    """Point to point, e.g. a KV cache from a prefill to a decode instance."""
    return seconds("p2p", size, 2, link)
