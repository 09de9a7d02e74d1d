"""What collectives cost: alpha-beta over links, hierarchical across nodes.

Formulas are those of ring and one-shot algorithms (Thakur et al. 2005; NCCL's bus bandwidth
convention): a ring all-reduce of b bytes over n ranks moves 2 (n-1)/n b through each rank's
link, an all-gather or reduce-scatter (n-1)/n b, an all-to-all (n-1)/n b of a rank's own send
buffer. A library picks the fastest of its protocols: those whose data carry flags (NCCL's LL and LL128: early
start, a fraction of the bandwidth) for small messages, a pipeline of slices (Simple) for large ones.
Kernels' starts and steps are instructions, so they scale with the GPU's clock. Constants live in
`data/links.yaml`.
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

#: kinds that engines have small-message kernels for, those that are tokens on their way to experts, and
#: those where one rank sends at a time
_OWN = ("all_reduce", "all_gather", "reduce_scatter")
_EXCHANGE = ("dispatch", "combine")
_ALONE = ("p2p", "broadcast")


class Constants(Entry):
    """Of one protocol on one kind of wire.

    alpha_us, per_step_us   start, and one step of the ring
    share                   of the link's one-direction peak that large messages reach
    """

    alpha_us: float
    per_step_us: float
    share: float

    def at_clock(self, slower: float) -> Constants:
        """On a GPU whose clock is so many times slower."""
        start = {"alpha_us": self.alpha_us * slower, "per_step_us": self.per_step_us * slower}
        return self.model_copy(update=start)


Protocols = tuple[Constants, ...]


@dataclass(frozen=True, slots=True)
class Own:
    """An engine's own all-reduce: which kernel, and up to how many bytes it is taken.

    barrier   ranks wait for each other before and after (vLLM, SGLang)
    lamport   data carry their own flags (TensorRT-LLM, FlashInfer)
    """

    up_to: float = 0.0
    kernel: Literal["barrier", "lamport"] = "barrier"


@dataclass(frozen=True, slots=True)
class Link:
    """A kind of wire: one direction, per GPU.

    bytes_s            of one rank that sends alone
    group_bytes_s      the same while all ranks of the group send: less where they share a host's bridges
    library            a collective of NCCL's kind
    own                an engine's own kernel; messages up to `own_up_to` bytes may take it
    dispatch, combine  tokens to experts and back
    """

    name: str
    bytes_s: float
    group_bytes_s: float
    library: Protocols
    own: Protocols
    dispatch: Protocols
    combine: Protocols
    own_up_to: float = 0.0
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

    def inner(self, gpu: Gpu, ranks: int, own: Own = Own()) -> Link:
        """The link inside a node for a group of `ranks` neighbours: NVLink while they fit its domain."""
        if gpu.vendor == "cpu":
            return _link("shared_memory", gpu, gpu.memory_bytes_s)
        if ranks <= gpu.nvlink_domain and gpu.nvlink_gbytes_s > 0:
            return _link("xgmi" if gpu.vendor == "amd" else "nvlink", gpu, gpu.nvlink_gbytes_s * 1e9, own)
        group = gpu.pcie_group_gbytes_s(ranks) * 1e9
        return _link("pcie", gpu, gpu.pcie_gbytes_s * 1e9, own if ranks <= 2 else Own(), group)

    def outer(self, gpu: Gpu) -> Link:
        """The network between nodes."""
        gbit_s = gpu.fabric_gbit_s if self.inter_node_gbit_s is None else self.inter_node_gbit_s
        return _link("fabric", gpu, gbit_s * 1e9 / 8)


@cache
def _constants() -> Any:
    return read("links.yaml")


def reference_mhz(wire: str) -> float:
    """Clock at which a wire's constants are stated. Raises KeyError where no clock matters."""
    return float(_constants()["links"][wire]["at_mhz"])


def _link(name: str, gpu: Gpu, bytes_s: float, own: Own = Own(), group: float | None = None) -> Link:
    return _made(name, gpu.arch, gpu.clock_mhz, bytes_s, bytes_s if group is None else group, own)


@cache
def _made(name: str, arch: str, clock_mhz: float, bytes_s: float, group: float, own: Own) -> Link:
    raw = _constants()["links"][name]
    lanes = raw | raw.get("by_arch", {}).get(arch, {})
    slower = raw["at_mhz"] / clock_mhz if "at_mhz" in raw else 1.0
    library, engine, dispatch, combine = (
        tuple(Constants(**one).at_clock(slower) for one in lanes[lane])
        for lane in ("library", own.kernel, "dispatch", "combine")
    )
    return Link(name, bytes_s, group, library, engine, dispatch, combine, own.up_to, raw["source_kind"])


def alpha_beta(kind: Kind, size: Array, ranks: int, of: Constants, bytes_s: float) -> Array:
    """Start, ring steps, and bytes through one rank's link, s."""
    start = (of.alpha_us + of.per_step_us * steps(kind, ranks)) * 1e-6
    found: Array = start + size * (_MOVED[kind](ranks) / (of.share * bytes_s))
    return found


def fastest(kind: Kind, size: Array, ranks: int, protocols: Protocols, bytes_s: float) -> Array:
    """Seconds of the best protocol for each size."""
    found: Array = np.minimum.reduce([alpha_beta(kind, size, ranks, of, bytes_s) for of in protocols])
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
    rate = link.bytes_s if kind in _ALONE else link.group_bytes_s
    time = fastest(kind, size, ranks, getattr(link, kind if kind in _EXCHANGE else "library"), rate)
    if kind in _OWN and link.own_up_to > 0:
        own = fastest(kind, size, ranks, link.own, rate)
        time = np.where(size <= link.own_up_to, np.minimum(own, time), time)
    return np.where(size > 0, time, 0.0)


def group_seconds(
    kind: Kind,
    size: ArrayLike,
    ranks: int,
    gpu: Gpu,
    fabric: Fabric,
    *,
    stride: int = 1,
    own: Own = Own(),
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
        return seconds(kind, size, ranks, fabric.inner(gpu, ranks * stride, own))
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
