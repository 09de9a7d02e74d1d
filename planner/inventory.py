"""The inventory as groups of islands: GPUs that reach each other without the network.

An island is a node, or a rack where NVLink spans nodes. An engine either lies inside one island or
takes whole ones, so tensor-parallel groups never leave NVLink's reach.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from planc.cost_model import catalogue
from planc.cost_model.catalogue import Gpu
from planc.cost_model.collectives import Fabric
from planc.cost_model.offload import Name, constants
from planc.planner.request import Nodes, Request


@dataclass(frozen=True, slots=True)
class Group:
    """Identical nodes.

    names      node names, in order        usd       per GPU and hour
    spot       the nodes may be taken away
    islands    GPUs of each island         priced    True: the request states the price
    stores     where caches may lie besides GPUs: (tier, GiB, bytes/s), each GPU's part
    """

    index: int
    gpu: Gpu
    per_node: int
    names: tuple[str, ...]
    usd: float
    priced: bool
    fabric: Fabric
    islands: tuple[int, ...]
    spot: bool = False
    stores: tuple[tuple[Name, float, float], ...] = ()

    @property
    def gpus(self) -> int:
        return sum(self.islands)

    def island_gpus(self, island: int) -> list[str]:
        """ "node/index" of the GPUs of an island, in order."""
        start = sum(self.islands[:island])
        places = (divmod(i, self.per_node) for i in range(start, start + self.islands[island]))
        return [f"{self.names[node]}/{index}" for node, index in places]

    def pieces(self, world: int) -> tuple[int, int] | None:
        """(pieces, GPUs each) that an engine of `world` GPUs takes; None when it cannot lie here."""
        island = max(self.islands)
        if world <= island:
            return 1, world
        return (world // island, island) if world % island == 0 else None


def _stores(
    request: Request, nodes: Nodes, gpu: Gpu, fabric: Fabric
) -> tuple[tuple[Name, float, float], ...]:
    """The fastest first. Drives and a store without a stated speed cannot be planned with."""
    share, each = constants()["share"], nodes.gpus_per_node
    found: list[tuple[Name, float, float]] = []
    if nodes.host_memory_gib is not None:
        found.append(("host", nodes.host_memory_gib / each, gpu.pcie_gbytes_s * 1e9 * share["host"]))
    if nodes.nvme_gib is not None and nodes.nvme_gbytes_s is not None:
        found.append(("nvme", nodes.nvme_gib / each, nodes.nvme_gbytes_s * 1e9 / each * share["nvme"]))
    store = request.inventory.cache_store_gib
    if store is not None:
        gpus = sum(n.count * n.gpus_per_node for n in request.inventory.nodes)
        found.append(("store", store / gpus, fabric.outer(gpu).bytes_s * share["store"]))
    return tuple(found)


def groups(request: Request) -> tuple[Group, ...]:
    """Node groups of the request. Unnamed nodes are called node0, node1, ... over all groups."""
    found: list[Group] = []
    number = 0
    taken = {nodes.name for nodes in request.inventory.nodes}
    prefix = "node" if not any(str(name).startswith("node") for name in taken if name) else "unnamed"
    for index, nodes in enumerate(request.inventory.nodes):
        gpu = catalogue.gpu(nodes.gpu)
        fabric = Fabric(nodes.gpus_per_node, request.inventory.inter_node_gbps)
        if nodes.name is None:
            names = tuple(f"{prefix}{number + i}" for i in range(nodes.count))
            number += nodes.count
        else:
            names = tuple(f"{nodes.name}-{i}" for i in range(nodes.count))
        per_island = max(fabric.scale_up(gpu) // nodes.gpus_per_node, 1)
        whole, rest = divmod(nodes.count, per_island)
        islands = (nodes.gpus_per_node * per_island,) * whole
        islands += (nodes.gpus_per_node * rest,) if rest else ()
        price = nodes.usd_per_gpu_hour
        found.append(
            Group(
                index=index,
                gpu=gpu,
                per_node=nodes.gpus_per_node,
                names=names,
                usd=gpu.usd_per_hour if price is None else price,
                priced=price is not None,
                fabric=fabric,
                islands=islands,
                spot=bool(nodes.spot),
                stores=_stores(request, nodes, gpu, fabric),
            )
        )
    return tuple(found)


# -- packing -----------------------------------------------------------------------------


def is_chain(sizes: Sequence[int]) -> bool:
    """Whether each size divides the next larger one."""
    ordered = sorted(set(sizes))
    return all(big % small == 0 for small, big in pairwise(ordered))


def chain_limits(sizes: Sequence[int], islands: Sequence[int]) -> list[tuple[dict[int, int], int]]:
    """Linear conditions on piece counts that are necessary and sufficient when the sizes form a chain.

    For each size s, every larger piece takes size/s aligned slots of size s, and an island of G GPUs
    has floor(G / s) of them. Returns (coefficient of each size, limit) pairs.
    """
    ordered = sorted(set(sizes))
    return [
        ({big: big // size for big in ordered if big >= size}, sum(island // size for island in islands))
        for size in ordered
    ]


def patterns(sizes: Sequence[int], island: int) -> list[dict[int, int]]:
    """All maximal ways to fill one island with pieces of the given sizes."""
    ordered = sorted(set(sizes), reverse=True)

    def fill(position: int, room: int) -> Iterator[dict[int, int]]:
        if position == len(ordered):
            if room < ordered[-1]:
                yield {}
            return
        size = ordered[position]
        for count in range(room // size, -1, -1):
            for rest in fill(position + 1, room - count * size):
                yield {size: count, **rest} if count else rest

    return list(fill(0, island))


def place(sizes: Sequence[int], islands: Sequence[int]) -> list[tuple[int, int]] | None:
    """(island, first GPU) of each piece, pieces in the given order; None when they do not fit.

    Largest first into the fullest island where they fit; exact for chains. Otherwise backtracks.
    """
    order = sorted(range(len(sizes)), key=lambda i: -sizes[i])
    room = list(islands)
    found: dict[int, tuple[int, int]] = {}

    def put(position: int) -> bool:
        if position == len(order):
            return True
        piece = order[position]
        size = sizes[piece]
        tried: set[int] = set()
        for island in sorted(range(len(room)), key=lambda i: (room[i], i)):
            if room[island] < size or room[island] in tried:
                continue
            tried.add(room[island])
            found[piece] = (island, islands[island] - room[island])
            room[island] -= size
            if put(position + 1):
                return True
            room[island] += size
        return False

    if is_chain(sizes):
        for piece in order:
            fits = [i for i in range(len(room)) if room[i] >= sizes[piece]]
            if not fits:
                return None
            island = min(fits, key=lambda i: (room[i], i))
            found[piece] = (island, islands[island] - room[island])
            room[island] -= sizes[piece]
    elif not put(0):
        return None
    return [found[i] for i in range(len(sizes))]
