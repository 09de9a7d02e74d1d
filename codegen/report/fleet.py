"""The fleet as it lies: kinds of engines with their colours, nodes with their GPUs, memory of a GPU."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from planc.codegen.report import palette
from planc.errors import PlancError
from planc.planner.inventory import groups
from planc.planner.plan import Memory, Plan, Replica
from planc.planner.request import make_request

_MOST_NODES = 40


@dataclass(frozen=True, slots=True)
class Slice:
    """One part of a memory bar, as a percentage of the GPU's capacity."""

    name: str
    gib: float
    percent: float
    colour: str


@dataclass(frozen=True, slots=True)
class Kind:
    """Replicas that differ in nothing but their GPUs and traffic; `share` of the requests pass through.
    `striped`: another kind has the colour too."""

    role: str
    classes: tuple[str, ...]
    replica: Replica
    count: int
    share: float
    colour: str
    striped: bool
    memory: tuple[Slice, ...]

    @property
    def paint(self) -> str:
        """Classes of the style sheet."""
        return f"c-{self.colour}{' striped' if self.striped else ''}"

    @property
    def layout(self) -> str:
        degrees = ("tp", "pp", "dp", "ep", "cp")
        found = [f"{n.upper()}{getattr(self.replica, n)}" for n in degrees if getattr(self.replica, n) > 1]
        return " ".join(found) or "one GPU"

    @property
    def stages(self) -> str:
        """Layers of each pipeline stage: "10 + 10 + 11", or "8 × 10"."""
        layers = self.replica.pipeline_layers
        if len(layers) > 2 and len(set(layers)) == 1:
            return f"{len(layers)} × {layers[0]}"
        return " + ".join(map(str, layers))


@dataclass(frozen=True, slots=True)
class Block:
    """Neighbouring GPUs of one replica on a node; `kind` None: idle ones."""

    kind: Kind | None
    caption: str
    gpus: tuple[tuple[str, str], ...]  # (what is written on it, title)


@dataclass(frozen=True, slots=True)
class Node:
    """Nodes that look alike."""

    names: str
    count: int
    blocks: tuple[Block, ...]


@dataclass(frozen=True, slots=True)
class Group:
    """Nodes of one entry of the inventory; `sliced`: what they hold are MIG slices."""

    title: str
    sliced: bool
    nodes: tuple[Node, ...]
    used: int
    gpus: int
    left_out: int


def kinds(plan: Plan) -> list[Kind]:
    """Kinds in the plan's order, each role with colours of its own."""
    found: dict[str, list[tuple[str, tuple[str, ...], Replica]]] = {}
    for pool in plan.pools:
        for replica in pool.replicas:
            key = pool.role + "/".join(pool.classes) + _shape(replica)
            found.setdefault(key, []).append((pool.role, tuple(pool.classes), replica))
    made: list[Kind] = []
    for members in found.values():
        role, classes, replica = members[0]
        hues = palette.ROLES[role]
        used = {kind.colour for kind in made}
        free = [hue for hue in (*hues, *palette.CLASSES) if hue not in used]
        hue = free[0] if free else hues[len(made) % len(hues)]
        made.append(
            Kind(
                role=role,
                classes=classes,
                replica=replica,
                count=len(members),
                share=sum(one.traffic_share for _, _, one in members),
                colour=hue,
                striped=not free,
                memory=slices(replica.memory),
            )
        )
    return made


def _shape(replica: Replica) -> str:
    return replica.model_dump_json(exclude={"gpus", "traffic_share"})


def slices(memory: Memory) -> tuple[Slice, ...]:
    """The memory map as parts of a bar; what they leave is free."""
    capacity = max(memory.capacity_gib, 1e-30)
    sizes = [(*palette.MEMORY[field], float(getattr(memory, field))) for field in palette.MEMORY]
    return tuple(
        Slice(name, gib, round(100.0 * gib / capacity, 3), colour) for name, colour, gib in sizes if gib > 0
    )


# -- placement -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Seat:
    """Whose a GPU is: kind, number of the replica in the plan, rank in the replica."""

    kind: Kind
    number: int
    rank: int


def placement(plan: Plan, found: Sequence[Kind]) -> list[Group]:
    """Every node of the inventory with what runs on it; nodes that look alike are one picture."""
    taken = seats(plan, found)
    drawn = []
    for title, sliced, names, per_node in _nodes(plan):
        pictures: dict[object, tuple[list[str], tuple[Block, ...]]] = {}
        for name in names:
            slots = [(f"{name}/{i}", taken.get(f"{name}/{i}")) for i in range(per_node)]
            blocks = tuple(_blocks(slots))
            look = tuple((b.kind and b.kind.paint, b.caption, len(b.gpus)) for b in blocks)
            pictures.setdefault(look, ([], blocks))[0].append(name)
        nodes = [Node(_range(members), len(members), blocks) for members, blocks in pictures.values()]
        used = sum(f"{name}/{i}" in taken for name in names for i in range(per_node))
        left = sum(node.count for node in nodes[_MOST_NODES:])
        drawn.append(Group(title, sliced, tuple(nodes[:_MOST_NODES]), used, len(names) * per_node, left))
    return drawn


def seats(plan: Plan, found: Sequence[Kind]) -> dict[str, Seat]:
    """Whose each GPU is."""
    kinds_by_key = {k.role + "/".join(k.classes) + _shape(k.replica): k for k in found}
    taken: dict[str, Seat] = {}
    number = 0
    for pool in plan.pools:
        for replica in pool.replicas:
            kind = kinds_by_key[pool.role + "/".join(pool.classes) + _shape(replica)]
            taken |= {gpu: Seat(kind, number, rank) for rank, gpu in enumerate(replica.gpus)}
            number += 1
    return taken


def _nodes(plan: Plan) -> Iterator[tuple[str, bool, tuple[str, ...], int]]:
    """(title, MIG slices?, node names, GPUs per node) of the inventory; of the plan's own GPUs where its
    request is not to be read (plans made by hand)."""
    try:
        inventory = groups(make_request(plan.request))
    except PlancError:
        places = [gpu.rsplit("/", 1) for replica in plan.replicas() for gpu in replica.gpus]
        names = tuple(dict.fromkeys(place[0] for place in places))
        widest = max((int(place[1]) for place in places if place[1:] and place[1].isdigit()), default=0)
        yield "", False, names, widest + 1
        return
    for group in inventory:
        price = f"{group.usd:.4g} USD per GPU and hour" + ("" if group.priced else " (list price)")
        title = f"{len(group.names)} × {group.per_node} {group.gpu.label} · {price}" + (
            " · spot" if group.spot else ""
        )
        yield title, bool(group.gpu.slice_of), group.names, group.per_node


def _blocks(slots: Sequence[tuple[str, Seat | None]]) -> Iterator[Block]:
    """Runs of GPUs of one replica. Replicas are told apart by position, not by number, so that nodes with
    the same layout look alike."""
    for number, run in groupby(slots, key=lambda slot: slot[1].number if slot[1] else None):
        members = list(run)
        seat = members[0][1]
        if seat is None or number is None:
            yield Block(
                None, "idle", tuple((name.rsplit("/", 1)[-1], f"{name}: idle") for name, _ in members)
            )
            continue
        whole = len(seat.kind.replica.gpus)
        part = "" if len(members) == whole else f", {len(members)} of {whole} GPUs"
        prefix = "" if seat.kind.role in ("aggregated", "encoder") else f"{seat.kind.role} "
        yield Block(
            seat.kind,
            f"{prefix}{seat.kind.layout}{part}",
            tuple(
                (
                    name.rsplit("/", 1)[-1],
                    f"{name}: {one.kind.role} replica {one.number}, rank {one.rank} of {whole}",
                )
                for name, one in members
                if one is not None
            ),
        )


def _range(names: Sequence[str]) -> str:
    """ "node3 – node9" for consecutive ones, else the first few."""
    if len(names) == 1:
        return names[0]
    digits = [name[len(name.rstrip("0123456789")) :] for name in names]
    stems = {name[: len(name) - len(d)] for name, d in zip(names, digits, strict=True)}
    numbers = [int(d) for d in digits if d]
    if len(stems) == 1 and numbers == list(range(numbers[0], numbers[0] + len(names))):
        return f"{names[0]} – {names[-1]}"
    return ", ".join(names[:4]) + (" …" if len(names) > 4 else "")
